"""Conversations to tokens and labels: several turns, several pictures, and what is refused."""

import io
import struct

import pytest
from conftest import GOLDEN, TINY
from PIL import Image
from transformers import AutoProcessor

from common.data.conversations import check_conversation, encode_conversation, encode_prompt, prompt_text
from common.data.pictures import check_picture

TOKENIZERS = [
    pytest.param(TINY, id="tiny"),
    pytest.param(
        GOLDEN / "tiny_checkpoint",
        id="published",
        marks=pytest.mark.skipif(not GOLDEN.is_dir(), reason="the published tokenizer (../shared/golden) is not here"),
    ),
]


@pytest.fixture(params=TOKENIZERS)
def processor(request):
    return AutoProcessor.from_pretrained(request.param, num_crops=1)


def picture(width=60, height=40):
    return Image.new("RGB", (width, height))


def turn(user, assistant, *images):
    return {"images": list(images), "user": user, "assistant": assistant}


CONVERSATIONS = {
    "one turn": [turn("What is it?", "A dog.", picture())],
    "text only": [turn("Two and two?", "Four"), turn("And three?", "Seven")],
    "pictures in every turn": [
        turn("What is it?", "A dog.", picture()),
        turn("Sure?", "Yes, I am."),
        turn("And these?", "1, 2 or 3", picture(90), picture(40, 90)),
        turn("So?", " spaces \n"),
    ],
    "pictures late": [turn("Ready?", "Yes"), turn("Look", "Seen", picture())],
    "tags of its own": [turn("Is <|image_2|> left of <|image_1|>?", "No", picture(), picture(90)), turn("Why?", "So")],
}


@pytest.fixture(params=CONVERSATIONS.values(), ids=CONVERSATIONS)
def conversation(request):
    return {"conversations": request.param}


def answer_spans(labels):
    """Begin and end of each run of labels that are learned."""
    learned = [label != -100 for label in labels]
    edges = [i for i, (before, now) in enumerate(zip([False, *learned], [*learned, False], strict=True)) if before != now]
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_every_answer_is_trained_on_after_exactly_what_inference_feeds(processor, conversation):
    turns = conversation["conversations"]
    sample = encode_conversation(conversation, processor)
    ids, labels = sample["input_ids"], sample["labels"]
    spans = answer_spans(labels)
    assert len(ids) == len(labels)
    assert len(spans) == len(turns)
    for number, (begin, end) in enumerate(spans):
        history = encode_prompt({"conversations": turns[: number + 1]}, processor)
        assert ids[:begin] == history["input_ids"]
        assert labels[begin:end] == ids[begin:end]
        text = processor.tokenizer.decode(ids[begin:end])
        ending = "<|end|>\n<|endoftext|>" if number == len(turns) - 1 else "<|end|>\n"
        answer = turns[number]["assistant"]
        # Published special tokens swallow the blanks after them.
        assert text.replace(" ", "") == (answer + ending).replace(" ", "")


def test_end_of_text_ends_the_last_answer_alone(processor, conversation):
    ids = encode_conversation(conversation, processor)["input_ids"]
    assert ids[-1] == processor.tokenizer.eos_token_id
    assert ids.count(processor.tokenizer.eos_token_id) == 1


def test_pictures_are_numbered_through_the_whole_conversation(processor):
    turns = CONVERSATIONS["pictures in every turn"]
    sample = encode_conversation({"conversations": turns}, processor)
    placeholders = [token for token in sample["input_ids"] if token < 0]
    tokens = [processor.image_processor.num_tokens(*image.size) for image in sample["images"]]
    assert [image.size for image in sample["images"]] == [(60, 40), (90, 40), (40, 90)]
    assert placeholders == [-1] * tokens[0] + [-2] * tokens[1] + [-3] * tokens[2]
    text = prompt_text({"conversations": turns}, processor)
    assert "<|user|>\n<|image_2|><|image_3|>\nAnd these?<|end|>\n<|assistant|>\n" in text


def test_a_turn_has_no_beginning_of_text_of_its_own(processor):
    ids = encode_conversation({"conversations": CONVERSATIONS["text only"]}, processor)["input_ids"]
    assert [i for i, token in enumerate(ids) if token == processor.tokenizer.bos_token_id] == [0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], '"conversations" must be a list of at least one turn'),
        ({"conversations": []}, '"conversations" must be a list of at least one turn'),
        ({"conversations": ["Hi"]}, "turn 1: a turn must be an object"),
        ({"conversations": [turn("Hi", "Ho"), {"user": "Hi"}]}, 'turn 2: "assistant" must be a non-empty string'),
        ({"conversations": [turn(" ", "Ho")]}, 'turn 1: "user" must be a non-empty string'),
        ({"conversations": [turn("Hi", 3)]}, 'turn 1: "assistant" must be a non-empty string'),
        ({"conversations": [turn("Hi", "Ho") | {"images": "a.jpg"}]}, 'turn 1: "images" must be a list'),
        ({"conversations": [turn("<|image_1|> <|image_2|>", "Ho", "a.jpg")]}, "do not match its 1 image"),
        ({"conversations": [turn("<|image_2|>", "Ho", "a.jpg")]}, "do not match its 1 image"),
        ({"conversations": [turn("Look", "Ho", "a"), turn("<|image_1|>", "Ho", "b")]}, "turn 2: the text's image tags"),
        ({"conversations": [turn("<|image_2|>", "Ho"), turn("<|image_1|>", "Ho", "a", "b")]}, "turn 1: the text's image tags"),
        ({"conversations": [turn("<|image_1|>", "Ho", "a", "b"), turn("<|image_2|>", "Ho")]}, "do not match its 2 image"),
        ({"conversations": [turn("Look", "<|image_1|>", "a"), turn("Hi", "Ho")]}, "turn 1: image tags are only allowed in"),
    ],
)
def test_what_is_no_conversation_is_refused_by_name(content, message):
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3") as raised:
        check_conversation(content, "data.jsonl, line 3")
    assert message in str(raised.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_stored_picture_that_is_cut_short_is_found_before_it_is_asked_about(processor, kind):
    file = io.BytesIO()
    Image.effect_noise((300, 200), 50).save(file, kind)
    whole = file.getvalue()
    asked = {"conversations": [turn("What?", "Noise.", {"bytes": whole, "path": None})]}
    assert check_picture({"bytes": whole, "path": None}) == (300, 200)
    assert encode_prompt(asked, processor)["images"] == [{"bytes": whole, "path": None}]
    cut = {"bytes": whole[: len(whole) // 2], "path": "a.png"}
    with pytest.raises(ValueError, match="image a.png cannot be decoded"):
        check_picture(cut)
    with pytest.raises(ValueError, match="image a.png cannot be decoded"):
        encode_prompt({"conversations": [turn("What?", "Noise.", cut)]}, processor)


def test_a_whole_picture_with_something_after_its_end_is_no_mistake():
    file = io.BytesIO()
    Image.effect_noise((300, 200), 50).save(file, "JPEG")
    assert check_picture({"bytes": file.getvalue() + bytes(1000), "path": None}) == (300, 200)


def test_a_picture_of_a_kind_that_nothing_decodes_is_named():
    """As Pillow says of some DDS files, in its own way."""
    fields = [124, 0x1007, 8, 8, 0, 0, 0, *[0] * 11, 32, 0x4, int.from_bytes(b"none", "little"), *[0] * 5, 0x1000, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="image none.dds cannot be (read|decoded)"):
        check_picture({"bytes": b"DDS " + struct.pack("<31I", *fields) + bytes(64), "path": "none.dds"})
