"""The published tables as data, the commands that run their rows, the page of results, and runs on the embedded samples."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from browser import chromium, overflow, watched
from conftest import ROOT

from common.arguments import check_arguments, uses_adapters
from tools import embedded, matrix, reproduce, runs
from tools.results_page import load_published, render_page

PHI_3, PHI_3_5 = "microsoft/Phi-3-vision-128k-instruct", "microsoft/Phi-3.5-vision-instruct"
# As published: learning rate, epochs, LoRA rank and alpha, figure in bf16 and in fp16.
TABLES = {
    ("nlvr2", PHI_3_5): {"full": (1e-5, 3, None, 89.40, None), "frozen": (2e-5, 2, None, 89.20, None)},
    ("docvqa", PHI_3): {
        "full": (5e-6, 2, None, 83.65, 82.60),
        "frozen": (1e-4, 2, None, 79.19, 78.74),
        "lora": (2e-4, 2, (32, 16), 82.46, 82.34),
        "qlora": (2e-4, 2, (32, 16), 81.85, 81.85),
    },
    ("hateful_memes", PHI_3): {
        "full": (5e-5, 2, None, 86.4, 85.4),
        "frozen": (1e-4, 3, None, 79.4, 78.6),
        "lora": (2e-4, 2, (128, 256), 86.6, 85.2),
        "qlora": (2e-4, 2, (128, 256), 84.0, 83.8),
    },
}
ROWS = [
    (task, model, f"{method}{suffix}", method, *settings, figure)
    for (task, model), table in TABLES.items()
    for method, (*settings, bf16, fp16) in table.items()
    for suffix, figure in (("", bf16), ("-fp16", fp16))
    if figure is not None
]


def run_main(module, monkeypatch, capsys, *arguments):
    """Run a tool in this process and return what it printed."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()
    return capsys.readouterr().out


def run_tool(name, *arguments):
    command = [sys.executable, "-m", f"tools.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800)


def record(task, row, **changes):
    """A row's file as reproduce writes it."""
    table = load_published()["accuracy"][task]
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


@pytest.mark.parametrize(("task", "model", "row", "method", "rate", "epochs", "lora", "figure"), ROWS)
def test_a_row_runs_as_published(task, model, row, method, rate, epochs, lora, figure, monkeypatch, capsys):
    assert load_published()["accuracy"][task]["rows"][row]["published"] == figure
    printed = run_main(reproduce, monkeypatch, capsys, task, "--row", row, "--dry_run", "--nproc_per_node", 4)
    launcher, *command = shlex.split(printed)
    assert launcher == "torchrun" and command[:3] == ["--standalone", "--nproc_per_node=4", f"finetune_hf_trainer_{task}.py"]
    script = importlib.import_module(f"finetune_hf_trainer_{task}")
    monkeypatch.setattr(sys, "argv", command[2:])
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = script.parse_args()
    check_arguments(args)
    assert (args.model_name_or_path, args.batch_size, args.learning_rate, args.num_train_epochs) == (model, 64, rate, epochs)
    assert args.bf16 is not row.endswith("-fp16")
    assert (uses_adapters(args), args.use_qlora) == (method in ("lora", "qlora"), method == "qlora")
    assert args.freeze_vision_model is (method == "frozen") and args.train_only is None
    assert not lora or (args.lora_rank, args.lora_rank * args.lora_alpha_ratio) == lora
    assert args.resume_from_checkpoint == "auto" and args.save_strategy == "steps"
    assert getattr(args, "full_train", True)


def test_no_row_is_missing_or_invented(monkeypatch, capsys):
    assert [(task, row) for task, table in load_published()["accuracy"].items() for row in table["rows"]] == [
        (task, row) for task, _, row, *_ in ROWS
    ]
    printed = run_main(reproduce, monkeypatch, capsys, "--list")
    for task, _, row, *_, figure in ROWS:
        assert re.search(rf"{task} --row {row} +{figure}", printed)
    assert "LoRA: none published" in printed
    assert "docvqa" not in run_main(reproduce, monkeypatch, capsys, "nlvr2", "--list")


def test_processes_fit_the_gpus_at_hand_and_the_batch(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    printed = run_main(reproduce, monkeypatch, capsys, "docvqa", "--all", "--dry_run")
    assert printed.count("torchrun --standalone --nproc_per_node=4 ") == 8
    assert "4 of 6 GPUs" in printed
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "--nproc_per_node=8 " in run_main(reproduce, monkeypatch, capsys, "docvqa", "--row", "full", "--dry_run")
    for gpus, wrong, message in (
        (0, ["--nproc_per_node", 3], "does not divide the published batch size of 64"),
        (0, [], "no GPU is available"),
        (0, ["--nproc_per_node", 2], "no GPU is available"),
        (4, ["--nproc_per_node", 8], r"--nproc_per_node 8: only 4 GPU\(s\) are available"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        with pytest.raises(SystemExit, match=message):
            run_main(reproduce, monkeypatch, capsys, "docvqa", "--row", "full", *wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nlvr2", "--row", "lora"], "has no row 'lora' (LoRA: none published); expected one of: full, frozen"),
        (["--row", "full"], "missing task, expected one of: nlvr2, docvqa, hateful_memes"),
        (["nlvr2", "--row", "full", "--smoke"], "--smoke requires --embedded"),
        (["nlvr2", "--row", "full", "--embedded", "--nproc_per_node", "4"], "omit the other flag"),
    ],
)
def test_what_reproduce_refuses(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(reproduce, monkeypatch, capsys, *arguments)
    assert message in capsys.readouterr().err


def test_the_page_in_the_repository_is_what_the_files_beside_it_say(tmp_path):
    for path in (ROOT / "results").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    reproduce.write_page(tmp_path)
    assert (ROOT / "results" / "README.md").read_text() == (tmp_path / "README.md").read_text()


def accuracy_part(page):
    return page.partition("## Speed")[0]


def test_nothing_measured_is_said_to_be_so():
    page = render_page({})
    assert accuracy_part(page).count("not measured |") == len(ROWS) + 1  # and NLVR2's LoRA, of which none is published
    speed = load_published()["speed"]["rows"]
    assert len(speed) == 15
    for row in speed:
        assert f"| {row['images_per_second']:.3f} | ~{row['peak_memory_gb']} |" in page
    for doubt in ("106 %", "cannot have reached the decoder", "suspect", "not the benchmarks' official ones"):
        assert doubt in page


def test_only_what_compares_stands_beside_a_published_figure():
    page = render_page(
        {
            "docvqa-full.json": record("docvqa", "full"),
            "docvqa-lora-x.json": record("docvqa", "lora", base_model="another/model"),
            "embedded-docvqa-qlora.json": record("docvqa", "qlora", base_model="assets/tiny_phi3v", embedded=True),
            "embedded-docvqa-frozen.json": record("docvqa", "frozen", embedded=True),
        }
    )
    tables, elsewhere = accuracy_part(page), page.partition("## Speed")[2]
    assert "| 83.65 | [87.65](docvqa-full.json) (4 × NVIDIA H100, 2026-01-02) |" in tables
    assert tables.count("not measured |") == len(ROWS)
    assert tables.count(".json)") == 2  # the row's, and published.json
    others, embedded_samples = elsewhere.split("## Results on the sample data")
    assert "another/model" in others and "docvqa-lora-x.json" in others
    assert embedded_samples.count("0.8765") == 2 and "say nothing about the real models" in embedded_samples


def test_a_figure_is_compared_with_the_published_one():
    table = load_published()["accuracy"]["docvqa"]
    measured = record("docvqa", "full", published_upstream=83.65)
    assert reproduce.describe(measured, table) == (
        "anls_case_sensitive 87.65 (before: 51.00), published upstream 83.65: +4.00 points"
    )
    assert "no published value" in reproduce.describe(measured | {"embedded": True}, table)


def test_a_row_that_has_its_file_is_not_run_again(tmp_path, monkeypatch, capsys):
    (tmp_path / "nlvr2-full.json").write_text("{}")
    printed = run_main(reproduce, monkeypatch, capsys, "nlvr2", "--row", "full", "--results_dir", tmp_path)
    assert "already exists; delete it to run the row again" in printed


def test_a_failed_row_does_not_keep_the_others_from_running(tmp_path, monkeypatch, capsys):
    tried = []

    def fail(command, **_):
        tried.append(command)
        raise runs.RunFailed("the run failed with exit code 1")

    monkeypatch.setattr(reproduce, "run_command", fail)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(SystemExit, match="nlvr2: full, frozen failed; run the same command again to resume"):
        run_main(reproduce, monkeypatch, capsys, "nlvr2", "--all", "--nproc_per_node", 8, "--results_dir", tmp_path)
    assert len(tried) == 2 and not list(tmp_path.iterdir())


def test_the_usage_is_one_runs_alone():
    # In a process of its own: this one's size would count as that of what it starts.
    program = (
        "from tools.runs import run_command\n"
        "for code in ('bytearray(300_000_000)', 'pass'):\n"
        "    print(run_command(['python', '-c', code]).peak_memory_gb)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    grown, small = (float(line) for line in result.stdout.splitlines() if not line.startswith("python"))
    assert 0.3 < grown < 0.4 and small < 0.1


def test_a_failed_run_is_raised():
    with pytest.raises(runs.RunFailed, match="exit code 3"):
        runs.run_command(["python", "-c", "raise SystemExit(3)"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_tool_waits_for_its_run_to_save(number):
    saver = (
        "import signal, sys, time\n"
        "def save(*_): print('saved', flush=True); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, save); signal.signal(signal.SIGINT, save)\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    program = f"from tools.runs import run_command; run_command(['python', '-c', {saver!r}])"
    # A session of its own stands for the terminal, whose Ctrl-C reaches all that run in it.
    tool = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    while (line := tool.stdout.readline()).strip() != "ready":
        assert line, "the run ended before it was ready"
    if number == signal.SIGTERM:
        tool.send_signal(number)
    else:
        os.killpg(tool.pid, number)
    assert "saved" in tool.communicate(timeout=30)[0]
    assert tool.returncode == 128 + number


@pytest.mark.slow
def test_an_interrupted_row_goes_on_and_a_finished_one_is_recorded(tmp_path):
    places = ["--output_dir", tmp_path / "runs", "--results_dir", tmp_path / "results"]
    row = ["nlvr2", "--row", "frozen", "--embedded", "--smoke", *places]
    output_dir = tmp_path / "runs" / "embedded-nlvr2-frozen-smoke"
    embedded.prepare_data("nlvr2", output_dir, smoke=True)
    command = shlex.split(run_tool("reproduce", *row, "--dry_run").stdout)
    runs.run_on_cpu([*command, "--max_steps", "2", "--save_steps", "1"])
    (output_dir / "eval_after.json").unlink()

    result = run_tool("reproduce", *row)
    assert result.returncode == 0, result.stdout
    assert f"resuming from {output_dir}/checkpoint-2" in result.stdout and "before finetuning" not in result.stdout
    found = json.loads((tmp_path / "results" / "embedded-nlvr2-frozen-smoke.json").read_text())
    assert found["embedded"] and "published_upstream" not in found
    assert found["base_model"] == embedded.MODEL and found["samples"] == 8 and found["metric"] == "accuracy"
    assert "--freeze_vision_model" in found["command"] and found["versions"]["torch"] == torch.__version__
    assert found["after"].keys() == {"accuracy", "consistency"} and found["hardware"].startswith("2 CPU processes")
    page = (tmp_path / "results" / "README.md").read_text()
    assert accuracy_part(page) == accuracy_part(render_page({})) and "embedded-nlvr2-frozen-smoke.json" in page
    assert (output_dir / "report.html").is_file() and not list(output_dir.glob("checkpoint-*"))
    assert "already exists" in run_tool("reproduce", *row).stdout


@pytest.mark.parametrize("method", runs.METHOD_FLAGS)
@pytest.mark.parametrize("task", runs.TASKS)
def test_every_method_takes_a_tasks_settings(task, method, tmp_path, monkeypatch):
    for smoke in (False, True):
        command = embedded.embedded_command(task, method, tmp_path, runs.METHOD_FLAGS[method], smoke)
        position = next(place for place, word in enumerate(command) if word.endswith(".py"))
        monkeypatch.setattr(sys, "argv", command[position:])
        monkeypatch.setenv("WORLD_SIZE", "2")
        check_arguments(importlib.import_module(command[position].removesuffix(".py")).parse_args())


@pytest.mark.slow
# The other two are run for the README's commands.
@pytest.mark.parametrize(("task", "method"), [("hateful_memes", "full"), ("ucf101", "lora")])
def test_a_task_runs_on_the_embedded_samples(task, method, tmp_path):
    result = run_tool("embedded", task, "--method", method, "--smoke", "--output_dir", tmp_path / "demo")
    assert result.returncode == 0, result.stdout
    what_happened = result.stdout.partition("Finetuned the tiny checkpoint")[2]
    assert re.search(r"(anls|accuracy|auroc) 0\.\d{4} -> 0\.\d{4} on \d+ samples", what_happened)
    assert f"{tmp_path}/demo/report.html" in what_happened and (tmp_path / "demo" / "report.html").is_file()
    assert f"torchrun --nproc_per_node=8 finetune_hf_trainer_{task}.py" in what_happened
    if task == "nlvr2":
        look_at_report(tmp_path / "demo" / "report.html", "Accuracy")


def look_at_report(path, metric):
    """The report of a real run, as a browser shows it: its metric, curves, and samples with their pictures."""
    with chromium() as browser, watched(browser, 1400) as page:
        page.goto(path.as_uri())
        assert metric in page.locator("main").inner_text()
        assert page.locator("figure svg").count() > 3 and page.locator("article").count() > 0
        broken = "pictures => pictures.filter(picture => !picture.complete || !picture.naturalWidth).length"
        assert page.locator("article img").count() > 0 and page.locator("article img").evaluate_all(broken) == 0
        assert overflow(page) == 0


@pytest.mark.slow
def test_the_matrix_keeps_figures_by_task_and_method(tmp_path):
    places = ["--output_dir", tmp_path / "runs", "--results_dir", tmp_path / "results"]
    result = run_tool("matrix", "--tasks", "docvqa", "--methods", "qlora", "--smoke", *places)
    assert result.returncode == 0, result.stdout
    found = json.loads((tmp_path / "results" / "embedded.json").read_text())["docvqa"]["qlora"]
    assert found["method"] == "QLoRA" and 0 < found["train_seconds"] < found["run_seconds"]
    assert 0.2 < found["peak_memory_gb"] < 4
    page = (tmp_path / "results" / "embedded.md").read_text()
    scores = f"{found['before']['anls']:.3f} | {found['after']['anls']:.3f}"
    assert f"| DocVQA | QLoRA | anls | {scores} | {found['train_seconds']:.0f} | {found['run_seconds']:.0f} |" in page
    assert page.count("not run") == 2 * 15


@pytest.mark.parametrize(("task", "bar"), [("docvqa", 0.75), ("hateful_memes", 0.9), ("nlvr2", 0.85), ("ucf101", 0.9)])
def test_what_is_recorded_of_the_embedded_samples_is_what_they_are_for(task, bar):
    records = json.loads((ROOT / "results/embedded.json").read_text())[task]
    metric = {"docvqa": "anls", "hateful_memes": "auroc"}.get(task, "accuracy")
    before, after = (records["full"][when][metric] for when in ("before", "after"))
    assert after > bar and after - before > 0.25
    assert records["full"]["run_seconds"] < 240
    if task == "docvqa":
        assert records["full"]["samples"] >= 200
        assert before < 0.3
        assert all(abs(records[method]["after"]["anls"] - after) < 0.1 for method in ("lora", "qlora"))


def test_the_matrix_in_the_repository_is_what_was_recorded():
    records = json.loads((ROOT / "results/embedded.json").read_text())
    assert (ROOT / "results/embedded.md").read_text() == matrix.render(records)


def test_settings_name_every_task_and_method():
    for task in runs.TASKS:
        for method in runs.METHOD_FLAGS:
            command = embedded.embedded_command(task, method, ROOT / "output", [], smoke=False)
            script = importlib.import_module(f"finetune_hf_trainer_{task}")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", command[3:])
                args = script.parse_args()
                check_arguments(args)
            assert args.num_crops == 1 and 0 < args.learning_rate <= 1e-2
    assert matrix.TASK_TITLES.keys() == set(runs.TASKS) == embedded.SETTINGS.keys() == embedded.SMOKE_COUNTS.keys()
