"""Whole runs of the script: processes, layouts of the batch, methods, checkpoints."""

import json
import re
import shutil

import pytest
import torch
from conftest import GOLDEN, TINY, needs_golden
from forked import finetune_forked
from PIL import Image
from runs import finetune, weights, write_docvqa, write_random_model
from safetensors.torch import load_file

from common.data.batches import epoch_steps

pytestmark = pytest.mark.slow

METHODS = {
    "zero2": {},
    "ddp": {"deepspeed": "none"},
    "lora": {"use_lora": True, "lora_rank": 4, "lora_dropout": 0.1},
    "qlora": {"use_qlora": True, "lora_rank": 4},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_docvqa(tmp_path_factory.mktemp("docvqa"))


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """Runs of six steps with a checkpoint after three, by method, each made once."""
    made = {}

    def run(method):
        if method not in made:
            output = tmp_path_factory.mktemp(method)
            start = finetune if method == "zero2" else finetune_forked  # one through torchrun
            log = start(data, output, max_steps=6, save_strategy="steps", save_steps=3, **METHODS[method])
            made[method] = (output, log)
        return made[method]

    return run


def assert_same_course(first, second, relative=1e-5):
    assert [entry["step"] for entry in first] == [entry["step"] for entry in second]
    for one, other in zip(first, second, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=relative)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=100 * relative)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(method, data, straight, tmp_path):
    output, log = straight(method)
    shutil.copytree(output, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "trainer_state.json").unlink()
    options = METHODS[method] | {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    resumed = finetune_forked(data, tmp_path, resume_from_checkpoint="auto", **options)
    assert resumed == log
    before, after = weights(output), weights(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_zero2_and_ddp_take_the_same_steps(straight):
    assert_same_course(straight("zero2")[1], straight("ddp")[1])


@pytest.mark.parametrize("method", METHODS)
def test_methods_learn_and_write_everything(method, straight):
    output, log = straight(method)
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[0]["grad_norm"] > 0
    for name in ("eval_before.json", "eval_after.json"):
        evaluation = json.loads((output / name).read_text())
        assert evaluation["metric"] == "anls" and 0 <= evaluation["anls"] <= 1 and evaluation["samples"] == 4
        assert [entry["id"] for entry in evaluation["predictions"]] == ["0", "1", "2", "3"]
        assert evaluation["predictions"][1]["answers"] == ["1037", "No. 1037"]
    for name in ("train_results.json", "trainer_state.json", "run.json", "README.md", "report.html", "tokenizer.json"):
        assert (output / name).is_file(), name


def test_saved_model_has_the_bases_layout(straight):
    saved, base = weights(straight("ddp")[0]), load_file(TINY / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in saved.items()} == {name: (t.shape, t.dtype) for name, t in base.items()}
    assert sum(not torch.equal(saved[name], base[name]) for name in base) > 50


@needs_golden
@pytest.mark.parametrize("method", ["zero2", "ddp"])
def test_saved_model_is_what_other_loaders_expect(method, straight):
    output, _ = straight(method)
    published = json.loads((GOLDEN / "param_names.json").read_text())["real_hub_index"]["name_patterns"]
    assert {re.sub(r"\.layers\.\d+\.", ".layers.N.", name) for name in weights(output)} == set(published)
    config, base = (json.loads((directory / "config.json").read_text()) for directory in (output, TINY))
    described = ("architectures", "auto_map", "model_type", "rope_scaling", "torch_dtype", "vision_config", "vocab_size")
    assert {key: config.get(key) for key in described} == {key: base.get(key) for key in described}
    assert config["rope_scaling"]["type"] == "su"


@pytest.mark.parametrize("method", ["zero2", "ddp"])
def test_what_is_never_run_is_saved_as_it_was(method, straight):
    saved, base = weights(straight(method)[0]), load_file(TINY / "model.safetensors")
    unused = [name for name in base if ".encoder.layers.3." in name or ".post_layernorm." in name]
    assert len(unused) == 18 and all(torch.equal(saved[name], base[name]) for name in unused)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_are_plain_and_move_everywhere(method, straight):
    adapter = weights(straight(method)[0])
    assert all(".lora_A." in name or ".lora_B." in name for name in adapter), "nothing of the base is stored"
    for part in ("lm_head", "qkv_proj", "gate_up_proj", "img_projection.2", "vision_model.encoder.layers.0.self_attn.q_proj"):
        moved = [tensor for name, tensor in adapter.items() if part in name and "lora_B" in name]
        assert moved and all(tensor.any() for tensor in moved), part
    last = json.loads((TINY / "config.json").read_text())["vision_config"]["num_hidden_layers"] - 1
    assert not any(f"encoder.layers.{last}." in name for name in adapter)


def test_two_processes_are_one_run(data, tmp_path):
    """Batch 1 × 8 accumulation ≡ batch 8 × 1 ≡ two processes × 4, packed or padded."""
    common = {"model_name_or_path": write_random_model(tmp_path / "model"), "dataloader_num_workers": 0}
    common |= {"batch_size": 8, "max_steps": 2, "deepspeed": "none"}
    runs = {
        "8 at once": dict(processes=1, batch_size_per_gpu=8),
        "one at a time": dict(processes=1, batch_size_per_gpu=1),
        "two processes": dict(processes=2, batch_size_per_gpu=4),
        "padded": dict(processes=2, batch_size_per_gpu=2, **{"no-packing": True}),
        "budget": dict(processes=2, batch_size_per_gpu=None, max_tokens_per_batch=900),
        "all that fits": dict(processes=2, batch_size_per_gpu=None, max_tokens_per_batch="auto"),
    }
    logs = {name: finetune_forked(data, tmp_path / name, **common, **options) for name, options in runs.items()}
    for name, log in logs.items():
        assert_same_course(log, logs["8 at once"]), name
    assert "1 micro-batch of up to" in (tmp_path / "all that fits.log").read_text()


@pytest.mark.parametrize("deepspeed", ["none", "auto"])
@pytest.mark.parametrize("without", [0, 1])
def test_a_process_without_pictures_keeps_in_step(without, deepspeed, tmp_path):
    """One process has text alone, the other a picture: same loss and gradient as one process with both."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (50, 60), "navy").save(tmp_path / "images" / "a.png")
    turns = [{"user": "Say yes.", "assistant": "Yes."}, {"images": ["a.png"], "user": "Colour?", "assistant": "Navy."}]
    lines = [json.dumps({"id": str(number), "conversations": [turn]}) for number, turn in enumerate(turns)]
    for split in ("train", "val"):
        (tmp_path / f"ucf101_{split}.jsonl").write_text("\n".join(lines) + "\n")
    # Packed, the larger sample comes first; unpacked, as the seed has it.
    text_first = (s for s in range(99) if all(epoch_steps(2, 2, s, epoch)[0].tolist() == [0, 1] for epoch in (0, 1)))
    layout = {"no-packing": True, "seed": next(text_first)} if without == 0 else {}
    options = {"script": "finetune_hf_trainer_ucf101.py", "batch_size": 2, "max_steps": 2, "deepspeed": deepspeed} | layout
    apart = finetune_forked(tmp_path, tmp_path / "apart", batch_size_per_gpu=1, **options)
    together = finetune_forked(tmp_path, tmp_path / "together", processes=1, **options)
    assert_same_course(apart, together)


@pytest.mark.parametrize(
    ("flag", "moves"),
    [
        ({"freeze_vision_model": True}, "decoder"),
        ({"train_only": "vision,projector"}, "vision"),
        ({"train_only": "vision"}, "tower"),
        ({"train_only": "projector"}, "projector"),
    ],
)
def test_only_the_chosen_parts_move(flag, moves, data, tmp_path):
    finetune_forked(data, tmp_path, max_steps=3, deepspeed="none", gradient_checkpointing="full", **flag)
    before, after = load_file(TINY / "model.safetensors"), weights(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    tower = {name for name in before if ".img_processor." in name}
    projector = {name for name in before if "vision_embed_tokens" in name} - tower
    decoder = before.keys() - tower - projector
    expected = {"decoder": decoder, "vision": tower | projector, "tower": tower, "projector": projector}[moves]
    assert changed <= expected
    if moves == "decoder":
        layers = {name.split(".")[2] for name in before if name.startswith("model.layers.")}
        assert {name.split(".")[2] for name in changed if name.startswith("model.layers.")} == layers
    assert changed & expected


def test_learning_rates_by_part(data, tmp_path):
    """A part whose rate is next to nothing stays where it was."""
    finetune_forked(data, tmp_path, max_steps=3, vision_learning_rate=1e-12, projector_learning_rate=1e-12, wd=0)
    before, after = load_file(TINY / "model.safetensors"), weights(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("vision_embed_tokens" in name for name in changed)


@pytest.mark.parametrize("method", ["zero2", "lora"])
def test_best_checkpoint_and_early_stopping(method, data, tmp_path):
    run = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "eval_metric_steps": 1}
    best = {"load_best_model_at_end": True, "early_stopping_patience": 2, "save_total_limit": 2}
    finetune_forked(data, tmp_path, max_steps=8, learning_rate=1e-9, **run, **best, **METHODS[method])
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 3, "nothing gets better at this learning rate, so patience ends after two more"
    assert state["best_model_checkpoint"].endswith("checkpoint-1")
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert all("eval_anls" in entry for entry in evaluations) and len(evaluations) == 3
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    final, best, last = (weights(tmp_path / place) for place in ("", "checkpoint-1", "checkpoint-3"))
    assert all(torch.equal(tensor, best[name].to(tensor.dtype)) for name, tensor in final.items())
    assert any(not torch.equal(tensor, best[name]) for name, tensor in last.items())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_by_name(attention, data, straight, tmp_path):
    """As the default that packs, and the log says which it is and why."""
    log = finetune_forked(data, tmp_path / "run", max_steps=6, attn_implementation=attention, **METHODS["ddp"])
    assert_same_course(log, straight("ddp")[1])
    assert re.search(rf"^attention: +{attention} \(.+\), packing off$", (tmp_path / "run.log").read_text(), re.MULTILINE)
