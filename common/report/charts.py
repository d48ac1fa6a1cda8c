"""The charts of a report, as SVG that follows the light or dark theme of the page, and as PNG."""

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
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve

# Charts are drawn in the light theme, which the PNG files use. In the page, each of these colors is replaced by a CSS variable,
# so that one drawing works in both themes. Therefore all of them must be different.
INK, MUTED, LINE, BEFORE, AFTER = "#1d1c1a", "#5f5b54", "#e0dcd3", "#8c8577", "#0e6252"
SERIES = ("#0e6253", "#b4551d", "#3c5aa6", "#8a2f6b", "#77680a", "#1f7a9a")
CSS_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", BEFORE: "before", AFTER: "after"} | {
    colour: f"series-{number}" for number, colour in enumerate(SERIES)
}
DASHES = ("solid", "dashed", "dotted")  # lines can be distinguished without colors
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "font.size": 8.5,
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
WIDTH = 3.7  # inches; narrow enough that labels stay readable on a phone
SMOOTH_FROM = 60  # number of logged points above which a moving average is also drawn
LONGEST_LABEL = 24  # characters; longer class names would leave no space for the matrix
NUMBERED_CLASSES = 16  # maximum number of classes for which the cells of a confusion matrix show counts


@dataclass
class Chart:
    """A figure with a title and a caption, which also serve as its description for screen readers."""

    name: str
    title: str
    figure: Figure
    caption: str

    def svg(self) -> Markup:
        """Return the figure as an inline SVG element with the colors of the page and ids that are unique to this chart."""
        buffer = io.StringIO()
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        svg = buffer.getvalue()
        view_box = re.search(r'viewBox="[^"]*"', svg)[0]
        body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index(">", svg.index("<svg")) + 1 :], flags=re.DOTALL)
        body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", body)
        body = re.sub("|".join(CSS_VARIABLES), lambda colour: f"var(--{CSS_VARIABLES[colour[0]]})", body)
        label = escape(f"{self.title}. {self.caption}")
        return Markup(f'<svg {view_box} role="img" aria-label="{label}" xmlns:xlink="http://www.w3.org/1999/xlink">{body}')

    def save_png(self, path: Path) -> None:
        """Save the figure as PNG, in the light theme."""
        with matplotlib.rc_context(STYLE):
            self.figure.savefig(path, format="png", dpi=160, facecolor="white")


def number(value: float) -> str:
    """Format a number for a caption or table: ``5e-06`` as ``5e-6``, ``0.12345`` as ``0.123``."""
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e6):
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    digits = f"{value:.3g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.2e}"
    return re.sub(r"\.?0*e\+?(-?)0*(?=\d)", r"e\1", digits)


def series(log: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values, float64 ``(points,)`` each, at which ``key`` was logged; values may be NaN."""
    points = [(entry["step"], float(entry[key])) for entry in log if key in entry and "step" in entry]
    return tuple(np.array(points, dtype=np.float64).reshape(-1, 2).T)


@matplotlib.rc_context(STYLE)
def curve_charts(logs: dict[str, Sequence[dict]]) -> list[Chart]:
    """Draw the training curves: one chart per quantity, with one line per run.

    Parameters
    ----------
    logs : dict of str to list of dict
        ``log_history`` by name of the run. A single run is drawn with its evaluation loss.

    Returns
    -------
    list of Chart
        Charts of the quantities that at least one run has logged.
    """
    charts = []
    for key, title in CURVES.items():
        lines = {name: series(log, key) for name, log in logs.items()}
        lines = {name: line for name, line in lines.items() if np.isfinite(line[1]).any()}
        if not lines:
            continue
        figure, axes = _axes(2.2)
        for index, name in enumerate(logs):
            if name not in lines:
                continue
            steps, values = lines[name]
            style = {"color": SERIES[index % len(SERIES)], "linestyle": DASHES[index % len(DASHES)]}
            if key in ("loss", "grad_norm") and len(steps) > SMOOTH_FROM:
                axes.plot(steps, values, linewidth=0.8, alpha=0.35, **style)
                axes.plot(steps, _smoothed(values), linewidth=1.6, **style)
            else:
                axes.plot(steps, values, linewidth=1.6, marker="o" if len(steps) == 1 else None, markersize=4, **style)
        if len(logs) > 1:
            caption = "Last: " + ", ".join(
                f"{name} {number(values[np.isfinite(values)][-1])}" for name, (_, values) in lines.items()
            )
        else:
            caption = _summary(key, *next(iter(lines.values())))
            steps, values = series(next(iter(logs.values())), "eval_loss")
            if key == "loss" and np.isfinite(values).any():
                axes.plot(steps, values, color=INK, linewidth=0, marker="o", markersize=3.5)
                caption += f"; evaluation (dots) {_summary('eval_loss', steps, values)}"
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if key == "mfu":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        elif key == "tokens_per_second":
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if key != "loss":
            axes.set_ylim(bottom=0)
        charts.append(Chart(key, title, figure, caption[:1].upper() + caption[1:] + "."))
    return charts


@matplotlib.rc_context(STYLE)
def score_chart(evaluations: dict[str, Sequence[float]]) -> Chart:
    """Draw the distribution of scores between 0 and 1, where scores below 0.5 count as 0, as for ANLS.

    Parameters
    ----------
    evaluations : dict of str to sequence of float
        Scores, with the key ``before``, ``after`` or both.
    """
    edges = [0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    labels = ["below .5", ".5", ".6", ".7", ".8", ".9", "exact"]
    figure, axes = _axes(2.6)
    captions = []
    for index, (when, scores) in enumerate(evaluations.items()):
        counts = np.bincount(np.searchsorted(edges, scores, side="right") - 1, minlength=len(labels))
        shares = counts / max(len(scores), 1)
        positions = np.arange(len(labels)) + (index - (len(evaluations) - 1) / 2) * 0.4
        bars = axes.bar(positions, 100 * shares, 0.38, color=BEFORE if when == "before" else AFTER, label=when)
        axes.bar_label(bars, [f"{100 * share:.0f}" if share else "" for share in shares], fontsize=6.5, padding=1.5)
        captions.append(f"{when}: {counts[0]:,} of {len(scores):,} below 0.5, {counts[-1]:,} exact")
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("score, from")
    axes.set_ylabel("% of the questions")
    axes.legend(loc="upper center", ncols=2)
    axes.margins(y=0.2)
    return Chart("scores", "Scores per question", figure, _sentence(captions))


@matplotlib.rc_context(STYLE)
def probability_chart(name: str, labels: Sequence[int], p_yes: Sequence[float]) -> Chart:
    """Draw the distribution of P(yes) for the samples with label 0 and those with label 1.

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
    figure, axes = _axes(2.6)
    axes.hist(p_yes[labels == 0], bins, color=BEFORE, alpha=0.75, label="label 0 (no)")
    axes.hist(p_yes[labels == 1], bins, color=AFTER, histtype="step", linewidth=1.8, label="label 1 (yes)")
    axes.set_xlabel("P(yes)")
    axes.set_ylabel("samples")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=2)
    caption = _sentence(
        f"median {np.median(p_yes[labels == label]):.2f} for label {label}" for label in (0, 1) if (labels == label).any()
    )
    return Chart(f"p-yes-{name}", f"P(yes) {name}", figure, caption)


@matplotlib.rc_context(STYLE)
def roc_chart(evaluations: dict[str, tuple[Sequence[int], Sequence[float]]]) -> Chart:
    """Draw the receiver operating characteristic of each evaluation.

    Parameters
    ----------
    evaluations : dict of str to (labels, p_yes)
        With the key ``before``, ``after`` or both. Both labels must occur.
    """
    figure, axes = _axes(2.6)
    axes.grid(axis="x")
    axes.plot([0, 1], [0, 1], color=LINE, linewidth=1)
    captions = []
    for when, (labels, p_yes) in evaluations.items():
        false_positives, true_positives, _ = roc_curve(labels, p_yes)
        area = roc_auc_score(labels, p_yes)
        line = {"color": BEFORE, "linestyle": (0, (4, 1.5))} if when == "before" else {"color": AFTER}
        axes.plot(false_positives, true_positives, linewidth=1.8, label=f"{when}, area {area:.3f}", **line)
        captions.append(f"{when}: area {area:.3f}")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.legend(loc="lower right")
    return Chart("roc", "ROC", figure, _sentence(captions))


def transition_chart(before: Sequence[float], after: Sequence[float]) -> Chart:
    """Draw how the answers changed between wrong, close and exact.

    Parameters
    ----------
    before, after : sequence of float, ``(samples,)``
        Scores of the same samples, between 0 and 1.
    """
    grades = ["wrong", "close", "exact"]
    first, last = ([grades[(score >= 0.5) + (score >= 1)] for score in scores] for scores in (before, after))
    figure, counts = _matrix(grades, first, last, "before", "after")
    improved, worsened = np.triu(counts, 1).sum(), np.tril(counts, -1).sum()
    caption = f"Answers that moved to a better class, above the diagonal: {improved:,}; to a worse one, below it: {worsened:,}."
    return Chart("transitions", "What became of the answers", figure, caption)


def confusion_chart(name: str, classes: Sequence[str], truth: Sequence[str], predicted: Sequence[str]) -> Chart:
    """Draw a confusion matrix, colored by the share of each true class.

    Parameters
    ----------
    name : str
        ``before`` or ``after``.
    classes : sequence of str
        All values that occur in ``truth`` and ``predicted``, in the order of the rows and columns.
    truth, predicted : sequence of str, ``(samples,)``
    """
    figure, counts = _matrix(classes, truth, predicted, "true class", "predicted class")
    caption = f"{np.trace(counts):,} of {len(truth):,} correct (on the diagonal)."
    return Chart(f"confusion-{name}", f"Confusion {name}", figure, caption)


@matplotlib.rc_context(STYLE)
def _matrix(
    labels: Sequence[str], rows: Sequence[str], columns: Sequence[str], row_title: str, column_title: str
) -> tuple[Figure, np.ndarray]:
    counts = confusion_matrix(rows, columns, labels=list(labels))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(labels)
    few = size <= 4
    figure, axes = _axes(2.6 if few else WIDTH)
    for row, column in np.argwhere(counts):
        # At most 45 % opaque, so that the count stays readable in both themes.
        alpha = 0.06 + 0.39 * shares[row, column]
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=AFTER, alpha=alpha, linewidth=0))
        if size <= NUMBERED_CLASSES:
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=9 if few else 6.5)
    shown = [label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…" for label in labels]
    axes.set_xticks(range(size), shown, rotation=0 if few else 90)
    axes.set_yticks(range(size), shown)
    axes.tick_params(labelsize=8.5 if few else max(2, min(6.5, 100 / size)), length=0)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel=column_title, ylabel=row_title)
    axes.set_aspect("auto" if few else "equal")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.hlines(np.arange(size + 1) - 0.5, -0.5, size - 0.5, color=LINE, linewidth=0.5)
    axes.vlines(np.arange(size + 1) - 0.5, -0.5, size - 0.5, color=LINE, linewidth=0.5)
    return figure, counts


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return a centered moving average of ``values`` over about a tenth of the points."""
    finite = np.isfinite(values)
    window = np.hanning(len(values) // 10 + 3)
    weights = np.convolve(finite, window, "same")
    return np.convolve(np.where(finite, values, 0), window, "same") / np.where(weights > 0, weights, np.nan)


def _summary(key: str, steps: np.ndarray, values: np.ndarray) -> str:
    finite = np.isfinite(values)
    invalid = f", {np.sum(~finite):,} not finite" if not finite.all() else ""
    steps, values = steps[finite], values[finite]
    low, high = np.argmin(values), np.argmax(values)
    highest = f"highest {number(values[high])} at step {number(steps[high])}"
    if key.endswith("loss"):
        lowest = f"lowest {number(values[low])} at step {number(steps[low])}"
        return f"from {number(values[0])} to {number(values[-1])}, {lowest}{invalid}"
    if key == "learning_rate":
        return highest
    if key == "mfu":
        return f"median {np.median(values):.1%}"
    return f"median {number(np.median(values))}, {highest}{invalid}"


def _sentence(parts) -> str:
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "." if text else ""
