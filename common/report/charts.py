"""The training curves of a report. They are drawn in the light theme; the page inverts them in the dark theme."""

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

MUTED, LINE = "#5f5b54", "#d5d1c8"
COLORS = ("#0e6252", "#b4551d", "#3c5aa6", "#8a2f6b", "#77680a", "#1f7a9a")
DASHES = ("solid", "dashed", "dotted")  # lines can be distinguished without colors
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), LINE),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.formatter.useoffset", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "axes.prop_cycle": cycler(color=COLORS, linestyle=2 * DASHES),
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
        lines = {name: line for name, line in lines.items() if len(line[1])}
        if not lines:
            continue
        figure = Figure(figsize=(3.7, 2.4), layout="constrained")  # inches; labels stay readable on a phone
        axes = figure.add_subplot()
        captions = []
        for name, (steps, values, others) in lines.items():
            first, last = (f"{value:.1%}" if key == "mfu" else number(value) for value in (values[0], values[-1]))
            text = f"{first} → {last}" + (f", {others:,} not finite" if others else "")
            captions.append(f"{name}: {text}" if len(lines) > 1 else text)
            [line] = axes.plot(steps, values, label=name, marker="o" if len(values) < 10 else None, markersize=3)
            if len(values) > SMOOTH_FROM:
                line.set(alpha=0.35, label=None)
                window = np.full(len(values) // 20, 1 / (len(values) // 20))
                steps, values = (np.convolve(points, window, "valid") for points in (steps, values))
                axes.plot(steps, values, label=name, color=line.get_color(), linestyle=line.get_linestyle())
        if len(lines) > 1:
            axes.legend()
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if key == "mfu":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if key != "loss":
            axes.set_ylim(bottom=0)
        charts.append(Chart(key, title, figure, "; ".join(captions)))
    return charts
