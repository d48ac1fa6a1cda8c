"""The charts of a report. They are drawn in the light theme; the page inverts them in the dark theme."""

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from sklearn.metrics import ConfusionMatrixDisplay, RocCurveDisplay

BEFORE, AFTER, MUTED, LINE = "#8c8577", "#0e6252", "#5f5b54", "#d5d1c8"
SERIES = (AFTER, "#b4551d", "#3c5aa6", "#8a2f6b", "#77680a", "#1f7a9a")
DASHES = ("solid", "dashed", "dotted")  # lines can be distinguished without colors
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "font.size": 8.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
}
CURVES = {
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOPs utilization",
}
SMOOTH_FROM = 60  # number of logged points above which a moving average is also drawn
LONGEST_LABEL = 24  # characters; longer class names would leave no space for the matrix


@dataclass
class Chart:
    """A figure with a title and a caption, which also serve as its description for screen readers."""

    name: str
    title: str
    figure: Figure
    caption: str

    @property
    def source(self) -> str:
        """The figure as an SVG image in a `data:` address."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return "data:image/svg+xml;base64," + b64encode(buffer.getvalue()).decode()

    def save_png(self, path: Path) -> None:
        """Save the figure as PNG."""
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(path, format="png", dpi=160)


def number(value: float) -> str:
    """Format a finite number for people: ``12,345``, ``0.123`` or ``5e-06``."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value % 1 == 0 else f"{value:.3g}"


def series(log: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values, float64 ``(points,)`` each, at which ``key`` was logged; values may be NaN."""
    points = [(entry["step"], float(entry[key])) for entry in log if key in entry and "step" in entry]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


@matplotlib.rc_context(STYLE)
def curve_charts(logs: dict[str, list[dict[str, Any]]]) -> list[Chart]:
    """Draw the training curves: one chart per quantity that was logged, with one line per run.

    Parameters
    ----------
    logs : dict of str to list of dict
        ``log_history`` by name of the run. A single run is drawn with its evaluation loss.
    """
    charts = []
    for key, title in CURVES.items():
        lines = {name: series(log, key) for name, log in logs.items()}
        if len(logs) == 1 and key == "loss":
            lines["evaluation"] = series(next(iter(logs.values())), "eval_loss")
        index = {name: place for place, name in enumerate(lines)}  # a run has the same color in all charts
        lines = {name: line for name, line in lines.items() if np.isfinite(line[1]).any()}
        if not lines:
            continue
        figure, axes = _axes()
        captions = []
        for name, (steps, values) in lines.items():
            finite = np.isfinite(values)
            smooth = key in ("loss", "grad_norm") and finite.sum() > SMOOTH_FROM
            style: dict[str, Any] = {"color": SERIES[index[name] % len(SERIES)], "linestyle": DASHES[index[name] % len(DASHES)]}
            marker = "o" if len(steps) < 10 else None
            axes.plot(steps, values, alpha=0.35 if smooth else 1, marker=marker, markersize=3, **style)
            if smooth:
                width = finite.sum() // 20
                mean_steps, mean = (np.convolve(points[finite], np.ones(width) / width, "valid") for points in (steps, values))
                axes.plot(mean_steps, mean, **style)
            axes.plot([], label=name, **style)  # for the legend, without a marker
            captions.append((f"{name}: " if len(lines) > 1 else "") + _summary(key, steps[finite], values[finite]))
            if not finite.all():
                captions[-1] += f", {np.sum(~finite):,} not finite"
        if len(lines) > 1:
            axes.legend()
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if key == "mfu":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if key != "loss":
            axes.set_ylim(bottom=0)
        # The name of a run keeps its case.
        caption = _sentence(captions) if len(logs) == 1 else "; ".join(captions) + "."
        charts.append(Chart(key, title, figure, caption))
    return charts


@matplotlib.rc_context(STYLE)
def roc_chart(evaluations: dict[str, tuple[list[int], list[float]]]) -> Chart:
    """Draw the receiver operating characteristic of each evaluation, given as labels (0 and 1) and P(yes)."""
    figure, axes = _axes()
    captions = []
    for when, (labels, p_yes) in evaluations.items():
        style = {"color": BEFORE, "linestyle": "dashed"} if when == "before" else {"color": AFTER}
        curve = RocCurveDisplay.from_predictions(labels, p_yes, ax=axes, name=when, curve_kwargs=style)
        captions.append(f"{when}: area {curve.roc_auc:.3f}")
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    return Chart("roc", "ROC", figure, _sentence(captions))


@matplotlib.rc_context(STYLE | {"axes.grid": False})
def confusion_chart(when: str, truth: Sequence[str], predicted: Sequence[str]) -> Chart:
    """Draw the confusion matrix of an evaluation (``before`` or ``after``)."""
    classes = sorted({*truth, *predicted}, key=lambda name: (name.startswith("("), name))  # "(other)" comes last
    figure, axes = _axes(height=2.6 if len(classes) <= 4 else 3.7)
    shown = [label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…" for label in classes]
    options: dict[str, Any] = {"labels": classes, "display_labels": shown, "include_values": len(classes) <= 12}
    ConfusionMatrixDisplay.from_predictions(truth, predicted, **options, ax=axes, cmap="Greens", colorbar=False)
    axes.tick_params(labelsize=min(8.5, 150 / len(classes)))
    axes.tick_params("x", rotation=90 if len(classes) > 4 else 0)
    axes.set(xlabel="predicted class", ylabel="true class")
    right = sum(first == second for first, second in zip(truth, predicted, strict=True))
    return Chart(f"confusion-{when}", f"Confusion {when}", figure, f"{right:,} of {len(truth):,} correct (on the diagonal).")


def _axes(height: float = 2.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.7, height), layout="constrained")  # inches; labels stay readable on a phone
    return figure, figure.add_subplot()


def _summary(key: str, steps: np.ndarray, values: np.ndarray) -> str:
    if key == "loss":
        lowest = np.argmin(values)
        return f"from {number(values[0])} to {number(values[-1])}, lowest {number(values[lowest])} at step {steps[lowest]:,.0f}"
    if key == "learning_rate":
        return f"highest {number(values.max())}"
    return f"median {np.median(values):.1%}" if key == "mfu" else f"median {number(float(np.median(values)))}"


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."
