"""The checkpoints that tools.merge_lora and tools.quantize write: checks before the work, and the writing."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError

from common.phi3v import Phi3VForCausalLM, Phi3VProcessor
from common.report.model_card import write_model_card
from common.report.run import EVALUATION_FIELDS, RUN_FIELDS
from common.runtime.files import check_config, read_json
from common.runtime.process import InputError, say


def check_output(output_dir: Path, source: Path, run_files: Collection[str]) -> None:
    """Check, before a checkpoint is computed, that it can be written.

    Parameters
    ----------
    output_dir : Path
        Must not exist, or must be an empty directory.
    source : Path
        Directory of the model or adapter.
    run_files : collection of str
        Files of the run in ``source`` that also describe the new checkpoint; those that exist must be valid.

    Raises
    ------
    InputError
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"--output_dir {output_dir} is not empty: choose a new directory")
    for name in run_files:
        if (path := source / name).is_file():
            fields = RUN_FIELDS if name == "run.json" else EVALUATION_FIELDS
            check_config(read_json(path, "delete it"), fields, path, "delete it", required=fields is RUN_FIELDS)


def write_checkpoint(
    model: Phi3VForCausalLM,
    processor: Phi3VProcessor,
    output_dir: Path,
    source: Path,
    run_files: Collection[str],
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint atomically.

    Parameters
    ----------
    output_dir, source, run_files
        See :func:`check_output`. With ``run.json``, the checkpoint gets a model card.
    state : dict of str to torch.Tensor, optional
        Weights to save instead of the model's own.

    Raises
    ------
    InputError
        If the directory cannot be written.
    """
    say(f"Writing {output_dir}")
    target = output_dir.resolve()  # of a link, or of the working directory
    handler = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # removes the temporary directory
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
            partial = Path(temporary) / target.name
            model.save_pretrained(partial, state_dict=state)
            for path in partial.glob("*.safetensors"):
                path.chmod((partial / "config.json").stat().st_mode)  # safetensors makes its files readable by the owner only
            processor.save_pretrained(partial)
            for name in run_files:
                if (source / name).is_file():
                    shutil.copyfile(source / name, partial / name)
            if (partial / "run.json").is_file():
                write_model_card(partial, name=output_dir)
            os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--output_dir {output_dir} cannot be written ({error}); no partial output was kept") from None
    finally:
        signal.signal(signal.SIGTERM, handler)
