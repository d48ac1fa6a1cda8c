"""Download and load a checkpoint, on disk or on the Hub: its processor and its weights."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import torch
from huggingface_hub import snapshot_download
from jinja2 import TemplateError
from safetensors import SafetensorError
from tokenizers.models import BPE
from transformers import GenerationConfig

from common.phi3v import Phi3VForCausalLM, Phi3VProcessor
from common.phi3v.processing import stop_token_ids
from common.runtime.process import InputError

from .checks import BAD_VALUES, COPY_AGAIN, check_checkpoint, first_line, open_tensors, read_config

TEMPLATE_SECONDS = 5  # a template takes milliseconds


def fetch_checkpoint(name_or_path: str, flag: str | None = "--model_name_or_path", revision: str | None = None) -> str | None:
    """Check a model and, if it is on the Hub, download all of it, so that later commits on the Hub do not affect the run.

    Returns
    -------
    str or None
        The downloaded commit; None for a directory.

    Raises
    ------
    InputError
        As :func:`check_checkpoint`.
    """
    check_checkpoint(name_or_path, flag, revision)
    if Path(name_or_path).is_dir():
        return None
    revision = revision or base_revision(name_or_path)
    try:
        snapshot = snapshot_download(name_or_path, revision=revision, allow_patterns=["*.json", "*.jinja", "*.safetensors"])
    except OSError as error:
        place = f"{flag} {name_or_path}" if flag else name_or_path
        raise InputError(f"{place} cannot be downloaded ({first_line(error)}): try again") from None
    check_checkpoint(snapshot, flag)
    return revision


def load_processor(name_or_path: str, revision: str | None = None, num_crops: int | None = None) -> Phi3VProcessor:
    """Load the processor saved with a model or adapter.

    Parameters
    ----------
    name_or_path : str
        Directory or Hub id.
    revision : str, optional
        Commit of a Hub model. Default: the latest.
    num_crops : int, optional
        Maximum number of crops per image. Default: the saved value.

    Raises
    ------
    InputError
        If a file of the processor cannot be read, or the tokenizer does not have what the recipes use.
    """
    options: dict[str, Any] = {} if num_crops is None else {"num_crops": num_crops}
    if special := [path for path in Path(name_or_path).glob("*.j*") if not path.is_file()]:  # opening a FIFO would wait
        raise InputError(f"{special[0]} is not a file: {COPY_AGAIN}")
    try:
        processor = Phi3VProcessor.from_pretrained(name_or_path, revision=revision or "main", **options)
        _check_tokenizer(processor)
    except BaseException as error:
        # For a damaged tokenizer.json, tokenizers raises Exception itself, and BaseException if its code panics.
        of_tokenizers = type(error) is Exception or type(error).__name__ == "PanicException"
        if not isinstance(error, (*BAD_VALUES, TemplateError)) and not of_tokenizers:
            raise
        raise InputError(
            f"the tokenizer or image processor files cannot be read ({first_line(error)}): {COPY_AGAIN}",
            name_or_path,
        ) from error
    if isinstance(model := processor.tokenizer.backend_tokenizer.model, BPE):
        # It would remember the first 10,000 texts, up to 40 MB in every data worker; few texts of a dataset occur again.
        model._resize_cache(0)
    return processor


def load_weights(
    name_or_path: str, processor: Phi3VProcessor, revision: str | None = None, flag: str | None = None, **options: Any
) -> Phi3VForCausalLM:
    """Load a model that :func:`fetch_checkpoint` has checked.

    Parameters
    ----------
    name_or_path : str
        Directory or Hub id.
    processor : Phi3VProcessor
        Provides the tokens that end an answer. The saved generation settings are not used, so that decoding is greedy.
    revision : str, optional
        Commit of a Hub model. Default: the latest.
    flag : str, optional
        The flag that gave the model, for messages.
    **options
        Passed to ``from_pretrained``.

    Raises
    ------
    InputError
        If the weights cannot be read, or the tokenizer has more tokens than the model.
    """
    place, tokenizer = f"{flag} {name_or_path}" if flag else name_or_path, processor.tokenizer
    config = read_config(name_or_path, revision, place)
    if (largest := max(tokenizer.get_vocab().values())) >= config.vocab_size:
        raise InputError(f"token {largest} of tokenizer.json is outside vocab_size {config.vocab_size}: {COPY_AGAIN}", place)
    generation = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=stop_token_ids(processor), pad_token_id=config.pad_token_id
    )
    try:
        # Not by AutoModelForCausalLM, which would look for code of the checkpoint.
        model: Any = Phi3VForCausalLM.from_pretrained(
            name_or_path, revision=revision or "main", use_safetensors=True, generation_config=generation, **options
        )
    except (OSError, SafetensorError) as error:
        raise InputError(f"the weights cannot be read ({first_line(error)}): {COPY_AGAIN}", place) from None
    model.config.eos_token_id = tokenizer.eos_token_id
    return model


def base_revision(name_or_path: str) -> str | None:
    """Return the commit of a Hub model that was downloaded last, or None for a directory."""
    directory = find_snapshot(name_or_path)
    return directory.name if directory.parent.name == "snapshots" else None


def find_snapshot(name_or_path: str, revision: str | None = None) -> Path:
    """Return the directory of a checkpoint; for a Hub id the local copy, even if the Hub has a newer commit."""
    directory = Path(name_or_path)
    if directory.is_dir():
        return directory.resolve()
    return Path(snapshot_download(name_or_path, revision=revision, local_files_only=True))


def read_tensors(directory: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Read some tensors of a checkpoint, with the dtype that they have on disk."""
    files = open_tensors(directory)
    return {name: files[name].get_tensor(name) for name in names}


@contextmanager
def _time_limit() -> Iterator[None]:
    """End a chat template that loops. Only the main thread can."""

    def end(*_: Any) -> None:
        raise ValueError(f"the chat template takes more than {TEMPLATE_SECONDS} s")

    if current_thread() is not main_thread():
        yield
        return
    handler, left = signal.signal(signal.SIGALRM, end), signal.alarm(TEMPLATE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        signal.alarm(left)


def _check_tokenizer(processor: Phi3VProcessor) -> None:
    tokenizer = processor.tokenizer
    if None in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        raise ValueError("the tokenizer has no eos_token or pad_token")
    if stop_token_ids(processor)[1] in (None, tokenizer.unk_token_id):
        raise ValueError("the tokenizer has no token that ends a turn")
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]
    with _time_limit():
        text = tokenizer.apply_chat_template(turns + turns[:1], tokenize=False, add_generation_prompt=True)
    if text.count("What?") != 2 or text.count("This.") != 1:
        raise ValueError("the chat template does not repeat the messages")
    processor.tokenize(text, [])
