"""What an evaluation found, and how it is written down."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.runtime import is_main_process, write_file

from .metrics import normalise_answer


@dataclass(frozen=True)
class Prediction:
    """What a model said to one sample, and what that is worth.

    Attributes
    ----------
    id, question : str
        Of the sample.
    prediction : str
        What the model said, as it is compared.
    answers : list of str
        Accepted answers.
    score : float
        0 to 1.
    more : dict
        What else the task states, by name.
    """

    id: str
    question: str
    prediction: str
    answers: list[str]
    score: float
    more: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Its fields as they are written, ``more`` among them."""
        fields = dict(vars(self))
        return fields | fields.pop("more")


def exact_match(id: str, question: str, answer: str, expected: str, **more: Any) -> Prediction:
    """Compare an answer with the expected one, but for case, and white space and full stops at the ends."""
    prediction = normalise_answer(answer)
    return Prediction(id, question, prediction, [expected], float(prediction == normalise_answer(expected)), more)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes
    ----------
    metric : str
        Name of the main figure.
    values : dict
        Figures by name, the main one among them.
    predictions : list of Prediction
        One a sample.
    """

    metric: str
    values: dict[str, Any]
    predictions: list[Prediction]

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
        "predictions": [prediction.to_dict() for prediction in evaluation.predictions],
    }
    write_file(path, content)
