"""The HTML report of one run, or a comparison of several runs."""

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
            rows.setdefault(entry["id"], row)  # if an id occurs several times, the report uses the first row
        selected = select_gallery(run.before, run.after)
        save_gallery_images(
            output_dir,
            lambda key: [decode_picture(picture) for picture in pictures(conversation_of(rows[key]))],
            [key for keys in selected.values() for key in keys],
        )
        print(f"report saved as {write_report(output_dir)}")
    except Exception as error:  # model and results are saved, and the report can be created later
        print(
            f"warning: report.html was not created ({error!r}); run python -m tools.report {output_dir} to create it",
            file=sys.stderr,
        )


def write_comparison(directories: Sequence[str | os.PathLike], path: str | os.PathLike) -> Path:
    """Write a comparison of several runs: metrics, settings that differ, and training curves in common charts.

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
    """Return the shortest path suffixes that distinguish the run directories."""
    parts = [run.directory.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{runs[0].directory} and other runs are the same directory; pass each run only once")


def _settings(run: Run) -> dict[str, dict[str, str]]:
    """Return the settings as text, in named groups, without those that the report shows elsewhere."""
    groups = {"Run": {}}
    for key, value in run.settings.items():
        name = key.replace("_", " ").capitalize()
        if isinstance(value, dict):
            groups[name] = {inner: _text(setting) for inner, setting in value.items()}
        elif key not in ("command", "date"):
            groups["Run"][name] = _text(value)
    return {name: group for name, group in groups.items() if group}


def _flat(groups: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the settings of all groups. The group is added to names that occur in several groups."""
    counts = Counter(key for group in groups.values() for key in group)
    return {
        key if counts[key] == 1 else f"{key} ({name.lower()})": value
        for name, group in groups.items()
        for key, value in group.items()
    }


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _rows(columns: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """Return the values of each key in all columns, with a dash for missing values."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return {key: [column.get(key, "—") for column in columns] for key in keys}


def _environment() -> jinja2.Environment:
    # All texts may come from a model or a dataset, so everything except the charts is escaped.
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
