"""The training methods on two processes: loss curves, which weights change, what is saved.

To regenerate the saved curves after a change that is meant to shift them, and to see what it shifted:

    WRITE_CURVES=1 python -m pytest tests/test_methods.py -k curve
    git diff tests/curves.json

The runs start from random weights, so they do not depend on what the tiny checkpoint has learned.
"""

import json
import os
import re
import sys
from functools import partial

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import GOLDEN, needs_golden
from forked import be_process
from runs import CURVE_TOLERANCE, CURVES, METHODS, QLORA_TOLERANCE, SCRIPT, flags, validation_batch, weights
from transformers import AutoProcessor

import finetune_hf_trainer_docvqa as docvqa
from common.arguments import Setup
from common.model.loading import base_model, load_model, set_gradient_checkpointing
from common.phi3v.parts import part_of


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """Directory and log of a method's run."""
    made = {}

    def run(method):
        if method not in made:
            output = tmp_path_factory.mktemp(method) / "run"
            target = partial(be_process, whole=method == "full")
            evaluated = {"max_eval_samples": 3, "max_new_tokens": 4}
            made[method] = (output, train(output, target=target, **evaluated, **METHODS[method]))
        return made[method]

    return run


def optimizer_states(output):
    """The optimizer state of each weight that DDP trains, after five steps."""
    return torch.load(output / "checkpoint-5" / "optimizer.pt", weights_only=False)["state"]


def assert_only_these_change(parts, before, after):
    """All weights of these parts change, except for the vision layers that are never run."""
    # A key's bias shifts all scores alike, so its gradient is zero except for rounding.
    names = {name for name in before if not name.endswith("k_proj.bias")}
    unused = re.compile(r"\.encoder\.layers\.2\.|\.post_layernorm\.")
    changed = {name for name in names if (after[name] - before[name]).abs().max() > 1e-9}
    assert changed == {name for name in names if part_of(name) in parts and not unused.search(name)}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_loss_follows_the_saved_curve(method, finished):
    _, log = finished(method)
    found = {key: [entry[key] for entry in log] for key in ("loss", "grad_norm")}
    curves = json.loads(CURVES.read_text()) if CURVES.exists() else {}
    if os.environ.get("WRITE_CURVES"):
        CURVES.write_text(json.dumps(curves | {method: found}, indent=2) + "\n")
        pytest.skip(f"wrote the curve of {method} to {CURVES.name}")
    for key, values in found.items():
        tolerance = QLORA_TOLERANCE[key] if method == "qlora" else CURVE_TOLERANCE
        assert values == pytest.approx(curves[method][key], rel=tolerance), key


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_layers_of_transformers_and_peft_follow_the_saved_curve(method, train, tmp_path):
    log = train(tmp_path, **METHODS[method], **{"no-fused_layers": True})
    curve = json.loads(CURVES.read_text())[method]
    for key in ("loss", "grad_norm"):
        assert [entry[key] for entry in log] == pytest.approx(curve[key], rel=CURVE_TOLERANCE), key
    assert "per process, layers of transformers and PEFT" in tmp_path.with_name(f"{tmp_path.name}.log").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["hyperparameters"]["fused_layers"] is False


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_writes_its_files(method, finished):
    output, log = finished(method)
    assert log[-1]["loss"] < log[0]["loss"]
    for name in ("eval_before.json", "eval_after.json"):
        evaluation = json.loads((output / name).read_text())
        assert evaluation["metric"] == "anls" and 0 <= evaluation["anls"] <= 1 and evaluation["samples"] == 3
        assert [entry["id"] for entry in evaluation["predictions"]] == ["0", "1", "2"]
        assert evaluation["predictions"][1]["answers"] == ["1037", "No. 1037"]
    for name in ("train_results.json", "trainer_state.json", "run.json", "README.md", "tokenizer.json"):
        assert (output / name).is_file(), name
    assert (output / "report.html").is_file() == (method == "full")  # the others are without it


@pytest.mark.slow
def test_a_saved_model_has_the_layout_of_its_base(finished, random_model):
    saved, base = weights(finished("full")[0]), weights(random_model)
    assert {name: (t.shape, t.dtype) for name, t in saved.items()} == {name: (t.shape, t.dtype) for name, t in base.items()}
    assert_only_these_change({"decoder", "vision", "projector"}, base, saved)


@needs_golden
@pytest.mark.slow
def test_a_saved_model_is_what_other_loaders_expect(finished, random_model):
    output, _ = finished("full")
    published = json.loads((GOLDEN / "param_names.json").read_text())["real_hub_index"]["name_patterns"]
    assert {re.sub(r"\.layers\.\d+\.", ".layers.N.", name) for name in weights(output)} == set(published)
    config, base = (json.loads((directory / "config.json").read_text()) for directory in (output, random_model))
    described = ("architectures", "auto_map", "model_type", "rope_scaling", "torch_dtype", "vision_config", "vocab_size")
    assert {key: config.get(key) for key in described} == {key: base.get(key) for key in described}
    assert config["rope_scaling"]["type"] == "su"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_contains_only_lora_weights_and_all_of_them_change(method, finished):
    adapter = weights(finished(method)[0])
    assert all(".lora_A." in name or ".lora_B." in name for name in adapter)
    for part in ("lm_head", "qkv_proj", "gate_up_proj", "img_projection.2", "vision_model.encoder.layers.0.self_attn.q_proj"):
        changed = [tensor for name, tensor in adapter.items() if part in name and "lora_B" in name]
        assert changed and all(tensor.any() for tensor in changed), part
    assert not any("encoder.layers.2." in name for name in adapter)  # this layer is never run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"train_only": "vision,projector"}, {"vision", "projector"}),
        ({"train_only": "projector", "deepspeed": "none"}, {"projector"}),
        ({"vision_learning_rate": 1e-12, "projector_learning_rate": 1e-12, "wd": 0}, {"decoder"}),
    ],
    ids=["ZeRO-2", "DDP", "by learning rate"],
)
def test_only_the_chosen_parts_change(options, parts, train, random_model, tmp_path):
    train(tmp_path, max_steps=3, **options)
    assert_only_these_change(parts, weights(random_model), weights(tmp_path))


@pytest.mark.slow
def test_frozen_vision_has_no_optimizer_state(train, finished, random_model, tmp_path):
    """DDP with recomputation: the losses of ZeRO-2, and the states of the decoder's weights."""
    options = {"freeze_vision_model": True, "gradient_checkpointing": "full", "deepspeed": "none"}
    log = train(tmp_path, save_strategy="steps", save_steps=5, **options)
    for entry, expected in zip(log, finished("frozen")[1], strict=True):
        assert entry == pytest.approx(expected, rel=1e-5)
    states = optimizer_states(tmp_path)
    assert len(states) == sum("vision_embed_tokens" not in name for name in weights(tmp_path))
    assert all(state["exp_avg"].any() for state in states.values())
    for output in (tmp_path, finished("frozen")[0]):
        assert_only_these_change({"decoder"}, weights(random_model), weights(output))


@pytest.mark.parametrize("frozen", [False, True])
def test_qlora_quantizes_the_linear_layers(frozen, random_model, docvqa_data, tmp_path, monkeypatch):
    options = {"use_qlora": True, "freeze_vision_model": frozen or None, "bf16": frozen or None}
    monkeypatch.setattr(sys, "argv", [SCRIPT, *flags(docvqa_data, tmp_path, model_name_or_path=random_model, **options)])
    args = docvqa.parse_args()
    setup = Setup(torch.device("cpu"), "bf16" if frozen else "fp32", "varlen")
    loaded = base_model(load_model(args, setup, AutoProcessor.from_pretrained(random_model, num_crops=1)))
    linears = {name: module for name, module in loaded.named_modules() if isinstance(module, Linear4bit)}
    names = {name.removeprefix("model.").replace(".base_layer", "") for name in linears}
    expected = {
        f"layers.{layer}.{name}"
        for layer in range(loaded.config.num_hidden_layers)
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    if not frozen:
        expected |= {
            f"vision_embed_tokens.img_processor.vision_model.encoder.layers.{layer}.{name}"
            for layer in range(loaded.config.vision_config.num_hidden_layers - 1)  # the last one is never run
            for name in (*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
        }
    assert names == expected
    for linear in linears.values():
        assert linear.weight.quant_type == "nf4" and linear.weight.compress_statistics
        assert linear.compute_dtype == (torch.bfloat16 if frozen else torch.float32)


@pytest.mark.parametrize("method", [{}, {"use_lora": True}])
def test_no_fused_layers_are_left_if_they_are_switched_off(method, random_model, docvqa_data, tmp_path, monkeypatch):
    processor = AutoProcessor.from_pretrained(random_model, num_crops=1)
    fused = {}
    for switch in ("fused_layers", "no-fused_layers"):
        command = [SCRIPT, *flags(docvqa_data, tmp_path, model_name_or_path=random_model, **method, **{switch: True})]
        monkeypatch.setattr(sys, "argv", command)
        model = load_model(docvqa.parse_args(), Setup(torch.device("cpu"), "fp32", "varlen"), processor)
        fused[switch] = {type(module).__name__ for module in model.modules() if type(module).__name__.startswith("Fused")}
    expected = {"FusedDecoderLayer", "FusedEncoderLayer"} | ({"FusedLoraLinear"} if method else set())
    assert fused == {"fused_layers": expected, "no-fused_layers": set()}


@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
def test_a_frozen_vision_tower_builds_no_graph(recomputation, random_model, docvqa_data, tmp_path, monkeypatch):
    command = [SCRIPT, *flags(docvqa_data, tmp_path, model_name_or_path=random_model, freeze_vision_model=True)]
    monkeypatch.setattr(sys, "argv", command)
    processor = AutoProcessor.from_pretrained(random_model, num_crops=1)
    frozen = load_model(docvqa.parse_args(), Setup(torch.device("cpu"), "fp32", "varlen"), processor).train()
    set_gradient_checkpointing(frozen, recomputation)
    needs_graph = []
    tower = frozen.model.vision_embed_tokens.tower
    tower.register_forward_hook(lambda module, inputs, output: needs_graph.append(output.requires_grad))
    frozen(**validation_batch(docvqa_data, processor)).loss.backward()
    assert needs_graph == [False]
    for name, parameter in frozen.named_parameters():
        assert parameter.grad is None if "vision_embed_tokens" in name else parameter.grad.any(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"use_dora": True, "use_rslora": True, "init_lora_weights": "True", "freeze_vision_model": True},
            {"use_dora": True, "use_rslora": True, "init_lora_weights": True},
        ),
        ({"init_lora_weights": "olora"}, {"init_lora_weights": "olora", "use_dora": False, "use_rslora": False}),
        ({"deepspeed": "common/deepspeed/zero3.json"}, {"init_lora_weights": "gaussian"}),
    ],
    ids=["DoRA, rsLoRA, frozen vision", "OLoRA", "ZeRO-3"],
)
def test_variants_of_lora_train_and_are_loaded_by_peft(options, expected, train, docvqa_data, tmp_path):
    """PEFT gets the flags, and the adapter that PEFT loads has the loss of the last evaluation."""
    log = train(tmp_path, eval_strategy="steps", eval_steps=5, **METHODS["lora"], **options)
    assert log[-1]["loss"] < log[0]["loss"] - 0.1
    if "deepspeed" in options:
        assert [entry["loss"] for entry in log] == pytest.approx(
            json.loads(CURVES.read_text())["lora"]["loss"], rel=CURVE_TOLERANCE
        )
    assert json.loads((tmp_path / "adapter_config.json").read_text()).items() >= expected.items()
    assert any("lora_magnitude_vector" in name for name in weights(tmp_path)) == ("use_dora" in options)
    assert any("vision" in name for name in weights(tmp_path)) == ("freeze_vision_model" not in options)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    eval_loss = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        loss = loaded(**validation_batch(docvqa_data, AutoProcessor.from_pretrained(tmp_path, num_crops=1), limit=1)).loss
    assert loss.item() == pytest.approx(eval_loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "name", "dtype"),
    [("adafactor", "exp_avg_sq_row", torch.float32), ("adamw_8bit", "state1", torch.uint8)],
)
def test_optimizers(optim, name, dtype, train, tmp_path):
    log = train(tmp_path, optim=optim, deepspeed="none", save_strategy="steps", save_steps=5)
    assert log[-1]["loss"] < log[0]["loss"]
    # bitsandbytes nests its states, and keeps those of small weights in fp32.
    states = [entry.get("__bnb_optimizer_quant_state__", entry) for entry in optimizer_states(tmp_path).values()]
    assert dtype in {state[name].dtype for state in states if name in state}


@pytest.mark.slow
def test_eight_bit_states_under_zero2(train, tmp_path):
    """As on one GPU: bf16 weights with masters, and the states of a whole group in one tensor."""
    log = train(tmp_path, optim="adamw_8bit", bf16=True)
    assert log[-1]["loss"] < log[0]["loss"] - 0.1
