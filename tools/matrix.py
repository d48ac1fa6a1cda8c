"""Run every task with every method on the generated sample data, and write results/embedded.md.

    python -m tools.matrix
    python -m tools.matrix --tasks docvqa --methods full lora     # rerun these, keep the other results

Results are saved to results/embedded.json after each run. Resume an interrupted matrix with --tasks and --methods.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common.runtime.files import read_json, write_file
from common.runtime.parser import Parser

from .embedded import add_run_flags, run_embedded
from .runs import METHOD_FLAGS, METHOD_TITLES, TASKS, RunFailed, markdown_table, read_results, write_page

HEADER = ["task", "method", "metric", "before", "after", "training (s)", "run (s)", "peak memory (GB)", "hardware"]


def render(records: dict[str, Any]) -> str:
    """Render the table from the results by task and method; pairs without a result are marked as not run."""
    lines = []
    for task, title in TASKS.items():
        for method in METHOD_FLAGS:
            cells = ["", "not run", "not run", "", "", "", ""]
            if record := records.get(task, {}).get(method):
                cells = [record["metric"], *(f"{record[when][record['metric']]:.3f}" for when in ("before", "after"))]
                cells += [f"{record['train_seconds']:.0f}", f"{record['run_seconds']:.0f}", f"{record['peak_memory_gb']:.2f}"]
                cells += [f"{record['hardware']}, {record['date'][:10]}"]
            lines.append([title, METHOD_TITLES[method], *cells])
    return markdown_table(HEADER, lines)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="tasks to run (default: all)")
    parser.add_argument("--methods", nargs="+", choices=METHOD_FLAGS, default=METHOD_FLAGS, help="methods (default: all)")
    add_run_flags(parser, Path("output/matrix"))
    args = parser.parse_args()
    kept = args.results_dir / "embedded.json"
    records = read_json(kept, "restore it, or delete it") if kept.is_file() else {}
    for task in args.tasks:
        for method in args.methods:
            output_dir = args.output_dir / f"{task}-{method}"
            try:
                usage = run_embedded(task, method, output_dir, [*METHOD_FLAGS[method], *args.run_flags], args.smoke)
            except RunFailed as error:
                sys.exit(f"error: {task}, {method}: {error}")
            figures = {"run_seconds": round(usage.seconds, 1), "peak_memory_gb": round(usage.peak_memory_gb, 3)}
            records.setdefault(task, {})[method] = read_results(output_dir) | figures
            write_file(kept, records)
            write_page(args.results_dir, "embedded.md", render(records))
    print(f"Wrote {args.results_dir}/embedded.md")


if __name__ == "__main__":
    main()
