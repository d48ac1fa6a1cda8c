"""Answers do not depend on batches and shared prefixes, and shared images are computed once."""

import argparse
import io
import json
import multiprocessing
import os
import signal

import pytest
import torch
from conftest import TINY
from forked import run_processes
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from common.data.conversations import pictures, prompt_text
from common.evaluation import generation
from common.evaluation.generation import batches_by_length, generate_answers, generate_with_log_probabilities
from common.phi3v import Phi3VConfig, cache
from common.phi3v.processing import stop_token_ids

ANSWERS = ("Yes.", "No, neither of them")


def flags(batch_size):
    return argparse.Namespace(eval_batch_size=batch_size, max_new_tokens=12, dataloader_num_workers=0, tqdm=False)


def load(**overrides):
    config = Phi3VConfig.from_dict(json.loads((TINY / "config.json").read_text()) | overrides)
    return AutoModelForCausalLM.from_pretrained(TINY, config=config, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY, num_crops=2)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """Questions on three sets of pictures (files, bytes, none), in mixed order; crops there are 2, 1 + 2, and none."""
    noise = torch.randint(0, 256, (300, 640, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    folder = tmp_path_factory.mktemp("pictures")
    wide, square, upright = folder / "wide.png", folder / "square.png", folder / "upright.png"
    Image.fromarray(noise).save(wide)
    Image.fromarray(noise[:, :300]).save(square)
    Image.fromarray(noise.transpose(1, 0, 2)).save(upright)
    two = [{"bytes": path.read_bytes(), "path": None} for path in (square, upright)]
    asked = [
        ([wide], "Read."),
        (two, "In <|image_2|>, and not in <|image_1|>?"),
        ([], "How are you?"),
        ([wide], "And which of these words is the longest one?"),
        (two, "In <|image_2|>, and not in <|image_1|>, what is there?"),
        ([square], "Read."),
        ([wide], "Read."),
    ]
    return [{"conversations": [{"images": images, "user": user}]} for images, user in asked]


@torch.no_grad()
def alone(model, processor, conversation):
    """Greedy answer and log-probabilities of ANSWERS, computed from one prompt at a time without a cache."""
    images = [Image.open(image) if not isinstance(image, dict) else open_bytes(image) for image in pictures(conversation)]
    inputs = processor(prompt_text(conversation, processor), images or None)
    inputs.pop("attention_mask")
    prompt = model.model.embed(**inputs)

    def logits_after(answer):
        embedded = torch.cat([prompt, model.model.embed(torch.tensor([answer], dtype=torch.long))], dim=1)
        return model(inputs_embeds=embedded).logits[0, prompt.shape[1] - 1 :]

    log_probabilities = []
    for answer in ANSWERS:
        ids = processor.tokenizer(answer, add_special_tokens=False).input_ids
        log_probabilities.append(logits_after(ids).log_softmax(-1)[range(len(ids)), ids].sum().item())
    answer = []
    while len(answer) < 12 and (not answer or answer[-1] not in stop_token_ids(processor)):
        answer.append(logits_after(answer)[-1].argmax().item())
    return processor.tokenizer.decode(answer, skip_special_tokens=True), log_probabilities


def open_bytes(image):
    return Image.open(io.BytesIO(image["bytes"]))


# Prompts have about 20, 480 and 1,100 tokens: with a limit of 490, where LongRoPE's factors change, some answers exceed it.
@pytest.fixture(scope="module")
def alone_at_a_limit(conversations, processor):
    """A model with this limit, and its answers to each prompt alone."""
    model = load(original_max_position_embeddings=490, max_position_embeddings=32 * 490)
    return model, [alone(model, processor, conversation) for conversation in conversations]


@pytest.mark.parametrize(("batch_size", "room"), [(1, 1), (4, 5)])
def test_answers_are_those_of_each_prompt_alone(conversations, processor, batch_size, room, alone_at_a_limit, monkeypatch):
    monkeypatch.setattr(cache, "PREALLOCATED_TOKENS", room)
    model, expected = alone_at_a_limit
    answers, found = generate_with_log_probabilities(model, processor, conversations, ANSWERS, flags(batch_size))
    assert answers == [answer for answer, _ in expected]
    torch.testing.assert_close(torch.tensor(found), torch.tensor([row for _, row in expected]).double(), rtol=1e-5, atol=5e-5)


def test_finished_answers_leave_the_batch(conversations, processor, monkeypatch):
    model, rows = load(), []
    stops = [3, 11, 20, 51]  # after 1, 4, 4, 6, 9, 12 and 1 tokens of what the model says to these prompts
    monkeypatch.setattr(generation, "stop_token_ids", lambda _: stops)
    expected = generate_answers(model, processor, conversations, flags(1))
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for share_left, sizes in ((0.5, [7, 3, 1]), (1.0, [7, 5, 3, 2, 1])):
        rows.clear()
        monkeypatch.setattr(generation, "COMPACT_BELOW", share_left)
        assert generate_answers(model, processor, conversations, flags(8)) == expected
        assert list(dict.fromkeys(rows[1:])) == sizes


def test_images_that_prompts_share_are_encoded_once(conversations, processor):
    model, seen = load(), []
    model.model.vision_embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[1])))
    generate_answers(model, processor, conversations, flags(8))
    assert seen == [4]  # wide, square, and the two of the pair


def test_prompts_with_the_same_prefix_come_together():
    order = [index for batch in batches_by_length([5, 9, 7, 9, 6], 2, 0, 1, prefixes=list("abcab")) for index in batch]
    assert order == [3, 0, 1, 4, 2]


def be_told_to_end(answers):
    """A process that answers while its worker sends SIGTERM to the group of both."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of the worker, the default of a program
    received, reader = [], os.getpid()
    signal.signal(signal.SIGTERM, lambda *_: received.append(os.getpid()))

    class Conversations(list):
        def __getitem__(self, index):
            if os.getpid() != reader:
                os.killpg(reader, signal.SIGTERM)
            return super().__getitem__(index)

    conversations = Conversations({"conversations": [{"user": f"Say {number}."}]} for number in range(4))
    args = argparse.Namespace(**vars(flags(1)) | {"max_new_tokens": 2, "dataloader_num_workers": 1})
    found = generate_answers(load(), AutoProcessor.from_pretrained(TINY), conversations, args)
    answers.write_text(f"{len(found)} {set(received) == {reader}}")


def test_workers_ignore_sigterm_to_their_process_group(tmp_path):
    """torchrun and Slurm send it so; the process itself saves at the end of its step, for which it needs its workers."""
    assert run_processes(be_told_to_end, [(tmp_path / "answers",)], timeout=120) == [0]
    assert (tmp_path / "answers").read_text() == "4 True"


def test_generation_does_not_use_flash_attention(monkeypatch):
    """It would remove the padding of the prompts from the cache for every token."""
    model, chosen = load(), []
    monkeypatch.setattr(model, "set_attn_implementation", chosen.append)  # refuses flash attention on a CPU
    for attention in ("flash_attention_2", "eager"):
        model.config._attn_implementation = attention
        with generation._evaluating(model):
            chosen.append(attention)
    assert chosen == [{"": "sdpa"}, "flash_attention_2", {"": "flash_attention_2"}, "eager"]
