"""As answer_with_vllm.py, with this repository's model under the transformers of vLLM's environment, one request at a time."""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

import common.phi3v  # noqa: F401 - registers the model


@torch.no_grad()
def main() -> None:
    name, requests, answers = sys.argv[1:4]
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(name)
    found = []
    for row in json.loads(Path(requests).read_text()):
        inputs = processor(row["prompt"], [Image.open(path) for path in row["images"]])
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False, return_dict_in_generate=True, output_logits=True)
        prompt_ids = inputs["input_ids"][0].tolist()
        answer_ids = output.sequences[0, len(prompt_ids) :]
        prompt = model(**inputs).logits[0, :-1].log_softmax(-1).topk(20)
        answer = torch.cat(output.logits).log_softmax(-1).topk(20)
        found.append(
            {
                "prompt_ids": [32044 if token < 0 else token for token in prompt_ids],
                "answer_ids": answer_ids.tolist(),
                "text": processor.tokenizer.decode(answer_ids, skip_special_tokens=True),
                "log_probabilities": [
                    dict(zip(tokens, values, strict=True))
                    for top in (prompt, answer)
                    for tokens, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                ],
            }
        )
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
