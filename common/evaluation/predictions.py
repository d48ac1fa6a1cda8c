"""What an evaluation found, and how it is written down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.runtime import is_main_process, write_file


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes
    ----------
    metric : str
        Name of the main figure.
    values : dict
        Figures by name, the main one among them.
    predictions : list of dict
        One a sample: ``id``, ``question``, ``prediction``, ``answers``, ``score``, and what else the task states.
    """

    metric: str
    values: dict[str, Any]
    predictions: list[dict[str, Any]]

    @property
    def logs(self) -> dict[str, float]:
        """Its single figures, named as the Trainer names those of an evaluation: ``eval_anls``, say."""
        return {f"eval_{name}": value for name, value in self.values.items() if isinstance(value, float)}

    def __str__(self) -> str:
        figures = (f"{name.removeprefix('eval_')} {value:.4f}" for name, value in self.logs.items())
        return f"{', '.join(figures)} on {len(self.predictions)} samples"


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation as JSON, whole or not at all, from the first process."""
    if not is_main_process():
        return
    content = {
        "metric": evaluation.metric,
        **evaluation.values,
        "samples": len(evaluation.predictions),
        "predictions": evaluation.predictions,
    }
    write_file(path, content)
