"""Checkpoints that are damaged before a run resumes from them."""

import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common.training.checkpoints import write_manifest

from .harness import Fault


def flip(name: str, output: Path):
    """Flip a bit in the middle of a file of the last checkpoint."""
    [path] = (output / "checkpoint-4").glob(name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(name: str, output: Path):
    [path] = (output / "checkpoint-4").glob(name)
    os.truncate(path, path.stat().st_size // 2)


def lose(name: str, output: Path):
    [path] = (output / "checkpoint-4").glob(name)
    path.unlink()


def damaged(how, does, reason, names, method, fast=()):
    return [
        Fault(
            f"{how}: {name}",
            rf"skipping checkpoint-4 \(.*{reason}.*\)\nresuming from .*checkpoint-2",
            (method,),
            damage=partial(does, name),
            finishes=True,
            fast=name in fast,
        )
        for name in names
    ]


class Payload:
    """A pickle of it would write a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def put_pickle(name: str, output: Path):
    """Put a pickle in place of a file, in a checkpoint that is otherwise whole."""
    [path] = (output / "checkpoint-4").glob(name)
    path.write_bytes(pickle.dumps(Payload(output / "was_run")))
    write_manifest(output / "checkpoint-4")


def put_inf_weight(output: Path):
    path = output / "checkpoint-4/adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    write_manifest(output / "checkpoint-4")


def put_inf_optimizer(output: Path):
    [path, _] = sorted((output / "checkpoint-4").rglob("*optim_states.pt"))
    states = torch.load(path, weights_only=False)
    states["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data[0] = float("inf")
    torch.save(states, path)
    write_manifest(output / "checkpoint-4")


def delete_last(output: Path, data: Path):
    shutil.rmtree(output / "checkpoint-4")


def not_run(output: Path):
    assert not (output / "was_run").exists(), "a pickle was run"


MODEL, OPTIMIZER = "global_step4/mp_rank_00_model_states.pt", "global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt"
OF_ZERO = ["model.safetensors", MODEL, OPTIMIZER, "latest"]
OF_ALL = ["rng_state_1.pth", "scheduler.pt", "trainer_state.json", "totals.json", "complete.json"]
OF_LORA = ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt", *OF_ALL]
DAMAGED = [
    *damaged("bit flipped", flip, "damaged", OF_ZERO, "ZeRO-2"),
    *damaged(
        "bit flipped", flip, "damaged|corrupted|missing|bytes", OF_LORA, "LoRA", ["adapter_model.safetensors", "optimizer.pt"]
    ),
    *damaged("truncated", cut, "bytes, expected", [OPTIMIZER], "ZeRO-2"),
    *damaged(
        "truncated", cut, "bytes, expected", ["adapter_model.safetensors", "trainer_state.json"], "LoRA", ["trainer_state.json"]
    ),
    *damaged("missing", lose, "is missing", [MODEL], "ZeRO-2"),
    *damaged("missing", lose, "is missing", ["optimizer.pt", "rng_state_1.pth"], "LoRA", ["rng_state_1.pth"]),
    *(
        Fault(
            f"pickle in place of {name}",
            "error: --resume_from_checkpoint .*checkpoint-4: a file may run code or is damaged, and is not loaded.*",
            (method,),
            damage=partial(put_pickle, name),
            codes=(1, 1),
            check=not_run,
            repair=delete_last,
            fast=name == "scheduler.pt",
        )
        for method, name in (
            ("ZeRO-2", MODEL),
            ("ZeRO-2", OPTIMIZER),
            ("LoRA", "optimizer.pt"),
            ("LoRA", "scheduler.pt"),
            ("LoRA", "rng_state_1.pth"),
        )
    ),
    Fault(
        "inf in a checkpoint's weights",
        "error: --resume_from_checkpoint .*checkpoint-4: .* is not finite: use an earlier one",
        damage=put_inf_weight,
        fast=True,
        repair=delete_last,
        codes=(1, 1),
    ),
    Fault(
        "inf in a checkpoint's master weights",
        "error: --resume_from_checkpoint .*checkpoint-4: .* is not finite: use an earlier one",
        ("ZeRO-2",),
        damage=put_inf_optimizer,
        repair=delete_last,
        codes=(1, 1),
    ),
]
