"""Merge an adapter into its base model: a full checkpoint in the published layout, for vLLM, the hub's code and these scripts.

python -m tools.merge_lora --adapter output/lora --output_dir output/merged
python -m tools.merge_lora --adapter output/qlora --output_dir output/merged --original_base

A QLoRA adapter has learned beside 4-bit weights and is merged into those, dequantized. --original_base takes the base as
published instead, whose weights are better but not the ones that the adapter knows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from common.model.inference import adapter_processor, attach_adapter, find_adapter, find_base, load_base
from common.report.model_card import RUN_FILES, write_model_card
from common.runtime import InputError, limit_library_bars, say, show_bars

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter: directory or hub id")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="a new directory for the checkpoint")
    parser.add_argument("--base", metavar="DIR", help="directory or hub id of the base (default: what the adapter names)")
    parser.add_argument("--original_base", action="store_true", help="merge a QLoRA adapter into the base as published")
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged weights (default: the base's)")
    parser.add_argument("--no-tqdm", dest="tqdm", action="store_false", help="plain lines instead of progress bars")
    return parser.parse_args()


def merge(
    adapter_name: str,
    output_dir: Path,
    dtype: torch.dtype | None = None,
    base: str | None = None,
    original_base: bool = False,
    bar: bool = True,
) -> None:
    """Merge an adapter and write the full checkpoint, whole or not at all.

    Parameters
    ----------
    adapter_name : str
        Directory or hub id.
    output_dir : Path
        Must not exist, or be empty.
    dtype : torch.dtype, optional
        Of the merged weights; the base's by default.
    base : str, optional
        Directory or hub id of the base; by default what the adapter names.
    original_base : bool
        Leave a base unquantized that was quantized in training.
    bar : bool
        False for ``--no-tqdm``.

    Raises
    ------
    InputError
        If the directory isn't empty, the adapter is none, or its base is missing or another.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"--output_dir {output_dir} is not empty: name a new directory")
    adapter = find_adapter(adapter_name)
    if adapter is None:
        raise InputError(f"--adapter {adapter_name} is no adapter: no directory or hub id with adapter_config.json")
    dtype = dtype or base_dtype(adapter, base)
    say(f"Loading the base of {adapter_name}")
    model = load_base(adapter, "cpu", dtype, base, quantized=not original_base)
    if getattr(model, "is_quantized", False):
        model = model.dequantize(dtype)
    processor = adapter_processor(adapter, model)
    say("Merging the adapter into it")
    adapted = attach_adapter(model, adapter)
    if not hasattr(adapted, "merge_and_unload"):
        kind = adapted.active_peft_config.peft_type.value
        raise InputError(f"--adapter {adapter_name} is of the kind {kind}, which can't be merged into weights: use it as it is")
    model = adapted.merge_and_unload(progressbar=show_bars(bar), safe_merge=True)

    say(f"Writing {output_dir}")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.") as temporary:
        partial = Path(temporary) / output_dir.name
        model.save_pretrained(partial)
        for path in partial.glob("*.safetensors"):
            path.chmod((partial / "config.json").stat().st_mode)  # safetensors lets the owner alone read its files
        processor.save_pretrained(partial)
        for name in RUN_FILES:
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, partial / name)
        if (partial / "run.json").is_file():
            write_model_card(partial, name=output_dir)
        os.replace(partial, output_dir)


def base_dtype(adapter: Path, base: str | None) -> torch.dtype:
    """The dtype in which an adapter's base is published."""
    name, revision = (base, None) if base else find_base(adapter)
    try:
        return AutoConfig.from_pretrained(name, revision=revision or "main").dtype or torch.float32
    except (OSError, ValueError):
        return torch.float32  # loading the base says what is wrong


def main() -> None:
    args = parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # from the libraries, to each other
    limit_library_bars(args.tqdm)
    # Saving loads DeepSpeed where it is installed, which would print that it finds no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dtype = DTYPES.get(args.dtype)
    try:
        merge(args.adapter, args.output_dir, dtype, args.base, args.original_base, args.tqdm)
    except (OSError, SafetensorError) as error:
        sys.exit(f"error: --output_dir {args.output_dir} can't be written ({error}); nothing is left there")
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"Wrote {args.output_dir}")


if __name__ == "__main__":
    main()
