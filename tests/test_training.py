"""Whole runs of a script: processes, layouts of the batch, checkpoints, signals."""

import json
import re

import pytest
import torch
from forked import finetune_forked
from PIL import Image
from runs import weights, write_docvqa

from common.data.batches import epoch_steps

pytestmark = pytest.mark.slow


def assert_same_steps(first, second, relative=1e-5):
    assert [entry["step"] for entry in first] == [entry["step"] for entry in second]
    for one, other in zip(first, second, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=relative)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=100 * relative)


def test_steps_do_not_depend_on_processes_accumulation_or_packing(train, tmp_path):
    common = {"batch_size": 8, "max_steps": 2, "deepspeed": "none"}
    runs = {
        "8 at once": dict(processes=1, batch_size_per_gpu=8),
        "one at a time": dict(processes=1, batch_size_per_gpu=1, attn_implementation="sdpa"),
        "padded": dict(processes=2, batch_size_per_gpu=2, **{"no-packing": True}),
        "token budget": dict(processes=2, batch_size_per_gpu=None, max_tokens_per_batch=900),
        "all that fits": dict(processes=2, batch_size_per_gpu=None, max_tokens_per_batch="auto"),
    }
    logs = {name: train(tmp_path / name, **common, **options) for name, options in runs.items()}
    for log in logs.values():
        assert_same_steps(log, logs["8 at once"])
    assert "1 micro-batch of up to" in (tmp_path / "all that fits.log").read_text()
    printed = (tmp_path / "one at a time.log").read_text()
    assert re.search(r"^attention: +sdpa \(.+\), packing off$", printed, re.MULTILINE)


@pytest.mark.parametrize(("without", "deepspeed"), [(0, "none"), (1, "auto")])
def test_a_process_without_images_does_not_block_the_others(without, deepspeed, random_model, tmp_path):
    """One process has only text, the other an image: same loss and gradient as one process with both."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (50, 60), "navy").save(tmp_path / "images" / "a.png")
    turns = [{"user": "Say yes.", "assistant": "Yes."}, {"images": ["a.png"], "user": "Colour?", "assistant": "Navy."}]
    lines = [json.dumps({"id": str(number), "conversations": [turn]}) for number, turn in enumerate(turns)]
    for split in ("train", "val"):
        (tmp_path / f"ucf101_{split}.jsonl").write_text("\n".join(lines) + "\n")
    # Packed, the larger sample comes first; unpacked, the order depends on the seed.
    text_first = (s for s in range(99) if all(epoch_steps(2, 2, s, epoch)[0].tolist() == [0, 1] for epoch in (0, 1)))
    layout = {"no-packing": True, "seed": next(text_first)} if without == 0 else {}
    options = {"script": "finetune_hf_trainer_ucf101.py", "model_name_or_path": random_model, "batch_size": 2, "max_steps": 2}
    options |= {"deepspeed": deepspeed} | layout
    apart = finetune_forked(tmp_path, tmp_path / "apart", batch_size_per_gpu=1, **options)
    together = finetune_forked(tmp_path, tmp_path / "together", processes=1, **options)
    assert_same_steps(apart, together)


def test_rows_skipped_at_the_start_are_listed_once(random_model, tmp_path):
    data, output = write_docvqa(tmp_path / "data"), tmp_path / "run"
    (data / "documents/train3.png").unlink()
    (data / "documents/val1.png").write_bytes(b"no image")
    release = json.loads((data / "train_v1.0_withQT.json").read_text())
    del release["data"][5]["answers"]
    (data / "train_v1.0_withQT.json").write_text(json.dumps(release))
    options = {"model_name_or_path": random_model, "on_bad_sample": "skip", "save_strategy": "steps", "save_steps": 1}
    finetune_forked(data, output, **options, max_steps=1)
    finetune_forked(data, output, **options, max_steps=2, resume_from_checkpoint="auto")
    entries = [json.loads(line) for line in (output / "bad_samples.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 0, 0]
    wanted = ["val1.png", 'entry 5 of "data": requires "question"', "train3.png is missing"]
    assert all(text in entry["error"] for text, entry in zip(wanted, entries, strict=True))
    assert "skipped_samples" not in json.loads((output / "train_results.json").read_text())
    assert "skipped in training" not in (tmp_path / "run.log").read_text()


def test_best_checkpoint_and_early_stopping(train, tmp_path):
    """With ZeRO-2; test_resume.py stops LoRA early."""
    options = {"max_steps": 8, "learning_rate": 1e-9}
    options |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "eval_metric_steps": 1}
    options |= {"load_best_model_at_end": True, "early_stopping_patience": 2, "save_total_limit": 2}
    train(tmp_path, **options)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 3, "at this learning rate the metric stays the same, so that patience ends the run"
    assert state["best_model_checkpoint"].endswith("checkpoint-1")
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert all("eval_anls" in entry for entry in evaluations) and len(evaluations) == 3
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    final, best, last = (weights(tmp_path / place) for place in ("", "checkpoint-1", "checkpoint-3"))
    assert all(torch.equal(tensor, best[name].to(tensor.dtype)) for name, tensor in final.items())
    assert any(not torch.equal(tensor, best[name]) for name, tensor in last.items())
