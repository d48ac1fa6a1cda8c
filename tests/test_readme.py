"""Commands and facts in README.md and docs/ against the code.

Every command in the README's bash blocks is run, with a small random model and generated data, one process per machine, one
step of two samples, one crop per image and a few tokens. `--use_flash_attention` is omitted because it requires a GPU, and
`--full_train` because it requires the Hub.
"""

import argparse
import importlib
import inspect
import json
import re
import shlex
import string
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import pytest
from conftest import ROOT
from forked import member_of_group, run_program, running_demo
from PIL import Image
from runs import free_port, write_random_model
from torch.distributed.run import get_args_parser

from assets.draw_samples import draw_samples

README = (ROOT / "README.md").read_text(encoding="utf-8")
TOP_LEVEL = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (*TOP_LEVEL, *sorted((ROOT / "docs").glob("*.md")))}
SCRIPTS = [path.stem for path in sorted(ROOT.glob("finetune_hf_trainer_*.py"))]
PROGRAMS = ["convert_ucf101", "assets.draw_samples"] + [
    f"{folder}.{path.stem}"
    for folder in ("tools", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if re.search(r"[pP]arser\(", text := path.read_text(encoding="utf-8")) and "def main(" in text
]
# Documents, memes, sentences and clips per class, for training and evaluation.
DRAWN = {"docvqa": (3, 1), "hateful_memes": (4, 2), "nlvr2": (2, 1), "ucf101": (1, 1)}
LIMITS = ["--max_steps", "1", "--batch_size", "2", "--max_eval_samples", "2", "--max_new_tokens", "4", "--num_crops", "1"]
LIMITS += ["--dataloader_num_workers", "0"]
OMITTED = ("--bf16", "--use_flash_attention", "--full_train")  # slow on a CPU; require a GPU and the Hub


def commands(text: str) -> list[str]:
    """The commands in a page's bash blocks, each with its continuation lines, without comments."""
    found = []
    for block in re.findall(r"^```bash\n(.+?)^```", text, re.MULTILINE | re.DOTALL):
        block = re.sub(r"<<'(\w+)'\n.*?\n\1\n", "\n", block, flags=re.DOTALL)
        command = ""
        for line in block.splitlines():
            command += line
            if command.endswith("\\"):
                command = command[:-1]
            elif command.count('"') % 2:
                command += "\n"
            else:
                found += [command] if command.strip() and not command.startswith("#") else []
                command = ""
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the code, and with generated data where the README's commands expect data."""
    folder = tmp_path_factory.mktemp("readme")
    for item in ("assets", "common", "tools", "convert_ucf101.py", *(f"{script}.py" for script in SCRIPTS)):
        (folder / item).symlink_to(ROOT / item)
    write_random_model(folder / "random")
    for task, (train, val) in DRAWN.items():
        draw_samples(task, folder / "drawn" / task, train, val)
    (folder / "page.png").symlink_to(next((folder / "drawn/docvqa/documents").glob("*.png")))
    (folder / "data/mine/images").mkdir(parents=True)
    for split, count in (("train", 4), ("val", 2)):
        rows = []
        for number in range(count):
            name = f"{split}{number}.png"
            Image.new("RGB", (90 + 10 * number, 90), "red").save(folder / "data/mine/images" / name)
            turn = {"images": [name], "user": f"Which colour has number {number}?", "assistant": "red"}
            rows.append(json.dumps({"id": f"{split}-{number}", "conversations": [turn]}))
        (folder / f"data/mine/{split}.jsonl").write_text("\n".join(rows) + "\n")
    for name, split in (("receipts", "train"), ("more_receipts", "val")):
        (folder / f"{name}.jsonl").symlink_to(folder / f"data/mine/{split}.jsonl")
    for picture in (folder / "data/mine/images").iterdir():
        (folder / picture.name).symlink_to(picture)
    return folder


def call(command: str, checkout: Path, **options: Sequence[dict[str, str]]) -> str:
    """Run a Python command, which must succeed, and return its output."""
    result = run_program(*shlex.split(command)[1:], folder=checkout, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout[-6000:]}"
    return result.stdout


def train(command: str, checkout: Path) -> None:
    """Run the processes that torchrun would start, with one per node; torchrun itself only parses its flags."""
    limited = re.sub(r"--num_train_epochs \d+", "", command)
    launch = get_args_parser().parse_args(shlex.split(re.sub(r"\$\w+", "0", limited))[1:])
    task = re.search(r"finetune_hf_trainer_(\w+)\.py", command)[1]
    own_data = [] if re.search("--(data_dir|train_file)", command) else ["--data_dir", f"drawn/{task}"]
    flags = [word for word in launch.training_script_args if word not in OMITTED]
    flags += ["--model_name_or_path", "random", *own_data, *LIMITS]
    nodes, port = int(launch.nnodes.split(":")[0]), free_port()
    one_each = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    variables = [member_of_group(node, nodes, port) | one_each for node in range(nodes)]
    call(shlex.join(["python", launch.training_script, *flags]), checkout, variables=variables)
    output = checkout / re.search(r"--output_dir (\S+)", command)[1]
    assert json.loads((output / "eval_after.json").read_text())["samples"] > 0
    assert (output / "report.html").is_file()


def convert(command: str, checkout: Path) -> None:
    call(f"{command} --source drawn/ucf101/UCF101_subset", checkout)


def check_data(command: str, checkout: Path) -> None:
    assert "No problems." in call(f"{command} --model_name_or_path random --num_crops 1", checkout)


def reproduce(command: str, checkout: Path) -> None:
    """Only print the command of the row: test_reproduce.py runs one."""
    assert "torchrun " in call(f"{command} --dry_run", checkout)


def as_it_stands(command: str, checkout: Path) -> None:
    assert call(command, checkout).strip()


def merge(command: str, checkout: Path) -> None:
    call(command, checkout)
    assert (checkout / re.search(r"--output_dir (\S+)", command)[1] / "model.safetensors").is_file()


def serve(command: str, checkout: Path) -> None:
    """Start the server, request its page, and stop it."""
    port = str(free_port())
    words = [*shlex.split(command)[3:], "--server_port", port]
    with (
        running_demo(*words, folder=checkout, log=checkout / f"{port}.log") as address,
        urllib.request.urlopen(address, timeout=60) as page,
    ):
        assert "Ask a finetuned model" in page.read().decode()


def make(command: str, checkout: Path) -> None:
    """Run the demo on a few samples; only parse the other commands that make would run."""
    result = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line.removeprefix(".venv/bin/") for line in result.stdout.splitlines()]
    assert lines
    for line in lines:
        if line == "python -m tools.embedded docvqa":
            assert "Results were written to output/demo-docvqa" in call(f"{line} --smoke", checkout)
        elif line.startswith(("python -m tools", "python -m benchmarks")):
            parse(shlex.split(line))


def install(command: str, checkout: Path) -> None:
    """Nothing is installed: only the versions and files that the command names are checked."""
    words = shlex.split(command)
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    assert [word for word in words if "==" in word and word not in pinned] == []
    for file in (after for word, after in zip(words, words[1:], strict=False) if word in ("-r", "--requirement")):
        assert (ROOT / file).is_file()
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all(group in groups for names in re.findall(r"\.\[([\w,]+)\]", command) for group in names.split(","))
    assert re.search(r"==| -r | -e ", command)


class Rule(NamedTuple):
    pattern: str
    stage: int  # a command may require the results of earlier stages
    run: Callable[[str, Path], None]


RULES = [
    Rule(r"torchrun ", 1, train),
    Rule(r"python convert_ucf101.py ", 0, convert),
    Rule(r"python -m tools.check_data ", 0, check_data),
    Rule(r"python -m tools.reproduce .*(--list|--dry_run)", 0, as_it_stands),
    Rule(r"python -m tools.reproduce ", 0, reproduce),
    Rule(r"python -m tools.(predict|evaluate|report) ", 2, as_it_stands),
    Rule(r"python -m tools.merge_lora ", 2, merge),
    Rule(r"python -m tools.demo ", 2, serve),
    Rule(r"make ", 1, make),  # takes as long as several trainings
    Rule(r"(DS_IGNORE_CUDA_DETECTION=1 )?pip install ", 0, install),
    Rule(r"python3 -m venv \.venv && \. \.venv/bin/activate$", 0, lambda *_: None),
]
COMMANDS = commands(README)
TRAINING = [command for command in COMMANDS if command.startswith("torchrun")]


@pytest.mark.parametrize("command", TRAINING)
def test_flags_fit_the_number_of_processes(command, monkeypatch):
    """The flags that the limits above replace, such as the batch size, are valid too."""
    variables = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    launcher, script, flags = re.match(r"(torchrun .*?) (finetune_\w+)\.py (.*)", command.replace("\n", " ")).groups()
    launch = get_args_parser().parse_args([*shlex.split(string.Template(launcher).substitute(variables))[1:], script])
    monkeypatch.setenv("WORLD_SIZE", str(int(launch.nproc_per_node) * int(launch.nnodes.split(":")[0])))
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(flags)])
    importlib.import_module(script).parse_args()


def rule_of(command: str) -> Rule | None:
    return next((rule for rule in RULES if re.match(rule.pattern, command)), None)


@pytest.fixture(scope="module")
def outcomes(checkout):
    """The commands' outcomes, two commands at a time, stage by stage."""
    outcomes: dict[str, Future] = {}
    with ThreadPoolExecutor(2) as pool:
        for stage in range(3):
            of_stage = [command for command in COMMANDS if rule_of(command).stage == stage]
            running = {command: pool.submit(rule_of(command).run, command, checkout) for command in of_stage}
            outcomes |= running
            for outcome in running.values():
                outcome.exception()  # waits
    return outcomes


def test_every_command_has_a_rule():
    assert [command for command in COMMANDS if rule_of(command) is None] == []
    assert len(TRAINING) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: re.sub(r"\W+", "-", command)[:80])
def test_a_command_of_the_readme_runs(command, outcomes):
    outcomes[command].result()


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------

# How commands of other programs begin.
OTHER_PROGRAMS = ("az ", "make ", "pip ", "DS_IGNORE_CUDA_DETECTION=1 pip ", "python - ", "python3 -m venv ", "vllm ")
OTHER_PROGRAMS += ("python -m lmms_eval ", "export ", "hf ", "source ")
# Flags of other programs, except torchrun's, which its parser lists.
OTHER_FLAGS = {
    "Azure": "--file --name --type --size --tier --min-instances --max-instances --resource-group --workspace-name",
    "lmms-eval": "--tasks --include_path --batch_size --model_args",
    "pip": "--no-build-isolation --no-deps",
    "Slurm": "--nodes --signal",
    "vLLM": "--trust-remote-code --max-model-len --limit-mm-per-prompt --mm-processor-kwargs --chat-template --enable-lora "
    "--structured-outputs-config",
}


PATCHING = Lock()  # commands run in threads


class Reached(Exception):
    """A program has created its parser."""


def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser that a program creates."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Reached(parser)

    with PATCHING, pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(sys, "argv", [module])
        program = importlib.import_module(module)
        with pytest.raises(Reached) as reached:
            (program.parse_args if inspect.signature(program.main).parameters else program.main)()
    return reached.value.args[0]


def parse(words: list[str]) -> None:
    """Parse a command with the parsers of its programs, which exit for unknown flags."""
    if words[0] == "torchrun":
        launcher = get_args_parser().parse_args(words[1:])
        module, flags = Path(launcher.training_script).stem, launcher.training_script_args
    elif words[1] == "-m":
        module, flags = words[2], words[3:]
    else:
        module, flags = Path(words[1]).stem, words[2:]
    parser_of(module).parse_args(flags)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_documents_are_valid(page):
    for command in commands(PAGES[page]):
        if not command.startswith(OTHER_PROGRAMS):
            parse(shlex.split(re.sub(r"\$\w+", "0", command)))


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings if option.startswith("--")}


def test_flags_in_the_documents_exist_and_the_readme_lists_all_of_the_scripts():
    of_scripts = set().union(*(options(parser_of(script)) for script in SCRIPTS)) - {"--help"}
    named = {page: set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text)) for page, text in PAGES.items()}
    assert of_scripts - named["README.md"] == set()
    known = of_scripts.union(*(options(parser_of(program)) for program in PROGRAMS))
    known |= options(get_args_parser()) | set(" ".join(OTHER_FLAGS.values()).split())
    assert {page: sorted(flags - known) for page, flags in named.items() if flags - known} == {}


@pytest.mark.parametrize("page", PAGES)
def test_links_have_targets(page):
    folder = ROOT if (ROOT / page).exists() else ROOT / "docs"
    for target in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", PAGES[page]):
        target, _, anchor = "".join(target).partition("#")
        if not target.startswith("https://"):
            path = folder / (target or page)
            assert path.exists(), target
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


def test_measured_values_in_the_readme_are_those_of_the_results():
    rows = re.findall(r"^\|(.+)\|$", README[README.index("## Results") : README.index("## What a run does")], re.MULTILINE)
    cells = [row.rsplit("|", 1)[1].strip() for row in rows]
    assert cells[0] == "measured here"
    page = (ROOT / "results/README.md").read_text(encoding="utf-8").partition("## Speed")[0]
    figures = re.findall(r"\| \[([\d.]+)\]\(", page)
    assert sorted(" ".join(cells[2:]).replace("not measured", "").split()) == sorted(figures)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 300
