"""Create the HTML report of a run, or compare several runs.

python -m tools.report output/docvqa
python -m tools.report output/full output/lora output/qlora --output comparison.html
"""

import argparse
import sys
from pathlib import Path

from common.report.page import write_comparison, write_report
from common.runtime.process import InputError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="--output_dir of a run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="HTML file to write (default: DIR/report.html, or ./comparison.html for several runs)",
    )
    args = parser.parse_args()
    try:
        if len(args.directories) == 1:
            path = write_report(args.directories[0], args.output)
        else:
            path = write_comparison(args.directories, args.output or Path("comparison.html"))
    except (OSError, InputError) as error:
        sys.exit(f"error: {error}")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
