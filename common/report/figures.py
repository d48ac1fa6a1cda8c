"""The metrics, tables and charts of a run. They depend on what its evaluations contain, not on the name of the task."""

import math
from collections import Counter
from statistics import median

from common.evaluation.metrics import normalise_answer

from .charts import Chart, confusion_chart, number, probability_chart, roc_chart, score_chart, series, transition_chart
from .run import RIGHT, Run, predictions_by_id

METRICS = {"anls": "ANLS", "anls_case_sensitive": "ANLS, case-sensitive", "auroc": "AUROC"}
IN_PERCENT = ("accuracy", "accuracy_by_likelihood", "consistency")
OUTCOMES = {
    "better": "got better",
    "stayed_right": "stayed right",
    "stayed_wrong": "stayed wrong",
    "worse": "got worse",
}
OTHER = "(other)"  # an answer that is not one of the classes
MOST_CLASSES = 120  # more distinct answers than this are treated as free text, without a confusion matrix


def metric_table(run: Run) -> list[dict]:
    """Return all scalar values of the evaluations, the main metric first."""
    keys = [run.metric] if run.metric else []
    keys += [
        key
        for key in {**run.before, **run.after}
        if key not in (run.metric, "samples") and isinstance({**run.before, **run.after}[key], int | float)
    ]
    rows = []
    for key in keys:
        before, after = _finite(run.before.get(key)), _finite(run.after.get(key))
        change = after - before if None not in (before, after) else None
        rows.append(
            {
                "name": _metric_name(key),
                "before": _metric_value(key, before),
                "after": _metric_value(key, after),
                "change": _metric_value(key, change, "+") if change is not None else None,
                "share_before": before,
                "share_after": after,
                "ends": ("0 %", "100 %") if key in IN_PERCENT else ("0", "1"),
            }
        )
    return rows


def facts(run: Run) -> dict[str, str]:
    """Return the key numbers of a run: samples, steps, time, throughput."""
    found = {}
    samples = (run.after or run.before).get("samples")
    if samples is not None:
        found["Samples evaluated"] = number(samples)
    if "global_step" in run.state:
        found["Steps"] = number(run.state["global_step"])
    epochs = run.results.get("epoch", run.state.get("epoch"))
    if epochs is not None:
        found["Epochs"] = number(round(epochs, 2))
    if "train_runtime" in run.results:
        found["Training time"] = format_duration(run.results["train_runtime"])
    if "train_loss" in run.results:
        found["Mean loss"] = number(run.results["train_loss"])
    for key, name in {"images_per_second": "Images per second", "tokens_per_second": "Tokens per second"}.items():
        values = series(run.log, key)[1]
        if len(values):
            found[name] = number(float(f"{median(values):.4g}"))
    values = series(run.log, "mfu")[1]
    if len(values):
        found["MFU"] = f"{100 * median(values):.1f} %"
    return found


def outcomes(run: Run) -> list[dict]:
    """Return how many samples got better, got worse, stayed right or stayed wrong."""
    first, last = predictions_by_id(run.before), predictions_by_id(run.after)
    counts = Counter()
    for key in first.keys() & last.keys():
        gain = last[key]["score"] - first[key]["score"]
        stayed = "stayed_right" if last[key]["score"] >= RIGHT else "stayed_wrong"
        counts["better" if gain > 0 else "worse" if gain < 0 else stayed] += 1
    return [{"key": key, "name": name, "count": counts[key]} for key, name in OUTCOMES.items() if counts[key]]


def evaluation_charts(run: Run) -> list[Chart]:
    """Return the charts for the contents of the evaluations."""
    evaluations = _evaluations(run)
    charts = []
    if run.metric == "anls" and evaluations:
        charts.append(score_chart({when: [row["score"] for row in rows] for when, rows in evaluations.items()}))
        first, last = predictions_by_id(run.before), predictions_by_id(run.after)
        both = [key for key in first if key in last]
        if both:
            charts.append(transition_chart(*([rows[key]["score"] for key in both] for rows in (first, last))))
    likely = {
        when: ([row["label"] for row in rows], [row["p_yes"] for row in rows])
        for when, rows in evaluations.items()
        if all("label" in row and "p_yes" in row for row in rows)
    }
    charts += [probability_chart(when, *evaluation) for when, evaluation in likely.items()]
    curves = {when: evaluation for when, evaluation in likely.items() if len(set(evaluation[0])) == 2}
    if curves:
        charts.append(roc_chart(curves))
    classes = _classes(run)
    if run.metric in ("accuracy", "auroc") and 0 < len(classes) <= MOST_CLASSES:
        # With probabilities, the confusion matrix before training would add nothing to the probability chart.
        for when, rows in list(evaluations.items())[-1 if likely else 0 :]:
            truth, predicted = _truth_and_predicted(rows, classes)
            shown = [*classes, OTHER] if OTHER in predicted else classes
            charts.append(confusion_chart(when, shown, truth, predicted))
    return charts


def class_table(run: Run) -> list[dict]:
    """Return the accuracy of each class before and after training, the lowest accuracy after training first."""
    before, after = (evaluation.get("accuracy_per_class", {}) for evaluation in (run.before, run.after))
    rows = [
        {
            "name": label,
            "before": _metric_value("accuracy", before.get(label)),
            "after": _metric_value("accuracy", after.get(label)),
            "share_before": before.get(label),
            "share_after": after.get(label),
        }
        for label in sorted(before | after)
    ]
    return sorted(rows, key=lambda row: (row["share_after"] or 0, row["share_before"] or 0))


def confusions(run: Run, limit: int = 8) -> list[tuple[str, str, int]]:
    """Return the most frequent confusions after training: true class, predicted class, count."""
    if not run.after.get("accuracy_per_class"):
        return []
    pairs = zip(*_truth_and_predicted(run.after["predictions"], _classes(run)), strict=True)
    counts = Counter((truth, predicted) for truth, predicted in pairs if truth != predicted)
    return [(*pair, count) for pair, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]]


def _metric_name(key: str) -> str:
    return METRICS.get(key, key.replace("_", " ").capitalize())


def _metric_value(key: str, value: float | None, sign: str = "") -> str:
    if value is None:
        return "—"
    if key in IN_PERCENT:
        return f"{100 * value:{sign}.1f} {'pp' if sign else '%'}"
    return f"{value:{sign}.3f}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _evaluations(run: Run) -> dict[str, list[dict]]:
    """Return the predictions of the available evaluations, with the keys `before` and `after`."""
    evaluations = {"before": run.before.get("predictions"), "after": run.after.get("predictions")}
    return {when: rows for when, rows in evaluations.items() if rows}


def _classes(run: Run) -> list[str]:
    """Return the classes that occur as reference answers, as they are written there, sorted."""
    answers = [row["answers"][0] for rows in _evaluations(run).values() for row in rows]
    return sorted({normalise_answer(answer): normalise_answer(answer, lower=False) for answer in answers}.values())


def _truth_and_predicted(rows: list[dict], classes: list[str]) -> tuple[list[str], list[str]]:
    name = {normalise_answer(label): label for label in classes}
    truth = [name[normalise_answer(row["answers"][0])] for row in rows]
    return truth, [name.get(normalise_answer(row["prediction"]), OTHER) for row in rows]
