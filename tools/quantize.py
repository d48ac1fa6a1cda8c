"""Quantize the decoder of a full model, and save it as a checkpoint that these tools and transformers load.

python -m tools.quantize --model output/docvqa --scheme nf4 --output_dir output/docvqa-nf4
python -m tools.quantize --model output/docvqa --scheme fp8 --output_dir output/docvqa-fp8 --data_file val.jsonl

nf4 and int8 are the formats of bitsandbytes, fp8 is the fine-grained format of transformers, in blocks of 128 × 128 weights,
which needs no calibration. The vision tower, the projector and the head keep their precision. With --data_file, in any of the
formats that training reads, both models answer its questions, and their ANLS is printed and written to quantization.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common.runtime.parser import Parser, check_inputs
from common.runtime.process import InputError, counted, say

SCHEMES = ("nf4", "int8", "fp8")


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="directory or Hub id of a full model")
    parser.add_argument("--scheme", required=True, choices=SCHEMES, help="format of the quantized weights")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="new or empty directory")
    parser.add_argument("--data_file", type=Path, metavar="FILE", help="file of questions with answers to score on")
    parser.add_argument("--image_dir", type=Path, metavar="DIR", help="root folder of its images (default: as in training)")
    parser.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="print plain lines instead of progress bars")
    args = parser.parse_args()
    if args.image_dir and not args.data_file:
        parser.error("--image_dir requires --data_file")
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds
    check_inputs(args)
    say("Loading PyTorch and transformers")

import logging
import math
import os
from statistics import fmean
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from common.evaluation.generation import Answering, generate_answers
from common.evaluation.metrics import anls
from common.model.checkpoint import find_snapshot, load_processor, load_weights
from common.model.checks import check_checkpoint, read_config
from common.model.inference import load_for_inference
from common.model.quantization import quantization_scheme, quantization_settings, quantized_layers
from common.phi3v import Phi3VForCausalLM
from common.runtime.files import write_file
from tools.checkpoints import check_output, write_checkpoint
from tools.predict import Question, read_questions, run_tool

RUN_FILES = ["run.json"]  # its evaluations are not those of the quantized model
FP8 = torch.float8_e4m3fn
FP8_BLOCK = 128


def quantize(name: str, scheme: str, output_dir: Path) -> None:
    """Quantize a model, and write the checkpoint atomically to a new or empty directory.

    Raises
    ------
    InputError
        If the model cannot be loaded, or the directory is not empty or cannot be written.
    """
    check_output(output_dir, Path(name), RUN_FILES)
    check_checkpoint(name, "--model")
    processor = load_processor(name)
    config: Any = read_config(name)
    if quantization_scheme(config):
        raise InputError("the model is already quantized: pass the one that it was made from", f"--model {name}")
    dtype = config.dtype or torch.bfloat16
    settings = quantization_settings(scheme, config, dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if scheme != "fp8":
        options |= {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": default_device()}}
    say(f"Loading {name}")
    model = load_weights(name, processor, **options)
    state = to_fp8(model, settings) if scheme == "fp8" else None
    write_checkpoint(model, processor, output_dir, Path(name), RUN_FILES, state)


def to_fp8(model: Phi3VForCausalLM, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the state of a model with the decoder's linear layers in fp8, and describe that in its configuration.

    Each block of a weight has a scale, float32, in ``weight_scale_inv``: weight ≈ fp8 × scale.
    """
    state = model.state_dict()
    names = quantized_layers(model)
    # Small models have layers that are no multiple of 128.
    block = math.gcd(FP8_BLOCK, *(size for name in names for size in state[f"{name}.weight"].shape))
    for name in names:
        weight = state[f"{name}.weight"].float()
        blocks = weight.unflatten(1, (-1, block)).unflatten(0, (-1, block))
        scale = blocks.abs().amax((1, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / torch.finfo(FP8).max
        state[f"{name}.weight"] = (blocks / scale).flatten(0, 1).flatten(1).to(FP8)
        state[f"{name}.weight_scale_inv"] = scale[:, 0, :, 0].contiguous()
    config: Any = model.config
    config.quantization_config = settings | {"weight_block_size": [block, block]}
    return state


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def score(name: str, questions: list[Question], bar: bool) -> float:
    """Return the ANLS of a model's answers to the last turns of conversations."""
    model, processor = load_for_inference(name, default_device())
    conversations = [question.conversation for question in questions]
    answers = generate_answers(model, processor, conversations, Answering(max_new_tokens=64, tqdm=bar))
    return fmean(anls(answer, [question.expected or ""]) for answer, question in zip(answers, questions, strict=True))


def quantize_and_score(args: argparse.Namespace) -> None:
    """Quantize the model that the flags name, and score both on ``--data_file``."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a warning for every int8 product
    # Saving imports DeepSpeed if it is installed, which would warn that it finds no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    questions = read_questions(args.data_file, args.image_dir, args.tqdm, answered=True) if args.data_file else []
    quantize(args.model, args.scheme, args.output_dir)
    print(f"Wrote {args.output_dir}: {gigabytes(args.model)} -> {gigabytes(args.output_dir)} GB")
    if questions:
        before, after = (score(str(name), questions, args.tqdm) for name in (args.model, args.output_dir))
        print(f"ANLS of {counted(len(questions), 'answer')}: {before:.4f} -> {after:.4f}")
        scores = {"metric": "anls", "samples": len(questions), "before": before, "after": after}
        write_file(args.output_dir / "quantization.json", {"scheme": args.scheme} | scores)


def gigabytes(name: str | Path) -> str:
    return f"{sum(path.stat().st_size for path in find_snapshot(str(name)).glob('*.safetensors')) / 1e9:.3f}"


def main(args: argparse.Namespace) -> None:
    run_tool(quantize_and_score, args)


if __name__ == "__main__":
    main(args)
