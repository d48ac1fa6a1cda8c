"""The launch files: their commands are parsed by torchrun and the scripts, and slurm.sbatch runs with stand-ins for Slurm."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from conftest import ROOT
from torch.distributed.run import get_args_parser

import finetune_hf_trainer_docvqa as script

LAUNCH = ROOT / "launch"

# Stand-ins for Slurm and torchrun. srun runs its command as the one task of the first machine; scancel signals that task.
STAND_INS = {
    "scontrol": 'if [[ $1 == show ]]; then printf "node7\\nnode8\\n"; else echo "scontrol $*" >> "$LOG"; fi',
    "srun": 'while [[ $1 == --* ]]; do shift; done\necho $$ > "$LOG.task"\nexport SLURM_NODEID=0\nexec "$@"',
    "scancel": 'echo "scancel $*" >> "$LOG"; kill -TERM "$(< "$LOG.task")"',
    "torchrun": 'printf "%s\\n" "$@" > "$LOG.arguments"\n'
    "trap 'sleep 0.5; echo saved >> \"$LOG\"; exit 1' TERM\n"
    'echo started >> "$LOG"\nfor ((i = 0; i < ${SECONDS_TO_TRAIN:-600}; i++)); do sleep 0.1; done',
}


def test_the_dockerfiles_command_and_user(monkeypatch):
    """`make lint` checks the rest with hadolint; building it needs Docker."""
    text = (ROOT / "Dockerfile").read_text()
    assert "\nUSER $UID\n" in text and "ARG UID=1000" in text
    (command,) = re.findall(r"^# +torchrun (.+)$", text, re.M)
    launcher = get_args_parser().parse_args(command.split())
    monkeypatch.setattr(sys, "argv", [launcher.training_script, *launcher.training_script_args])
    assert script.parse_args().use_lora


def check_command(command: list[str], monkeypatch) -> tuple:
    """Parse a torchrun command with torchrun's parser, and the script's flags with the script's parser."""
    launcher = get_args_parser().parse_args(command)
    assert (ROOT / launcher.training_script).is_file()
    monkeypatch.setattr(sys, "argv", [launcher.training_script, *launcher.training_script_args])
    flags = script.parse_args()
    assert launcher.shutdown_timeout > 30  # torchrun's own default is too short to save a checkpoint
    assert flags.resume_from_checkpoint == "auto"
    assert flags.save_strategy == "steps"
    return launcher, flags


@pytest.fixture
def slurm(tmp_path):
    """Starts the batch script as Slurm does, with stand-ins for the programs that it calls."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "log").touch()
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "64",
    }

    def start(*arguments: str, **more: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", LAUNCH / "slurm.sbatch", *arguments], cwd=tmp_path, env=os.environ | environment | more
        )

    return start


def test_a_process_ends_with_torchrun_while_it_imports_libraries(tmp_path):
    child = "import time; from common.runtime.parser import Parser; Parser(None); print('ready', flush=True); time.sleep(60)"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "none"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", parent, child], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout.readline() == "ready\n"
    [process] = psutil.Process(launcher.pid).children()
    launcher.kill()
    process.wait(timeout=10)


def test_slurm_directives():
    text = (LAUNCH / "slurm.sbatch").read_text()
    directives = re.findall(r"^#SBATCH --(.+)$", text, re.M)
    assert {"ntasks-per-node=1", "requeue", "open-mode=append"} <= set(directives)  # torchrun starts the processes
    [notice] = re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", text, re.M)
    [timeout] = re.findall(r"--shutdown-timeout=(\d+)", text)
    assert int(timeout) < int(notice)


def test_slurm_command(slurm, tmp_path, monkeypatch):
    flags = ["--bf16", "--save_steps", "50", "--output_dir", "output/with blank"]
    job = slurm("finetune_hf_trainer_docvqa.py", *flags, SECONDS_TO_TRAIN="0")
    assert job.wait(timeout=20) == 0
    assert (tmp_path / "log").read_text() == "started\n"
    launcher, flags = check_command((tmp_path / "log.arguments").read_text().splitlines(), monkeypatch)
    assert (launcher.nnodes, launcher.node_rank, launcher.nproc_per_node) == ("2", 0, "gpu")
    assert (launcher.master_addr, launcher.master_port) == ("node7", 20000 + 4711)
    assert (flags.bf16, flags.save_steps, str(flags.output_dir)) == (True, 50, "output/with blank")


def test_slurm_saves_and_requeues_before_the_time_limit(slurm, tmp_path):
    job = slurm("finetune_hf_trainer_docvqa.py", "--bf16")
    log, deadline = tmp_path / "log", time.monotonic() + 20
    while log.read_text() != "started\n" and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)  # as --signal=B: does, to the batch script alone
    assert job.wait(timeout=20) == 1
    assert log.read_text().splitlines() == ["started", "scancel --signal=TERM 4711", "saved", "scontrol requeue 4711"]


def test_skypilot_command(monkeypatch):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "file_mounts", "envs", "setup", "run"}
    set_by_skypilot = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    command = task["run"].partition("torchrun")[2]
    expanded = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"],
        env=os.environ | task["envs"] | set_by_skypilot,
        capture_output=True,
        text=True,
        check=True,
    )
    launcher, flags = check_command(expanded.stdout.splitlines(), monkeypatch)
    assert (launcher.nnodes, launcher.node_rank, launcher.nproc_per_node) == ("2", 1, "8")
    assert launcher.master_addr == "10.0.0.1"
    assert str(flags.output_dir).startswith(tuple(task["file_mounts"]))


def test_azure_command(monkeypatch):
    job = yaml.safe_load((LAUNCH / "azureml.yml").read_text())
    assert job["distribution"] == {"type": "pytorch", "process_count_per_instance": 1}  # torchrun starts the others
    assert (LAUNCH / job["code"]).resolve() == ROOT
    install, _, command = job["command"].partition("torchrun ")
    assert install.endswith("pip install --quiet -r requirements.txt && ")
    set_by_azure = {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.4", "MASTER_PORT": "6105"}
    command = re.sub(r"\$\{\{outputs\.(\w+)\}\}", lambda match: f"/mnt/{job['outputs'][match[1]]['type']}", command)
    words = shlex.split(re.sub(r"\$(\w+)", lambda match: set_by_azure[match[1]], command))
    launcher, flags = check_command(words, monkeypatch)
    assert (launcher.nnodes, launcher.node_rank) == (str(job["resources"]["instance_count"]), 1)
    assert (launcher.master_addr, launcher.master_port) == ("10.0.0.4", 6105)
    assert str(flags.output_dir) == "/mnt/uri_folder"
