"""The metrics and tables of a run. They depend on what its evaluations contain, not on the name of the task."""

import math
from collections import Counter, defaultdict
from statistics import median
from textwrap import shorten

from common.evaluation.metrics import normalize_answer
from common.runtime.files import is_number

from .charts import number, series
from .run import RIGHT, Run

METRICS = {
    "anls": "ANLS",
    "anls_case_sensitive": "ANLS, case-sensitive",
    "auroc": "AUROC",
    "exact": "Exact match",
    "f1": "F1",
    "relaxed": "Relaxed accuracy",
}
IN_PERCENT = ("accuracy", "accuracy_by_likelihood", "consistency", "contains", "exact", "relaxed")


def metric_table(run: Run) -> list[dict[str, str]]:
    """Return all scalar values of the evaluations, the main metric first."""
    values: list[dict[str, float]] = [
        {key: value for key, value in evaluation.items() if is_number(value) and key != "samples"}
        for evaluation in (run.before, run.after)
    ]
    main = (run.before | run.after).get("metric")
    rows = []
    for key in sorted(values[0] | values[1], key=lambda key: key != main):
        before, after = (of_key.get(key, math.nan) for of_key in values)
        change = after - before
        rows.append(
            {
                "name": METRICS.get(key, key.replace("_", " ").capitalize()),
                "before": _metric_value(key, before),
                "after": _metric_value(key, after),
                "change": "" if math.isnan(change) else f"{100 * change:+.1f} pp" if key in IN_PERCENT else f"{change:+.3f}",
                "direction": "up" if change > 0 else "down" if change < 0 else "",
            }
        )
    return rows


def facts(run: Run) -> dict[str, str]:
    """Return the key numbers of a run: samples, steps, time, throughput."""
    values = {
        "Samples evaluated": (run.after or run.before).get("samples"),
        "Steps": run.state.get("global_step"),
        "Epochs": run.results.get("epoch", run.state.get("epoch")),
        "Mean loss": run.results.get("train_loss"),
    }
    for key, name in {"images_per_second": "Images per second", "tokens_per_second": "Tokens per second"}.items():
        values[name] = median(series(run.log, key)[1].tolist() or [math.nan])
    found = {name: number(value) for name, value in values.items() if value is not None and math.isfinite(value)}
    if mfu := series(run.log, "mfu")[1].tolist():
        found["MFU"] = f"{median(mfu):.1%}"
    if "train_runtime" in run.results:
        minutes, seconds = divmod(round(run.results["train_runtime"]), 60)
        long = f"{minutes // 60} h {minutes % 60:02} min"
        found["Training time"] = long if minutes >= 60 else f"{minutes} min {seconds:02} s"
    return found


def class_table(run: Run) -> list[tuple[str, str, str, str]]:
    """Return name, accuracy before and after training, and most frequent wrong answer of each class, lowest accuracy first."""
    before, after = (found.get("accuracy_per_class", {}) for found in (run.before, run.after))
    wrong: dict[str, Counter[str]] = defaultdict(Counter)
    for row in run.after.get("predictions", []):
        if row["score"] < RIGHT:
            wrong[normalize_answer(row["answers"][0])][shorten(row["prediction"], 60) or "(no answer)"] += 1
    return [
        (
            name,
            *(_metric_value("accuracy", of_class.get(name, math.nan)) for of_class in (before, after)),
            ", ".join(f"{answer} ({count:,})" for answer, count in wrong[normalize_answer(name)].most_common(1)) or "—",
        )
        for name in sorted(before | after, key=lambda name: (after.get(name, 0), before.get(name, 0), name))
    ]


def _metric_value(key: str, value: float) -> str:
    return "—" if not math.isfinite(value) else f"{value:.1%}" if key in IN_PERCENT else f"{value:.3f}"
