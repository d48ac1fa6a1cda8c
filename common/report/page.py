"""The HTML report of one run, or a comparison of several runs."""

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from common.data.conversations import pictures
from common.data.pictures import decode_picture
from common.runtime.files import replacing, write_file
from common.runtime.process import InputError

from .charts import curve_charts
from .figures import MOST_CLASSES, class_table, confusions, evaluation_charts, facts, metric_table
from .gallery import group_samples, samples, save_gallery_images, select_gallery
from .run import RIGHT, Run, read_run


def write_report(output_dir: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a run, and its curves as PNG files to `curves/` in the run directory.

    Parameters
    ----------
    output_dir : path
        The run directory.
    path : path, optional
        The HTML file. Default: `report.html` in `output_dir`.

    Returns
    -------
    Path
        The HTML file.

    Raises
    ------
    FileNotFoundError
        If the directory does not exist, or contains no file of a run.
    InputError
        If a file is invalid; the message names it.
    """
    run = read_run(output_dir)
    curves = curve_charts({"training": run.log})
    for chart in curves:
        with replacing(run.directory / "curves" / f"{chart.name}.png") as temporary:
            chart.save_png(temporary)
    evaluations = list(run.predictions.values())
    answers = {when.capitalize(): predictions for when, predictions in run.predictions.items()}
    return _write_page(
        Path(path) if path else run.directory / "report.html",
        "run.html.j2",
        run=run,
        title=run.settings.get("task") or run.directory.resolve().name,
        date=_date(run),
        metrics=metric_table(run),
        facts=facts(run),
        outcomes=group_samples(evaluations) if len(evaluations) == 2 else {},
        charts=evaluation_charts(run),
        curves=curves,
        classes=class_table(run),
        confusions=confusions(run),
        most_classes=MOST_CLASSES,
        samples=samples(select_gallery(evaluations), answers, [run.directory]),
        settings=_settings(run),
    )


def report_run(output_dir: Path, conversation_of: Callable[[int], dict[str, Any]]) -> None:
    """Write the report at the end of a run, with the images of its samples.

    Parameters
    ----------
    output_dir : Path
    conversation_of : callable
        Returns the conversation of an evaluation row, for its index.
    """
    try:
        run = read_run(output_dir)
        rows: dict[str, int] = {}
        for row, entry in enumerate(run.after["predictions"]):
            rows.setdefault(str(entry["id"]), row)  # if an id occurs several times, the report uses the first row
        save_gallery_images(
            output_dir,
            lambda key: [decode_picture(picture) for picture in pictures(conversation_of(rows[key]))],
            [key for keys in select_gallery(list(run.predictions.values())).values() for key in keys],
        )
        print(f"report saved as {write_report(output_dir)}")
    except Exception as error:  # model and results are saved, and the report can be created later
        print(
            f"warning: report.html was not created ({error!r}); run python -m tools.report {output_dir} to create it",
            file=sys.stderr,
        )


def write_comparison(directories: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> Path:
    """Write a comparison of several runs: metrics, settings that differ, training curves, and answers to the same samples.

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
    FileNotFoundError, InputError
        See `write_report`.
    """
    runs = [read_run(directory) for directory in directories]
    places = [run.directory.resolve() for run in runs]
    if len(set(places)) < len(places):
        raise InputError(f"{places[0]} and other runs are the same directory; pass each run only once")
    parent = os.path.commonpath(places)
    named = {os.path.relpath(place, parent): run for place, run in zip(places, runs, strict=True)}
    answers = {name: run.predictions["after"] for name, run in named.items() if "after" in run.predictions}
    with_images = {key for run in runs for keys in select_gallery(list(run.predictions.values())).values() for key in keys}
    # One run may set on the command line what another leaves at its default.
    settings = [
        {(group == "Versions", key): value for group, values in _settings(run).items() for key, value in values.items()}
        for run in runs
    ]
    keys = dict.fromkeys(key for of_run in settings for key in of_run)
    rows = {key: [of_run.get(key, "—") for of_run in settings] for key in keys}
    return _write_page(
        Path(path),
        "comparison.html.j2",
        title=f"{len(runs)} runs compared",
        date="",
        runs=named,
        metrics={name: metric_table(run) for name, run in named.items()},
        facts=[facts(run) for run in runs],
        different={key: values for key, values in rows.items() if len(set(values)) > 1},
        same={key: values[0] for (_, key), values in rows.items() if len(set(values)) == 1},
        curves=curve_charts({name: run.log for name, run in named.items()}),
        samples=samples(select_gallery(list(answers.values()), with_images), answers, places) if len(answers) > 1 else [],
    )


def _write_page(path: Path, template: str, **content: Any) -> Path:
    # All texts may come from a model or a dataset, so everything is escaped.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_file(path, environment.get_template(template).render(**content, right=RIGHT))
    return path


def _date(run: Run) -> str:
    date = str(run.settings.get("date", ""))
    try:
        return datetime.fromisoformat(date).strftime("%d %B %Y, %H:%M %Z").strip()
    except ValueError:
        return date


def _settings(run: Run) -> dict[str, dict[str, str]]:
    """Return the settings as text, in groups: hyperparameters that the command names, then the others, without empty ones."""
    given = re.findall(r"--([\w-]+)", str(run.settings.get("command")))
    names = ("Run", "Set on the command line", "Versions", "Other hyperparameters")
    groups: dict[str, dict[str, str]] = {name: {} for name in names}
    for key, value in run.settings.items():
        for name, setting in (value if isinstance(value, dict) else {key: value}).items():
            named = name in given or name.removesuffix("s") in given  # --metric sets metrics
            hyperparameters = "Set on the command line" if named else "Other hyperparameters"
            group = {"hyperparameters": hyperparameters, "versions": "Versions"}.get(key, "Run")
            if setting not in (None, []) and key not in ("command", "date"):
                words = setting if isinstance(setting, list) else [setting]
                texts = (word if isinstance(word, str) else json.dumps(word, ensure_ascii=False) for word in words)
                groups[group][name] = ", ".join(texts)
    return {name: group for name, group in groups.items() if group}
