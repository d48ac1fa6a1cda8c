"""Invariants of the model on the tiny checkpoint: batch layouts, precisions, recomputation, saved files."""

import json
import shutil

import pytest
import torch
from conftest import GOLDEN, TINY, needs_golden
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from common.data.collator import Collator
from common.data.conversations import encode_conversation
from common.model.loading import compile_layers, set_gradient_checkpointing
from common.phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor
from common.phi3v.image_processing import grid_to_crops, join_crops, normalize_with_global_view, to_crop_grid


def load(attention="varlen", dtype=torch.float32, **overrides):
    config = Phi3VConfig.from_dict(json.loads((TINY / "config.json").read_text()) | overrides)
    return AutoModelForCausalLM.from_pretrained(TINY, config=config, dtype=dtype, attn_implementation=attention)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY, num_crops=1)


def noise(width, height, seed=0):
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def sample(processor, user, assistant, *images):
    turn = {"images": list(images), "user": user, "assistant": assistant}
    return encode_conversation({"conversations": [turn]}, processor)


@pytest.fixture(scope="module")
def samples(processor):
    return [
        sample(processor, "Just text.", "Right."),
        sample(processor, "What is it?", "Noise.", noise(300, 200)),
        sample(processor, "Which is <|image_2|>, and which <|image_1|>?", "Both.", noise(90, 300, 1), noise(400, 90, 2)),
    ]


def set_long_factors(model, factor):
    """Those of the tiny checkpoint are all 1, like its short ones."""
    rotary = model.model.rotary_emb
    rotary.config.rope_parameters["long_factor"] = [factor] * len(rotary.config.rope_parameters["short_factor"])
    rotary.inv_freq.copy_(rotary.inverse_frequencies()[0])


def loss_and_gradients(model, batch, **options):
    model.train()
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(first, second, relative):
    assert first.keys() == second.keys()
    # A key's bias shifts all scores alike, so its gradient is only rounding, relative to the size of the others.
    least = 1e-3 * torch.stack([gradient.norm() for gradient in first.values()]).norm()
    for name in first:
        scale = max(first[name].norm(), least)
        assert (first[name] - second[name]).norm() <= relative * scale, name


def test_packed_and_padded_batches_equal_single_samples(processor, samples):
    """Loss and gradients, with grouped key heads, several turns, without an answer, and across LongRoPE's limit."""
    limits = {"original_max_position_embeddings": 400, "max_position_embeddings": 32 * 400}
    config = json.loads((TINY / "config.json").read_text()) | {"num_key_value_heads": 3} | limits
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Phi3VConfig.from_dict(config), dtype=torch.float32, attn_implementation="varlen")
    set_long_factors(model, 2.5)
    turns = [{"images": [noise(300, 200)], "user": "What?", "assistant": "Noise."}, {"user": "Sure?", "assistant": "Quite."}]
    several = encode_conversation({"conversations": turns}, processor)
    silent = samples[0] | {"labels": [-100] * len(samples[0]["labels"])}
    samples = [samples[0], samples[2], several, silent]
    lengths = [len(entry["input_ids"]) for entry in samples]
    assert min(lengths) < 400 < max(lengths)

    count = sum(label != -100 for entry in samples for label in entry["labels"])
    packed, packed_gradients = loss_and_gradients(model, Collator(processor, packing=True)(samples))
    padded, padded_gradients = loss_and_gradients(model, Collator(processor)(samples))
    model.zero_grad()
    alone = 0
    for entry in samples:
        loss = model(**Collator(processor)([entry]), num_items_in_batch=count).loss
        loss.backward()
        alone += loss.item()
    alone_gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert packed.item() == pytest.approx(alone, rel=1e-5)
    assert padded.item() == pytest.approx(alone, rel=1e-5)
    assert_equal_gradients(alone_gradients, packed_gradients, 1e-5)
    assert_equal_gradients(alone_gradients, padded_gradients, 1e-5)


def test_logits_are_computed_on_request(processor, samples):
    """For all positions in evaluation, for none in training; the loss is the same."""
    model, batch = load(), Collator(processor, packing=True)(samples)
    trained = model.train()(**batch)
    assert trained.logits is None
    with torch.no_grad():
        evaluated = model.eval()(**batch)
        assert evaluated.logits.shape[:2] == batch["input_ids"].shape
        assert evaluated.loss.item() == pytest.approx(trained.loss.item(), rel=1e-6)
        assert model(**batch, skip_logits=True).logits is None


def test_long_factors_change_the_result(processor, samples):
    """The tests above would also pass if LongRoPE were ignored."""
    batch = Collator(processor)(samples[1:2])
    short, long = load(), load(original_max_position_embeddings=100, max_position_embeddings=3200)
    set_long_factors(long, 2.0)
    with torch.no_grad():
        assert not torch.allclose(short(**batch).logits, long(**batch).logits, atol=1e-3)


@pytest.fixture(scope="module")
def fp32_loss(processor, samples):
    """Of a batch of text and an image."""
    with torch.no_grad():
        return load()(**Collator(processor)(samples[:2])).loss.item()


def test_eager_attention_computes_the_same(processor, samples, fp32_loss):
    with torch.no_grad():
        assert load("eager")(**Collator(processor)(samples[:2])).loss.item() == pytest.approx(fp32_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("mode", "attention", "packing"),
    [("bf16 weights", "varlen", True), ("bf16 autocast", "sdpa", False), ("fp16 autocast", "varlen", True)],
)
def test_half_precisions(processor, samples, fp32_loss, mode, attention, packing):
    model = load(attention, dtype=torch.bfloat16 if mode == "bf16 weights" else torch.float32)
    dtype = torch.float16 if mode == "fp16 autocast" else torch.bfloat16
    with torch.autocast("cpu", dtype=dtype, enabled="autocast" in mode):
        loss, gradients = loss_and_gradients(model, Collator(processor, packing=packing)(samples[:2]))
    assert loss.item() == pytest.approx(fp32_loss, rel=3e-2)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("where", ["resid_pdrop", "attention_dropout"])
def test_recomputation_repeats_dropout(processor, samples, where):
    batch, model, found = Collator(processor)(samples[:1]), load("sdpa", **{where: 0.5}), []
    for mode in ("none", "full"):
        set_gradient_checkpointing(model, mode)
        torch.manual_seed(0)
        found.append(loss_and_gradients(model, batch))
    assert found[0][0] == found[1][0]
    assert_equal_gradients(found[0][1], found[1][1], 1e-6)


def test_raw_crops_give_the_pixels_of_the_processor(samples):
    """uint8 crops that the model normalizes are bit-identical to the processor's pixels."""
    processor = AutoProcessor.from_pretrained(TINY, num_crops=2)
    images = samples[2]["images"]
    prompt = "<|user|>\n<|image_1|><|image_2|>\nSame?<|end|>\n<|assistant|>\n"
    inputs = processor(prompt, images)
    grids = [to_crop_grid(image, 2) for image in images]
    raw = torch.cat([grid_to_crops(grid) for grid in grids])
    model = load()
    sizes = [tuple(size) for size in inputs["image_sizes"].tolist()]
    vision = model.model.vision_embed_tokens
    assert torch.equal(vision.views(raw, sizes), vision.views(inputs["pixel_values"], sizes))
    assert torch.equal(join_crops(grid_to_crops(grids[0]), *sizes[0]).permute(1, 2, 0), torch.from_numpy(grids[0]))
    assert len(normalize_with_global_view(raw, sizes)) == len(raw) + 2


def test_text_alone_gives_every_vision_parameter_a_zero_gradient(processor, samples):
    model = load()
    _, gradients = loss_and_gradients(model, Collator(processor)(samples[:1]))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == trainable
    assert all(not gradients[name].any() for name in trainable if "vision_embed_tokens" in name)


def test_unused_layers_are_frozen_and_saved_unchanged(tmp_path):
    model = load(dtype=torch.bfloat16)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    last = model.config.vision_config.num_hidden_layers - 1
    assert frozen and all(f"encoder.layers.{last}." in name or "post_layernorm" in name for name in frozen)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += parameter.requires_grad
    model.save_pretrained(tmp_path)
    before, after = load_file(TINY / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert any(not torch.equal(before[name], after[name]) for name in before.keys() - frozen)


@pytest.mark.parametrize("checkpoint", [TINY, pytest.param(GOLDEN / "tiny_checkpoint", marks=needs_golden)])
def test_load_save_load_is_bit_identical(checkpoint, tmp_path):
    model, processor = AutoModelForCausalLM.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    assert isinstance(model, Phi3VForCausalLM) and isinstance(processor, Phi3VProcessor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and not any("wte" in name for name in after)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    config = json.loads((tmp_path / "config.json").read_text())  # as other loaders expect it
    assert config["model_type"] == "phi3_v" and config["architectures"] == ["Phi3VForCausalLM"]
    assert config["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert config["rope_scaling"]["type"] == "su" and "rope_parameters" not in config
    assert config["torch_dtype"] == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())

    text = "<|user|>\nWhat — is it? <|image|> ünï<|end|>\n<|assistant|>\n"
    loaded = AutoProcessor.from_pretrained(tmp_path, num_crops=3)
    assert loaded.tokenizer(text).input_ids == processor.tokenizer(text).input_ids
    assert loaded.tokenizer.chat_template == processor.tokenizer.chat_template
    assert loaded.image_processor.num_crops == 3


def test_special_tokens_are_saved_under_the_key_of_earlier_versions(tmp_path):
    """transformers 4, which vLLM uses, fails on a list under the key of transformers 5."""
    shutil.copytree(TINY, tmp_path / "published")
    path = tmp_path / "published/tokenizer_config.json"
    special = ["<|system|>", "<|end|>", "<|user|>"]
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"additional_special_tokens": special}))
    processor = AutoProcessor.from_pretrained(tmp_path / "published")
    processor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["additional_special_tokens"] == special and not isinstance(saved.get("extra_special_tokens"), list)
    again = AutoProcessor.from_pretrained(tmp_path / "saved").tokenizer
    assert again.all_special_tokens == processor.tokenizer.all_special_tokens
    text = "<|user|>\nWhat?<|end|>\n<|assistant|>\n"
    assert again(text).input_ids == processor.tokenizer(text).input_ids


@pytest.mark.parametrize(
    ("directory", "published_as", "owner"),
    [
        ("base", "Phi-3-vision-128k-instruct", "microsoft/Phi-3-vision-128k-instruct"),
        ("phi-3-vision", "Phi-3.5-vision-instruct", "microsoft/Phi-3.5-vision-instruct"),
        ("Phi-3-vision-128k-instruct", "", "microsoft/Phi-3-vision-128k-instruct"),
        ("base", "", "microsoft/Phi-3.5-vision-instruct"),
    ],
)
def test_saved_files_refer_to_the_code_of_their_base_model(directory, published_as, owner, tmp_path):
    """Downloaded files name their code without its repository."""
    shutil.copytree(TINY, tmp_path / directory)
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        text = (tmp_path / directory / name).read_text(encoding="utf-8")
        content = json.loads(text.replace("microsoft/Phi-3.5-vision-instruct--", ""))
        if name == "config.json":
            content["_name_or_path"] = published_as
        (tmp_path / directory / name).write_text(json.dumps(content), encoding="utf-8")
    AutoModelForCausalLM.from_pretrained(tmp_path / directory).save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(tmp_path / directory).save_pretrained(tmp_path / "saved")
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        for code in json.loads((tmp_path / "saved" / name).read_text(encoding="utf-8"))["auto_map"].values():
            assert code.startswith(f"{owner}--")


def test_the_code_of_a_checkpoint_is_never_run(tmp_path):
    model, processor = AutoModelForCausalLM.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for name in ("configuration_phi3_v", "modeling_phi3_v", "processing_phi3_v"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the checkpoint was run')")
    config_path = tmp_path / "config.json"
    config_path.write_text(config_path.read_text().replace("microsoft/Phi-3.5-vision-instruct--", ""))
    for trust in (None, True):
        assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)) is Phi3VConfig
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)) is Phi3VForCausalLM
        assert type(AutoProcessor.from_pretrained(tmp_path, trust_remote_code=trust)) is Phi3VProcessor


def test_real_configuration_on_the_meta_device():
    scaling = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
    config = Phi3VConfig(rope_scaling=scaling, max_position_embeddings=131072, sliding_window=262144)
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_146_621_440
    assert len(model.state_dict()) == 592


def test_batch_of_texts_pads_on_either_side(processor):
    texts = ["<|user|>\n<|image_1|>\nA?<|end|>\n<|assistant|>\n", "<|user|>\nLonger text alone?<|end|>\n<|assistant|>\n"]
    alone = [processor(texts[0], noise(50, 50)), processor(texts[1])]
    lengths = [inputs["input_ids"].shape[1] for inputs in alone]
    for side in ("left", "right"):
        batch = processor(texts, [[noise(50, 50)], []], padding_side=side)
        assert batch["attention_mask"].sum(1).tolist() == lengths
        for row, inputs, length in zip(batch["input_ids"], alone, lengths, strict=True):
            kept = row[-length:] if side == "left" else row[:length]
            assert torch.equal(kept, inputs["input_ids"][0])
        assert batch["pixel_values"].shape[0] == batch["image_sizes"].shape[0] == 1


@pytest.mark.parametrize(
    ("text", "count"), [("<|image_1|><|image_2|>", 1), ("no tag", 1), ("<|image_1|><|image_3|>", 2), ("<|image_1|>", 0)]
)
def test_tags_that_do_not_match_the_images_are_refused(processor, text, count):
    with pytest.raises(ValueError, match="image tags"):
        processor(text, [noise(40, 40)] * count)


def test_placeholders_without_their_image_are_refused(processor, samples):
    model, batch = load(), Collator(processor)(samples[1:2])
    with pytest.raises(ValueError, match="pixel_values is missing"):
        model(input_ids=batch["input_ids"])
    batch["input_ids"][batch["input_ids"] == -1] = 5
    with pytest.raises(ValueError, match="placeholders do not match"):
        model(**batch)


def test_an_image_can_be_referred_to_twice(processor):
    image, prompt = noise(60, 60), "<|user|>\n<|image_1|> and again <|image_1|>?<|end|>\n<|assistant|>\n"
    twice = prompt.replace("again <|image_1|>", "again <|image_2|>")
    model = load()
    with torch.no_grad():
        once = model(**processor(prompt, image)).logits
        copied = model(**processor(twice, [image, image])).logits
    assert torch.allclose(once, copied, atol=1e-5)


def test_crossing_the_limit_in_a_batch_generates_like_alone():
    """Rows of a batch exceed LongRoPE's limit at different steps; each answer is that of the row alone."""
    processor = AutoProcessor.from_pretrained(TINY)
    model = load(original_max_position_embeddings=40, max_position_embeddings=1280)
    set_long_factors(model, 2.0)
    prompts = [f"<|user|>\n{text}<|end|>\n<|assistant|>\n" for text in ("Hello", "A longer prompt, this.", "Who?")]
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    batch = processor(prompts, padding_side="left")
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, prompt in zip(together, prompts, strict=True):
        inputs = processor(prompt)
        alone = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert row.tolist() == alone.tolist()


def test_beam_search_keeps_the_images_of_each_row(processor):
    prompts = ["<|user|>\n<|image_1|>\nA?<|end|>\n<|assistant|>\n"] * 2
    inputs = processor(prompts, [[noise(50, 50, 1)], [noise(50, 50, 2)]])
    model = load()
    single = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    beams = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=2, num_return_sequences=2, eos_token_id=None)
    assert beams.shape[0] == 4 and single.shape[0] == 2
    assert torch.equal(beams[0, :-4], single[0, :-4]) and torch.equal(beams[2, :-4], single[1, :-4])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")  # which the scripts leave out too
def test_compiled_layers_compute_the_same(samples, processor, monkeypatch):
    """Traced with their gradients; compiling kernels for a CPU would take a minute."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **options: compile(layer, backend="aot_eager", **options))
    plain, compiled = load(num_hidden_layers=1), load(num_hidden_layers=1)
    batch = Collator(processor, packing=True)(samples[:2])
    for model in (plain, compiled):
        set_gradient_checkpointing(model, "full")
    compile_layers(compiled)
    loss, gradients = loss_and_gradients(plain, batch)
    compiled_loss, compiled_gradients = loss_and_gradients(compiled, batch)
    assert compiled_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_equal_gradients(gradients, compiled_gradients, 1e-4)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_a_batch_without_answers_calls_no_loss_kernel(processor, samples):
    """Not every kernel accepts an empty batch; the loss and the gradients are zero."""
    model, batch = load(), Collator(processor)(samples[1:2])
    model.cross_entropy = None
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, gradients = loss_and_gradients(model, batch)
    assert loss == 0 and gradients and not any(gradient.any() for gradient in gradients.values())
