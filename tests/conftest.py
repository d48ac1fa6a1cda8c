"""Paths, fixtures and helpers that tests share."""

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

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


# Files that take more than a minute: a worker that gets one of them at the end would let the other wait. And the one that
# needs most memory, before others have used some.
LONGEST = [f"test_{name}.py" for name in ("golden", "readme", "zero", "custom_dataset", "multi_node", "bad_input", "resume")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    gc.freeze()  # collections during tests do not visit what has been imported


def torchrun(*command: object, processes: int = 2, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of the repository on CPU processes. A failure raises no exception."""
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


@pytest.fixture(scope="module", autouse=True)
def release_memory_of_a_file() -> Iterator[None]:
    """Return what the tests of a file have used to the system, so that a worker does not grow from file to file."""
    yield
    gc.collect()
    gc.freeze()  # what is left, such as modules imported late, is not visited again
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random fp32 weights, smaller than the tiny one."""
    from runs import write_random_model

    return write_random_model(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture(scope="session")
def docvqa_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training and 3 evaluation rows in DocVQA's official layout."""
    from runs import write_docvqa

    return write_docvqa(tmp_path_factory.mktemp("docvqa"), val=3)


@pytest.fixture(scope="session")
def train(random_model: Path, docvqa_data: Path) -> Callable[..., list[dict]]:
    """Runs of five steps by :func:`forked.finetune_forked`, with short evaluations: ``train(output, **flags)``."""
    from forked import finetune_forked

    options = {"model_name_or_path": random_model, "max_steps": 5, "max_eval_samples": 1, "max_new_tokens": 1}
    return lambda output, **changes: finetune_forked(docvqa_data, output, **options | changes)


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the tiny checkpoint."""
    from adapters import save_adapter

    return save_adapter(tmp_path_factory.mktemp("adapters") / "lora", "--use_lora")


@pytest.fixture(scope="session")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A QLoRA adapter of the tiny checkpoint."""
    from adapters import save_adapter

    return save_adapter(tmp_path_factory.mktemp("adapters") / "qlora", "--use_qlora")


@pytest.fixture(scope="session")
def receipts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three images of one, two and two crops."""
    directory, paths = tmp_path_factory.mktemp("receipts"), []
    for number, size in enumerate([(336, 336), (600, 300), (200, 400)]):
        picture = Image.new("RGB", size, "white")
        ImageDraw.Draw(picture).text((20, 20), f"TOTAL {number}7.50", fill="black")
        paths.append(directory / f"picture{number}.png")
        picture.save(paths[-1])
    return paths


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """A cache of ``datasets`` that other tests do not use, also in forked processes."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def parse(monkeypatch):
    """Parses the flags of a script or tool, as from the command line."""

    def parse(module, *words: object):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        return module.parse_args()

    return parse


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs a script or tool in this process, as from the command line, and returns what it printed."""

    def run(module, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        capsys.readouterr()
        module.main(*([module.parse_args()] if hasattr(module, "parse_args") else []))
        return capsys.readouterr().out

    return run


@pytest.fixture
def predict(run_main):
    """Runs `tools.predict` in this process and returns what it printed."""
    import tools.predict

    return partial(run_main, tools.predict)
