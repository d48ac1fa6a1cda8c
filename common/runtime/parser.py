"""A parser of command lines that suggests what was meant. Imports only the standard library."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from .process import fail, local_rank

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
TORCHRUN_FLAGS = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "standalone")


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, on one process of each machine, and suggests what was meant."""

    def __init__(self, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

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
