"""A parser of command lines that suggests what was meant. Imports only the standard library."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from .process import InputError, die_with_parent, fail, local_rank, stop_on_interrupt

# Flags of transformers, PEFT and TRL, and what to use instead.
OTHER_NAMES = {
    "bs": "--batch_size",
    "epochs": "--num_train_epochs",
    "fp16": "no flag: fp16 is the default on a GPU",
    "gradient_accumulation_steps": "--batch_size, the samples per step over all processes",
    "load_in_4bit": "--use_qlora",
    "lora_alpha": "--lora_alpha_ratio, alpha divided by the rank",
    "lora_r": "--lora_rank",
    "lr": "--learning_rate",
    "model": "--model_name_or_path",
    "per_device_eval_batch_size": "--eval_batch_size",
    "per_device_train_batch_size": "--batch_size_per_gpu",
    "warmup_ratio": "--warmup_steps with a value below 1",
    "weight_decay": "--wd",
}
FOLDERS = ("data_dir", "image_dir")
DATA_FILES = ("train_file", "eval_file", "data_file")
MODELS = ("model_name_or_path", "model", "adapter", "base")
TORCHRUN_FLAGS = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "standalone")


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, on one process of each machine, and suggests what was meant."""

    def __init__(self, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)
        sys.excepthook = stop_on_interrupt  # also while libraries are imported
        if "TORCHELASTIC_RUN_ID" in os.environ:
            die_with_parent()  # torchrun: a restarted run would write to the same directory

    def error(self, message: str) -> NoReturn:
        """Show the message and exit with code 1. All processes have the same flags."""
        fail(message, show=local_rank() == 0)

    # Without the overloads of argparse, which are for other classes of namespaces.
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Return the values of the flags. Unknown ones are named before missing ones: they may be the same, misspelled."""
        words = sys.argv[1:] if args is None else list(args)
        names = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")]
        known = [option.removeprefix("--") for action in self._actions for option in action.option_strings]
        for name in names:
            if name and name not in known and "help" not in names:
                self.error(f"unknown flag --{name}{_suggestion(name, known)}")
        values, unexpected = self.parse_known_args(words, namespace)
        if unexpected:
            before = words[words.index(unexpected[0]) - 1] if unexpected[0] in words[1:] else self.prog
            self.error(f"unexpected {unexpected[0]!r} after {before}; --help shows which flags take a value")
        return values


def _suggestion(name: str, known: list[str]) -> str:
    if name.replace("-", "_") in TORCHRUN_FLAGS:
        return ": torchrun's own flags come before the script"
    if (other := OTHER_NAMES.get(name)) and other.split()[0].strip("-,:") in [*known, "no"]:
        return f": use {other}"
    closest = get_close_matches(name.lower().replace("-", "_"), known, n=1) or get_close_matches(name, known, n=1)
    return f": did you mean --{closest[0]}?" if closest else "; --help lists all flags"


def check_inputs(args: argparse.Namespace) -> None:
    """Exit with a message if the data or the model that the flags name is not there, before libraries are loaded for seconds.

    Whatever takes longer to find out is left to the program.
    """
    try:
        for name in FOLDERS:
            if (folder := getattr(args, name, None)) and not folder.is_dir():
                raise InputError("no such folder", f"--{name} {folder}")
        for name in DATA_FILES:
            found = getattr(args, name, None) or []
            if found and name == "train_file" and (args.streaming or args.eval_only):
                continue  # names with wildcards, or not read
            for file in found if isinstance(found, list) else [found]:
                path = (getattr(args, "data_dir", None) or Path()) / file
                if not path.is_file():
                    raise InputError("no such file", f"--{name} {path}")
                if not _may_have_rows(path) and getattr(args, "on_bad_sample", "raise") == "raise":
                    expected = "expected JSON Lines, a JSON array, or a table that was saved as CSV UTF-8 (.csv, .tsv)"
                    raise InputError(f"neither JSON nor CSV: {expected}", f"--{name} {path}")
        for name in MODELS:
            model = getattr(args, name, None)
            if model and model != "none" and not may_be_on_hub(model) and not Path(model).is_dir():
                raise InputError("no such directory, and not a Hub id", f"--{name} {model}")
    except (OSError, InputError) as error:
        fail(str(error), show=local_rank() == 0)


def _may_have_rows(path: Path) -> bool:
    """Whether a file is a table by its name, or starts like JSON; an empty file is left to its reader."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return True
    with path.open("rb") as file:
        start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    return not start or start.startswith((b"{", b"["))


def may_be_on_hub(name: str) -> bool:
    """Whether the name of a model can be a Hub id, and not only a directory."""
    return not name.startswith((".", "/", "~")) and name.count("/") == 1
