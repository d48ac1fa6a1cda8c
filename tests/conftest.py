"""What the tests share: where things are, and how a script is started under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TINY = ROOT / "assets" / "tiny_phi3v"
GOLDEN = SHARED / "golden"

needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the published code's reference numbers (../shared/golden) are not here"
)
needs_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real data (../shared/data) is not here")


def torchrun(*command: object, processes: int = 2, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of the repository on CPU processes and return what it printed; raises nothing if it fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launcher, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
