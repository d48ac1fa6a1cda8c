"""Create the HTML report of a run, or compare several runs.

python -m tools.report output/docvqa
python -m tools.report output/full output/lora output/qlora --output comparison.html
"""

import argparse
from pathlib import Path

from common.runtime.parser import Parser
from common.runtime.process import InputError, fail, say


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="--output_dir of a run")
    what = "HTML file to write (default: DIR/report.html, or ./comparison.html for several runs)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=what)
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds
    say("Reading the results")

from common.report.page import write_report


def main(args: argparse.Namespace) -> None:
    path = args.output or (Path("comparison.html") if len(args.directories) > 1 else Path(args.directories[0], "report.html"))
    try:
        write_report(args.directories, path)
    except (OSError, InputError) as error:
        fail(str(error))
    print(f"Wrote {path}")


if __name__ == "__main__":
    main(args)
