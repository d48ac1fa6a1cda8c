"""Answer requests with vLLM, in vLLM's own environment: python answer_with_vllm.py MODEL REQUESTS.json ANSWERS.json.

A request has a prompt with image tags and the paths of its images. An answer has the ids of prompt and answer tokens, the text,
and for every token of both, except the first, the log-probabilities of the 20 most likely tokens at its place.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageOps
from vllm import LLM, SamplingParams


def main() -> None:
    model, requests, answers = sys.argv[1:4]
    rows = json.loads(Path(requests).read_text())
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=4096,
        max_num_seqs=4,
        max_num_batched_tokens=4096,
        limit_mm_per_prompt={"image": 2},
        enforce_eager=True,
        skip_mm_profiling=True,
        **json.loads(sys.argv[4]) if len(sys.argv) > 4 else {},
    )
    prompts = [
        {"prompt": row["prompt"]}
        | (
            {"multi_modal_data": {"image": [ImageOps.exif_transpose(Image.open(path)) for path in row["images"]]}}
            if row["images"]
            else {}
        )
        for row in rows
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, logprobs=20, prompt_logprobs=20))
    found = [
        {
            "prompt_ids": output.prompt_token_ids,
            "answer_ids": list(output.outputs[0].token_ids),
            "text": output.outputs[0].text,
            "log_probabilities": [
                {token: entry.logprob for token, entry in top.items()}
                for top in [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            ],
        }
        for output in outputs
    ]
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
