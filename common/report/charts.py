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
from sklearn.metrics import ConfusionMatrixDisplay

MUTED, LINE = "#5f5b54", "#d5d1c8"
SERIES = ("#0e6252", "#b4551d", "#3c5aa6", "#8a2f6b", "#77680a", "#1f7a9a")
DASHES = ("solid", "dashed", "dotted")  # lines can be distinguished without colors
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), LINE),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.formatter.useoffset", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "text.parse_math": False,
    "font.size": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
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


def series(log: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Return steps and values, float64 ``(points,)`` each, that were logged as ``key``, and how many others are not finite."""
    logged = [(entry["step"], entry[key]) for entry in log if key in entry and "step" in entry]
    steps, values = np.array(logged, np.float64).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite], int(np.sum(~finite))


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
        show = "{:.1%}".format if key == "mfu" else number
        figure, axes = _axes()
        captions = {}
        for index, (name, (steps, values, others)) in enumerate(lines.items()):
            if not len(values):
                continue
            first, last, lowest, highest = map(show, (values[0], values[-1], values.min(), values.max()))
            captions[name] = f"{first} → {last}, between {lowest} and {highest}" + (
                f", {others:,} not finite" if others else ""
            )
            style: dict[str, Any] = {"color": SERIES[index % len(SERIES)], "linestyle": DASHES[index % len(DASHES)]}
            if len(values) > SMOOTH_FROM:
                axes.plot(steps, values, alpha=0.35, **style)
                window = np.full(len(values) // 20, 1 / (len(values) // 20))
                steps, values = np.convolve(steps, window, "valid"), np.convolve(values, window, "valid")
            axes.plot(steps, values, label=name, marker="o" if len(values) < 10 else None, markersize=3, **style)
        if not captions:
            continue
        if len(captions) > 1:
            axes.legend()
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if key == "mfu":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if key != "loss":
            axes.set_ylim(bottom=0)
        caption = "; ".join(f"{name}: {text}" if len(captions) > 1 else text for name, text in captions.items())
        charts.append(Chart(key, title, figure, caption))
    return charts


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
    return Chart(f"confusion-{when}", f"Confusion {when}", figure, f"{right:,} of {len(truth):,} correct (on the diagonal)")


def _axes(height: float = 2.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.7, height), layout="constrained")  # inches; labels stay readable on a phone
    return figure, figure.add_subplot()
