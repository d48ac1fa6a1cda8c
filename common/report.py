"""The report of a run: its figures, curves, distributions and a gallery of samples, in one HTML file that needs nothing else.

A run directory holds what the training scripts write: `run.json`, `eval_before.json`, `eval_after.json`,
`trainer_state.json`, `train_results.json` and `gallery/<id>_<k>.jpg`. Any of them may be missing: the report shows what
there is and says what is not. What it shows depends on what the evaluations hold, not on the name of a task.
"""

import base64
import hashlib
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median

import jinja2
from PIL import Image

from common.report_charts import (
    DASHES,
    SERIES,
    Chart,
    confusion_chart,
    curve_charts,
    number,
    probability_chart,
    roc_chart,
    score_chart,
    series,
    transition_chart,
)

FILES = {
    "run.json": "the command, versions, data and hyperparameters are not known",
    "eval_before.json": "nothing to compare with: evaluation before training was off, or did not finish",
    "eval_after.json": "no result: evaluation after training was off, or the run ended before it",
    "trainer_state.json": "no curves",
    "train_results.json": "the training time is not known",
}
METRICS = {"anls": "ANLS", "anls_case_sensitive": "ANLS, case-sensitive", "auroc": "AUROC"}
IN_PERCENT = ("accuracy", "accuracy_by_likelihood", "consistency")
GROUPS = {
    "better": "Got better",
    "worse": "Got worse",
    "stayed_wrong": "Stayed wrong",
    "wrong": "Wrong",
    "right": "Right",
}
OUTCOMES = {
    "better": "got better",
    "stayed_right": "stayed right",
    "stayed_wrong": "stayed wrong",
    "worse": "got worse",
}
RIGHT = 0.5  # the score from which an answer counts as right: ANLS is 0 below it
THUMBNAIL_SIDE = 640
FOREMOST = 3  # samples of each group that the gallery shows at first
OTHER = "(other)"  # an answer that is none of the classes
MOST_CLASSES = 120  # that a confusion matrix can show; answers are open where there are more


@dataclass
class Run:
    """What a run directory holds.

    `before` and `after` are the evaluations, `state` the Trainer's state, `results` its closing figures and `settings`
    the contents of `run.json`; a file that is missing is an empty dict here and its name a key of `missing`.
    """

    directory: Path
    before: dict
    after: dict
    state: dict
    results: dict
    settings: dict
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def metric(self) -> str | None:
        return (self.after or self.before).get("metric")

    @property
    def log(self) -> list[dict]:
        return self.state.get("log_history", [])


def write_report(output_dir: str | os.PathLike, path: str | os.PathLike | None = None) -> Path:
    """Write the report of a run, and its curves as PNG files to `curves/` beside what they come from.

    Parameters
    ----------
    output_dir : path
        The run directory.
    path : path, optional
        The HTML file, by default `report.html` in `output_dir`.

    Returns
    -------
    Path
        The HTML file.

    Raises
    ------
    FileNotFoundError
        If there is no such directory, or it holds none of a run's files.
    ValueError
        If one of the files is not what it should be; the message names the file.
    """
    run = read_run(output_dir)
    path = Path(path) if path else run.directory / "report.html"
    curves = curve_charts({"training": run.log})
    for chart in curves:
        with _replacing(run.directory / "curves" / f"{chart.name}.png") as temporary:
            chart.save_png(temporary)
    groups = select_gallery(run.before, run.after)
    page = (
        _environment()
        .get_template("run.html.j2")
        .render(
            run=run,
            title=run.settings.get("task") or run.directory.resolve().name,
            subtitle=" · ".join(run.settings[key] for key in ("base_model", "method") if key in run.settings),
            figures=_figures(run),
            facts=_facts(run),
            outcomes=_outcomes(run),
            curves=curves,
            charts=_evaluation_charts(run),
            classes=_class_table(run),
            confusions=_confusions(run),
            gallery=_gallery(run, groups),
            groups={group: GROUPS[group] for group, ids in groups.items() if ids},
            settings=_settings(run),
            date=_date(run),
        )
    )
    with _replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def write_comparison(directories: Sequence[str | os.PathLike], path: str | os.PathLike) -> Path:
    """Write several runs side by side: their metrics, the settings in which they differ, and their curves overlaid.

    Parameters
    ----------
    directories : sequence of path
        The run directories.
    path : path
        The HTML file.

    Returns
    -------
    Path
        The HTML file.

    Raises
    ------
    FileNotFoundError, ValueError
        As `write_report`.
    """
    runs = [read_run(directory) for directory in directories]
    names = _names(runs)
    settings = _rows([{key: value for group in _settings(run).values() for key, value in group.items()} for run in runs])
    page = (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            names=names,
            runs=runs,
            figures=[_figures(run) for run in runs],
            facts=_rows([_facts(run) for run in runs]),
            different={key: values for key, values in settings.items() if len(set(values)) > 1},
            same={key: values[0] for key, values in settings.items() if len(set(values)) == 1},
            curves=curve_charts({name: run.log for name, run in zip(names, runs, strict=True)}),
            colours=len(SERIES),
            dashes=DASHES,
        )
    )
    with _replacing(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def select_gallery(before: dict | None, after: dict | None, limit_per_group: int = 12) -> dict[str, list[str]]:
    """Choose the samples worth showing: what training changed most, and what it left wrong.

    Parameters
    ----------
    before, after : dict or None
        Evaluations as in `eval_before.json` and `eval_after.json`; either may be missing.
    limit_per_group : int
        How many samples of a group are chosen at most.

    Returns
    -------
    dict of str to list of str
        Ids under `better`, `worse` and `stayed_wrong` (with one evaluation only: `wrong` and `right`), the greatest
        change first. Among equals the choice is arbitrary, but the same in every call.
    """
    first, last = _predictions(before), _predictions(after)
    arbitrary = sorted(first.keys() & last.keys() if first and last else first or last, key=_arbitrary_order)
    if not (first and last):
        only = {key: (last or first)[key]["score"] for key in arbitrary}
        groups = {
            "wrong": [key for key in arbitrary if only[key] < RIGHT],
            "right": [key for key in arbitrary if only[key] >= RIGHT],
        }
    else:
        gain = {key: last[key]["score"] - first[key]["score"] for key in arbitrary}
        groups = {
            "better": sorted((key for key in arbitrary if gain[key] > 0), key=lambda key: -gain[key]),
            "worse": sorted((key for key in arbitrary if gain[key] < 0), key=lambda key: gain[key]),
            "stayed_wrong": [key for key in arbitrary if gain[key] == 0 and last[key]["score"] < RIGHT],
        }
    return {group: ids[:limit_per_group] for group, ids in groups.items()}


def save_gallery_images(
    output_dir: str | os.PathLike, pictures: Callable[[str], Sequence[Image.Image]], ids: Iterable[str]
) -> None:
    """Write thumbnails of the samples' pictures to `gallery/<id>_<k>.jpg`, at most 640 pixels on the longer side.

    Parameters
    ----------
    output_dir : path
        The run directory.
    pictures : callable
        From a sample's id to its pictures, in any mode.
    ids : iterable of str
        The samples; ids that are unfit for a file name are given another one.
    """
    for key in ids:
        for k, picture in enumerate(pictures(key)):
            thumbnail = picture.convert("RGB")
            thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            with _replacing(_thumbnail_path(Path(output_dir), key, k)) as temporary:
                thumbnail.save(temporary, format="JPEG", quality=85)


def read_run(directory: str | os.PathLike) -> Run:
    """Read what a run directory holds.

    Parameters
    ----------
    directory : path

    Returns
    -------
    Run

    Raises
    ------
    FileNotFoundError
        If there is no such directory, or it holds none of a run's files.
    ValueError
        If one of the files is not what it should be; the message names the file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; give the --output_dir of a training run")
    contents = {name: _read_json(directory / name) for name in FILES if (directory / name).is_file()}
    if not contents:
        raise FileNotFoundError(f"{directory} holds none of a run's files ({', '.join(FILES)}): is it an --output_dir?")
    for name in contents.keys() & {"eval_before.json", "eval_after.json"}:
        _check_evaluation(contents[name], directory / name)
    return Run(
        directory,
        before=contents.get("eval_before.json", {}),
        after=contents.get("eval_after.json", {}),
        state=contents.get("trainer_state.json", {}),
        results=contents.get("train_results.json", {}),
        settings=contents.get("run.json", {}),
        missing={name: consequence for name, consequence in FILES.items() if name not in contents},
    )


def _read_json(path: Path) -> dict:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it or run the training again") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(contents).__name__}")
    return contents


def _check_evaluation(evaluation: dict, path: Path) -> None:
    metric = evaluation.get("metric")
    if not isinstance(metric, str) or not isinstance(evaluation.get(metric), int | float):
        raise ValueError(f"{path}: 'metric' must name the key of a number in the same file, not {metric!r}")
    for row, prediction in enumerate(evaluation.get("predictions", [])):
        absent = {"id", "question", "prediction", "answers", "score"} - set(prediction)
        if absent or not prediction["answers"]:
            raise ValueError(f"{path}: prediction {row} has no {', '.join(sorted(absent)) or 'answers'}")


def _predictions(evaluation: dict | None) -> dict[str, dict]:
    """Return the predictions by id; of several with the same id, the first."""
    return {str(row["id"]): row for row in reversed((evaluation or {}).get("predictions", []))}


def _arbitrary_order(key: str) -> tuple[int, str]:
    return zlib.crc32(key.encode()), key


def _thumbnail_path(directory: Path, key: str, k: int) -> Path:
    fit = re.fullmatch(r"[A-Za-z0-9-][A-Za-z0-9._-]{0,79}", key)
    stem = key if fit else re.sub(r"[^A-Za-z0-9-]+", "-", key)[:40] + "-" + hashlib.sha1(key.encode()).hexdigest()[:12]
    return directory / "gallery" / f"{stem}_{k}.jpg"


def _thumbnails(directory: Path, key: str) -> Iterator[str]:
    k = 0
    while (path := _thumbnail_path(directory, key, k)).is_file():
        yield "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()
        k += 1


def _metric_name(key: str) -> str:
    return METRICS.get(key, key.replace("_", " ").capitalize())


def _metric_value(key: str, value: float | None, sign: str = "") -> str:
    if value is None:
        return "—"
    if key in IN_PERCENT:
        return f"{100 * value:{sign}.1f} {'pp' if sign else '%'}"
    return f"{value:{sign}.3f}"


def _figures(run: Run) -> list[dict]:
    """Return every figure of the evaluations, the main metric first."""
    keys = [run.metric] if run.metric else []
    keys += [
        key
        for key in {**run.before, **run.after}
        if key not in (run.metric, "samples") and isinstance({**run.before, **run.after}[key], int | float)
    ]
    figures = []
    for key in keys:
        before, after = _finite(run.before.get(key)), _finite(run.after.get(key))
        change = after - before if None not in (before, after) else None
        figures.append(
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
    return figures


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _facts(run: Run) -> dict[str, str]:
    facts = {}
    samples = (run.after or run.before).get("samples")
    if samples is not None:
        facts["Samples evaluated"] = number(samples)
    if "global_step" in run.state:
        facts["Steps"] = number(run.state["global_step"])
    epochs = run.results.get("epoch", run.state.get("epoch"))
    if epochs is not None:
        facts["Epochs"] = number(round(epochs, 2))
    if "train_runtime" in run.results:
        facts["Training time"] = _duration(run.results["train_runtime"])
    if "train_loss" in run.results:
        facts["Mean loss"] = number(run.results["train_loss"])
    for key, name in {"images_per_second": "Images per second", "tokens_per_second": "Tokens per second"}.items():
        values = series(run.log, key)[1]
        if len(values):
            facts[name] = number(float(f"{median(values):.4g}"))
    values = series(run.log, "mfu")[1]
    if len(values):
        facts["MFU"] = f"{100 * median(values):.1f} %"
    return facts


def _date(run: Run) -> str | None:
    try:
        return datetime.fromisoformat(run.settings["date"]).strftime("%d %B %Y, %H:%M %Z").strip()
    except (KeyError, TypeError, ValueError):
        return run.settings.get("date")


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _outcomes(run: Run) -> list[dict]:
    """Return how many samples got better, got worse, or stayed right or wrong."""
    first, last = _predictions(run.before), _predictions(run.after)
    counts = Counter()
    for key in first.keys() & last.keys():
        gain = last[key]["score"] - first[key]["score"]
        stayed = "stayed_right" if last[key]["score"] >= RIGHT else "stayed_wrong"
        counts["better" if gain > 0 else "worse" if gain < 0 else stayed] += 1
    return [{"key": key, "name": name, "count": counts[key]} for key, name in OUTCOMES.items() if counts[key]]


def _evaluations(run: Run) -> dict[str, list[dict]]:
    """Return the predictions of the evaluations that there are, under `before` and `after`."""
    evaluations = {"before": run.before.get("predictions"), "after": run.after.get("predictions")}
    return {when: rows for when, rows in evaluations.items() if rows}


def _evaluation_charts(run: Run) -> list[Chart]:
    """Return the charts that fit what the evaluations hold."""
    evaluations = _evaluations(run)
    charts = []
    if run.metric == "anls" and evaluations:
        charts.append(score_chart({when: [row["score"] for row in rows] for when, rows in evaluations.items()}))
        first, last = _predictions(run.before), _predictions(run.after)
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
        # Probabilities show more of the state before training than the answers drawn from them.
        for when, rows in list(evaluations.items())[-1 if likely else 0 :]:
            truth, predicted = _truth_and_predicted(rows, classes)
            shown = [*classes, OTHER] if OTHER in predicted else classes
            charts.append(confusion_chart(when, shown, truth, predicted))
    return charts


def _normal(answer: str) -> str:
    return answer.strip().strip(".").lower()


def _classes(run: Run) -> list[str]:
    """Return the classes that occur as an answer, as they are written there, sorted."""
    answers = [row["answers"][0] for rows in _evaluations(run).values() for row in rows]
    return sorted({_normal(answer): answer.strip(" .") for answer in answers}.values())


def _truth_and_predicted(rows: list[dict], classes: list[str]) -> tuple[list[str], list[str]]:
    name = {_normal(label): label for label in classes}
    truth = [name[_normal(row["answers"][0])] for row in rows]
    return truth, [name.get(_normal(row["prediction"]), OTHER) for row in rows]


def _class_table(run: Run) -> list[dict]:
    """Return each class with its accuracy before and after, the worst after training first."""
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


def _confusions(run: Run, limit: int = 8) -> list[tuple[str, str, int]]:
    """Return the pairs of classes that are still taken for each other most often: true, predicted, count."""
    if not run.after.get("accuracy_per_class"):
        return []
    pairs = zip(*_truth_and_predicted(run.after["predictions"], _classes(run)), strict=True)
    counts = Counter((truth, predicted) for truth, predicted in pairs if truth != predicted)
    return [(*pair, count) for pair, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit]]


def _gallery(run: Run, groups: dict[str, list[str]]) -> dict:
    """Return the gallery's samples, and the question by itself where it is the same for all of them."""
    first, last = _predictions(run.before), _predictions(run.after)
    samples = []
    for group, ids in groups.items():
        for place, key in enumerate(ids):
            row = last.get(key) or first[key]
            samples.append(
                {
                    "group": group,
                    "foremost": place < FOREMOST,
                    "id": key,
                    "question": row["question"],
                    "answers": list(dict.fromkeys(row["answers"])),
                    "predictions": {"before": first.get(key), "after": last.get(key)},
                    "pictures": list(_thumbnails(run.directory, key)),
                }
            )
    questions = {sample["question"] for sample in samples}
    return {"samples": samples, "question": questions.pop() if len(questions) == 1 and len(samples) > 1 else None}


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the shortest ends of the directories' paths that tell them apart."""
    parts = [run.directory.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{runs[0].directory} and others of the runs are the same directory; name each only once")


def _settings(run: Run) -> dict[str, dict[str, str]]:
    """Return the settings as text, in titled groups, without those that stand in the report's head."""
    groups = {"Run": {}}
    for key, value in run.settings.items():
        name = key.replace("_", " ").capitalize()
        if isinstance(value, dict):
            groups[name] = {inner: _text(setting) for inner, setting in value.items()}
        elif key not in ("command", "date"):
            groups["Run"][name] = _text(value)
    return {name: group for name, group in groups.items() if group}


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _rows(columns: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """Return for each key its value in every column, a dash where a column has none."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return {key: [column.get(key, "—") for column in columns] for key in keys}


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path whose file replaces the one at `path` once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _environment() -> jinja2.Environment:
    # Everything that is shown may come from a model or a data set, so everything is escaped but the charts.
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "report_templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
