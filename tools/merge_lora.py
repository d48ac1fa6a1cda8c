"""Merge an adapter into its base model and save a full checkpoint in the published layout.

The result can be used with vLLM, with the model code on the Hub, and with the scripts of this repository.

python -m tools.merge_lora --adapter output/lora --output_dir output/merged
python -m tools.merge_lora --adapter output/qlora --output_dir output/merged --original_base

A QLoRA adapter was trained with a 4-bit base, so by default it is merged into the dequantized 4-bit weights.
--original_base merges it into the original weights of the base instead. They have no quantization error, but they are
not the weights that the adapter was trained with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common.runtime.parser import Parser, check_inputs
from common.runtime.process import InputError, say

DTYPES = ("float32", "bfloat16", "float16")


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--adapter", required=True, metavar="DIR", help="directory or Hub id of the adapter")
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="DIR", help="new or empty directory for the checkpoint"
    )
    parser.add_argument("--base", metavar="DIR", help="directory or Hub id of the base model (default: from the adapter)")
    parser.add_argument(
        "--original_base", action="store_true", help="merge a QLoRA adapter into the original, unquantized base"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the merged weights (default: as the base)")
    parser.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="print plain lines instead of progress bars")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds
    check_inputs(args)
    say("Loading PyTorch and transformers")

import os
from typing import Any

import torch

from common.model.checks import read_config
from common.model.inference import adapter_processor, attach_adapter, find_adapter, find_base, load_base
from common.report.model_card import RUN_FILES
from common.runtime.progress import show_bars
from tools.checkpoints import check_output, write_checkpoint
from tools.predict import run_tool


def merge(
    adapter_name: str,
    output_dir: Path,
    dtype: torch.dtype | None = None,
    base: str | None = None,
    original_base: bool = False,
    bar: bool = True,
) -> None:
    """Merge an adapter and write the full checkpoint atomically.

    Parameters
    ----------
    adapter_name : str
        Directory or Hub id.
    output_dir : Path
        Must not exist, or must be empty.
    dtype : torch.dtype, optional
        Dtype of the merged weights; by default that of the base.
    base : str, optional
        Directory or Hub id of the base model; by default read from the adapter.
    original_base : bool
        Do not quantize the base, even if it was quantized in training.
    bar : bool
        Show progress bars; False for ``--no-tqdm``.

    Raises
    ------
    InputError
        If the directory is not empty or cannot be written, the adapter is invalid, or its base is missing or does not match.
    """
    adapter = find_adapter(adapter_name)
    if adapter is None:
        raise InputError(f"--adapter {adapter_name} is not an adapter: expected a directory or Hub id with adapter_config.json")
    check_output(output_dir, adapter, RUN_FILES)
    dtype = dtype or base_dtype(adapter, base)
    say(f"Loading the base model of {adapter_name}")
    model = load_base(adapter, "cpu", dtype, base, quantized=not original_base)
    if getattr(model, "is_quantized", False):
        model = model.dequantize(dtype)
    processor = adapter_processor(adapter, base)
    say("Merging the adapter")
    adapted = attach_adapter(model, adapter)
    try:
        model = adapted.merge_and_unload(progressbar=show_bars(bar), safe_merge=True)
    except ValueError as error:  # of weights that are not finite
        raise InputError(f"--adapter {adapter_name} cannot be merged ({error}): use an earlier checkpoint") from None
    write_checkpoint(model, processor, output_dir, adapter, RUN_FILES)


def base_dtype(adapter: Path, base: str | None) -> torch.dtype:
    """Return the dtype in which an adapter's base was published."""
    try:
        config: Any = read_config(*find_base(adapter, base))
        return config.dtype or torch.float32
    except InputError:
        return torch.float32  # loading the base reports the error


def merge_adapter(args: argparse.Namespace) -> None:
    """Merge the adapter that the flags name."""
    # Saving imports DeepSpeed if it is installed, which would warn that it finds no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    merge(args.adapter, args.output_dir, dtype, args.base, args.original_base, args.tqdm)
    print(f"Wrote {args.output_dir}")


def main(args: argparse.Namespace) -> None:
    run_tool(merge_adapter, args)


if __name__ == "__main__":
    main(args)
