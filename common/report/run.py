"""A run directory: what the training scripts leave there, read and checked, and files that are put there whole."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.runtime import InputError, hardware, is_main_process, local_world_size, read_json, versions, world_size, write_file

FILES = {
    "run.json": "the command, versions, data and hyperparameters are not known",
    "eval_before.json": "nothing to compare with: evaluation before training was off, or did not finish",
    "eval_after.json": "no result: evaluation after training was off, or the run ended before it",
    "trainer_state.json": "no curves",
    "train_results.json": "the training time is not known",
}
RIGHT = 0.5  # the score from which an answer counts as right: ANLS is 0 below it


@dataclass
class Run:
    """What a run directory holds.

    `before` and `after` are the evaluations, `state` the Trainer's state, `results` its closing figures and `settings`
    the contents of `run.json`; a file that is missing is an empty dict here and its name a key of `missing`.
    """

    directory: Path
    before: dict
    after: dict
    state: dict
    results: dict
    settings: dict
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def metric(self) -> str | None:
        return (self.after or self.before).get("metric")

    @property
    def log(self) -> list[dict]:
        return self.state.get("log_history", [])


def write_run(
    output_dir: str | Path,
    task: str,
    base_model: str,
    base_revision: str | None,
    method: str,
    data: str,
    hyperparameters: dict[str, Any],
    datasets: Sequence[str] = (),
) -> None:
    """Write ``run.json`` from the first process: what is being run, by which command, on what, since when.

    Parameters
    ----------
    output_dir : str or Path
        The run's directory.
    task : str
        As people call it, ``"DocVQA"`` say.
    base_model : str
        Hub id or directory.
    base_revision : str, optional
        Commit of a hub model; see :func:`common.model.checkpoint.base_revision`.
    method : str
        ``"full"``, ``"LoRA"`` and so on.
    data : str
        Which rows trained and which evaluate, in words.
    hyperparameters : dict
        Values by flag. What JSON doesn't know, paths say, is written as text.
    datasets : sequence of str
        Hub ids of the data sets, if any.
    """
    if not is_main_process():
        return
    run = {
        "task": task,
        "command": launch_command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": base_model,
        "base_revision": base_revision,
        "method": method,
        "data": data,
        "hardware": hardware(),
        "versions": versions(),
        "hyperparameters": hyperparameters,
    }
    if datasets:
        run["datasets"] = list(datasets)
    write_file(Path(output_dir) / "run.json", json.dumps(run, indent=2, ensure_ascii=False, default=str) + "\n")


def remove_report(output_dir: Path) -> None:
    """Remove the report of an earlier run, and the pictures that it shows."""
    (output_dir / "report.html").unlink(missing_ok=True)
    shutil.rmtree(output_dir / "gallery", ignore_errors=True)


def launch_command() -> str:
    """The command line that started this process, as it is typed: with ``torchrun`` where that was used."""
    script = shlex.join(sys.argv)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"python {script}"
    processes, nodes = local_world_size(), ""
    if world_size() > processes:
        nodes = f"--nnodes={world_size() // processes} "
    return f"torchrun --nproc_per_node={processes} {nodes}{script}"


def read_run(directory: str | os.PathLike) -> Run:
    """Read what a run directory holds.

    Parameters
    ----------
    directory : path

    Returns
    -------
    Run

    Raises
    ------
    FileNotFoundError
        If there is no such directory, or it holds none of a run's files.
    InputError
        If one of the files is not what it should be; the message names the file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; give the --output_dir of a training run")
    contents = {
        name: read_json(directory / name, "delete it or run the training again")
        for name in FILES
        if (directory / name).is_file()
    }
    if not contents:
        raise FileNotFoundError(f"{directory} holds none of a run's files ({', '.join(FILES)}): is it an --output_dir?")
    for name in contents.keys() & {"eval_before.json", "eval_after.json"}:
        _check_evaluation(contents[name], directory / name)
    return Run(
        directory,
        before=contents.get("eval_before.json", {}),
        after=contents.get("eval_after.json", {}),
        state=contents.get("trainer_state.json", {}),
        results=contents.get("train_results.json", {}),
        settings=contents.get("run.json", {}),
        missing={name: consequence for name, consequence in FILES.items() if name not in contents},
    )


def predictions_by_id(evaluation: dict | None) -> dict[str, dict]:
    """Return the predictions by id; of several with the same id, the first."""
    return {str(row["id"]): row for row in reversed((evaluation or {}).get("predictions", []))}


def _check_evaluation(evaluation: dict, path: Path) -> None:
    metric = evaluation.get("metric")
    if not isinstance(metric, str) or not isinstance(evaluation.get(metric), int | float):
        raise InputError(f"'metric' must name the key of a number in the same file, not {metric!r}", str(path))
    for row, prediction in enumerate(evaluation.get("predictions", [])):
        absent = {"id", "question", "prediction", "answers", "score"} - set(prediction)
        if absent or not prediction["answers"]:
            raise InputError(f"prediction {row} has no {', '.join(sorted(absent)) or 'answers'}", str(path))
