"""The HTML report of a run, or the comparison of several runs."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from common.data.conversations import pictures
from common.data.pictures import decode_picture
from common.runtime.files import replacing, write_file
from common.runtime.process import InputError

from .charts import curve_charts
from .figures import class_table, facts, metric_table
from .gallery import PER_GROUP, by_id, group_samples, in_gallery, save_thumbnails, thumbnails
from .run import FILES, RIGHT, Run, read_run


def write_report(directories: Sequence[str | os.PathLike[str]], path: Path) -> None:
    """Write the report of a run, or a comparison of several runs.

    Parameters
    ----------
    directories : sequence of path
        The run directories.
    path : Path
        The HTML file.

    Raises
    ------
    InputError
        If a directory is not that of a run, or a file in it is invalid; the message names it.
    """
    runs = [read_run(directory) for directory in directories]
    places = [run.directory.resolve() for run in runs]
    if len(set(places)) < len(places):
        raise InputError(f"{places[0]} and other runs are the same directory; pass each run only once")
    parent = os.path.commonpath(places)
    named = {os.path.relpath(place, parent): run for place, run in zip(places, runs, strict=True)}
    single = runs[0] if len(runs) == 1 else None
    if single:
        evaluations = {when.capitalize(): by_id(rows) for when, rows in single.predictions.items()}
        curves = curve_charts({"training": single.log})
        for chart in curves if path.parent.resolve() == places[0].resolve() else ():
            with replacing(path.parent / "curves" / f"{chart.name}.png") as temporary:
                chart.save_png(temporary)
    else:
        evaluations = {name: by_id(run.predictions["after"]) for name, run in named.items() if "after" in run.predictions}
        curves = curve_charts({name: run.log for name, run in named.items()})
    groups = group_samples(list(evaluations.values()), {key for run in runs for key in in_gallery(run)})
    questions = {row["question"] for rows in evaluations.values() for row in rows.values()}
    # All texts may come from a model or a dataset, so everything is escaped.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=(single.settings.get("task") or places[0].name) if single else f"{len(runs)} runs compared",
        runs=named,
        single=single,
        settings=single.settings if single else {},
        files=FILES,
        metrics={name: metric_table(run) for name, run in named.items()},
        facts=facts(single) if single else {},
        classes=class_table(single) if single else [],
        curves=curves,
        questions=list(questions),
        groups={group: ids for group, ids in groups.items() if ids},
        per_group=PER_GROUP,
        evaluations=evaluations,
        thumbnails=lambda key: thumbnails(places, key),
        right=RIGHT,
        tables=_tables(runs),
    )
    write_file(path, page)


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
        save_thumbnails(output_dir, lambda key: map(decode_picture, pictures(conversation_of(rows[key]))), in_gallery(run))
        write_report([output_dir], output_dir / "report.html")
        print(f"report saved as {output_dir / 'report.html'}")
    except Exception as error:  # model and results are saved, and the report can be created later
        print(
            f"warning: report.html was not created ({error!r}); run python -m tools.report {output_dir} to create it",
            file=sys.stderr,
        )


def _tables(runs: Sequence[Run]) -> dict[str, dict[str, list[str]]]:
    """Return titled tables of settings: by name, the value in each run. Those of several runs begin with what differs."""
    settings = [_settings(run) for run in runs]
    if len(runs) == 1:
        return {title: {name: [text] for name, text in texts.items()} for title, texts in settings[0].items()}
    columns = []
    for run, groups in zip(runs, settings, strict=True):
        versions = {f"{library} (version)": version for library, version in groups["Versions"].items()}
        columns.append(facts(run) | groups["Run"] | groups["Hyperparameters"] | versions)
    rows = {name: [column.get(name, "—") for column in columns] for column in columns for name in column}
    different = {name: texts for name, texts in rows.items() if len(set(texts)) > 1}
    return {"What differs": different, "What is the same": {name: rows[name] for name in rows if name not in different}}


def _settings(run: Run) -> dict[str, dict[str, str]]:
    """Return the settings as text, in groups, without those that are not set."""
    settings = {key: value for key, value in run.settings.items() if key not in ("command", "date")}
    hyperparameters, versions = settings.pop("hyperparameters", {}), settings.pop("versions", {})
    settings |= settings.pop("eval_set", {})
    groups = {"Run": settings, "Hyperparameters": hyperparameters, "Versions": versions}
    return {
        title: {name: _text(value) for name, value in group.items() if value not in (None, [])}
        for title, group in groups.items()
    }


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)
