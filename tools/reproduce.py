"""Run rows of the published accuracy tables, with their hyperparameters and models, on the GPUs at hand, and compare.

    python -m tools.reproduce --list
    python -m tools.reproduce nlvr2 --row full                # results/nlvr2-full.json and results/README.md
    python -m tools.reproduce docvqa --all                    # a whole table; start again and it goes on where it was
    python -m tools.reproduce docvqa --row lora --dry_run     # print the command alone
    python -m tools.reproduce nlvr2 --row full --embedded     # the same course on the tiny checkpoint, on a CPU

A row that has its file in results/ is not run again; one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from common.runtime import write_file

from .embedded import PROCESSES, add_run_flags, embedded_command, prepare_data
from .results_page import METHOD_TITLES, compares, load_published, percent, render_page, scientific
from .runs import METHOD_FLAGS, RunFailed, read_results, run_command, run_on_cpu, torchrun_command

PUBLISHED_GPUS = 8
SAVE_STEPS = 200  # an interrupted row loses at most so many


def parse_args(published: dict[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("task", nargs="?", choices=published, help="whose table")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--row", help="a row of the table; --list prints them")
    what.add_argument("--all", action="store_true", help="every row of the table")
    what.add_argument("--list", action="store_true", help="print the rows, of all tables unless a task is named")
    what.add_argument("--render", action="store_true", help="only write the page of results anew")
    parser.add_argument("--dry_run", action="store_true", help="print the torchrun command, run nothing")
    parser.add_argument("--model_name_or_path", help="another model than the published row's; its figure is listed apart")
    parser.add_argument("--nproc_per_node", type=int, help="processes (default: as many of the GPUs as divide the batch)")
    parser.add_argument("--embedded", action="store_true", help="on the tiny checkpoint and drawn samples, on a CPU")
    add_run_flags(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("output/reproduce"), help="of the runs (default: %(default)s)")
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="(default: %(default)s)")
    args = parser.parse_args()
    if args.task is None and not (args.list or args.render):
        parser.error("name a task: " + ", ".join(published))
    if args.row is not None and args.row not in published[args.task]["rows"]:
        none = "".join(f" ({method}: none published)" for method in published[args.task]["none_published"])
        parser.error(f"{args.task} has no row {args.row!r}{none}; it has {', '.join(published[args.task]['rows'])}")
    if args.smoke and not args.embedded:
        parser.error("--smoke goes with --embedded")
    if args.embedded and (args.model_name_or_path or args.nproc_per_node):
        parser.error(f"--embedded has a model and {PROCESSES} processes of its own: leave the other flag out")
    return args


def count_processes(wanted: int | None, batch_size: int, dry_run: bool) -> int:
    """How many processes share the batch evenly: as many as wanted, or as the GPUs at hand allow.

    Raises
    ------
    ValueError
        If there are no GPUs, or fewer than wanted, or the wanted number doesn't divide the batch.
    """
    gpus = torch.cuda.device_count()
    if wanted is not None and (wanted < 1 or batch_size % wanted):
        raise ValueError(f"--nproc_per_node {wanted} doesn't divide the published batch of {batch_size}")
    if wanted is not None and (dry_run or wanted <= gpus):
        return wanted
    if gpus == 0 and dry_run:
        print(f"# no GPU is at hand: the command is the one for {PUBLISHED_GPUS}")
        return PUBLISHED_GPUS
    if gpus == 0:
        raise ValueError(
            "no GPU is at hand, and a published row needs one: --dry_run prints its command, --embedded runs its course "
            "on a CPU with the tiny checkpoint"
        )
    if wanted is not None:
        raise ValueError(f"--nproc_per_node {wanted}: {gpus} GPU(s) are at hand; --dry_run prints the command for more")
    processes = max(count for count in range(1, gpus + 1) if batch_size % count == 0)
    if processes < gpus:
        print(f"# {processes} of {gpus} GPUs: the batch of {batch_size} can't be shared evenly by more")
    return processes


def method_flags(row: dict[str, Any]) -> list[str]:
    """A row's flags that say what trains, and in which precision; without ``--bf16`` a GPU trains in fp16."""
    flags = [*METHOD_FLAGS[row["method"]], *(["--bf16"] if row["precision"] == "bf16" else [])]
    if "lora_rank" in row:
        flags += ["--lora_rank", str(row["lora_rank"]), "--lora_alpha_ratio", f"{row['lora_alpha'] / row['lora_rank']:g}"]
    return flags


def row_command(task: str, table: dict[str, Any], row: dict[str, Any], output_dir: Path, args: argparse.Namespace) -> list[str]:
    """The command that runs a row; the task's script fits the accumulation to the number of processes.

    Raises
    ------
    ValueError
        If the row can't be run on this machine.
    """
    # The last checkpoint is kept, and gone on from when the row is started again.
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
    """Run a row, unless it has been run, and record what it found.

    Raises
    ------
    RunFailed
        If the task's script fails.
    ValueError
        If the row can't be run on this machine.
    """
    row = table["rows"][name]
    label = f"embedded-{task}-{name}{'-smoke' if args.smoke else ''}" if args.embedded else f"{task}-{name}"
    if args.model_name_or_path not in (None, table["model"]):
        label += "-" + re.sub(r"[^A-Za-z0-9.]+", "-", args.model_name_or_path).strip("-")
    output_dir, result = args.output_dir / label, args.results_dir / f"{label}.json"
    if result.is_file() and not args.dry_run:
        print(f"{result} is there already; delete it to run the row again")
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
        shutil.rmtree(checkpoint)  # several times the model's size, and of no more use
    print(f"{task} {name}: {describe(record, table)}\nWrote {result} and {args.results_dir}/README.md", flush=True)


def describe(record: dict[str, Any], table: dict[str, Any]) -> str:
    """What a row found, beside the published figure where it compares with that."""
    metric = table["metric"]
    measured = f"{metric} {percent(table, record['after'][metric])} (before: {percent(table, record['before'][metric])})"
    if not compares(record):
        what = "embedded samples" if record["embedded"] else record["base_model"]
        return f"{measured}, {what}: no published figure to compare with"
    difference = 100 * record["after"][metric] - record["published_upstream"]
    return f"{measured}, published upstream {record['published_upstream']:.{table['decimals']}f}: {difference:+.2f} points"


def write_page(results_dir: Path) -> None:
    """Write the page of results anew, from the rows' files beside it."""
    contents = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results_dir.glob("*.json"))}
    records = {name: content for name, content in contents.items() if "row" in content}
    write_file(results_dir / "README.md", render_page(records))


def list_rows(tables: dict[str, Any]) -> str:
    """Every row with its settings and its published figure."""
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
        sys.exit(f"error: {args.task}: {', '.join(failed)} failed; the same command goes on with what is missing")


if __name__ == "__main__":
    main()
