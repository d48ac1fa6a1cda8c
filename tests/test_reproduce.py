"""tools.reproduce, tools.embedded and tools.matrix: published tables, commands of their rows, results pages, sample runs."""

import importlib
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from report_runs import write_json

from common.arguments import check_arguments
from tools import embedded, matrix, reproduce, runs
from tools.runs import load_published

PUBLISHED = load_published()["accuracy"]
ROWS = [(task, name) for task, table in PUBLISHED.items() for name in table["rows"]]


def record(task, row, **changes):
    """A row's file as reproduce writes it."""
    table = PUBLISHED[task]
    metric = table["metric"]
    return {
        "task": task,
        "row": row,
        "embedded": False,
        "metric": metric,
        "before": {metric: 0.51},
        "after": {metric: 0.87654},
        "base_model": table["model"],
        "date": "2026-01-02T03:04:05+00:00",
        "hardware": "4 × NVIDIA H100",
    } | changes


@pytest.mark.parametrize(("task", "name"), ROWS)
def test_a_row_runs_as_published(task, name, monkeypatch, run_main):
    printed = run_main(reproduce, task, "--row", name, "--dry_run", "--nproc_per_node", 4)
    launcher, *command = shlex.split(printed.splitlines()[-1])
    assert launcher == "torchrun" and command[:3] == ["--standalone", "--nproc_per_node=4", f"finetune_hf_trainer_{task}.py"]
    monkeypatch.setattr(sys, "argv", command[2:])
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = importlib.import_module(f"finetune_hf_trainer_{task}").parse_args()
    check_arguments(args)
    row, method = PUBLISHED[task]["rows"][name], PUBLISHED[task]["rows"][name]["method"]
    assert (args.model_name_or_path, args.batch_size) == (PUBLISHED[task]["model"], 64)
    assert (args.learning_rate, args.num_train_epochs) == (row["learning_rate"], row["num_train_epochs"])
    assert args.bf16 is not name.endswith("-fp16")
    assert (args.use_lora, args.use_qlora) == (method == "lora", method == "qlora")
    assert args.freeze_vision_model is (method == "frozen") and args.train_only is None
    if "lora_rank" in row:
        assert (args.lora_rank, args.lora_rank * args.lora_alpha_ratio) == (row["lora_rank"], row["lora_alpha"])
    assert args.resume_from_checkpoint == "auto" and args.save_strategy == "steps"
    assert getattr(args, "full_train", True)


def test_rows_are_listed(run_main):
    printed = run_main(reproduce, "--list")
    assert printed.count("not measured |") == len(ROWS) + 1 == 19  # and NLVR2's LoRA, of which none is published
    assert "DocVQA" not in run_main(reproduce, "nlvr2", "--list")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nlvr2", "--row", "lora"], "has no row 'lora' (LoRA: none published); expected one of: full, frozen"),
        (["--row", "full"], "missing task, expected one of: nlvr2, docvqa, hateful_memes"),
        (["nlvr2", "--row", "full", "--smoke"], "--smoke requires --embedded"),
        (["nlvr2", "--row", "full", "--embedded", "--nproc_per_node", "4"], "omit the other flag"),
        (
            ["nlvr2", "--row", "full", "--nproc_per_node", "3"],
            "--nproc_per_node: 3 does not divide the published batch size of 64",
        ),
        (["nlvr2", "--row", "full"], "--nproc_per_node: 8 processes need as many GPUs, but 0 are available: --dry_run"),
    ],
)
def test_invalid_flags(arguments, message, monkeypatch, capsys, run_main):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit):
        run_main(reproduce, *arguments)
    assert message in capsys.readouterr().err


def test_the_results_pages_are_up_to_date(tmp_path):
    records = json.loads((ROOT / "results/embedded.json").read_text())
    runs.write_page(tmp_path, "README.md", reproduce.render(ROOT / "results"))
    runs.write_page(tmp_path, "embedded.md", matrix.render(records))
    for name in ("README.md", "embedded.md"):
        assert (ROOT / "results" / name).read_text() == (tmp_path / name).read_text()
    for row in load_published()["speed"]["rows"]:
        assert f"| {row['images_per_second']:.3f} | ~{row['peak_memory_gb']} |" in (tmp_path / "README.md").read_text()


def test_only_comparable_results_are_shown_beside_published_values(tmp_path):
    records = {
        "docvqa-full": record("docvqa", "full"),
        "docvqa-lora-x": record("docvqa", "lora", base_model="another/model"),
        "embedded-docvqa-qlora": record("docvqa", "qlora", base_model="assets/tiny_phi3v", embedded=True),
    }
    for name, content in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    tables, _, others = reproduce.render(tmp_path).partition("## Results with other models")
    assert "| 83.65 | [87.65](docvqa-full.json) (4 × NVIDIA H100, 2026-01-02) |" in tables
    assert tables.count("not measured |") == len(ROWS) and tables.count(".json)") == 1
    assert "another/model" in others and "docvqa-lora-x.json" in others and others.count("0.8765") == 2
    table = PUBLISHED["docvqa"]
    measured = record("docvqa", "full", published_upstream=83.65)
    assert reproduce.describe(measured, table) == (
        "anls_case_sensitive 87.65 (before: 51.00), published upstream 83.65: +4.00 points"
    )
    assert "no published value" in reproduce.describe(record("docvqa", "full", embedded=True), table)


def test_the_other_rows_run_after_a_failed_one(tmp_path, monkeypatch, capsys, run_main):
    tried = []

    def fail(command, **_):
        tried.append(command)
        raise runs.RunFailed("the run failed with exit code 1")

    monkeypatch.setattr(reproduce, "run_command", fail)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(SystemExit):
        run_main(reproduce, "nlvr2", "--all", "--nproc_per_node", 8, "--results_dir", tmp_path)
    assert "nlvr2: full, frozen failed; run the same command again to resume" in capsys.readouterr().err
    assert len(tried) == 2 and not list(tmp_path.iterdir())


def test_usage_and_failure_of_a_run():
    # In a process of its own, because the size of this one would be counted.
    program = (
        "from tools.runs import run_command\n"
        "for code in ('bytearray(900_000_000)', 'pass', 'exit(3)'):\n"
        "    print(run_command(['python', '-c', code]).peak_memory_gb)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    grown, small = (float(line) for line in result.stdout.splitlines() if not line.startswith("python"))
    assert grown > 0.9 and small < grown - 0.2  # the tool's own size counts until Python has started
    assert "RunFailed: the run failed with exit code 3" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_tool_waits_for_its_run_to_save(number):
    saver = (
        "import signal, sys, time\n"
        "def handle(by): signal.signal(signal.SIGTERM, by); signal.signal(signal.SIGINT, by)\n"
        "def save(*_):\n"
        "    handle(signal.SIG_IGN); print('saving', flush=True); time.sleep(1); print('saved', flush=True); sys.exit(1)\n"
        "handle(save)\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    read, write = os.pipe()

    def tool():
        os.setsid()  # like a terminal, whose Ctrl-C reaches all processes that run in it
        os.dup2(write, 1)
        runs.run_command(["python", "-c", saver])

    process = multiprocessing.get_context("fork").Process(target=tool)
    process.start()
    os.close(write)
    with open(read) as output:
        assert output.readline() == "ready\n"
        os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
        assert output.readline() == "saving\n"
        os.kill(process.pid, number)  # users press Ctrl-C again when nothing seems to happen
        assert output.read() == "saved\n"
    process.join(30)
    process.kill()
    assert process.exitcode == 128 + number


def test_data_that_was_not_generated_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "run_command", lambda *_, **__: None)
    for _ in range(2):
        embedded.run_embedded("nlvr2", "full", tmp_path / "drawn", [], smoke=True)
    own = tmp_path / "mine-data" / "own.txt"
    own.parent.mkdir()
    own.touch()
    with pytest.raises(runs.RunFailed, match="mine-data would be replaced"):
        embedded.run_embedded("nlvr2", "full", tmp_path / "mine", [], smoke=True)
    assert own.is_file()


def test_the_settings_of_a_task_fit_every_method(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for task, method, smoke in product(runs.TASKS, runs.METHOD_FLAGS, (False, True)):
        command = embedded.embedded_command(task, method, tmp_path, runs.METHOD_FLAGS[method], smoke)
        monkeypatch.setattr(sys, "argv", command[3:])
        args = importlib.import_module(f"finetune_hf_trainer_{task}").parse_args()
        check_arguments(args)
        assert args.num_crops == 1 and 0 < args.learning_rate <= 1e-2


def test_runs_on_sample_data_are_recorded(tmp_path, monkeypatch, run_main):
    """Without the runs themselves: `make demo` in test_readme.py makes one."""
    commands = []

    def run(command, **environment):
        commands.append(command)
        if "--output_dir" not in command:  # the conversion of the videos
            return None
        output_dir = Path(command[command.index("--output_dir") + 1])
        values = {"metric": "accuracy", "accuracy": 0.5, "samples": 2, "train_runtime": 3.0}
        described = dict.fromkeys(("base_revision", "data", "command", "date", "hardware", "versions"), "x")
        described |= {"base_model": "tiny", "method": "QLoRA"}
        for name in ("run", "eval_before", "eval_after", "train_results", "checkpoint-1/trainer_state"):
            write_json(output_dir / f"{name}.json", values | described)
        return runs.Usage(4.0, 1.5)

    monkeypatch.setattr(embedded, "run_command", run)
    results = tmp_path / "results"
    places = ["--output_dir", tmp_path / "runs", "--results_dir", results]
    run_main(matrix, "--tasks", "docvqa", "--methods", "qlora", "--smoke", *places)
    found = json.loads((results / "embedded.json").read_text())["docvqa"]["qlora"]
    assert (found["method"], found["train_seconds"], found["run_seconds"], found["peak_memory_gb"]) == ("QLoRA", 3.0, 4.0, 1.5)
    page = (results / "embedded.md").read_text()
    assert "| DocVQA | QLoRA | accuracy | 0.500 | 0.500 | 3 | 4 | 1.50 | x, x |" in page and page.count("not run") == 2 * 15

    row = ["nlvr2", "--row", "frozen", "--embedded", "--smoke", *places]
    assert "accuracy 50.00 (before: 50.00); no published value" in run_main(reproduce, *row)
    found = json.loads((results / "embedded-nlvr2-frozen-smoke.json").read_text())
    assert found["embedded"] and "published_upstream" not in found and found["samples"] == 2
    page = (results / "README.md").read_text()
    assert page.count("not measured |") == len(ROWS) + 1 and "embedded-nlvr2-frozen-smoke.json" in page
    assert not list((tmp_path / "runs/embedded-nlvr2-frozen-smoke").glob("checkpoint-*"))
    assert "already exists" in run_main(reproduce, *row)

    said = run_main(embedded, "docvqa", "--smoke", "--output_dir", tmp_path / "demo")
    assert "accuracy 0.5000 -> 0.5000 on 2 samples" in said and f"{tmp_path}/demo/report.html" in said
    assert "torchrun --nproc_per_node=8 finetune_hf_trainer_docvqa.py" in said
    run_main(embedded, "ucf101", "--smoke", "--output_dir", tmp_path / "demo")
    convert, train = commands[-2:]
    assert convert[convert.index("--out_dir") + 1] == train[train.index("--data_dir") + 1]


@pytest.mark.parametrize(("task", "bar"), [("docvqa", 0.75), ("hateful_memes", 0.9), ("nlvr2", 0.85), ("ucf101", 0.9)])
def test_the_recorded_runs_learned(task, bar):
    records = json.loads((ROOT / "results/embedded.json").read_text())[task]
    metric = records["full"]["metric"]
    before, after = (records["full"][when][metric] for when in ("before", "after"))
    assert after > bar and after - before > 0.25
    assert records["full"]["run_seconds"] < 240
    if task == "docvqa":
        assert records["full"]["samples"] >= 200 and before < 0.3
        assert all(abs(records[method]["after"]["anls"] - after) < 0.1 for method in ("lora", "qlora"))
