"""Batched evaluation compared with one sample at a time, on the DocVQA sample data for the tiny checkpoint.

python -m benchmarks.evaluation
"""

import argparse
from pathlib import Path

from common.runtime.parser import Parser
from common.runtime.process import say

from . import RESULTS


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--documents", type=int, default=55, help="documents with four questions each (default: 55, as in the demo)"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="prompts per batch (default: 32)")
    parser.add_argument(
        "--max_new_tokens", type=int, default=64, help="maximum answer length in tokens (default: 64, as in the scripts)"
    )
    parser.add_argument("--repetitions", type=int, default=3, help="measured repetitions, after one for warmup (default: 3)")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "evaluation.json",
        help="result file (default: benchmarks/results/evaluation.json)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds
    say("Loading PyTorch and transformers")

import random
import tempfile

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from assets.draw_samples import draw_samples
from common.data.conversations import prompt_text
from common.evaluation.generation import Answering, generate_answers
from common.phi3v.processing import stop_token_ids
from finetune_hf_trainer_docvqa import load_official, to_conversation

from .measure import interleave, ratios, summarise, write_result

MODEL = Path(__file__).parents[1] / "assets" / "tiny_phi3v"
NUM_CROPS = 1


@torch.no_grad()
def answer_one_by_one(model, processor, conversations, max_new_tokens):
    """Baseline: preprocess images to floats, and generate the answers one prompt at a time."""
    answers = []
    for conversation in conversations:
        images = [Image.open(picture) for picture in conversation["conversations"][0]["images"]]
        inputs = processor(prompt_text(conversation, processor), images)
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stop_token_ids(processor),
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        answers.append(processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def main(args: argparse.Namespace) -> None:
    processor = AutoProcessor.from_pretrained(MODEL, num_crops=NUM_CROPS)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa").eval()
    settings = Answering(args.batch_size, args.max_new_tokens, tqdm=False)
    with tempfile.TemporaryDirectory() as directory:
        draw_samples("docvqa", Path(directory), train=1, val=args.documents)
        rows = load_official(Path(directory), "val", limit=None)
        conversations = [to_conversation(row, random.Random(0)) for row in rows]
        answers = {}

        def batched():
            answers["batched"] = generate_answers(model, processor, conversations, settings)

        def one_by_one():
            answers["one by one"] = answer_one_by_one(model, processor, conversations, args.max_new_tokens)

        seconds = interleave({"one by one": one_by_one, "batched": batched}, args.repetitions)

    same = sum(a == b for a, b in zip(answers["batched"], answers["one by one"], strict=True))
    answer_tokens = [len(ids) for ids in processor.tokenizer(answers["batched"], add_special_tokens=False).input_ids]
    faster = ratios(seconds["one by one"], seconds["batched"])
    for name, values in seconds.items():
        print(f"{name}: {summarise(values)['median']:.2f} s for {len(rows)} questions")
    print(
        f"speedup of batched evaluation: {faster['median']:.2f}x ({faster['lowest']:.2f}x to {faster['highest']:.2f}x); "
        f"{same} of {len(rows)} answers are identical"
    )
    content = {
        "benchmark": "evaluation",
        "questions": len(rows),
        "batch_size": args.batch_size,
        "mean_tokens_of_an_answer": sum(answer_tokens) / len(rows),
        "same_answers": same,
        "seconds": {name: summarise(values) for name, values in seconds.items()},
        "times_faster": faster,
    }
    write_result(args.out, content)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    main(args)
