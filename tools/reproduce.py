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
import sys
from pathlib import Path
from typing import Any

import torch

from common.runtime import read_json, write_file

from .embedded import PROCESSES, add_run_flags, embedded_command, prepare_data
from .results_page import METHOD_TITLES, compares, load_published, percent, render_page, scientific
from .runs import METHOD_FLAGS, RunFailed, read_results, run_command, run_on_cpu, torchrun_command

PUBLISHED_GPUS = 8
SAVE_STEPS = 200  # an interrupted row loses at most this many steps


def parse_args(published: dict[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("task", nargs="?", choices=published, help="task of the table")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--row", help="row of the table; --list prints all rows")
    what.add_argument("--all", action="store_true", help="run all rows of the table")
    what.add_argument("--list", action="store_true", help="print the rows of the task, or of all tasks")
    what.add_argument("--render", action="store_true", help="only regenerate the results page")
    parser.add_argument("--dry_run", action="store_true", help="print the torchrun command without running it")
    parser.add_argument(
        "--model_name_or_path", help="a different model than the published row's; its result is listed separately"
    )
    parser.add_argument("--nproc_per_node", type=int, help="number of processes (default: as many GPUs as divide the batch)")
    parser.add_argument("--embedded", action="store_true", help="use the tiny checkpoint and generated sample data, on a CPU")
    add_run_flags(parser)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("output/reproduce"), help="parent of the runs (default: %(default)s)"
    )
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="results folder (default: %(default)s)")
    args = parser.parse_args()
    if args.task is None and not (args.list or args.render):
        parser.error("missing task, expected one of: " + ", ".join(published))
    if args.row is not None and args.row not in published[args.task]["rows"]:
        none = "".join(f" ({method}: none published)" for method in published[args.task]["none_published"])
        parser.error(f"{args.task} has no row {args.row!r}{none}; expected one of: {', '.join(published[args.task]['rows'])}")
    if args.smoke and not args.embedded:
        parser.error("--smoke requires --embedded")
    if args.embedded and (args.model_name_or_path or args.nproc_per_node):
        parser.error(f"--embedded sets the model and {PROCESSES} processes: omit the other flag")
    return args


def count_processes(wanted: int | None, batch_size: int, dry_run: bool) -> int:
    """Return the number of processes: ``wanted``, or the most available GPUs that divide the batch size.

    Raises
    ------
    ValueError
        If there are no GPUs, or fewer than wanted, or the wanted number does not divide the batch size.
    """
    gpus = torch.cuda.device_count()
    if wanted is not None and (wanted < 1 or batch_size % wanted):
        raise ValueError(f"--nproc_per_node {wanted} does not divide the published batch size of {batch_size}")
    if wanted is not None and (dry_run or wanted <= gpus):
        return wanted
    if gpus == 0 and dry_run:
        print(f"# no GPU is available: this is the command for {PUBLISHED_GPUS} GPUs")
        return PUBLISHED_GPUS
    if gpus == 0:
        raise ValueError(
            "no GPU is available, but a published row requires one: --dry_run prints the command, --embedded runs the same "
            "steps with the tiny checkpoint on a CPU"
        )
    if wanted is not None:
        raise ValueError(f"--nproc_per_node {wanted}: only {gpus} GPU(s) are available; --dry_run prints the command for more")
    processes = max(count for count in range(1, gpus + 1) if batch_size % count == 0)
    if processes < gpus:
        print(f"# using {processes} of {gpus} GPUs: no larger number divides the batch size of {batch_size}")
    return processes


def method_flags(row: dict[str, Any]) -> list[str]:
    """Return a row's flags for the method and the precision; without ``--bf16`` a GPU trains in fp16."""
    flags = [*METHOD_FLAGS[row["method"]], *(["--bf16"] if row["precision"] == "bf16" else [])]
    if "lora_rank" in row:
        flags += ["--lora_rank", str(row["lora_rank"]), "--lora_alpha_ratio", f"{row['lora_alpha'] / row['lora_rank']:g}"]
    return flags


def row_command(task: str, table: dict[str, Any], row: dict[str, Any], output_dir: Path, args: argparse.Namespace) -> list[str]:
    """Return the command that runs a row; the script adapts gradient accumulation to the number of processes.

    Raises
    ------
    ValueError
        If the row cannot be run on this machine.
    """
    # The last checkpoint is kept, to resume from it when the row is started again.
    saving = ["--save_strategy", "steps", "--save_steps", str(10 if args.embedded else SAVE_STEPS), "--save_total_limit", "1"]
    flags = [*method_flags(row), *saving, "--resume_from_checkpoint", "auto", *args.run_flags]
    if args.embedded:
        return embedded_command(task, row["method"], output_dir, flags, args.smoke)
    model = args.model_name_or_path or table["model"]
    paths = ["--model_name_or_path", model, "--output_dir", str(output_dir), *table["flags"]]
    rates = ["--learning_rate", scientific(row["learning_rate"]), "--num_train_epochs", str(row["num_train_epochs"])]
    processes = count_processes(args.nproc_per_node, table["batch_size"], args.dry_run)
    return torchrun_command(task, [*paths, "--batch_size", str(table["batch_size"]), *rates, *flags], processes)


def run_row(task: str, name: str, table: dict[str, Any], args: argparse.Namespace) -> None:
    """Run a row and record its result, unless it already has one.

    Raises
    ------
    RunFailed
        If the task's script fails.
    ValueError
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
        prepare_data(task, output_dir, args.smoke)
        run_on_cpu(command)
    else:
        run_command(command)
    record = {"task": task, "row": name, "embedded": args.embedded, **read_results(output_dir)}
    if compares(record):
        record["published_upstream"] = row["published"]
    write_file(result, record)
    write_page(args.results_dir)
    for checkpoint in output_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # several times the size of the model, and no longer needed
    print(f"{task} {name}: {describe(record, table)}\nWrote {result} and {args.results_dir}/README.md", flush=True)


def describe(record: dict[str, Any], table: dict[str, Any]) -> str:
    """Summarize a row's result, with the published value if the two can be compared."""
    metric = table["metric"]
    measured = f"{metric} {percent(table, record['after'][metric])} (before: {percent(table, record['before'][metric])})"
    if not compares(record):
        what = "sample data" if record["embedded"] else record["base_model"]
        return f"{measured}, {what}: no published value to compare with"
    difference = 100 * record["after"][metric] - record["published_upstream"]
    return f"{measured}, published upstream {record['published_upstream']:.{table['decimals']}f}: {difference:+.2f} points"


def write_page(results_dir: Path) -> None:
    """Regenerate the results page from the rows' files in the same folder."""
    contents = {path.name: read_json(path, "measure it again") for path in sorted(results_dir.glob("*.json"))}
    records = {name: content for name, content in contents.items() if "row" in content}
    write_file(results_dir / "README.md", render_page(records))


def list_rows(tables: dict[str, Any]) -> str:
    """List all rows with their settings and published values."""
    lines = []
    for task, table in tables.items():
        lines.append(f"{table['title']}: {table['metric_title']} in percent, {table['model']}, batch {table['batch_size']}")
        for name, row in table["rows"].items():
            rank = f", rank {row['lora_rank']}, alpha {row['lora_alpha']}" if "lora_rank" in row else ""
            settings = f"lr {scientific(row['learning_rate'])}, {row['num_train_epochs']} epochs{rank}"
            method = f"{METHOD_TITLES[row['method']]}, {row['precision']}"
            lines.append(f"  {task} --row {name:<11} {row['published']:.{table['decimals']}f}  {method:<25} {settings}")
        lines += [f"  {method}: none published" for method in table["none_published"]]
    return "\n".join(lines)


def main() -> None:
    tables = load_published()["accuracy"]
    args = parse_args(tables)
    if args.list:
        print(list_rows({args.task: tables[args.task]} if args.task else tables))
        return
    if args.render:
        write_page(args.results_dir)
        return
    table = tables[args.task]
    failed = []
    for name in table["rows"] if args.all else [args.row]:
        try:
            run_row(args.task, name, table, args)
        except RunFailed as error:
            print(f"error: {args.task} {name}: {error}", file=sys.stderr, flush=True)
            failed.append(name)
        except ValueError as error:
            sys.exit(f"error: {error}")
    if failed:
        sys.exit(f"error: {args.task}: {', '.join(failed)} failed; run the same command again to resume")


if __name__ == "__main__":
    main()
