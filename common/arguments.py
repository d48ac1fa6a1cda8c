"""Command-line flags that all task scripts share, in titled groups."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from common.phi3v.image_processing import MAX_CROPS, check_num_crops
from common.phi3v.parts import PARTS
from common.runtime import InputError, world_size

DEFAULT_MODEL = "microsoft/Phi-3.5-vision-instruct"
SAVE_STEPS = 500
LORA_DEFAULTS = {"lora_rank": 64, "lora_alpha_ratio": 2.0, "lora_dropout": 0.0}
LORA_DEFAULTS |= {"use_dora": False, "use_rslora": False, "init_lora_weights": "gaussian"}


@dataclass(frozen=True)
class Setup:
    """What a run has settled of its flags for this machine and this model.

    Attributes
    ----------
    device : torch.device
        Of this process.
    precision : {"bf16", "fp16", "fp32"}
    attention, attention_reason : str
        Name of the implementation for transformers, and why it was chosen.
    packing : bool
        Whether samples are laid end to end instead of padded.
    deepspeed : str, optional
        DeepSpeed's configuration file; None for plain DDP.
    zero_stage : int, optional
        The stage that it names.
    revision : str, optional
        Commit of a hub model.
    checkpoint : Path, optional
        To resume from.
    """

    device: torch.device
    precision: str
    attention: str
    attention_reason: str = ""
    packing: bool = False
    deepspeed: str | None = None
    zero_stage: int | None = None
    revision: str | None = None
    checkpoint: Path | None = None


def training_parser(description: str, task: str, metric: str) -> argparse.ArgumentParser:
    """Parser with the flags shared by the task scripts, with the published recipe's names and defaults.

    Parameters
    ----------
    description : str
        The script's docstring.
    task : str
        Name of the task as people call it.
    metric : str
        Name of the task's main figure, by which ``--load_best_model_at_end`` judges with ``--eval_metric_steps``.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    parser.set_defaults(task=task, metric=metric)

    group = parser.add_argument_group("model")
    group.add_argument("--model_name_or_path", default=DEFAULT_MODEL, help="hub id or directory (default: %(default)s)")
    group.add_argument("--bf16", action="store_true", help="bf16; without it fp16 on a GPU and fp32 on a CPU")
    group.add_argument("--use_flash_attention", action="store_true", help="insist on a flash attention kernel")
    group.add_argument(
        "--attn_implementation",
        choices=("varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"),
        help="attention by name (default: the fastest that runs here, printed at start)",
    )
    group.add_argument(
        "--num_crops", type=int, default=16, help=f"most crops a picture is cut into, 1 to {MAX_CROPS} (default: %(default)s)"
    )

    group = parser.add_argument_group("what trains")
    group.add_argument("--freeze_vision_model", action="store_true", help="train the decoder alone")
    group.add_argument(
        "--train_only",
        type=lambda names: tuple(names.split(",")),
        metavar="PARTS",
        help=f"train these parts alone, separated by commas: {', '.join(PARTS)}",
    )
    group.add_argument("--use_lora", action="store_true", help="train LoRA adapters instead of all weights")
    group.add_argument("--use_qlora", action="store_true", help="LoRA on a base quantized to 4 bits")
    group.add_argument("--lora_rank", type=int, help="rank (default: %(default)s)")
    group.add_argument("--lora_alpha_ratio", type=float, help="alpha / rank (default: %(default)s)")
    group.add_argument("--lora_dropout", type=float, help="dropout (default: %(default)s)")
    group.add_argument("--use_dora", action="store_true", help="weight-decomposed LoRA")
    group.add_argument("--use_rslora", action="store_true", help="rank-stabilized LoRA scaling")
    group.add_argument(
        "--init_lora_weights",
        choices=("gaussian", "True", "False", "orthogonal", "pissa", "olora"),
        help="how adapters start, by PEFT's name for it (default: %(default)s)",
    )

    parser.set_defaults(**LORA_DEFAULTS)

    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", type=Path, default=Path("output"), help="where results go (default: output)")
    group.add_argument("--batch_size", type=int, default=16, help="samples per step, over all processes (default: 16)")
    group.add_argument("--batch_size_per_gpu", type=int, default=1, help="samples per process at once (default: 1)")
    group.add_argument("--num_train_epochs", type=int, default=1, help="epochs (default: %(default)s)")
    group.add_argument("--max_steps", type=int, default=-1, help="stop after so many steps (default: no limit)")
    group.add_argument("--learning_rate", type=float, default=4e-5, help="peak learning rate (default: %(default)s)")
    group.add_argument("--vision_learning_rate", type=float, help="of the vision tower (default: --learning_rate)")
    group.add_argument("--projector_learning_rate", type=float, help="of the projector (default: --learning_rate)")
    group.add_argument(
        "--optim", default="adamw_torch_fused", help="optimizer, as TrainingArguments takes it (default: %(default)s)"
    )
    group.add_argument("--wd", type=float, default=0.01, help="weight decay (default: %(default)s)")
    group.add_argument(
        "--lr_scheduler_type",
        choices=("linear", "cosine", "constant_with_warmup"),
        default="linear",
        help="course of the learning rate after warm-up (default: %(default)s)",
    )
    group.add_argument(
        "--warmup_steps",
        type=float,
        default=50,
        help="steps of linear warm-up or, below 1, their share of all steps (default: %(default)s)",
    )
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
        help="most tokens per process at once; with packing, instead of --batch_size_per_gpu",
    )
    group.add_argument(
        "--gradient_checkpointing",
        choices=("auto", "full", "selective", "none"),
        default="auto",
        help="recompute all layers, every second one or none in the backward pass (default: as little as fits)",
    )
    group.add_argument("--use_liger_kernel", action="store_true", help="Liger's fused kernels (requirements-gpu.txt)")
    group.add_argument("--torch_compile", action="store_true", help="compile the decoder's layers")
    group.add_argument(
        "--dataloader_num_workers",
        type=int,
        default=4,
        help="DataLoader workers per process, at most its share of the cores (default: 4)",
    )

    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--save_strategy",
        choices=("no", "steps", "epoch"),
        default="no",
        help="when to save checkpoints (default: only the result, at the end)",
    )
    group.add_argument(
        "--save_steps",
        type=int,
        default=SAVE_STEPS,
        help="steps between checkpoints, with --save_strategy steps (default: %(default)s)",
    )
    group.add_argument("--save_total_limit", type=int, help="keep the last so many checkpoints (default: all)")
    group.add_argument(
        "--resume_from_checkpoint",
        metavar="auto|DIR",
        help="go on from the last complete checkpoint in --output_dir, if there is one, or from this one",
    )
    group.add_argument("--load_best_model_at_end", action="store_true", help="end with the best checkpoint, not the last")
    group.add_argument("--early_stopping_patience", type=int, help="stop after so many evaluations without a better one")
    group.add_argument(
        "--save_on_each_node",
        action="store_true",
        help="each node keeps its own checkpoints: for nodes without a shared file system",
    )
    group.add_argument(
        "--push_to_hub",
        action="store_true",
        help="upload the result to the hub, with run.json and the evaluations' questions and answers, without the report",
    )
    group.add_argument("--hub_model_id", help="hub repository to upload to (default: the name of --output_dir)")
    group.add_argument("--hub_private_repo", action="store_true", help="make the hub repository private (default: public)")

    group = parser.add_argument_group("data and evaluation")
    group.add_argument(
        "--streaming",
        action="store_true",
        help="read the hub's shards, or shards in the general format, as training goes on, each process its part of the rows",
    )
    group.add_argument(
        "--skip_bad_rows",
        action="store_true",
        help="leave out rows that can't be used, and count them, instead of ending; not with --streaming",
    )
    group.add_argument("--eval_strategy", choices=("no", "steps", "epoch"), default="no", help="when to measure the loss")
    group.add_argument(
        "--eval_steps", type=int, help="steps between evaluations, with --eval_strategy steps (default: --logging_steps)"
    )
    group.add_argument("--eval_metric_steps", type=int, help="measure the task's metric too, every so many steps")
    group.add_argument("--max_train_samples", type=int, help="train on the first so many rows")
    group.add_argument("--max_eval_samples", type=int, help="evaluate on the first so many rows")
    group.add_argument("--eval_batch_size", type=int, default=8, help="prompts per process at once (default: 8)")
    group.add_argument("--max_new_tokens", type=int, default=64, help="most tokens of an answer (default: %(default)s)")

    group = parser.add_argument_group("logging")
    group.add_argument("--logging_steps", type=int, default=10, help="steps between log lines (default: %(default)s)")
    group.add_argument("--report_to", default="none", help="none, tensorboard, trackio, … (default: %(default)s)")
    group.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="plain lines instead of progress bars")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Check values that don't depend on the machine.

    Raises
    ------
    InputError
        Naming the flag and what it takes.
    """
    try:
        check_num_crops(args.num_crops)
    except ValueError:
        raise InputError(f"--num_crops must be from 1 to {MAX_CROPS}, not {args.num_crops}") from None
    positive = (
        "batch_size batch_size_per_gpu num_train_epochs lora_rank eval_batch_size max_new_tokens logging_steps "
        "max_train_samples max_eval_samples max_tokens_per_batch save_steps save_total_limit eval_steps "
        "eval_metric_steps early_stopping_patience"
    )
    for name in positive.split():
        if (value := getattr(args, name, None)) is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    for name in ("warmup_steps", "dataloader_num_workers", "wd", "lora_dropout"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name} must not be negative, not {getattr(args, name)}")
    if args.warmup_steps >= 1 and not float(args.warmup_steps).is_integer():
        raise InputError(f"--warmup_steps must be a whole number of steps, or below 1 a share of all, not {args.warmup_steps}")
    if args.lora_dropout >= 1:
        raise InputError(f"--lora_dropout must be below 1, not {args.lora_dropout}")
    if round(args.lora_rank * args.lora_alpha_ratio) < 1:
        raise InputError(
            f"--lora_rank {args.lora_rank} × --lora_alpha_ratio {args.lora_alpha_ratio} must give an alpha of at least 1"
        )
    for name in ("learning_rate", "vision_learning_rate", "projector_learning_rate"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise InputError(f"--{name} must be above 0, not {value}")
    processes = world_size()
    if args.batch_size % (processes * args.batch_size_per_gpu):
        raise InputError(
            f"--batch_size {args.batch_size} can't be divided over {processes} process(es) × --batch_size_per_gpu "
            f"{args.batch_size_per_gpu}: make it a multiple of {processes * args.batch_size_per_gpu}"
        )
    if args.max_tokens_per_batch is not None and args.packing is False:
        raise InputError("--max_tokens_per_batch needs --packing: take one of them back")
    if args.max_tokens_per_batch is not None and args.streaming:
        raise InputError("--max_tokens_per_batch plans batches by the lengths of all rows, which --streaming does not know")
    if args.skip_bad_rows and args.streaming:
        raise InputError("--skip_bad_rows leaves out rows that are checked before training, which --streaming does not do")
    if args.use_flash_attention and args.attn_implementation in ("sdpa", "eager"):
        raise InputError(f"--use_flash_attention and --attn_implementation {args.attn_implementation} contradict each other")
    if args.use_qlora and args.init_lora_weights in ("pissa", "olora"):
        raise InputError(
            f"--init_lora_weights {args.init_lora_weights} takes the adapters out of the base's weights, which 4 bits can't "
            "hold: choose another one with --use_qlora"
        )
    _check_parts(args)
    _check_idle(args)
    _check_evaluation(args)


def _check_parts(args: argparse.Namespace) -> None:
    trained = trained_parts(args)
    for part in PARTS[1:]:
        if getattr(args, f"{part}_learning_rate") is not None and part not in trained:
            raise InputError(f"--{part}_learning_rate: the {part} part doesn't train, only {', '.join(trained)}: leave it out")
    if args.train_only is None:
        return
    unknown = sorted(set(args.train_only) - set(PARTS))
    if unknown:
        raise InputError(f"no part {unknown[0]!r}; parts are {', '.join(PARTS)}", f"--train_only {','.join(args.train_only)}")
    if args.freeze_vision_model and set(args.train_only) != {"decoder"}:
        raise InputError("--freeze_vision_model leaves only the decoder to train; --train_only says otherwise")
    if uses_adapters(args):
        raise InputError("--train_only chooses weights to train in full; leave it out with --use_lora or --use_qlora")


def _check_idle(args: argparse.Namespace) -> None:
    """Refuse flags that would do nothing without another one."""
    for name, default in LORA_DEFAULTS.items():
        if getattr(args, name) != default and not uses_adapters(args):
            raise InputError(f"--{name} needs --use_lora or --use_qlora: without them all weights train")
    for name, needed, missing in (
        ("save_steps", "--save_strategy steps", args.save_steps != SAVE_STEPS and args.save_strategy != "steps"),
        ("save_total_limit", "--save_strategy steps or epoch", args.save_strategy == "no"),
        ("eval_steps", "--eval_strategy steps", args.eval_strategy != "steps"),
        ("hub_model_id", "--push_to_hub", not args.push_to_hub),
        ("hub_private_repo", "--push_to_hub", not args.push_to_hub),
    ):
        if getattr(args, name) and missing:
            raise InputError(f"--{name} needs {needed}")


def _check_evaluation(args: argparse.Namespace) -> None:
    if args.eval_metric_steps and args.eval_strategy != "steps":
        raise InputError("--eval_metric_steps needs --eval_strategy steps")
    eval_steps = args.eval_steps or args.logging_steps  # as TrainingArguments has it
    if args.eval_metric_steps and args.eval_metric_steps % eval_steps:
        raise InputError(f"--eval_metric_steps {args.eval_metric_steps} must be a multiple of --eval_steps {eval_steps}")
    if args.early_stopping_patience and not args.load_best_model_at_end:
        raise InputError("--early_stopping_patience needs --load_best_model_at_end")
    if args.load_best_model_at_end and (args.save_strategy != args.eval_strategy or args.save_strategy == "no"):
        raise InputError("--load_best_model_at_end needs --save_strategy and --eval_strategy to be the same, steps or epoch")
    if args.load_best_model_at_end and args.save_strategy == "steps" and args.save_steps != eval_steps:
        raise InputError(
            "--load_best_model_at_end needs a checkpoint of every evaluation: "
            f"set --save_steps ({args.save_steps}) to --eval_steps ({eval_steps})"
        )
    if args.load_best_model_at_end and args.eval_metric_steps and args.eval_metric_steps != eval_steps:
        raise InputError(
            "--load_best_model_at_end compares the metric at every evaluation: set --eval_metric_steps to --eval_steps"
        )


def uses_adapters(args: argparse.Namespace) -> bool:
    """Whether LoRA adapters train instead of weights."""
    return args.use_lora or args.use_qlora


def trained_parts(args: argparse.Namespace) -> tuple[str, ...]:
    """The parts of the model that train; under LoRA those that have adapters."""
    return args.train_only or (("decoder",) if args.freeze_vision_model else PARTS)


def method_name(args: argparse.Namespace) -> str:
    """The method as people call it: full, LoRA or QLoRA, and which parts train if not all."""
    name = "QLoRA" if args.use_qlora else "LoRA" if args.use_lora else "full"
    if args.freeze_vision_model:
        return f"{name}, frozen vision"
    return f"{name}, {' and '.join(args.train_only)} only" if args.train_only else name
