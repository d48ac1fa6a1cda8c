"""Run all faults, or those whose name matches a regular expression, and print a table: python -m faults.run [NAME]."""

import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from .faults import FAULTS
from .harness import prepared, run_fault, undisturbed


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    begin, failures, count = time.monotonic(), 0, 0
    for method in ("ZeRO-2", "LoRA"):
        undisturbed(method)
    print(f"undisturbed runs and imports: {time.monotonic() - begin:.0f} s\n")
    print("| fault | method | outcome | seconds |\n|---|---|---|---|")
    for fault in FAULTS:
        for method in fault.methods:
            if not re.search(wanted, f"{fault.name}, {method}"):
                continue
            folder, start = Path(tempfile.mkdtemp(prefix="fault-")), time.monotonic()
            try:
                outcome = run_fault(fault, method, folder)
            except Exception as error:
                print(f"--- {fault.name}, {method}: {traceback.format_exc()}", file=sys.stderr, flush=True)
                failures += 1
                outcome = f"**{(str(error) or repr(error)).splitlines()[0][:100]}**"
            count += 1
            outcome = outcome.replace("|", "\\|")
            print(f"| {fault.name} | {method} | {outcome} | {time.monotonic() - start:.0f} |", flush=True)
            shutil.rmtree(folder)
    shutil.rmtree(prepared()[0].parent)
    print(
        f"\n{count} faults, {failures} with another outcome, in {(time.monotonic() - begin) / 60:.1f} minutes on "
        f"{os.cpu_count()} CPU cores"
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
