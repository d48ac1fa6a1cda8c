"""The results of an evaluation, and their JSON file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.runtime.files import write_file
from common.runtime.process import counted, is_main_process

from .metrics import normalize_answer


@dataclass(frozen=True)
class Prediction:
    """The prediction for one sample, and its score."""

    id: str
    question: str
    prediction: str  # answer of the model, as it is compared with the references
    answers: list[str]  # references
    score: float  # 0 to 1
    more: dict[str, Any] = field(default_factory=dict)  # further values of the task, by name

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they are saved, with the entries of ``more`` at the same level."""
        fields = dict(vars(self))
        return fields | fields.pop("more")


def exact_match(id: str, question: str, answer: str, expected: str, **more: Any) -> Prediction:
    """Compare an answer with the expected one, ignoring case, and whitespace and periods at both ends."""
    prediction = normalize_answer(answer)
    return Prediction(id, question, prediction, [expected], float(prediction == normalize_answer(expected)), more)


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation."""

    metric: str  # name of the main metric
    values: dict[str, Any]  # by name, including the main metric
    predictions: list[Prediction]  # one per sample

    @property
    def logs(self) -> dict[str, float]:
        """The scalar values under the names that the Trainer uses, such as ``eval_anls``."""
        return {f"eval_{name}": value for name, value in self.values.items() if isinstance(value, float)}

    def __str__(self) -> str:
        metrics = (f"{name.removeprefix('eval_')} {value:.4f}" for name, value in self.logs.items())
        return f"{', '.join(metrics)} on {counted(len(self.predictions), 'sample')}"


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation as JSON from the main process. The file is written atomically."""
    if not is_main_process():
        return
    content = {
        "metric": evaluation.metric,
        **evaluation.values,
        "samples": len(evaluation.predictions),
        "predictions": [prediction.to_dict() for prediction in evaluation.predictions],
    }
    write_file(path, content)
