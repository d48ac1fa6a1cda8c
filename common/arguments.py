"""Command-line flags that all task scripts share, in titled groups."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .phi3v.image_processing import MAX_CROPS, check_num_crops

DEFAULT_MODEL = "microsoft/Phi-3.5-vision-instruct"


def training_parser(description: str) -> argparse.ArgumentParser:
    """Parser with the flags shared by the task scripts, with the published recipe's names and defaults.

    Parameters
    ----------
    description : str
        The script's docstring.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_name_or_path", default=DEFAULT_MODEL, help="hub id or directory (default: %(default)s)"
    )
    group.add_argument("--bf16", action="store_true", help="bf16; without it fp16 on a GPU and fp32 on a CPU")
    group.add_argument("--use_flash_attention", action="store_true", help="insist on a flash attention kernel")
    group.add_argument(
        "--attn_implementation",
        choices=("varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"),
        help="attention by name (default: the fastest that runs here, printed at start)",
    )
    group.add_argument(
        "--num_crops", type=int, default=16, help=f"most crops a picture is cut into, 1 to {MAX_CROPS} (default: 16)"
    )

    group = parser.add_argument_group("what trains")
    group.add_argument("--freeze_vision_model", action="store_true", help="train the decoder alone")
    group.add_argument("--use_lora", action="store_true", help="train LoRA adapters instead of all weights")
    group.add_argument("--use_qlora", action="store_true", help="LoRA on a base quantized to 4 bits")
    group.add_argument("--lora_rank", type=int, default=64, help="rank (default: %(default)s)")
    group.add_argument("--lora_alpha_ratio", type=float, default=2.0, help="alpha / rank (default: %(default)s)")
    group.add_argument("--lora_dropout", type=float, default=0.0, help="dropout (default: %(default)s)")

    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", type=Path, default=Path("output"), help="where results go (default: output)")
    group.add_argument("--batch_size", type=int, default=16, help="samples a step over all processes (default: 16)")
    group.add_argument("--batch_size_per_gpu", type=int, default=1, help="samples at once a process (default: 1)")
    group.add_argument("--num_train_epochs", type=int, default=1, help="epochs (default: %(default)s)")
    group.add_argument("--max_steps", type=int, default=-1, help="stop after so many steps (default: no limit)")
    group.add_argument("--learning_rate", type=float, default=4e-5, help="peak learning rate (default: %(default)s)")
    group.add_argument("--wd", type=float, default=0.01, help="weight decay (default: %(default)s)")
    group.add_argument("--warmup_steps", type=int, default=50, help="steps of linear warm-up (default: %(default)s)")
    group.add_argument("--seed", type=int, default=42, help="seed of every random choice (default: %(default)s)")

    group = parser.add_argument_group("speed and memory")
    group.add_argument(
        "--deepspeed",
        default="auto",
        metavar="FILE",
        help="DeepSpeed configuration, or none for plain DDP (default: common/deepspeed/zero2.json, with LoRA none)",
    )
    group.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        help="lay samples end to end instead of padding them (default: where the attention kernel can)",
    )
    group.add_argument(
        "--max_tokens_per_batch",
        type=int,
        help="most tokens at once a process; with packing, instead of --batch_size_per_gpu",
    )
    group.add_argument("--dataloader_num_workers", type=int, default=4, help="workers a process (default: 4)")

    group = parser.add_argument_group("data and evaluation")
    group.add_argument("--max_train_samples", type=int, help="train on the first so many rows")
    group.add_argument("--max_eval_samples", type=int, help="evaluate on the first so many rows")
    group.add_argument("--eval_batch_size", type=int, default=8, help="prompts at once a process (default: 8)")
    group.add_argument("--max_new_tokens", type=int, default=64, help="longest answer (default: %(default)s)")

    group = parser.add_argument_group("logging")
    group.add_argument("--logging_steps", type=int, default=10, help="steps between log lines (default: %(default)s)")
    group.add_argument("--report_to", default="none", help="none, tensorboard, trackio, … (default: %(default)s)")
    group.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="no progress bars")
    return parser


def check_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Check values that don't depend on the machine, and set what follows from others.

    Raises
    ------
    ValueError
        Naming the flag and what it takes.
    """
    try:
        check_num_crops(args.num_crops)
    except ValueError:
        raise ValueError(f"--num_crops must be from 1 to {MAX_CROPS}, not {args.num_crops}") from None
    positive = (
        "batch_size batch_size_per_gpu num_train_epochs lora_rank eval_batch_size max_new_tokens logging_steps "
        "max_train_samples max_eval_samples max_tokens_per_batch"
    )
    for name in positive.split():
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
    for name in ("warmup_steps", "dataloader_num_workers", "wd", "lora_dropout"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must not be negative, not {getattr(args, name)}")
    if args.learning_rate <= 0:
        raise ValueError(f"--learning_rate must be above 0, not {args.learning_rate}")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % (world_size * args.batch_size_per_gpu):
        raise ValueError(
            f"--batch_size {args.batch_size} can't be divided over {world_size} process(es) × --batch_size_per_gpu "
            f"{args.batch_size_per_gpu}: make it a multiple of {world_size * args.batch_size_per_gpu}"
        )
    if args.max_tokens_per_batch is not None and args.packing is False:
        raise ValueError("--max_tokens_per_batch needs --packing: take one of them back")
    if args.use_flash_attention and args.attn_implementation in ("sdpa", "eager"):
        raise ValueError(
            f"--use_flash_attention and --attn_implementation {args.attn_implementation} contradict each other"
        )
    args.use_lora = args.use_lora or args.use_qlora
    return args
