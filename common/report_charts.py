"""The charts of a report, drawn once: as SVG that follows the page's light or dark theme, and as PNG."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve

# Charts are drawn in the light theme, which is what the PNG files keep. In the page each of these colours becomes the
# CSS variable of its name, so that one drawing serves both themes. Each must be a colour of its own.
INK, MUTED, LINE, BEFORE, AFTER = "#1d1c1a", "#5f5b54", "#e0dcd3", "#8c8577", "#0e6252"
SERIES = ("#0e6253", "#b4551d", "#3c5aa6", "#8a2f6b", "#77680a", "#1f7a9a")
CSS_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", BEFORE: "before", AFTER: "after"} | {
    colour: f"series-{number}" for number, colour in enumerate(SERIES)
}
DASHES = ("solid", (0, (5, 1.5)), (0, (1, 1.2)))
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}
CURVES = {
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOPs utilization",
}
WIDTH = 4.8  # inches; at 9 points the labels stay readable on a phone, where a chart is as wide as the screen
SMOOTH_FROM = 60  # logged points, above which a moving average is drawn over them
NUMBERED_CLASSES = 16  # up to which the cells of a confusion matrix hold their counts


@dataclass
class Chart:
    """A drawn figure with its title and a sentence on what it shows, which is also what a screen reader says of it."""

    name: str
    title: str
    figure: Figure
    caption: str

    def svg(self) -> Markup:
        """Return the figure as an inline SVG element: coloured by the page, its ids unique to this chart."""
        buffer = io.StringIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        svg = buffer.getvalue()
        view_box = re.search(r'viewBox="[^"]*"', svg)[0]
        body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index(">", svg.index("<svg")) + 1 :], flags=re.DOTALL)
        body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", body)
        body = re.sub("|".join(CSS_VARIABLES), lambda colour: f"var(--{CSS_VARIABLES[colour[0]]})", body)
        label = escape(f"{self.title}. {self.caption}")
        return Markup(
            f'<svg {view_box} role="img" aria-label="{label}" xmlns:xlink="http://www.w3.org/1999/xlink">{body}'
        )

    def save_png(self, path: Path) -> None:
        """Write the figure as PNG, in the light theme."""
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(path, format="png", dpi=160, facecolor="white")


def number(value: float) -> str:
    """Return a figure short enough for a caption or a table: ``5e-06`` as ``5e-6``, ``0.12345`` as ``0.123``."""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e6):
        return f"{int(value):,}"
    digits = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return re.sub(r"e([+-])0*(\d)", lambda exponent: "e" + exponent[1].replace("+", "") + exponent[2], digits)


def series(log: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values, float64 ``(points,)`` each, at which ``key`` was logged; values may be NaN."""
    points = [(entry["step"], float(entry[key])) for entry in log if key in entry and "step" in entry]
    return tuple(np.array(points, dtype=np.float64).reshape(-1, 2).T)


@matplotlib.rc_context(STYLE)
def curve_charts(logs: Sequence[Sequence[dict]]) -> list[Chart]:
    """Draw what was logged while training, one chart a quantity, with one line for each log.

    Parameters
    ----------
    logs : sequence of list of dict
        ``log_history`` of each run. One alone is drawn with its evaluation loss, and smoothed where it is long.

    Returns
    -------
    list of Chart
        Only of the quantities that some log has.
    """
    charts = []
    for key, title in CURVES.items():
        lines = [series(log, key) for log in logs]
        if not any(np.isfinite(values).any() for _, values in lines):
            continue
        figure, axes = _axes(2.5)
        captions = []
        for index, (steps, values) in enumerate(lines):
            colour, dash = (SERIES[index % len(SERIES)], DASHES[index // len(SERIES) % len(DASHES)])
            noisy = key in ("loss", "grad_norm") and len(steps) > SMOOTH_FROM
            axes.plot(steps, values, color=colour, linestyle=dash, **_raw_line(noisy, len(steps)))
            if noisy:
                axes.plot(steps, _smoothed(values), color=colour, linestyle=dash, linewidth=1.6)
            captions.append(_change(steps, values))
        if key == "loss" and len(logs) == 1:
            steps, values = series(logs[0], "eval_loss")
            if len(steps):
                axes.plot(steps, values, color=INK, linewidth=0, marker="o", markersize=3.5)
                captions.append(f"evaluation (dots) {_change(steps, values)}")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if key == "mfu":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if key != "loss":
            axes.set_ylim(bottom=0)
        caption = "; ".join(captions) if len(logs) == 1 else f"{len(logs)} runs over their steps"
        charts.append(Chart(key, title, figure, caption))
    return charts


@matplotlib.rc_context(STYLE)
def score_chart(evaluations: dict[str, Sequence[float]]) -> Chart:
    """Draw how the samples' scores are spread, for a score between 0 and 1 that is 0 below one half, as ANLS is.

    Parameters
    ----------
    evaluations : dict of str to sequence of float
        Scores under ``before``, ``after`` or both.
    """
    edges = [0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    labels = ["< 0.5", "0.5 – 0.6", "0.6 – 0.7", "0.7 – 0.8", "0.8 – 0.9", "0.9 – 1", "exact"]
    figure, axes = _axes(2.7)
    captions = []
    for index, (when, scores) in enumerate(evaluations.items()):
        counts = np.bincount(np.searchsorted(edges, scores, side="right") - 1, minlength=len(labels))
        shares = counts / max(len(scores), 1)
        places = np.arange(len(labels)) + (index - (len(evaluations) - 1) / 2) * 0.4
        bars = axes.bar(places, shares, 0.38, color=BEFORE if when == "before" else AFTER)
        axes.bar_label(bars, [f"{share:.0%}" if share else "" for share in shares], fontsize=7.5, padding=2)
        captions.append(f"{when}: {counts[0]:,} of {len(scores):,} below 0.5, {counts[-1]:,} exact")
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("score of a question")
    axes.margins(y=0.12)
    return Chart("scores", "Scores per question", figure, _sentence(captions))


@matplotlib.rc_context(STYLE)
def probability_chart(name: str, labels: Sequence[int], p_yes: Sequence[float]) -> Chart:
    """Draw how P(yes) is spread over the samples whose label is 0 and those whose label is 1.

    Parameters
    ----------
    name : str
        ``before`` or ``after``.
    labels : sequence of int, ``(samples,)``
    p_yes : sequence of float, ``(samples,)``
        Between 0 and 1.
    """
    labels, p_yes = np.asarray(labels), np.asarray(p_yes)
    bins = np.linspace(0, 1, 21)
    figure, axes = _axes(2.4)
    axes.hist(p_yes[labels == 0], bins, color=BEFORE, alpha=0.75, label="label 0 (no)")
    axes.hist(p_yes[labels == 1], bins, color=AFTER, histtype="step", linewidth=1.8, label="label 1 (yes)")
    axes.set_xlabel("P(yes)")
    axes.set_ylabel("samples")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=2, fontsize=8)
    caption = _sentence(
        f"median {np.median(p_yes[labels == label]):.2f} where the label is {label}"
        for label in (0, 1)
        if (labels == label).any()
    )
    return Chart(f"p-yes-{name}", f"P(yes) {name}", figure, caption)


@matplotlib.rc_context(STYLE)
def roc_chart(evaluations: dict[str, tuple[Sequence[int], Sequence[float]]]) -> Chart:
    """Draw the receiver operating characteristic of each evaluation.

    Parameters
    ----------
    evaluations : dict of str to (labels, p_yes)
        Under ``before``, ``after`` or both; both labels must occur.
    """
    figure, axes = _axes(3.4)
    axes.grid(axis="x")
    axes.plot([0, 1], [0, 1], color=LINE, linewidth=1)
    captions = []
    for when, (labels, p_yes) in evaluations.items():
        false_positives, true_positives, _ = roc_curve(labels, p_yes)
        area = roc_auc_score(labels, p_yes)
        line = {"color": BEFORE, "linestyle": (0, (4, 1.5))} if when == "before" else {"color": AFTER}
        axes.plot(false_positives, true_positives, linewidth=1.8, label=f"{when}, area {area:.3f}", **line)
        captions.append(f"{when}: area {area:.3f}")
    axes.set_aspect("equal")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.legend(loc="lower right", fontsize=8)
    return Chart("roc", "ROC", figure, _sentence(captions))


@matplotlib.rc_context(STYLE)
def confusion_chart(name: str, classes: Sequence[str], truth: Sequence[str], predicted: Sequence[str]) -> Chart:
    """Draw which class was taken for which, as shares of each true class.

    Parameters
    ----------
    name : str
        ``before`` or ``after``.
    classes : sequence of str
        In the order of the rows and columns; ``truth`` and ``predicted`` hold nothing else.
    truth, predicted : sequence of str, ``(samples,)``
    """
    counts = confusion_matrix(truth, predicted, labels=list(classes))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(classes)
    figure, axes = _axes(min(WIDTH, 1.4 + 0.42 * size))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for row, column in np.argwhere(counts):
        # At most 0.45 opaque, so that the count on it keeps its contrast in both themes.
        axes.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=AFTER, alpha=0.06 + 0.39 * shares[row, column])
        )
        if size <= NUMBERED_CLASSES:
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=8)
    font = 8 if size <= 12 else max(2.5, 96 / size)
    axes.set_xticks(range(size), classes, rotation=45 if size > 3 else 0, ha="right" if size > 3 else "center")
    axes.set_yticks(range(size), classes)
    axes.tick_params(labelsize=font, length=0)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal", xlabel="predicted", ylabel="true")
    axes.hlines(np.arange(size + 1) - 0.5, -0.5, size - 0.5, color=LINE, linewidth=0.5)
    axes.vlines(np.arange(size + 1) - 0.5, -0.5, size - 0.5, color=LINE, linewidth=0.5)
    right = int(np.trace(counts))
    caption = f"{right:,} of {len(truth):,} on the diagonal. Rows are true classes, columns predicted ones."
    return Chart(f"confusion-{name}", f"Confusion {name}", figure, caption)


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _raw_line(noisy: bool, points: int) -> dict:
    if noisy:
        return {"linewidth": 0.8, "alpha": 0.35}
    return {"linewidth": 1.6, "marker": "o" if points == 1 else None, "markersize": 4}


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return the bias-corrected exponential moving average of ``values``, over about a thirtieth of their number."""
    decay = 1 - 30 / len(values)
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(average / weight if weight else math.nan)
    return np.array(smoothed)


def _change(steps: np.ndarray, values: np.ndarray) -> str:
    finite = np.isfinite(values)
    lost = f", {np.sum(~finite):,} not finite" if not finite.all() else ""
    steps, values = steps[finite], values[finite]
    if not len(values):
        return f"no finite value{lost}"
    if len(values) == 1:
        return f"{number(values[0])} at step {number(steps[0])}{lost}"
    low, high = np.argmin(values), np.argmax(values)
    return (
        f"from {number(values[0])} to {number(values[-1])}, lowest {number(values[low])} at step {number(steps[low])}, "
        f"highest {number(values[high])} at step {number(steps[high])}{lost}"
    )


def _sentence(parts) -> str:
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "." if text else ""
