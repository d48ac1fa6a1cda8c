"""Run every task with every method on the embedded samples, and write results/embedded.md.

    python -m tools.matrix
    python -m tools.matrix --tasks docvqa --methods full lora     # run these anew, keep the others' figures

Figures are kept in results/embedded.json after each run, so a matrix that was interrupted goes on with --tasks and --methods.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common.runtime import write_file

from .embedded import MODEL, PROCESSES, add_run_flags, embedded_command, prepare_data
from .results_page import METHOD_TITLES, markdown_table
from .runs import METHOD_FLAGS, TASKS, RunFailed, read_results, run_on_cpu

TASK_TITLES = {"docvqa": "DocVQA", "hateful_memes": "Hateful Memes", "nlvr2": "NLVR2", "ucf101": "UCF-101"}

PAGE = """\
# Methods × tasks on the embedded samples

Rendered by `python -m tools.matrix`. The tiny checkpoint `{model}` on drawn sample data, {processes} processes on a CPU.
These figures show that every method trains on every task, and **say nothing about the real models or data sets**.

*Training* takes the seconds that are stated, the whole run those after it: the two evaluations, start and report included.
*Peak memory* is the resident memory of the largest process,
Python and its libraries included (some 0.6 GB), from the operating system's account of the run.

{table}

The commands, versions and all figures are in [embedded.json](embedded.json).
"""


def render(records: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Render the page from the figures by task and method; a pair that was not run says so."""
    lines = []
    for task in TASKS:
        for method in METHOD_FLAGS:
            record = records.get(task, {}).get(method)
            cells = _cells(record) if record else ["", "not run", "not run", "", "", "", ""]
            lines.append([TASK_TITLES[task], METHOD_TITLES[method], *cells])
    titles = ["task", "method", "metric", "before", "after", "training, s", "run, s", "peak memory, GB", "measured on"]
    return PAGE.format(model=MODEL, processes=PROCESSES, table=markdown_table(titles, lines))


def _cells(record: dict[str, Any]) -> list[str]:
    metric = record["metric"]
    scores = [f"{record[when][metric]:.3f}" for when in ("before", "after")]
    where = f"{record['hardware']}, {record['date'][:10]}"
    seconds = [f"{record[name]:.0f}" for name in ("train_seconds", "run_seconds")]
    return [metric, *scores, *seconds, f"{record['peak_memory_gb']:.2f}", where]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="(default: all)")
    parser.add_argument("--methods", nargs="+", choices=METHOD_FLAGS, default=list(METHOD_FLAGS), help="(default: all)")
    add_run_flags(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("output/matrix"), help="of the runs (default: %(default)s)")
    parser.add_argument("--results_dir", type=Path, default=Path("results"), help="(default: %(default)s)")
    args = parser.parse_args()
    kept = args.results_dir / "embedded.json"
    records = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for task in args.tasks:
        for method in args.methods:
            output_dir = args.output_dir / f"{task}-{method}"
            try:
                prepare_data(task, output_dir, args.smoke)
                flags = [*METHOD_FLAGS[method], *args.run_flags]
                usage = run_on_cpu(embedded_command(task, method, output_dir, flags, args.smoke))
            except RunFailed as error:
                sys.exit(f"error: {task}, {method}: {error}")
            record = read_results(output_dir)
            record |= {"run_seconds": round(usage.seconds, 1), "peak_memory_gb": round(usage.peak_memory_gb, 3)}
            records.setdefault(task, {})[method] = record
            write_file(kept, records)
            write_file(args.results_dir / "embedded.md", render(records))
    print(f"Wrote {args.results_dir}/embedded.md")


if __name__ == "__main__":
    main()
