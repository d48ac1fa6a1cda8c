"""The faults that `make faults` runs."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

from conftest import ROOT

from common.training.checkpoints import why_incomplete

from . import struck
from .damage import DAMAGED
from .harness import Fault
from .struck import Place, Strike

TRAINER = "common.training.trainer.FinetuningTrainer"
STEP = f"{TRAINER}.training_step"
BOTH = ("ZeRO-2", "LoRA")
GONE = r"error: another process has ended \(.*Connection (closed|reset) by peer.*"


def strike(at, do, call=1, ranks=(0, 1)):
    return {"strike": Strike(at, do, call, ranks)}


def has_checkpoints(*steps):
    return partial(check_checkpoints, [f"checkpoint-{step}" for step in steps])


def check_checkpoints(names, output: Path):
    assert {path.name for path in output.glob("checkpoint-*") if why_incomplete(path) is None} == set(names)


KILLED = [
    Fault("one process killed in a step", GONE, BOTH, **strike(STEP, struck.kill, 4, (1,)), codes=(1, -9), fast=True),
    Fault("one process killed in a step", GONE, ("ZeRO-3",), **strike(STEP, struck.kill, 4, (1,)), codes=(1, -9)),
    Fault("the main process killed in a step", GONE, **strike(STEP, struck.kill, 4, (0,)), codes=(-9, 1)),
    Fault("all killed in a step", "resuming|step 3 of 6", BOTH, **strike(STEP, struck.kill, 4), codes=(-9, -9)),
    Fault("killed while saving", GONE, BOTH, **strike(f"{TRAINER}._write_totals", struck.kill, 2, (1,)), codes=(1, -9)),
    Fault(
        "all killed before the manifest",
        "step 4 of 6",
        BOTH,
        **strike(f"{TRAINER}._write_totals", struck.kill, 2),
        check=has_checkpoints(2),
    ),
    Fault("killed in the evaluation loss", GONE, BOTH, **strike(f"{TRAINER}.evaluation_loop", struck.kill, 1, (1,))),
    Fault("killed in the evaluation before", GONE, **strike(f"{TRAINER}.evaluate_before", struck.kill, 1, (1,))),
    Fault("killed in the evaluation after", GONE, **strike(f"{TRAINER}.evaluate_after", struck.kill, 1, (1,))),
    Fault(
        "killed while old checkpoints are rotated",
        GONE,
        BOTH,
        **strike("common.training.trainer.rotate_checkpoints", struck.kill_while_removing, 2, (0,)),
        check=has_checkpoints(4),
    ),
    Fault(
        "killed while the result is saved",
        GONE,
        BOTH,
        **strike("common.phi3v.Phi3VProcessor.save_pretrained", struck.kill, 4, (0,)),
        check=lambda output: check_no_result(output),
    ),
    Fault(
        "killed while weights are written",
        GONE,
        BOTH,
        **strike(f"{TRAINER}._save", struck.kill_in_writing, 2, (0,)),
        codes=(-signal.SIGXFSZ, 1),
        check=has_checkpoints(2),
    ),
    Fault(
        "killed while the result's weights are written",
        GONE,
        **strike(f"{TRAINER}._save", struck.kill_in_writing, 4, (0,)),
        codes=(-signal.SIGXFSZ, 1),
        check=lambda output: check_no_result(output),
    ),
    Fault(
        "killed while an answer is generated",
        GONE,
        **strike("common.evaluation.generation._generate", struck.kill, 2, (0,)),
        codes=(-9, 1),
    ),
    Fault("killed while the report is written", "results saved", **strike(f"{TRAINER}.report", struck.kill)),
    Fault(
        "a data worker killed",
        r"error: a data worker died \(DataLoader worker .*",
        BOTH,
        **strike(STEP, struck.kill_workers, 4, (1,)),
        options={"dataloader_num_workers": 1},
        codes=(1, 1),
    ),
]


def check_no_result(output: Path):
    assert not list(output.glob("*.safetensors"))


def signaled(phase, expected, at, call=1, ranks=(0, 1), exact=True, methods=("LoRA",), fast=None, **options):
    """SIGTERM and SIGINT in a phase: the same is expected of both. ``fast`` is the one that belongs to ``make test``."""
    faults = []
    for name, do, code in (("SIGTERM", struck.term, 143), ("SIGINT", struck.interrupt, 130)):
        said = expected.format(name)
        options |= {"codes": (code, code)} if exact else {}
        faults.append(Fault(f"{name} {phase}", said, methods, **strike(at, do, call, ranks), fast=name == fast, **options))
    return faults


def check_evaluation_due(output: Path, step: int):
    assert json.loads((output / f"checkpoint-{step}/totals.json").read_text())["evaluation_due"]
    check_checkpoints([f"checkpoint-{step}"], output)


STOPPED = "stopped by {{}} after step {}; resume with --resume_from_checkpoint auto"
SAVED = {step: STOPPED.format(step) for step in (3, 5)}
METRIC = {"eval_metric_steps": 3}
DUE = {"check": lambda output: check_evaluation_due(output, 3)}
FIVE = {"check": has_checkpoints(5)}
SIGNALS = [
    *signaled("at the start", "stopped by {}", "common.training.start.run_identity"),
    *signaled("in the evaluation before", "stopped by {}", f"{TRAINER}.evaluate_before", exact=False),
    *signaled("in a step", SAVED[5], STEP, 5, fast="SIGINT", **FIVE),
    *signaled("to one process in a step", SAVED[5], STEP, 5, (1,), methods=BOTH),
    *signaled("in a step before an evaluation", SAVED[3], STEP, 3, (1,), methods=("LoRA", "ZeRO-3"), options=METRIC),
    *signaled("while saving", SAVED[5], f"{TRAINER}._write_totals", 2),
    *signaled("while old checkpoints are rotated", SAVED[5], "common.training.trainer.rotate_checkpoints", 2, **FIVE),
    *signaled("in the evaluation loss", SAVED[3], f"{TRAINER}.evaluation_loop", **DUE),
    *signaled(
        "to one process in the metric's evaluation",
        SAVED[3],
        "common.evaluation.generation._prompt_batches",
        2,
        (0,),
        options=METRIC,
        **DUE,
    ),
    *signaled("while the result is saved", "stopped by {} after training; the model is saved", f"{TRAINER}.save_result"),
    *signaled("in the evaluation after", "stopped by {}", f"{TRAINER}.evaluate_after", exact=False),
    *signaled("while the report is written", "stopped by {}", f"{TRAINER}.report", exact=False),
    Fault("SIGTERM twice in a step", "stopped by SIGTERM\n", **strike(STEP, struck.term_twice, 4), codes=(143, 143)),
    Fault("SIGINT twice in a step", "stopped by SIGINT\n", **strike(STEP, struck.interrupt_twice, 4), codes=(130, 130)),
]

HUNG = r"error: process 1 did not respond within --ddp_timeout.*"
HANGS = {"options": {"ddp_timeout": 5}, "frozen": True}
SILENT = r"warning: process 1 on \S+ has not responded for \d+ seconds; the others end after --ddp_timeout \(5 seconds\)"
HANGING = [
    Fault("a process hangs in a step, while the others wait", SILENT, **strike(STEP, struck.stop, 4, (1,)), **HANGS),
    Fault("a process hangs in a step", HUNG, BOTH, **strike(STEP, struck.stop, 4, (1,)), **HANGS),
    Fault("a process hangs while saving", HUNG, BOTH, **strike(f"{TRAINER}._write_totals", struck.stop, 2, (1,)), **HANGS),
    Fault("a process hangs in an evaluation", HUNG, **strike(f"{TRAINER}.evaluation_loop", struck.stop, 1, (1,)), **HANGS),
    Fault("the main process hangs in a step", HUNG.replace("1", "0"), **strike(STEP, struck.stop, 4, (0,)), **HANGS),
]


def kill_one_process(launcher: subprocess.Popen):
    os.kill(child_processes(launcher.pid)[1], signal.SIGKILL)


def child_processes(pid: int) -> list[int]:
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def interrupt_group(launcher: subprocess.Popen):
    os.killpg(launcher.pid, signal.SIGINT)


LAUNCHED = [
    Fault("torchrun alone killed", "step 2 of 6", launcher=subprocess.Popen.kill),
    Fault("one process of torchrun killed", "Signal 9 .SIGKILL. received by PID", launcher=kill_one_process, codes=(1,)),
    Fault("SIGTERM to torchrun", SAVED[3].format("SIGTERM"), launcher=subprocess.Popen.terminate),
    Fault("Ctrl-C under torchrun", SAVED[3].format("SIGINT"), launcher=interrupt_group),
]

WRITING = r"error: reading or writing failed \(\[Errno \d+\] "
FULL = "error: saving failed .*: free disk space and restart"


def second_run(place: Place):
    """Start another run in the same directory, which has to be refused."""
    command = [sys.executable, *sys.argv]
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "0"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(f"second run, exit code {ended.returncode}: {ended.stderr[-1000:]}", flush=True)


def put_stale_lock(output: Path):
    (output / "_lock").write_text(f"process 1 on {socket.gethostname()}")


DISK = [
    Fault("disk full while saving a checkpoint", FULL, BOTH, **strike(f"{TRAINER}._write_totals", struck.fill_disk, 1)),
    Fault(
        "disk full while saving the weights",
        FULL,
        BOTH,
        **strike(f"{TRAINER}._save", struck.fill_disk, 2),
        check=has_checkpoints(2),
    ),
    Fault(
        "disk full while saving the result",
        FULL,
        BOTH,
        **strike(f"{TRAINER}.save_result", struck.fill_disk),
        check=check_no_result,
    ),
    Fault(
        "disk full while writing predictions",
        f"{WRITING}No space left on device.*free disk space",
        **strike("common.training.trainer.write_evaluation", partial(struck.fail, errno.ENOSPC), 2, (0,)),
    ),
    Fault(
        "disk full while writing the report",
        "warning: report.html was not created .*File too large.* to create it",
        **strike(f"{TRAINER}.report", struck.fill_disk),
        finishes=True,
    ),
    Fault(
        "output directory read-only",
        "error: --output_dir .*: cannot be written to .*Read-only file system",
        **strike("common.training.start.lock_output_dir", struck.refuse_directories, 1, (0,)),
    ),
    Fault(
        "file system turns read-only",
        "error: saving failed .*Read-only file system.*check the disk",
        **strike(f"{TRAINER}._write_totals", partial(struck.fail, errno.EROFS), 2, (0,)),
    ),
    Fault(
        "output directory removed in a step",
        r"warning: --output_dir .*, or its _lock, was deleted during the run(.*\n)*warning: README.md was not written",
        **strike(STEP, struck.remove_output, 4, (0,)),
        finishes=True,
    ),
    Fault(
        "best checkpoint removed in a step",
        r"warning: the best checkpoint, .*checkpoint-3, was deleted during the run",
        BOTH,
        **strike(STEP, struck.remove_output, 5, (0,)),
        options={"load_best_model_at_end": True, "save_steps": 3, **METRIC},
        finishes=True,
    ),
    Fault(
        "a second run in the same directory",
        r"second run, exit code 1: (.*\n)*error: --output_dir .*: another run \(process \d+ on .*\) is writing to it",
        **strike(STEP, second_run, 4, (0,)),
        finishes=True,
    ),
    Fault("lock of a dead run", "resuming from .*checkpoint-4", damage=put_stale_lock, finishes=True, fast=True),
]


PAGE = r"error: .*train_v1.0_withQT.json, entry \d+ of \"data\": image .*train\d+.png"


def restore(output: Path, data: Path):
    from .harness import prepared

    shutil.copytree(prepared()[1], data, dirs_exist_ok=True)


def lists_bad_samples(output: Path):
    entries = [json.loads(line) for line in (output / "bad_samples.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [4, 6], entries
    assert all("train14.png is missing" in entry["error"] for entry in entries)
    assert json.loads((output / "train_results.json").read_text())["skipped_samples"] == 2


def spoil(how, names="train*.png"):
    return strike(STEP, partial(struck.spoil, how, names), 3)


SKIP = {"on_bad_sample": "skip"}
DATA = [
    Fault("pictures deleted in a step", f"{PAGE} is missing", BOTH, **spoil(os.unlink), repair=restore, fast=True),
    Fault("pictures truncated in a step", f"{PAGE} (has changed since|cannot be)", **spoil(struck.halve), repair=restore),
    Fault("pictures replaced in a step", f"{PAGE} has changed since the run began", **spoil(struck.repaint), repair=restore),
    Fault("evaluation picture deleted", r"error: .*val\d.png is missing", **spoil(os.unlink, "val*.png"), repair=restore),
    Fault(
        "a picture deleted, samples skipped",
        "results saved",
        BOTH,
        **spoil(os.unlink, "train14.png"),
        options=SKIP,
        finishes=True,
        same=False,
        check=lists_bad_samples,
    ),
    Fault(
        "all pictures deleted, samples skipped",
        r"error: all samples of step \d are unusable: see .*bad_samples.jsonl",
        **spoil(os.unlink),
        options=SKIP,
        repair=restore,
    ),
]

NUMBERS = [
    Fault(
        "loss not finite in a step",
        r"error: loss or gradient was not finite in 1 consecutive step, starting at step 3 .*",
        BOTH,
        **strike(STEP, struck.put_nan_loss, 3),
        options={"max_nonfinite_steps": 1},
        codes=(1, 1),
    ),
    Fault(
        "gradient not finite in a step",
        r"error: loss or gradient was not finite in 1 consecutive step, starting at step 3 .*",
        BOTH,
        **strike(STEP, struck.put_inf_gradient, 3),
        options={"max_nonfinite_steps": 1},
        codes=(1, 1),
    ),
    Fault(
        "a weight not finite in a step",
        r"error: .* is not finite after step 4 .*: the checkpoint was not saved",
        BOTH,
        **strike(f"{TRAINER}.require_finite", struck.put_inf, 2, (1,)),
        check=has_checkpoints(2),
    ),
]

FAULTS = [*KILLED, *SIGNALS, *HANGING, *LAUNCHED, *DISK, *DAMAGED, *DATA, *NUMBERS]
