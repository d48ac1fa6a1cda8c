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
from common.runtime.process import InputError, fail, say

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
import shutil
import tempfile
import warnings
from typing import Any

import torch
from safetensors import SafetensorError

from common.model.checks import read_config
from common.model.inference import adapter_processor, attach_adapter, find_adapter, find_base, load_base
from common.report.model_card import RUN_FILES, write_model_card
from common.runtime.progress import limit_library_bars, show_bars


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
        If the directory is not empty, the adapter is invalid, or its base is missing or does not match.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"--output_dir {output_dir} is not empty: choose a new directory")
    adapter = find_adapter(adapter_name)
    if adapter is None:
        raise InputError(f"--adapter {adapter_name} is not an adapter: expected a directory or Hub id with adapter_config.json")
    dtype = dtype or base_dtype(adapter, base)
    say(f"Loading the base model of {adapter_name}")
    model = load_base(adapter, "cpu", dtype, base, quantized=not original_base)
    if getattr(model, "is_quantized", False):
        model = model.dequantize(dtype)
    processor = adapter_processor(adapter, model)
    say("Merging the adapter")
    adapted = attach_adapter(model, adapter)
    try:
        model = adapted.merge_and_unload(progressbar=show_bars(bar), safe_merge=True)
    except ValueError as error:  # of weights that are not finite
        raise InputError(f"--adapter {adapter_name} cannot be merged ({error}): use an earlier checkpoint") from None

    say(f"Writing {output_dir}")
    target = output_dir.resolve()  # of a link, or of the working directory
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        partial = Path(temporary) / target.name
        model.save_pretrained(partial)
        for path in partial.glob("*.safetensors"):
            path.chmod((partial / "config.json").stat().st_mode)  # safetensors makes its files readable by the owner only
        processor.save_pretrained(partial)
        for name in RUN_FILES:
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, partial / name)
        if (partial / "run.json").is_file():
            write_model_card(partial, name=output_dir)
        os.replace(partial, target)


def base_dtype(adapter: Path, base: str | None) -> torch.dtype:
    """Return the dtype in which an adapter's base was published."""
    name, revision = (base, None) if base else find_base(adapter)
    try:
        config: Any = read_config(name, revision)
        return config.dtype or torch.float32
    except InputError:
        return torch.float32  # loading the base reports the error


def main(args: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # from libraries, about their own dependencies
    limit_library_bars(args.tqdm)
    # Saving imports DeepSpeed if it is installed, which would warn that it finds no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        merge(args.adapter, args.output_dir, dtype, args.base, args.original_base, args.tqdm)
    except (OSError, SafetensorError) as error:
        fail(f"--output_dir {args.output_dir} cannot be written ({error}); no partial output was kept")
    except InputError as error:
        fail(str(error))
    print(f"Wrote {args.output_dir}")


if __name__ == "__main__":
    main(args)
