"""Writing a model or adapter: as the result of a run, or to a checkpoint."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from common.model.adapters import write_base_description
from common.model.checkpoint import read_tensors
from common.phi3v import Phi3VProcessor
from common.runtime.process import InputError
from common.runtime.script import disk_remedy

from .output import SAVING

Weights = dict[str, torch.Tensor]


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Report an error of the file system as an :class:`InputError` which says that earlier checkpoints are intact.

    Raises
    ------
    InputError
        If the disk is full, read-only or broken. All other errors are raised unchanged.
    """
    try:
        yield
    except Exception as error:
        if not (remedy := disk_remedy(error)):
            raise
        raise InputError(
            f"saving failed ({error}): {remedy} and restart with --resume_from_checkpoint auto; earlier checkpoints are intact"
        ) from error


def write_result(directory: Path, model: Any, processor: Phi3VProcessor, weights: Weights | None, base: Path) -> None:
    """Write the trained model or adapter, in the dtype of its base model, to the output directory.

    It is written to a temporary directory first, and replaces earlier files once it is complete.

    Parameters
    ----------
    directory : Path
    model : PreTrainedModel or PeftModel
    processor : Phi3VProcessor
    weights : dict of torch.Tensor, optional
        By name, if DeepSpeed has gathered them; by default, those of the model.
    base : Path
        Directory of the checkpoint that was finetuned.
    """
    temporary = directory / SAVING
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    if hasattr(model, "peft_config"):
        write_model(temporary, model, processor, weights)
        (temporary / "README.md").unlink(missing_ok=True)  # a form of PEFT; the model card may be there already
    else:
        dtype = AutoConfig.from_pretrained(base).dtype or model.dtype
        weights = {name: tensor.to(dtype) for name, tensor in (weights or model.state_dict()).items()}
        # DeepSpeed also casts frozen weights, and fp16 cannot represent all bf16 values: save the original frozen weights.
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        write_model(temporary, model, processor, weights | read_tensors(base, frozen))
        model.config.dtype = dtype  # transformers has written the training dtype
        model.config.save_pretrained(temporary)
    # Until all files are new, there is no configuration, so that files of two runs are not loaded as one model.
    config = "adapter_config.json" if hasattr(model, "peft_config") else "config.json"
    (directory / config).unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == config):
        os.replace(path, directory / path.name)
    temporary.rmdir()


def write_model(directory: Path, model: Any, processor: Phi3VProcessor, weights: Weights | None) -> None:
    """Write a model or adapter, in the dtype of the weights, with its processor; otherwise as :func:`write_result`."""
    directory.mkdir(parents=True, exist_ok=True)
    options = {}
    if hasattr(model, "peft_config"):
        # If lm_head has an adapter, PEFT by default also saves the base model's lm_head.
        options["save_embedding_layers"] = False
        write_base_description(directory, model)
    # transformers would write only on the first process of all nodes. TrainingArguments.should_save has already decided.
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    model.save_pretrained(directory, state_dict=weights, **options)
    for path in directory.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors creates files that only the owner can read
    processor.save_pretrained(directory)
