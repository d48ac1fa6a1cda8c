"""Merging, predicting, model cards: on adapters of the tiny checkpoint, as the training scripts save them."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, ROOT, TINY, needs_golden
from huggingface_hub import metadata_load
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tools.merge_lora
import tools.predict
from common.adapter_base import base_revision, write_base_description
from common.arguments import check_arguments, training_parser
from common.inference import load_for_inference
from common.model import load_model, load_processor
from common.model_card import launch_command, write_model_card, write_run
from tools.merge_lora import merge

pytestmark = pytest.mark.skipif(not (TINY / "model.safetensors").is_file(), reason="assets/tiny_phi3v is not there")


def save_adapter(directory: Path, *flags: str, base: str | Path = TINY) -> Path:
    """Save an adapter that changes the answers, as the training scripts do."""
    command_line = ["--model_name_or_path", str(base), "--lora_rank", "8", "--num_crops", "2", *flags]
    args = check_arguments(training_parser("", task="test", metric="anls").parse_args(command_line))
    args.attention, args.deepspeed = ("sdpa", ""), None
    processor = load_processor(args)
    model = load_model(args, processor, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory, save_embedding_layers=False)
    processor.save_pretrained(directory)
    write_base_description(directory, model)
    return directory


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapters") / "lora", "--use_lora")


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapters") / "qlora", "--use_qlora")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three pictures of different shapes: one, two and two crops."""
    paths = []
    for number, size in enumerate([(336, 336), (600, 300), (200, 400)]):
        picture = Image.new("RGB", size, "white")
        ImageDraw.Draw(picture).text((20, 20), f"TOTAL {number}7.50", fill="black")
        paths.append(tmp_path_factory.getbasetemp() / f"picture{number}.png")
        picture.save(paths[-1])
    return paths


def run_tool(name: str, *arguments: object) -> str:
    """Run a tool as people do, and return what it printed."""
    command = [sys.executable, "-m", f"tools.{name}", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def predict(monkeypatch, capsys):
    """Runs `tools.predict` in this process, which spares the imports, and returns what it printed."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
        capsys.readouterr()
        tools.predict.main()
        return capsys.readouterr().out

    return run


@torch.no_grad()
def logits(model: torch.nn.Module, processor, pictures: list[Path]) -> torch.Tensor:
    images = [Image.open(path) for path in pictures[:2]]
    inputs = processor("<|user|>\n<|image_1|><|image_2|>\nWhat is the total?<|end|>\n<|assistant|>\n", images)
    return model(**inputs).logits


def tensors(directory: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}


@pytest.mark.parametrize(
    "flags",
    [
        ("--use_lora",),
        ("--use_lora", "--freeze_vision_model"),
        ("--use_lora", "--use_dora", "--use_rslora"),
        ("--use_qlora",),
        ("--use_qlora", "--freeze_vision_model"),
    ],
    ids=" ".join,
)
def test_merged_equals_adapter(flags, tmp_path, pictures):
    adapter = save_adapter(tmp_path / "adapter", *flags)
    merge(str(adapter), tmp_path / "merged", torch.float32)
    model, processor = load_for_inference(adapter, "cpu", torch.float32)
    expected = logits(model, processor, pictures)
    with model.disable_adapter():
        base = logits(model, processor, pictures)
    merged = logits(*load_for_inference(tmp_path / "merged", "cpu", torch.float32), pictures)
    assert (merged - expected).abs().max() <= 1e-4
    assert (merged - base).abs().max() > 0.1, "the adapter changes nothing, so that nothing is tested"


def test_merged_checkpoint_has_the_base_s_layout(lora, tmp_path):
    printed = run_tool("merge_lora", "--adapter", lora, "--output_dir", tmp_path / "merged")
    assert printed == f"Wrote {tmp_path / 'merged'}\n"
    assert tensors(tmp_path / "merged") == tensors(TINY)
    config, base_config = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "merged", TINY))
    assert config.keys() == base_config.keys()
    for key in ("architectures", "auto_map", "model_type", "rope_scaling", "torch_dtype", "vision_config", "vocab_size"):
        assert config[key] == base_config[key]
    processor_files = {"preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert processor_files <= {path.name for path in (tmp_path / "merged").iterdir()}
    modes = {path.stat().st_mode for path in (tmp_path / "merged").iterdir()}
    assert len(modes) == 1, "some files can't be read by others"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"], "temporary files are left"


@needs_golden
@pytest.mark.parametrize("method", ["--use_lora", "--use_qlora"])
def test_merged_published_checkpoint_keeps_names_and_shapes(method, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", method, base=GOLDEN / "tiny_checkpoint")
    merge(str(adapter), tmp_path / "merged")
    reference = json.loads((GOLDEN / "param_names.json").read_text())
    merged = tensors(tmp_path / "merged")
    assert {name: shape for name, (_, shape) in merged.items()} == reference["shapes"]
    assert {dtype for dtype, _ in merged.values()} == {"BF16"}
    patterns = {re.sub(r"\.layers\.\d+\.", ".layers.N.", name) for name in merged}
    assert patterns == set(reference["real_hub_index"]["name_patterns"])
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rope_scaling"]["type"] == "su"
    assert "quantization_config" not in config


def test_qlora_merges_into_the_dequantized_or_the_original_base(qlora, tmp_path):
    merge(str(qlora), tmp_path / "dequantized", torch.float32)
    merge(str(qlora), tmp_path / "original", torch.float32, original_base=True)
    base, dequantized, original = (
        load_file(path / "model.safetensors") for path in (TINY, tmp_path / "dequantized", tmp_path / "original")
    )
    adapter = load_file(qlora / "adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    delta = adapter[f"base_model.model.{name}.lora_B.weight"] @ adapter[f"base_model.model.{name}.lora_A.weight"]
    torch.testing.assert_close(original[f"{name}.weight"], base[f"{name}.weight"].float() + 2 * delta)
    # NF4 has 16 levels a block of 64 weights.
    levels = (dequantized[f"{name}.weight"] - 2 * delta).reshape(-1, 64)
    assert all(len(block.div(block.abs().max()).mul(1e3).round().unique()) <= 16 for block in levels)


def test_adapter_has_no_copy_of_the_head_and_needs_none(lora, tmp_path):
    names = load_file(lora / "adapter_model.safetensors").keys()
    assert {name for name in names if "lm_head" in name} == {
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.lm_head.lora_B.weight",
    }
    merge(str(lora), tmp_path / "merged")
    head, base_head = (load_file(path / "model.safetensors")["lm_head.weight"] for path in (tmp_path / "merged", TINY))
    assert not torch.equal(head, base_head)


def test_merging_leaves_a_directory_in_use_alone(lora, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"--output_dir {tmp_path} is not empty"):
        merge(str(lora), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_full_disk_leaves_nothing_behind(lora, tmp_path, monkeypatch):
    def replace(source, destination):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tools.merge_lora.os, "replace", replace)
    monkeypatch.setattr(sys, "argv", ["merge_lora", "--adapter", str(lora), "--output_dir", str(tmp_path / "merged")])
    with pytest.raises(SystemExit, match=f"--output_dir {tmp_path / 'merged'} can't be written .*No space left"):
        tools.merge_lora.main()
    assert not list(tmp_path.iterdir())


def test_no_adapter_is_said_so(tmp_path):
    with pytest.raises(ValueError, match=f"--adapter {TINY} is no adapter"):
        merge(str(TINY), tmp_path / "merged")
    with pytest.raises(ValueError, match="is no adapter .* leave --base out"):
        load_for_inference(TINY, "cpu", base=str(TINY))
    with pytest.raises(ValueError, match="nowhere.* there is no such directory"):
        load_for_inference("./nowhere", "cpu")


@pytest.fixture
def moved_base(tmp_path) -> tuple[Path, Path]:
    """A copy of the tiny checkpoint and an adapter that names it."""
    base = shutil.copytree(TINY, tmp_path / "base")
    return base, save_adapter(tmp_path / "adapter", "--use_lora", "--freeze_vision_model", base=base)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_base_is_named(moved_base, predict, tmp_path):
    base, adapter = moved_base
    base.rename(tmp_path / "elsewhere")
    missing = f"error: adapter {adapter} needs its base model, {base}, which can't be loaded: .*--base DIR"
    with pytest.raises(SystemExit, match=missing):
        predict("--model", adapter, "--prompt", "Total?")
    model, _ = load_for_inference(adapter, "cpu", base=str(tmp_path / "elsewhere"))
    assert model.get_base_model().name_or_path == str(tmp_path / "elsewhere")


def test_base_named_relative_to_another_folder_is_found(moved_base):
    base, adapter = moved_base
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="models/base")
    model, _ = load_for_inference(adapter, "cpu")
    assert model.get_base_model().name_or_path == str(base)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """Snapshot of the hub model `someone/tiny` in a cache of its own."""
    cache, commit = tmp_path / "hub", 40 * "a"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    reference = cache / "models--someone--tiny" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text(commit)
    return shutil.copytree(TINY, reference.parents[1] / "snapshots" / commit)


def test_base_on_the_hub_is_found_at_its_revision(hub_cache, tmp_path, pictures):
    adapter = save_adapter(tmp_path / "adapter", "--use_lora", base="someone/tiny")
    description = json.loads((adapter / "base_model.json").read_text())
    assert (description["name"], description["revision"]) == ("someone/tiny", hub_cache.name)
    assert description["path"] is None
    assert base_revision("someone/tiny") == hub_cache.name
    assert base_revision(str(TINY)) is None
    model, _ = load_for_inference(adapter, "cpu")
    assert model.get_base_model().name_or_path == "someone/tiny"
    assert load_for_inference("someone/tiny", "cpu")[1].image_processor.num_crops == 1
    merge(str(adapter), tmp_path / "merged")
    edit_json(adapter / "adapter_config.json", revision=40 * "b")
    with pytest.raises(ValueError, match="needs its base model, someone/tiny, which can't be loaded"):
        load_for_inference(adapter, "cpu")


def test_another_configuration_is_refused(moved_base):
    base, adapter = moved_base
    scaling = json.loads((base / "config.json").read_text())["rope_scaling"]
    edit_json(base / "config.json", rope_scaling=scaling | {"short_factor": [1.5] * len(scaling["short_factor"])})
    with pytest.raises(ValueError, match=r"is another model \(other rope_scaling\).*--base"):
        load_for_inference(adapter, "cpu")


def test_other_weights_are_noticed(moved_base):
    base, adapter = moved_base
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor.float() for name, tensor in weights.items()}, base / "model.safetensors")
    load_for_inference(adapter, "cpu")  # the same in fp32
    weights["model.norm.weight"][5] += 1
    save_file(weights, base / "model.safetensors")
    with pytest.raises(ValueError, match="has other weights.*--base"):
        load_for_inference(adapter, "cpu")
    with pytest.warns(UserWarning, match="has other weights"):
        load_for_inference(adapter, "cpu", base=str(base))


def test_adapter_of_another_size_is_refused_without_a_description(moved_base):
    _, adapter = moved_base
    (adapter / "base_model.json").unlink()
    load_for_inference(adapter, "cpu")
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"
    save_file(weights | {name: torch.zeros(8, 3072)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj are for 3072 features, the base has 192"):
        load_for_inference(adapter, "cpu")


def test_damaged_weights_are_named(moved_base, tmp_path):
    base, adapter = moved_base
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        merge(str(adapter), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    path.unlink()
    with pytest.raises(ValueError, match="lacks adapter_model.safetensors"):
        load_for_inference(adapter, "cpu")
    path.write_bytes(whole)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="needs its base model.*can't be loaded"):
        load_for_inference(adapter, "cpu")


def conversations(pictures: list[Path]) -> list[dict]:
    names = [path.name for path in pictures]
    return [
        {"id": "one", "conversations": [{"images": names[:1], "user": "What is the total?"}]},
        {"id": "two", "conversations": [{"images": names[1:], "user": "Which is larger?", "assistant": "The second."}]},
        {"id": "none", "conversations": [{"user": "Say something."}]},
        {
            "id": "turns",
            "conversations": [
                {"images": names[2:], "user": "What is this?", "assistant": "A receipt."},
                {"user": "And its total?"},
            ],
        },
    ]


def test_predictions_do_not_depend_on_the_batch(lora, pictures, predict, tmp_path):
    rows = conversations(pictures)
    data_file = tmp_path / "data.jsonl"
    data_file.write_text("".join(f"{json.dumps(row)}\n\n" for row in rows))
    flags = ("--model", lora, "--data_file", data_file, "--image_dir", pictures[0].parent, "--max_new_tokens", 6)
    run_tool("predict", *flags, "--output_file", tmp_path / "out" / "batched.jsonl", "--eval_batch_size", 4)
    batched = [json.loads(line) for line in (tmp_path / "out" / "batched.jsonl").read_text().splitlines()]
    predictions = [row.pop("prediction") for row in batched]
    assert batched == rows
    assert all(predictions)
    one_by_one = predict(*flags, "--eval_batch_size", 1, "--no-tqdm").splitlines()
    assert [json.loads(line)["prediction"] for line in one_by_one] == predictions
    single = predict("--model", lora, "--images", *pictures[1:], "--prompt", "Which is larger?", "--max_new_tokens", 6)
    assert single == f"{predictions[1]}\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[]", "line 2: must be a JSON object, not list"),
        ('{"conversations": []}', 'line 2: "conversations" must be'),
        ('{"conversations": [{"user": " "}]}', 'line 2, turn 1: "user" must be'),
        ('{"conversations": [{"user": "a"}, {"user": "b"}]}', 'line 2, turn 1: "assistant" must be'),
        ('{"conversations": [{"user": "a", "images": ["no.png"]}]}', "line 2: picture .*no.png is missing"),
        ('{"conversations": [{"user": "a", "images": [7]}]}', 'line 2: "images" must hold names'),
        ('{"conversations": [{"user": "<|image_2|>", "images": ["no.png"]}]}', "line 2: the text's image tags"),
    ],
)
def test_bad_rows_are_named(row, message, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"conversations": [{{"user": "fine"}}]}}\n{row}\n')
    with pytest.raises(ValueError, match=message):
        tools.predict.read_rows(path, tmp_path)


@pytest.mark.parametrize(
    "flags",
    ["", "--prompt a --data_file b", "--data_file b --images c", "--prompt a --image_dir b", "--prompt a --max_new_tokens 0"],
)
def test_contradicting_flags_are_refused(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict", "--model", str(TINY), *flags.split()])
    with pytest.raises(SystemExit):
        tools.predict.parse_args()
    assert re.search("error: .*--(prompt|images|image_dir|max_new_tokens)", capsys.readouterr().err)


def write_evaluations(directory: Path) -> None:
    for name, score in (("before", 0.125), ("after", 0.75)):
        evaluation = {"metric": "anls", "loss": 1.0, "anls": score, "samples": 1200, "predictions": [], "by_class": {}}
        (directory / f"eval_{name}.json").write_text(json.dumps(evaluation))


def write_tiny_run(directory: Path, base_model: str = str(TINY), method: str = "LoRA") -> None:
    write_run(
        directory,
        task="Hateful Memes",
        base_model=base_model,
        base_revision="4a0d683eba9f1d0cbfb6151705d1ee73c25a80ca" if base_model != str(TINY) else None,
        method=method,
        data="8,000 rows train, 500 evaluate",
        hyperparameters={"learning_rate": 2e-4, "output_dir": directory, "bf16": True, "prompt": "a|b"},
        datasets=["HuggingFaceM4/the_cauldron"],
    )
    write_evaluations(directory)


def test_run_json(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--output_dir", "my output"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    write_tiny_run(tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["command"] == "python finetune.py --output_dir 'my output'"
    assert torch.__version__.startswith(run["versions"]["torch"])
    assert run["hyperparameters"]["output_dir"] == str(tmp_path)
    described = {"task", "base_model", "base_revision", "method", "data", "datasets", "hyperparameters"}
    assert run.keys() == described | {"command", "date", "hardware", "versions"}

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert launch_command() == "torchrun --nproc_per_node=8 --nnodes=2 finetune.py --output_dir 'my output'"


def test_front_matter_is_what_the_hub_reads(tmp_path):
    write_tiny_run(tmp_path, base_model="microsoft/Phi-3.5-vision-instruct", method="full")
    write_model_card(tmp_path, name="someone/phi-memes")
    card = (tmp_path / "README.md").read_text()
    data = metadata_load(tmp_path / "README.md")
    assert data["base_model"] == "microsoft/Phi-3.5-vision-instruct"
    assert data["library_name"] == "transformers"
    assert data["license"] == "mit"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["datasets"] == ["HuggingFaceM4/the_cauldron"]
    assert {"phi3_v", "hateful-memes", "full"} <= set(data["tags"])
    (index,) = data["model-index"]
    assert index["name"] == "phi-memes"
    metrics = {metric["type"]: metric["value"] for result in index["results"] for metric in result["metrics"]}
    assert metrics == {"anls": 0.75, "loss": 1.0}
    assert "# phi-memes\n" in card
    assert "at revision `4a0d683eba9f1d0cbfb6151705d1ee73c25a80ca`" in card
    assert "| 1,200 samples | before | after |\n| --- | --- | --- |\n| anls | 0.1250 | 0.7500 |\n| loss |" in card
    assert "from_pretrained('someone/phi-memes'" in card
    assert "| learning_rate | 0.0002 |" in card
    assert "| prompt | a\\|b |" in card
    assert f"torch {torch.__version__.partition('+')[0]}" in card


def test_card_without_results_or_run(tmp_path):
    with pytest.raises(ValueError, match="has no run.json"):
        write_model_card(tmp_path)
    write_tiny_run(tmp_path)
    for path in tmp_path.glob("eval_*.json"):
        path.unlink()
    write_model_card(tmp_path)
    assert "## Results" not in (tmp_path / "README.md").read_text()
    assert "model-index" not in metadata_load(tmp_path / "README.md")
    assert "base_model" not in metadata_load(tmp_path / "README.md"), "a directory is no hub id"


def load_as_the_card_says(directory: Path) -> dict:
    (code,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) == 3
    scope: dict = {}
    exec(code, scope)
    return scope


def test_card_says_how_to_load_adapter_and_merged_model(lora, tmp_path, pictures):
    adapter = shutil.copytree(lora, tmp_path / "adapter")
    write_tiny_run(adapter)
    write_model_card(adapter)
    assert metadata_load(adapter / "README.md")["library_name"] == "peft"
    merge(str(adapter), tmp_path / "merged")
    assert metadata_load(tmp_path / "merged" / "README.md")["library_name"] == "transformers"
    by_adapter, by_merged = load_as_the_card_says(adapter), load_as_the_card_says(tmp_path / "merged")
    first, second = (logits(scope["model"].float().eval(), scope["processor"], pictures) for scope in (by_adapter, by_merged))
    assert (first - second).abs().max() < 0.5, "bf16 rounds no further than that"
    assert by_adapter["processor"].image_processor.num_crops == 2
