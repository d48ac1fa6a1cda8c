"""A model prepared for each method, conversations about images, and adapters as the scripts save them."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import TINY
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from common.arguments import Setup, check_arguments, training_parser
from common.model.adapters import write_base_description
from common.model.checkpoint import fetch_checkpoint, load_processor
from common.model.loading import avoid_avx512_kernel, load_model
from common.model.lora import fuse_lora
from common.phi3v import Phi3VConfig
from common.phi3v.parts import lora_targets, unquantized_modules


def save_adapter(directory: Path, *flags: str, base: str | Path = TINY) -> Path:
    """Save an adapter with random weights, which changes the answers, as the training scripts do."""
    command_line = ["--model_name_or_path", str(base), "--lora_rank", "8", "--num_crops", "2", *flags]
    args = training_parser("", task="test", metric="anls").parse_args(command_line)
    check_arguments(args)
    setup = Setup(torch.device("cpu"), "fp32", "sdpa", revision=fetch_checkpoint(str(base)))
    processor = load_processor(str(base), setup.revision, args.num_crops)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # for lora_A
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


def build(
    method: str = "full", dtype=torch.float32, attention: str = "varlen", fuse: bool = True, base: Path = TINY
) -> torch.nn.Module:
    """Prepare a checkpoint to train with "full", "LoRA" or "QLoRA", optionally with "frozen vision"; fuse LoRA layers."""
    torch.manual_seed(0)
    options = {"dtype": dtype, "attn_implementation": attention}
    if method == "QLoRA":
        kept = unquantized_modules(Phi3VConfig.from_pretrained(base), vision=True)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
        )
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    avoid_avx512_kernel(model)
    if "frozen vision" in method:
        model.model.vision_embed_tokens.requires_grad_(False)
    if "LoRA" in method:
        targets = lora_targets(model.config, vision="frozen vision" not in method)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False))
        if fuse:
            fuse_lora(model)
    return model.train()


def conversations() -> list[dict]:
    """Conversations about no image, an image, and two images, of one or two crops."""
    noise = [Image.effect_noise(size, 80).convert("RGB") for size in ((300, 200), (90, 300), (90, 90))]
    return [
        {"conversations": [{"images": images, "user": "What is it?", "assistant": answer}]}
        for images, answer in (([], "Text."), (noise[:1], "Noise."), (noise[1:], "Two images."))
    ]


@torch.no_grad()
def logits(model: torch.nn.Module, processor, receipts: list[Path]) -> torch.Tensor:
    images = [Image.open(path) for path in receipts[:2]]
    inputs = processor("<|user|>\n<|image_1|><|image_2|>\nWhat is the total?<|end|>\n<|assistant|>\n", images)
    return model(**inputs).logits
