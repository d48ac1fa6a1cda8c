"""The model against reference values that the published code computed for a checkpoint in the published layout."""

import hashlib
import json

import pytest
import torch
from conftest import GOLDEN, needs_golden
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor

from common.data.conversations import encode_conversation
from common.phi3v import Phi3VConfig, Phi3VImageProcessor
from common.phi3v.image_processing import crop_grid_size, num_image_tokens

pytestmark = needs_golden
CHECKPOINT = GOLDEN / "tiny_checkpoint"
CASES = json.loads((GOLDEN / "model_cases.json").read_text()) if GOLDEN.is_dir() else {}


def load_case(name, attention=None):
    case = CASES[name]
    # Eager attention on 6,000 tokens takes gigabytes, and on 1,000 tokens hundreds of megabytes.
    attention = attention or ("sdpa" if max(case["lengths"]) > 1000 else "eager")
    config = json.loads((CHECKPOINT / "config.json").read_text()) | case["config_overrides"]
    model = AutoModelForCausalLM.from_pretrained(
        CHECKPOINT, config=Phi3VConfig.from_dict(config), dtype=torch.float32, attn_implementation=attention
    )
    processor = AutoProcessor.from_pretrained(CHECKPOINT, num_crops=case["num_crops"])
    images = [[Image.open(GOLDEN / "images" / image) for image in sample["images"]] for sample in case["samples"]]
    return case, load_file(GOLDEN / "cases" / f"{name}.safetensors"), model, processor, images


def pictures(case, processor, images):
    batch = processor([sample["prompt"] for sample in case["samples"]], images)
    return {key: batch[key] for key in ("pixel_values", "image_sizes") if key in batch}


def number_by_position(input_ids, image_tokens):
    """Number placeholders in the order of the images, which changes only `d_swapped`.

    There the published code fills the placeholders of the second image with the features of the first one. This code uses the
    numbers, which is tested below.
    """
    input_ids = input_ids.clone()
    for row, counts in zip(input_ids, image_tokens, strict=True):
        numbers = [-number for number, count in enumerate(counts, start=1) for _ in range(count)]
        row[row < 0] = torch.tensor(numbers, dtype=row.dtype)
    return input_ids


def expand(run_lengths):
    return [token for token, count in run_lengths for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, None) for name in CASES] + [(name, "sdpa") for name in ("f_batch", "f_batch_with_text_only", "g_long")],
)
def test_logits_loss_and_gradients(name, attention):
    case, tensors, model, processor, images = load_case(name, attention)
    input_ids = number_by_position(tensors["input_ids"], case["num_img_tokens"])
    inputs = {"input_ids": input_ids, "attention_mask": tensors["attention_mask"]}
    inputs |= pictures(case, processor, images)
    ends = torch.tensor(case["lengths"]) - 1
    output = model(**inputs, labels=tensors["labels"], logits_to_keep=ends[:, None])
    assert (output.logits[:, 0] - tensors["last_logits"]).abs().max() <= 5e-5
    assert output.loss.item() == pytest.approx(case["loss"], rel=1e-5)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        # A key's bias shifts all scores alike, so its gradient is zero except for rounding.
        tolerance = 1e-6 if name.endswith("k_proj.bias") else 1e-7
        assert norm == pytest.approx(case["grad_norms"].get(name) or 0.0, rel=1e-4, abs=tolerance), name


@pytest.mark.parametrize("name", CASES)
def test_prompt_ids_and_greedy_tokens(name):
    case, tensors, model, processor, images = load_case(name)
    for index, (sample, expected) in enumerate(zip(case["samples"], case["greedy"], strict=True)):
        inputs = processor(sample["prompt"], images[index])
        length = case["prompt_lengths"][index]
        assert inputs["input_ids"][0].tolist() == expand(case["input_ids_rle"][index])[:length]
        inputs["input_ids"] = number_by_position(inputs["input_ids"], [case["num_img_tokens"][index]])
        tokens = model.generate(**inputs, max_new_tokens=len(expected["new_tokens"]), do_sample=False, eos_token_id=None)
        assert tokens[0, length:].tolist() == expected["new_tokens"]


@pytest.mark.parametrize("name", CASES)
def test_training_ids_and_labels(name):
    """An encoded conversation is the published prompt, answer and end, with labels on what follows the prompt."""
    case, tensors, _, processor, images = load_case(name)
    for row, sample in enumerate(case["samples"]):
        user = sample["prompt"].removeprefix("<|user|>\n").removesuffix("<|end|>\n<|assistant|>\n")
        turn = {"images": images[row], "user": user, "assistant": sample["answer"]}
        encoded = encode_conversation({"conversations": [turn]}, processor)
        real = tensors["attention_mask"][row].bool()
        expected = expand(case["input_ids_rle"][row])[: case["lengths"][row]]
        found = number_by_position(torch.tensor([encoded["input_ids"]]), [case["num_img_tokens"][row]])[0].tolist()
        assert found == number_by_position(torch.tensor([expected]), [case["num_img_tokens"][row]])[0].tolist()
        assert encoded["labels"] == tensors["labels"][row][real].tolist()


@pytest.mark.parametrize("name", ["f_batch", "f_batch_with_text_only"])
def test_left_padded_batch_generates_like_single_prompts(name):
    case, _, model, processor, images = load_case(name)
    inputs = processor([sample["prompt"] for sample in case["samples"]], images, padding_side="left")
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
    for row, expected in zip(tokens[:, inputs["input_ids"].shape[1] :], case["greedy"], strict=True):
        assert row.tolist() == expected["new_tokens"]


def test_placeholders_get_the_features_of_their_number():
    """`<|image_2|> … <|image_1|>` with pictures (a, b) is `<|image_1|> … <|image_2|>` with (b, a)."""
    case, _, model, processor, images = load_case("d_swapped")
    prompt = case["samples"][0]["prompt"]
    first, second = images[0]
    swapped = prompt.replace("<|image_2|>", "<|image_0|>").replace("<|image_1|>", "<|image_2|>")
    swapped = swapped.replace("<|image_0|>", "<|image_1|>")
    with torch.no_grad():
        logits = model(**processor(prompt, [first, second]), logits_to_keep=8).logits
        same = model(**processor(swapped, [second, first]), logits_to_keep=8).logits
        other = model(**processor(swapped, [first, second]), logits_to_keep=8).logits
    assert torch.equal(logits, same)
    assert not torch.allclose(logits[:, -1], other[:, -1], atol=1e-2)


def test_every_crop_is_bit_identical():
    crops = 0
    for key, expected in json.loads((GOLDEN / "image_processor.json").read_text()).items():
        name, num_crops = key.split("|")
        image = Image.open(GOLDEN / "images" / name)
        # The published processor drops transparency; this one composes it on white.
        image = image.convert("RGB") if image.mode == "RGBA" else image
        output = Phi3VImageProcessor(num_crops=int(num_crops))(image)
        assert output["image_sizes"].tolist() == expected["image_sizes"]
        for crop, digest in zip(output["pixel_values"][0], expected["crop_sha256"], strict=True):
            assert hashlib.sha256(crop.numpy().tobytes()).hexdigest() == digest
            crops += 1
    assert crops == 174


def test_sizes_and_token_counts():
    table = json.loads((GOLDEN / "hd_size_table.json").read_text())
    for row in table["rows"]:
        row = dict(zip(table["columns"], row, strict=True))
        size = crop_grid_size(row["width"], row["height"], row["num_crops"])
        assert size == (row["hd_height"], row["hd_width"])
        assert num_image_tokens(*size) == row["num_img_tokens"]


def test_token_ids_of_raw_strings_and_chats():
    reference = json.loads((GOLDEN / "tokenizer_processor.json").read_text())["phi35"]
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    tokenizer = processor.tokenizer
    for text, ids in reference["raw_text"].items():
        assert tokenizer(text).input_ids == ids["bos"], text
        assert tokenizer(text, add_special_tokens=False).input_ids == ids["no_special"], text
    for name, chat in reference["chats"].items():
        prompt = tokenizer.apply_chat_template(chat["messages"], tokenize=False, add_generation_prompt=True)
        assert prompt == chat["prompt"], name
        processor.image_processor.num_crops = int(name.rpartition("=")[2])
        sizes = [Image.open(GOLDEN / "images" / image).size for image in chat["images"]]
        counts = [processor.image_processor.num_tokens(*size) for size in sizes]
        assert processor.tokenize(prompt, counts) == expand(chat["input_ids_rle"]), name


def test_parameters_have_the_published_names_and_shapes():
    published = json.loads((GOLDEN / "param_names.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {name: published["shapes"][name] for name in published["safetensors_keys"]}
