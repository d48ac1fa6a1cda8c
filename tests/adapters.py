"""Adapters of the tiny checkpoint that change its answers, as the training scripts save them."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import TINY
from PIL import Image

from common.adapter_base import write_base_description
from common.arguments import check_arguments, training_parser
from common.model import fetch_checkpoint, load_model, load_processor


def save_adapter(directory: Path, *flags: str, base: str | Path = TINY) -> Path:
    """Save an adapter that changes the answers, as the training scripts do."""
    command_line = ["--model_name_or_path", str(base), "--lora_rank", "8", "--num_crops", "2", *flags]
    args = check_arguments(training_parser("", task="test", metric="anls").parse_args(command_line))
    args.attention, args.deepspeed, args.base_revision = ("sdpa", ""), None, fetch_checkpoint(str(base))
    processor = load_processor(args)
    model = load_model(args, processor, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory, save_embedding_layers=False)
    processor.save_pretrained(directory)
    write_base_description(directory, model)
    return directory


@torch.no_grad()
def logits(model: torch.nn.Module, processor, receipts: list[Path]) -> torch.Tensor:
    images = [Image.open(path) for path in receipts[:2]]
    inputs = processor("<|user|>\n<|image_1|><|image_2|>\nWhat is the total?<|end|>\n<|assistant|>\n", images)
    return model(**inputs).logits
