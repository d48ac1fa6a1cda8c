"""A run directory: writing ``run.json``, and reading and checking the files that the training scripts write."""

import json
import os
import shlex
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from common.runtime.files import (
    COUNT,
    NUMBER,
    OBJECT,
    OBJECTS,
    TEXT,
    Check,
    check_config,
    is_number,
    is_path,
    read_json,
    write_file,
)
from common.runtime.machine import hardware, versions
from common.runtime.process import InputError, is_main_process, local_world_size, world_size

FILES = {
    "run.json": "command, versions, data and hyperparameters are unknown",
    "eval_before.json": "no comparison: the evaluation before training was turned off or did not finish",
    "eval_after.json": "no result: the evaluation after training was turned off, or the run ended before it",
    "trainer_state.json": "no training curves",
    "train_results.json": "the training time is unknown",
}


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_data_set(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() <= {"type", "config", "split"} and _are_texts(list(value.values()))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_number, value.values()))


def _is_log(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict) and all(number is None or is_number(number) for number in entry.values()) for entry in value
    )


RUN_FIELDS: dict[str, Check] = {
    "base_model": ("a name or a path", is_path),
    **dict.fromkeys(("task", "method", "data", "command", "date", "hardware"), TEXT),
    **dict.fromkeys(("hyperparameters", "versions"), OBJECT),
}
OPTIONAL_FIELDS: dict[str, Check] = {  # of run.json
    "base_revision": ("a string or null", lambda value: value is None or isinstance(value, str)),
    "datasets": ("a list of strings or null", lambda value: value is None or _are_texts(value)),
    "eval_set": ("an object of type, config and split", _is_data_set),
}
EVALUATION_FIELDS: dict[str, Check] = {
    "metric": TEXT,
    "samples": COUNT,
    "predictions": OBJECTS,
    "accuracy_per_class": ("an object of numbers", _are_numbers),
}
PREDICTION_FIELDS: dict[str, Check] = {
    "id": ("a string or an integer", lambda value: type(value) in (str, int)),
    "question": TEXT,
    "prediction": TEXT,
    "answers": ("a list of strings", lambda value: _are_texts(value) and value != []),
    "score": ("a finite number", lambda value: is_number(value) and abs(value) < 2**63),
}
STATE_FIELDS: dict[str, Check] = {
    "log_history": ("a list of objects of numbers", _is_log),
    "global_step": COUNT,
    "epoch": NUMBER,
}
RESULTS_FIELDS: dict[str, Check] = {
    "epoch": NUMBER,
    "train_loss": NUMBER,
    "train_runtime": ("seconds", lambda value: is_number(value) and 0 <= value < 2**63),
}
DELETE = "delete it, or run the training again"
RIGHT = 0.5  # minimum score of an answer that counts as right; lower ANLS scores are 0


class Run(NamedTuple):
    """The contents of a run directory: one attribute per entry of `FILES`, empty if the file is missing."""

    directory: Path
    settings: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    state: dict[str, Any]
    results: dict[str, Any]

    @property
    def missing(self) -> dict[str, str]:
        """The missing files, and what the report lacks without each of them."""
        return {name: FILES[name] for name, content in zip(FILES, self[1:], strict=True) if not content}

    @property
    def predictions(self) -> dict[str, list[dict[str, Any]]]:
        """The predictions of the evaluations that have some, with the keys `before` and `after`."""
        evaluations = {"before": self.before, "after": self.after}
        return {when: found["predictions"] for when, found in evaluations.items() if found.get("predictions")}

    @property
    def log(self) -> list[dict[str, Any]]:
        return self.state.get("log_history", [])


def write_run(output_dir: str | Path, **described: Any) -> None:
    """Write ``run.json`` on the main process, with the command, start time, hardware and versions.

    Parameters
    ----------
    output_dir : str or Path
        The run directory.
    **described
        ``task`` (display name), ``base_model`` and ``base_revision`` (commit of a Hub model), ``method``, ``data`` (text),
        ``hyperparameters`` (values by flag), ``datasets`` (Hub ids of the training data), ``eval_set`` (as for
        :func:`common.training.build.build_trainer`) and ``question`` (an example, as the model is prompted). Values that JSON
        cannot represent, such as paths, are written as text.
    """
    if not is_main_process():
        return
    started = datetime.now(UTC).isoformat(timespec="seconds")
    run = {"command": launch_command(), "date": started, **described, "hardware": hardware(), "versions": versions()}
    write_file(Path(output_dir) / "run.json", json.dumps(run, indent=2, ensure_ascii=False, default=str) + "\n")


def remove_report(output_dir: Path) -> None:
    """Delete the report of an earlier run and the images in it."""
    (output_dir / "report.html").unlink(missing_ok=True)
    shutil.rmtree(output_dir / "gallery", ignore_errors=True)


def launch_command() -> str:
    """Return the command line that started this process, including ``torchrun`` if it was used."""
    script = shlex.join(sys.argv)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"python {script}"
    processes = local_world_size()
    nodes = f"--nnodes={world_size() // processes} " if world_size() > processes else ""
    return f"torchrun --nproc_per_node={processes} {nodes}{script}"


def read_run(directory: str | os.PathLike[str]) -> Run:
    """Read a run directory.

    Raises
    ------
    InputError
        If the directory contains no file of a run, or a file is invalid; the message names it.
    """
    paths = [Path(directory, name) for name in FILES]
    run = Run(Path(directory), *(read_json(path, DELETE) if path.is_file() else {} for path in paths))
    if len(run.missing) == len(FILES):
        raise InputError(f"{directory} contains no file of a run ({', '.join(FILES)}); pass the --output_dir of a training run")
    expected = (RUN_FIELDS | OPTIONAL_FIELDS, EVALUATION_FIELDS, EVALUATION_FIELDS, STATE_FIELDS, RESULTS_FIELDS)
    for path, content, fields in zip(paths, run[1:], expected, strict=True):
        check_config(content, fields, path, DELETE)
    for name, evaluation in (("eval_before.json", run.before), ("eval_after.json", run.after)):
        metric = evaluation.get("metric")
        if evaluation and (not isinstance(metric, str) or not is_number(evaluation.get(metric))):
            raise InputError(
                f"'metric' must be the key of a number in the same file, got {metric!r}", str(run.directory / name)
            )
        for row, prediction in enumerate(evaluation.get("predictions", [])):
            check_config(prediction, PREDICTION_FIELDS, f"{run.directory / name}, prediction {row}", DELETE, required=True)
    return run
