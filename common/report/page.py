"""The HTML of a report: one run, or several side by side."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import jinja2

from common.data.conversations import pictures
from common.data.pictures import decode_picture
from common.runtime import InputError, replacing, write_file

from .charts import DASHES, SERIES, curve_charts
from .figures import class_table, confusions, evaluation_charts, facts, metric_table, outcomes
from .gallery import GROUPS, gallery, save_gallery_images, select_gallery
from .run import Run, read_run


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
    InputError
        If one of the files is not what it should be; the message names the file.
    """
    run = read_run(output_dir)
    path = Path(path) if path else run.directory / "report.html"
    curves = curve_charts({"training": run.log})
    for chart in curves:
        with replacing(run.directory / "curves" / f"{chart.name}.png") as temporary:
            chart.save_png(temporary)
    groups = select_gallery(run.before, run.after)
    page = (
        _environment()
        .get_template("run.html.j2")
        .render(
            run=run,
            title=run.settings.get("task") or run.directory.resolve().name,
            subtitle=" · ".join(run.settings[key] for key in ("base_model", "method") if key in run.settings),
            figures=metric_table(run),
            facts=facts(run),
            outcomes=outcomes(run),
            curves=curves,
            charts=evaluation_charts(run),
            classes=class_table(run),
            confusions=confusions(run),
            gallery=gallery(run, groups),
            groups={group: GROUPS[group] for group, ids in groups.items() if ids},
            settings=_settings(run),
            date=_date(run),
        )
    )
    write_file(path, page)
    return path


def report_run(output_dir: Path, conversation_of: Callable[[int], dict]) -> None:
    """Write the report at the end of a run, with the pictures of the samples that it shows.

    Parameters
    ----------
    output_dir : Path
    conversation_of : callable
        Gives the conversation of an evaluation row, by its number.
    """
    try:
        run = read_run(output_dir)
        rows: dict[str, int] = {}
        for row, entry in enumerate(run.after["predictions"]):
            rows.setdefault(entry["id"], row)  # of rows of the same id the report shows the first, too
        chosen = select_gallery(run.before, run.after)
        save_gallery_images(
            output_dir,
            lambda key: [decode_picture(picture) for picture in pictures(conversation_of(rows[key]))],
            [key for keys in chosen.values() for key in keys],
        )
        print(f"report: {write_report(output_dir)}")
    except Exception as error:  # the model is saved and scored; a report can be made again
        print(f"warning: no report.html ({error!r}); python -m tools.report {output_dir} makes it", file=sys.stderr)


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
    FileNotFoundError, InputError
        As `write_report`.
    """
    runs = [read_run(directory) for directory in directories]
    names = _names(runs)
    settings = _rows([_flat(_settings(run)) for run in runs])
    page = (
        _environment()
        .get_template("comparison.html.j2")
        .render(
            names=names,
            runs=runs,
            figures=[metric_table(run) for run in runs],
            facts=_rows([facts(run) for run in runs]),
            different={key: values for key, values in settings.items() if len(set(values)) > 1},
            same={key: values[0] for key, values in settings.items() if len(set(values)) == 1},
            curves=curve_charts({name: run.log for name, run in zip(names, runs, strict=True)}),
            colours=len(SERIES),
            dashes=DASHES,
        )
    )
    write_file(Path(path), page)
    return Path(path)


def _date(run: Run) -> str | None:
    try:
        return datetime.fromisoformat(run.settings["date"]).strftime("%d %B %Y, %H:%M %Z").strip()
    except (KeyError, TypeError, ValueError):
        return run.settings.get("date")


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the shortest ends of the directories' paths that tell them apart."""
    parts = [run.directory.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{runs[0].directory} and others of the runs are the same directory; name each only once")


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


def _flat(groups: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the settings of all groups; one whose name another group has too says which it is of."""
    times = Counter(key for group in groups.values() for key in group)
    return {
        key if times[key] == 1 else f"{key} ({name.lower()})": value
        for name, group in groups.items()
        for key, value in group.items()
    }


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _rows(columns: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """Return for each key its value in every column, a dash where a column has none."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return {key: [column.get(key, "—") for column in columns] for key in keys}


def _environment() -> jinja2.Environment:
    # Everything that is shown may come from a model or a data set, so everything is escaped but the charts.
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
