"""Reproduce rows of the published accuracy tables with their models and hyperparameters on the available GPUs.

    python -m tools.reproduce --list
    python -m tools.reproduce nlvr2 --row full                # results/nlvr2-full.json and results/README.md
    python -m tools.reproduce docvqa --all                    # all rows of a table; run it again to resume
    python -m tools.reproduce docvqa --row lora --dry_run     # only print the command
    python -m tools.reproduce nlvr2 --row full --embedded     # the same steps with the tiny checkpoint, on a CPU

A row that already has a file in results/ is skipped. An interrupted row resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from common.runtime.parser import Parser, check_inputs
from common.runtime.process import InputError, counted, fail, say
from tools.embedded import PROCESSES, add_run_flags, embedded_command, run_embedded
from tools.runs import (
    METHOD_FLAGS,
    METHOD_TITLES,
    RunFailed,
    load_published,
    markdown_table,
    read_results,
    run_command,
    torchrun_command,
    write_page,
)

PUBLISHED_GPUS = 8
SAVE_STEPS = 200  # an interrupted row loses at most this many steps
OTHERS = """

## Results with other models

These runs use the hyperparameters of a row with a different model, so they cannot be compared with the published row. Those of
the tiny checkpoint, on generated sample data, **say nothing about the real models or datasets**.

"""


def parse_args() -> argparse.Namespace:
    published = load_published()["accuracy"]
    parser = Parser(__doc__)
    parser.add_argument("task", nargs="?", choices=published, help="task of the table")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--row", help="row of the table; --list prints all rows")
    what.add_argument("--all", action="store_true", help="run all rows of the table")
    what.add_argument("--list", action="store_true", help="print the rows of the task, or of all tasks")
    what.add_argument("--render", action="store_true", help="only regenerate the results page")
    parser.add_argument("--dry_run", action="store_true", help="print the torchrun command without running it")
    parser.add_argument("--model_name_or_path", help="another model than the published row's; its result is listed separately")
    parser.add_argument("--nproc_per_node", type=int, help="number of processes (default: as many GPUs as divide the batch)")
    parser.add_argument("--embedded", action="store_true", help="use the tiny checkpoint and generated sample data, on a CPU")
    add_run_flags(parser, Path("output/reproduce"))
    args = parser.parse_args()
    if args.task is None and not (args.list or args.render):
        parser.error("missing task, expected one of: " + ", ".join(published))
    if args.row is not None and args.row not in (rows := published[args.task]["rows"]):
        none = "".join(f" ({method}: none published)" for method in published[args.task]["none_published"])
        parser.error(f"{args.task} has no row {args.row!r}{none}; expected one of: {', '.join(rows)}")
    if args.smoke and not args.embedded:
        parser.error("--smoke requires --embedded")
    if args.embedded and (args.model_name_or_path or args.nproc_per_node):
        parser.error(f"--embedded sets the model and {PROCESSES} processes: omit the other flag")
    return args


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds
    check_inputs(args)
    say("Loading PyTorch")

import torch

from common.runtime.files import read_json, write_file


def count_processes(wanted: int | None, batch_size: int, dry_run: bool) -> int:
    """Return the number of processes: ``wanted``, or the most available GPUs that divide the batch size.

    Raises
    ------
    InputError
        If too few GPUs are available, or the wanted number does not divide the batch size.
    """
    gpus = torch.cuda.device_count()
    available = range(1, (gpus or PUBLISHED_GPUS) + 1)
    processes = max(count for count in available if batch_size % count == 0) if wanted is None else wanted
    if processes < 1 or batch_size % processes:
        raise InputError(f"{processes} does not divide the published batch size of {batch_size}", "--nproc_per_node")
    if processes > gpus and not dry_run:
        remedy = "--dry_run prints the command, --embedded runs the same steps with the tiny checkpoint on a CPU"
        raise InputError(f"{processes} processes need as many GPUs, but {gpus} are available: {remedy}", "--nproc_per_node")
    print(f"# {counted(processes, 'process', 'processes')}, one per GPU; available: {counted(gpus, 'GPU')}")
    return processes


def row_command(task: str, table: dict[str, Any], row: dict[str, Any], output_dir: Path, args: argparse.Namespace) -> list[str]:
    """Return the command that runs a row; the script adapts gradient accumulation to the number of processes."""
    flags = row_flags(row, args)
    if args.embedded:
        return embedded_command(task, row["method"], output_dir, flags, args.smoke)
    words = ["--model_name_or_path", args.model_name_or_path or table["model"], "--output_dir", str(output_dir)]
    words += [*table["flags"], "--batch_size", str(table["batch_size"]), "--learning_rate", scientific(row["learning_rate"])]
    words += ["--num_train_epochs", str(row["num_train_epochs"]), *flags]
    return torchrun_command(task, words, count_processes(args.nproc_per_node, table["batch_size"], args.dry_run))


def row_flags(row: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Return a row's flags for the method, precision and resuming; without ``--bf16`` a GPU trains in fp16."""
    flags = [*METHOD_FLAGS[row["method"]], *(["--bf16"] if row["precision"] == "bf16" else [])]
    if "lora_rank" in row:
        flags += ["--lora_rank", str(row["lora_rank"]), "--lora_alpha_ratio", f"{row['lora_alpha'] / row['lora_rank']:g}"]
    flags += ["--save_strategy", "steps", "--save_steps", str(10 if args.embedded else SAVE_STEPS), "--save_total_limit", "1"]
    return [*flags, "--resume_from_checkpoint", "auto", "--overwrite_output_dir", *args.run_flags]


def run_row(task: str, name: str, table: dict[str, Any], args: argparse.Namespace) -> None:
    """Run a row and record its result, unless it already has one.

    Raises
    ------
    RunFailed
        If the task's script fails.
    InputError
        If the row cannot be run on this machine.
    """
    row = table["rows"][name]
    label = f"embedded-{task}-{name}{'-smoke' if args.smoke else ''}" if args.embedded else f"{task}-{name}"
    if args.model_name_or_path not in (None, table["model"]):
        label += "-" + re.sub(r"[^A-Za-z0-9.]+", "-", args.model_name_or_path).strip("-")
    output_dir, result = args.output_dir / label, args.results_dir / f"{label}.json"
    if result.is_file() and not args.dry_run:
        print(f"{result} already exists; delete it to run the row again")
        return
    command = row_command(task, table, row, output_dir, args)
    if args.dry_run:
        print(shlex.join(command))
        return
    if args.embedded:
        run_embedded(task, row["method"], output_dir, row_flags(row, args), args.smoke)
    else:
        run_command(command)
    record = {"task": task, "row": name, "embedded": args.embedded, **read_results(output_dir)}
    if compares(record, table):
        record["published_upstream"] = row["published"]
    write_file(result, record)
    write_page(args.results_dir, "README.md", render(args.results_dir))
    for checkpoint in output_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # several times the size of the model, and no longer needed
    print(f"{task} {name}: {describe(record, table)}\nWrote {result} and {args.results_dir}/README.md", flush=True)


def compares(record: dict[str, Any], table: dict[str, Any]) -> bool:
    """Whether a result is comparable with the published value: it uses the real data and the published model."""
    return not record["embedded"] and record["base_model"] == table["model"]


def describe(record: dict[str, Any], table: dict[str, Any]) -> str:
    """Summarize a row's result, with the published value if the two can be compared."""
    before, after = (100 * record[when][table["metric"]] for when in ("before", "after"))
    measured = f"{table['metric']} {after:.2f} (before: {before:.2f})"
    if "published_upstream" not in record:
        return f"{measured}; no published value to compare with"
    return f"{measured}, published upstream {record['published_upstream']}: {after - record['published_upstream']:+.2f} points"


def accuracy_tables(tables: dict[str, Any], links: dict[tuple[str, str], str]) -> str:
    """Render the published tables with the measured values in ``links``, by task and row."""
    parts = []
    for task, table in tables.items():
        lines = []
        for name, row in table["rows"].items():
            lora = f"{row['lora_rank']} / {row['lora_alpha']}" if "lora_rank" in row else "–"
            cells = [f"`{name}`", METHOD_TITLES[row["method"]], row["precision"], lora, scientific(row["learning_rate"])]
            value = f"{row['published']:.{table['decimals']}f}"
            lines.append([*cells, row["num_train_epochs"], value, links.get((task, name), "not measured")])
        lines += [["", method, "", "", "", "", "none published", "not measured"] for method in table["none_published"]]
        metric = table["metric_title"]
        parts += [f"## {table['title']}", f"Model `{table['model']}`, batch size {table['batch_size']}; {metric} in percent."]
        header = ["`--row`", "method", "precision", "LoRA rank / α", "learning rate", "epochs"]
        parts.append(markdown_table([*header, f"{metric}, published upstream", f"{metric}, measured here"], lines))
    return "\n\n".join(parts)


def render(results_dir: Path) -> str:
    """Render the tables of the results page from the rows' files in its folder."""
    contents = {path.name: read_json(path, "delete it") for path in sorted(results_dir.glob("*.json"))}
    tables = load_published()["accuracy"]
    links, others = {}, []
    for name, record in contents.items():
        if "row" not in record:
            continue
        table, where = tables[record["task"]], f"{record['hardware']}, {record['date'][:10]}"
        if compares(record, table):
            value = f"{100 * record['after'][table['metric']]:.{table['decimals']}f}"
            links[record["task"], record["row"]] = f"[{value}]({name}) ({where})"
        else:
            scores = [f"{record[when][record['metric']]:.4f}" for when in ("before", "after")]
            row = f"[{record['task']} {record['row']}]({name})"
            others.append([row, f"`{record['base_model']}`", record["metric"], *scores, where])
    header = ["row", "model", "metric", "before", "after", "hardware"]
    return accuracy_tables(tables, links) + (OTHERS + markdown_table(header, others) if others else "")


def scientific(rate: float) -> str:
    """Format a learning rate as ``5e-6``."""
    return f"{rate:.0e}".replace("e-0", "e-")


def main(args: argparse.Namespace) -> None:
    tables = load_published()["accuracy"]
    if args.list:
        print(accuracy_tables({args.task: tables[args.task]} if args.task else tables, {}))
        return
    if args.render:
        write_page(args.results_dir, "README.md", render(args.results_dir))
        return
    table = tables[args.task]
    failed = []
    for name in table["rows"] if args.all else [args.row]:
        try:
            run_row(args.task, name, table, args)
        except RunFailed as error:
            say(f"error: {args.task} {name}: {error}")
            failed.append(name)
        except InputError as error:
            fail(str(error))
    if failed:
        fail(f"{args.task}: {', '.join(failed)} failed; run the same command again to resume")


if __name__ == "__main__":
    main(args)
