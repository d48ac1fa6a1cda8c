"""Adapters of the tiny checkpoint that change its answers, as the training scripts save them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from conftest import TINY
from forked import finetune_forked
from PIL import Image
from runs import weights, write_random_model
from transformers import AutoModelForCausalLM

from common.arguments import Setup, check_arguments, training_parser
from common.model.adapters import write_base_description
from common.model.checkpoint import fetch_checkpoint, load_processor
from common.model.loading import load_model
from tools.merge_lora import merge


def save_adapter(directory: Path, *flags: str, base: str | Path = TINY) -> Path:
    """Save an adapter that changes the answers, as the training scripts do."""
    command_line = ["--model_name_or_path", str(base), "--lora_rank", "8", "--num_crops", "2", *flags]
    args = training_parser("", task="test", metric="anls").parse_args(command_line)
    check_arguments(args)
    setup = Setup(torch.device("cpu"), "fp32", "sdpa", revision=fetch_checkpoint(str(base)))
    processor = load_processor(str(base), setup.revision, args.num_crops)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # draws the adapter's other half
        model = load_model(args, setup, processor)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        elif parameter.requires_grad and ".modules_to_save." in name:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory, save_embedding_layers=False)
    processor.save_pretrained(directory)
    write_base_description(directory, model)
    return directory


@torch.no_grad()
def logits(model: torch.nn.Module, processor, receipts: list[Path]) -> torch.Tensor:
    images = [Image.open(path) for path in receipts[:2]]
    inputs = processor("<|user|>\n<|image_1|><|image_2|>\nWhat is the total?<|end|>\n<|assistant|>\n", images)
    return model(**inputs).logits


def assert_adapter_goes_all_the_way(script: str, data: Path, directory: Path, method: str) -> None:
    """Train an adapter for two steps on two processes, go on from the first one, merge it, and load that."""
    options = {"script": script, "model_name_or_path": write_random_model(directory / "model"), method: True, "lora_rank": 4}
    options |= {"batch_size": 2, "batch_size_per_gpu": 1, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    log = finetune_forked(data, directory / "straight", **options)
    shutil.copytree(directory / "straight/checkpoint-1", directory / "resumed/checkpoint-1")
    assert finetune_forked(data, directory / "resumed", resume_from_checkpoint="auto", **options) == log
    straight, resumed = weights(directory / "straight"), weights(directory / "resumed")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    merge(str(directory / "straight"), directory / "merged")
    merged, base = (AutoModelForCausalLM.from_pretrained(directory / name).state_dict() for name in ("merged", "model"))
    assert any(not torch.equal(merged[name], base[name]) for name in base)
