"""Command-line flags shared by all task scripts, and the checks of their values.

Imports only the standard library, so that a wrong flag is reported before PyTorch is imported, which takes seconds; only the
settings of an adapter that is to be trained further are read with :mod:`common.phi3v`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.runtime.parser import Parser
from common.runtime.process import InputError, counted, world_size

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "microsoft/Phi-3.5-vision-instruct"
SAVE_STEPS = 500
LOGGING_STEPS = 10
NUM_TRAIN_EPOCHS = 1
# As in common.phi3v, which imports PyTorch; a test compares them.
PARTS = ("decoder", "vision", "projector")
MAX_CROPS = 16
# The schedules of transformers that need no further settings.
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")
POLYNOMIAL_END = 1e-7  # of transformers
# What may change when a run is resumed, if it is named in --accept_changes.
CHANGEABLE = (
    *("learning_rate", "vision_learning_rate", "projector_learning_rate", "wd", "lr_scheduler_type", "warmup_steps"),
    *("steps", "seed", "num_crops", "data"),
)
LORA_DEFAULTS: dict[str, Any] = {
    "lora_rank": 64,
    "lora_alpha_ratio": 2.0,
    "lora_dropout": 0.0,
    "use_dora": False,
    "use_rslora": False,
    "init_lora_weights": "gaussian",
}

# Shared flags that act with --eval_only.
EVALUATION_FLAGS = (
    *("eval_only", "model_name_or_path", "num_crops", "bf16", "output_dir", "ddp_timeout"),
    *("dataloader_num_workers", "on_bad_sample", "max_eval_samples", "eval_batch_size", "max_new_tokens", "tqdm"),
)


@dataclass(frozen=True)
class Setup:
    """Settings of a run, resolved from its flags for this machine and this model by :func:`common.training.start.start`.

    Defined here because :mod:`common.model` may not import :mod:`common.training`.
    """

    device: torch.device  # of this process
    precision: str  # "bf16", "fp16" or "fp32"
    attention: str  # name of the attention implementation in transformers
    attention_reason: str = ""  # why it was chosen
    packing: bool = False  # whether samples are concatenated without padding
    deepspeed: str | None = None  # configuration file; None for plain DDP
    zero_stage: int | None = None  # as set in that file
    batch_size_per_gpu: int = 1  # samples per process per micro-batch, and of the evaluation loss
    max_tokens_per_batch: int | str | None = None  # limit of a micro-batch, or "auto", instead of the number of samples
    revision: str | None = None  # commit of a model from the Hub
    base: str = ""  # --model_name_or_path, or the base model of an adapter that is trained further
    adapter: Path | None = None  # that adapter
    checkpoint: Path | None = None  # to resume from
    identity: dict[str, Any] = field(default_factory=dict)  # what must not change when the run is resumed, by name


class TrainingParser(Parser):
    """The parser of a task script, which also checks the values; see :func:`check_arguments`."""

    training_flags: set[str]  # names, without dashes, of the flags that have no effect with --eval_only

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Take the defaults of the LoRA flags from ``--model_name_or_path``, if that is an adapter to be trained further."""
        found, rest = super().parse_known_args(args, namespace)
        if (found.use_lora or found.use_qlora) and (settings := adapter_settings(found.model_name_or_path)):
            self.set_defaults(**settings)
            found, rest = super().parse_known_args(args, namespace)
        return found, rest

    def parse_args(  # type: ignore[override]  # as in Parser
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        words = sys.argv[1:] if args is None else list(args)
        values = super().parse_args(words, namespace)
        options = {option: action.dest for action in self._actions for option in action.option_strings}
        given = [option for word in words if (option := word.partition("=")[0]) in options]
        try:
            check_arguments(values)
            unused = [option for option in given if options[option] in self.training_flags]
            if values.eval_only and unused:
                raise InputError(f"--eval_only does not train: remove {', '.join(unused)}")
        except InputError as error:
            self.error(str(error))
        return values


def adapter_settings(name_or_path: str) -> dict[str, Any]:
    """Return the values of the LoRA flags that an adapter was trained with; empty if it is none, or will be refused."""
    path = Path(name_or_path) / "adapter_config.json"
    if not path.is_file():
        return {}
    from common.phi3v.parts import parts_of_adapter  # imports PyTorch

    try:
        config = json.loads(path.read_bytes())
        train_fully, vision = parts_of_adapter(config["target_modules"], config.get("modules_to_save"))
        ratio, dropout = config["lora_alpha"] / config["r"], float(config["lora_dropout"])
        if not (math.isfinite(ratio) and 0 <= dropout < 1):
            return {}
        return {
            "lora_rank": int(config["r"]),
            "lora_alpha_ratio": ratio,
            "lora_dropout": dropout,
            "use_dora": bool(config["use_dora"]),
            "use_rslora": bool(config["use_rslora"]),
            "init_lora_weights": str(config["init_lora_weights"]),
            "train_fully": train_fully,
            "freeze_vision_model": not vision,
        }
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, AttributeError, RecursionError):
        return {}


def training_parser(description: str | None, task: str, metric: str) -> TrainingParser:
    """Create the parser of the shared flags, with the published recipe's names and defaults.

    Parameters
    ----------
    description : str
        Docstring of the script.
    task : str
        Display name of the task.
    metric : str
        Name of the task's main metric, which ``--load_best_model_at_end`` compares if ``--eval_metric_steps`` is given.
    """
    parser = TrainingParser(description)
    parser.set_defaults(task=task, metric=metric)

    add = parser.add_argument_group("model").add_argument
    adapters = "with --use_lora or --use_qlora also the directory of an adapter, which is trained further"
    add("--model_name_or_path", default=DEFAULT_MODEL, help=f"Hub id or directory; {adapters} (default: %(default)s)")
    add("--bf16", action="store_true", help="train in bf16 (default: fp16 on a GPU, fp32 on a CPU)")
    add(
        "--use_flash_attention",
        action="store_true",
        help="fail without a flash attention kernel",
    )
    add(
        "--attn_implementation",
        choices=("varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4"),
        help="attention implementation (default: the fastest available, printed at the start)",
    )
    add("--num_crops", type=int, default=16, help=f"maximum number of crops per image, 1 to {MAX_CROPS} (default: %(default)s)")

    add = parser.add_argument_group("trainable parameters").add_argument
    add("--freeze_vision_model", action="store_true", help="train only the decoder")
    add("--train_only", type=_parts, metavar="PARTS", help=f"train only these parts, comma-separated: {', '.join(PARTS)}")
    add("--use_lora", action="store_true", help="train LoRA adapters instead of all weights")
    add("--use_qlora", action="store_true", help="train LoRA adapters on a base model quantized to 4 bits")
    add(
        "--train_fully",
        type=_parts,
        default=(),
        metavar="PARTS",
        help="with adapters on the decoder only, train all weights of these parts, comma-separated: vision, projector (except "
        "its two separators)",
    )
    add("--lora_rank", type=int, help="LoRA rank (default: %(default)s)")
    add("--lora_alpha_ratio", type=float, help="LoRA alpha divided by the rank (default: %(default)s)")
    add("--lora_dropout", type=float, help="LoRA dropout (default: %(default)s)")
    add("--use_dora", action="store_true", help="use weight-decomposed LoRA (DoRA)")
    add("--use_rslora", action="store_true", help="use rank-stabilized LoRA scaling")
    add(
        "--init_lora_weights",
        choices=("gaussian", "True", "False", "orthogonal", "pissa", "olora"),
        help="LoRA initialization, as in PEFT's LoraConfig (default: %(default)s)",
    )
    parser.set_defaults(**LORA_DEFAULTS)

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", type=Path, default=Path("output"), help="output directory (default: output)")
    add("--batch_size", type=int, default=16, help="samples per optimizer step over all processes (default: 16)")
    add("--batch_size_per_gpu", type=int, help="samples per process per micro-batch (default: 1, or by --max_tokens_per_batch)")
    add("--num_train_epochs", type=_number, default=NUM_TRAIN_EPOCHS, help="epochs, also fractional (default: %(default)s)")
    add("--max_steps", type=int, default=-1, help="maximum number of optimizer steps (default: no limit)")
    add("--learning_rate", type=float, default=4e-5, help="peak learning rate (default: %(default)s)")
    add("--vision_learning_rate", type=float, help="learning rate of the vision tower (default: --learning_rate)")
    add("--projector_learning_rate", type=float, help="learning rate of the projector (default: --learning_rate)")
    add("--optim", default="adamw_torch_fused", help="optimizer, by its name in TrainingArguments (default: %(default)s)")
    add("--wd", type=float, default=0.01, help="weight decay (default: %(default)s)")
    add(
        "--lr_scheduler_type",
        choices=SCHEDULES,
        default="linear",
        help="learning rate schedule after warmup; constant has no warmup (default: %(default)s)",
    )
    add("--warmup_steps", type=float, default=50, help="linear warmup; if below 1, a fraction of all steps (default: 50)")
    add("--seed", type=int, default=42, help="random seed (default: %(default)s)")
    add("--max_nonfinite_steps", type=int, default=3, help="end after N steps without a finite loss or gradient (default: 3)")
    add("--ddp_timeout", type=int, default=1800, help="seconds until an unresponsive process ends the run (default: 1800)")

    add = parser.add_argument_group("speed and memory").add_argument
    add(
        "--deepspeed",
        default="auto",
        metavar="FILE",
        help="DeepSpeed configuration, or none for plain DDP (default: common/deepspeed/zero2.json; none with LoRA)",
    )
    add("--packing", action=argparse.BooleanOptionalAction, help="concatenate samples, not pad them (default: if supported)")
    add(
        "--max_tokens_per_batch",
        type=lambda text: text if text == "auto" else int(text),
        metavar="auto|N",
        help="maximum number of tokens per micro-batch, or what is fastest in the free memory (auto); requires packing, and "
        "replaces --batch_size_per_gpu (default: auto on a GPU)",
    )
    add(
        "--gradient_checkpointing",
        choices=("auto", "full", "selective", "vision", "elementwise", "none"),
        default="auto",
        help="recompute in the backward pass: all layers, every second layer, the vision tower, norms and activations "
        "only, or nothing (default: as little as memory allows)",
    )
    fused = "fused layers and adapters, instead of those of transformers and PEFT (default: on)"
    add("--fused_layers", action=argparse.BooleanOptionalAction, default=True, help=fused)
    add("--use_liger_kernel", action="store_true", help="use Liger's fused kernels (requires liger-kernel)")
    add("--torch_compile", action="store_true", help="compile the layers of the decoder and the tower")
    add("--dataloader_num_workers", type=int, default=4, help="workers per process, at most its CPU cores (default: 4)")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--save_strategy", choices=("no", "steps", "epoch"), default="no", help="when to save checkpoints (default: never)")
    add("--save_steps", type=int, default=SAVE_STEPS, help="steps between checkpoints, if saved by steps (default: 500)")
    add("--save_total_limit", type=int, help="number of checkpoints to keep (default: all)")
    resume = "resume from the last complete checkpoint in --output_dir, if any (auto), or from this one"
    add("--resume_from_checkpoint", metavar="auto|DIR", help=resume)
    add(
        "--accept_changes",
        nargs="+",
        choices=CHANGEABLE,
        default=[],
        help="settings that may differ from those of the checkpoint; the new values are used",
    )
    add("--overwrite_output_dir", action="store_true", help="delete what an earlier run wrote to --output_dir, unless resumed")
    add("--load_best_model_at_end", action="store_true", help="load the best checkpoint at the end")
    add("--early_stopping_patience", type=int, help="stop after N evaluations without improvement")
    add(
        "--save_on_each_node",
        action="store_true",
        help="save checkpoints on every node, if they share no file system",
    )
    push = "upload the model to the Hub with run.json and the evaluations' questions and answers, without the report"
    add("--push_to_hub", action="store_true", help=push)
    add("--hub_model_id", help="Hub repository to upload to (default: the name of --output_dir)")
    add("--hub_private_repo", action="store_true", help="make the Hub repository private (default: public)")

    add = parser.add_argument_group("data and evaluation").add_argument
    add("--eval_only", action="store_true", help="do not train: evaluate --model_name_or_path, and write evaluation.json")
    add("--streaming", action="store_true", help="read shards during training; each process reads its part of the rows")
    add(
        "--on_bad_sample",
        choices=("raise", "skip"),
        default="raise",
        help="what to do about invalid rows, and about images that become unusable during training: stop, or skip and count "
        "them in bad_samples.jsonl (default: %(default)s)",
    )
    add(
        "--eval_strategy",
        choices=("no", "steps", "epoch"),
        default="no",
        help="when to evaluate the loss during training",
    )
    add("--eval_steps", type=int, help="steps between evaluations, if evaluated by steps (default: --logging_steps, or 10)")
    add("--eval_metric_steps", type=int, help="also compute the task's metric every N steps")
    add("--max_train_samples", type=int, help="train on the first N rows")
    add("--max_eval_samples", type=int, help="evaluate on the first N rows")
    add("--eval_batch_size", type=int, default=8, help="prompts per process per batch (default: 8)")
    longest = "those of the longest evaluation answer, at least 64"
    add("--max_new_tokens", type=int, help=f"maximum tokens per answer (default: {longest})")

    add = parser.add_argument_group("logging").add_argument
    add("--logging_steps", type=int, help="steps between log lines (default: 10, or fewer to log at least 20 times)")
    add("--report_to", nargs="+", default=["none"], help="one or several of tensorboard, trackio, … (default: none)")
    add("--no-tqdm", dest="tqdm", action="store_false", help="print plain lines instead of progress bars")
    parser.training_flags = {action.dest for action in parser._actions} - set(EVALUATION_FLAGS)
    return parser


def _parts(names: str) -> tuple[str, ...]:
    """Read names of parts, whose order does not matter."""
    return tuple(sorted(set(names.split(","))))


def _number(text: str) -> float:
    """Read a number, as an int if it is one, so that it is also printed as one."""
    value = float(text)
    return int(value) if value.is_integer() else value


# Names of flags, which values they accept, and what must be true of them. None and auto are not checked.
RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("num_crops", lambda value: 1 <= value <= MAX_CROPS, f"be from 1 to {MAX_CROPS}"),
    (
        "batch_size batch_size_per_gpu lora_rank eval_batch_size max_new_tokens logging_steps max_train_samples "
        "max_eval_samples max_tokens_per_batch save_steps save_total_limit eval_steps eval_metric_steps "
        "early_stopping_patience max_nonfinite_steps ddp_timeout",
        lambda value: value >= 1,
        "be at least 1",
    ),
    ("max_steps", lambda value: value == -1 or value >= 1, "be at least 1"),
    ("warmup_steps dataloader_num_workers wd lora_dropout", lambda value: value >= 0, "not be negative"),
    ("warmup_steps", lambda value: value < 1 or float(value).is_integer(), "be an integer, or a fraction of all steps below 1"),
    ("lora_dropout", lambda value: value < 1, "be below 1"),
    ("num_train_epochs learning_rate vision_learning_rate projector_learning_rate", lambda value: value > 0, "be above 0"),
)


def check_arguments(args: argparse.Namespace) -> None:
    """Check the values that do not depend on the machine.

    Raises
    ------
    InputError
        If a value is invalid; the message names the flag and the values that it accepts.
    """
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} must be a finite number, got {value}")
    for names, accepts, expected in RANGES:
        for name in names.split():
            value = getattr(args, name, None)
            if value not in (None, "auto") and not accepts(value):
                raise InputError(f"--{name} must {expected}, got {value}")
    _check_batches(args)
    _check_method(args)
    _check_dependent_flags(args)
    _check_evaluation(args)


def _check_batches(args: argparse.Namespace) -> None:
    processes, per_gpu, limited = world_size(), args.batch_size_per_gpu or 1, args.max_tokens_per_batch is not None
    if not args.eval_only and args.batch_size % (processes * per_gpu):
        raise InputError(
            f"--batch_size {args.batch_size} is not divisible by {counted(processes, 'process', 'processes')} × "
            f"--batch_size_per_gpu {per_gpu}: use a multiple of {processes * per_gpu}"
        )
    if limited and args.packing is False:
        raise InputError("--max_tokens_per_batch requires packing: remove it or --no-packing")
    if limited and args.streaming:
        raise InputError("--max_tokens_per_batch requires the lengths of all rows, which are not known with --streaming")
    # With --eval_strategy, it is still the batch size of the evaluation loss.
    if limited and args.batch_size_per_gpu is not None and args.eval_strategy == "no":
        raise InputError("--batch_size_per_gpu has no effect with --max_tokens_per_batch: remove one of them")
    if args.on_bad_sample == "skip" and args.streaming:
        raise InputError("--on_bad_sample skip requires checking all rows before training, which --streaming does not do")
    if args.max_steps > 0 and args.num_train_epochs != NUM_TRAIN_EPOCHS:
        raise InputError("--max_steps and --num_train_epochs both set the length of the run: remove one of them")
    if args.lr_scheduler_type == "polynomial" and args.learning_rate <= POLYNOMIAL_END:
        raise InputError(f"--lr_scheduler_type polynomial ends at {POLYNOMIAL_END:g}: --learning_rate must be above it")
    if args.use_flash_attention and args.attn_implementation in ("sdpa", "eager"):
        raise InputError(f"--use_flash_attention and --attn_implementation {args.attn_implementation} are incompatible")
    if args.gradient_checkpointing == "elementwise" and (args.torch_compile or not args.fused_layers):
        other = "--torch_compile" if args.torch_compile else "--no-fused_layers"
        raise InputError(f"--gradient_checkpointing elementwise has no effect with {other}: remove one of them")


def _check_method(args: argparse.Namespace) -> None:
    adapters = args.use_lora or args.use_qlora
    trained = trained_parts(args.train_only, args.train_fully, args.freeze_vision_model)
    if args.use_lora and args.use_qlora:
        raise InputError("--use_qlora already trains LoRA adapters, on a quantized model: remove it or --use_lora")
    for name, default in LORA_DEFAULTS.items():
        if getattr(args, name) != default and not adapters:
            raise InputError(f"--{name} requires --use_lora or --use_qlora")
    if round(args.lora_rank * args.lora_alpha_ratio) < 1:
        raise InputError(
            f"--lora_rank {args.lora_rank} × --lora_alpha_ratio {args.lora_alpha_ratio} must give an alpha of at least 1"
        )
    if args.use_qlora and args.init_lora_weights in ("pissa", "olora", "orthogonal"):
        raise InputError(f"--init_lora_weights {args.init_lora_weights} does not work with 4-bit weights: choose another one")
    for flag, accepted in (("train_only", PARTS), ("train_fully", ("vision", "projector"))):
        if unknown := sorted(set(getattr(args, flag) or ()) - set(accepted)):
            raise InputError(f"--{flag}: unknown part {unknown[0]!r}, expected {', '.join(accepted)}")
    for part in PARTS[1:]:
        if getattr(args, f"{part}_learning_rate") is not None and part not in trained:
            raise InputError(f"--{part}_learning_rate: {part} is not trained, only {', '.join(trained)}: remove the flag")
    if args.train_fully and (args.freeze_vision_model or not adapters):
        raise InputError("--train_fully requires --use_lora or --use_qlora, and excludes --freeze_vision_model")
    if args.train_only and adapters:
        raise InputError("--train_only selects weights for full finetuning: remove it, or --use_lora and --use_qlora")
    if args.train_only and args.freeze_vision_model:
        raise InputError("--freeze_vision_model means --train_only decoder: remove one of them")


def _check_dependent_flags(args: argparse.Namespace) -> None:
    """Reject flags that have no effect without another flag."""
    for name, required, missing in (
        ("save_steps", "--save_strategy steps", args.save_steps != SAVE_STEPS and args.save_strategy != "steps"),
        ("save_total_limit", "--save_strategy steps or epoch", args.save_strategy == "no"),
        ("eval_steps", "--eval_strategy steps", args.eval_strategy != "steps"),
        ("eval_metric_steps", "--eval_strategy steps", args.eval_strategy != "steps"),
        ("early_stopping_patience", "--load_best_model_at_end", not args.load_best_model_at_end),
        ("hub_model_id", "--push_to_hub", not args.push_to_hub),
        ("hub_private_repo", "--push_to_hub", not args.push_to_hub),
        ("accept_changes", "--resume_from_checkpoint", args.resume_from_checkpoint is None),
    ):
        if getattr(args, name) and missing:
            raise InputError(f"--{name} requires {required}")


def _check_evaluation(args: argparse.Namespace) -> None:
    eval_steps = steps_between_evaluations(args.eval_steps, args.logging_steps)
    if args.eval_metric_steps and args.eval_metric_steps % eval_steps:
        raise InputError(f"--eval_metric_steps {args.eval_metric_steps} must be a multiple of --eval_steps {eval_steps}")
    if not args.load_best_model_at_end:
        return
    required = "--load_best_model_at_end requires"
    if args.save_strategy != args.eval_strategy or args.save_strategy == "no":
        raise InputError(f"{required} the same --save_strategy and --eval_strategy, steps or epoch")
    if args.save_strategy == "steps" and args.save_steps != eval_steps:
        different = f"--save_steps ({args.save_steps}) to --eval_steps ({eval_steps})"
        raise InputError(f"{required} a checkpoint at every evaluation: set {different}")
    if args.eval_metric_steps and args.eval_metric_steps != eval_steps:
        raise InputError(f"{required} the metric at every evaluation: set --eval_metric_steps to --eval_steps")


def steps_between_evaluations(eval_steps: int | None, logging_steps: int | None) -> int:
    """Return the optimizer steps between evaluations, with ``--eval_strategy steps``."""
    return eval_steps or logging_steps or LOGGING_STEPS


def trained_parts(
    train_only: tuple[str, ...] | None, train_fully: tuple[str, ...], freeze_vision_model: bool
) -> tuple[str, ...]:
    """Return the trained parts of the model; with LoRA, the parts that have adapters or are trained fully."""
    if train_fully:
        return ("decoder", *train_fully)
    return train_only or (("decoder",) if freeze_vision_model else PARTS)


def method_name(args: argparse.Namespace) -> str:
    """Return the display name of the method: full, LoRA or QLoRA, and the trained parts if not all are trained."""
    name = "QLoRA" if args.use_qlora else "LoRA" if args.use_lora else "full"
    if args.train_fully:
        return f"{name} of the decoder, {' and '.join(args.train_fully)} fully trained"
    if args.freeze_vision_model:
        return f"{name}, frozen vision"
    return f"{name}, {' and '.join(args.train_only)} only" if args.train_only else name
