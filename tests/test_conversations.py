"""From conversations to tokens and labels: several turns, several images, other formats, invalid rows."""

import pytest
from conftest import GOLDEN, TINY
from PIL import Image
from transformers import AutoProcessor

from common.data.conversations import encode_conversation, encode_prompt, prompt_text
from common.data.reading import check_conversation, read_conversation

TOKENIZERS = [
    pytest.param(TINY, id="tiny"),
    pytest.param(
        GOLDEN / "tiny_checkpoint",
        id="published",
        marks=pytest.mark.skipif(not GOLDEN.is_dir(), reason="the published tokenizer (../shared/golden) is not here"),
    ),
]


@pytest.fixture(params=TOKENIZERS, scope="module")
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
    """Start and end of each span of supervised labels."""
    supervised = [label != -100 for label in labels]
    edges = [i for i, (before, now) in enumerate(zip([False, *supervised], [*supervised, False], strict=True)) if before != now]
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_every_answer_follows_the_prompt_of_inference(processor, conversation):
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
        # The published special tokens drop the spaces after them.
        assert text.replace(" ", "") == (answer + ending).replace(" ", "")
    assert [index for index, token in enumerate(ids) if token == processor.tokenizer.eos_token_id] == [len(ids) - 1]
    if not sample["images"]:  # the text after an image begins with this token too
        assert [index for index, token in enumerate(ids) if token == processor.tokenizer.bos_token_id] == [0]


def test_images_are_numbered_across_turns(processor):
    turns = CONVERSATIONS["pictures in every turn"]
    sample = encode_conversation({"conversations": turns}, processor)
    placeholders = [token for token in sample["input_ids"] if token < 0]
    tokens = [processor.image_processor.num_tokens(*image.size) for image in sample["images"]]
    assert [image.size for image in sample["images"]] == [(60, 40), (90, 40), (40, 90)]
    assert placeholders == [-1] * tokens[0] + [-2] * tokens[1] + [-3] * tokens[2]
    text = prompt_text({"conversations": turns}, processor)
    assert "<|user|>\n<|image_2|><|image_3|>\nAnd these?<|end|>\n<|assistant|>\n" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conversations": [turn("Hi", "Ho")], "system": "<|end|>"}, '"system" contains the special token <|end|>'),
        ({"conversations": [turn("<image> or <image>?", "Ho", "a")]}, '"user" has 2 <image> marks, but the turn has 1 image'),
        ({"conversations": [turn("<image> <|image_1|>", "Ho", "a")]}, "use one mark per image, and no tags beside them"),
        ({"conversations": [turn("Look", "<image>", "a")]}, 'only allowed in "user", but "assistant" contains <image>'),
        ({"conversations": [turn("Look", "Ho", "data:image/png;base64," + "A" * 9000)]}, "AAAA… (9,022 characters)"),
        ({"conversations": [turn("Look", f"<|{'a' * 9000}|>", "a")]}, "aaaa… (9,004 characters): remove it"),
        ({"conversations": [turn("Look", "Ho", "https://example.com/a.png")]}, "got https://example.com/a.png"),
        ({"conversations": [turn("Hi", "Ho"), {"user": "Hi"}]}, 'turn 2: "assistant" must be a non-empty string'),
        ({"conversations": [turn("Hi", 3)]}, 'turn 1: "assistant" must be a non-empty string'),
        ({"conversations": [turn("Hi", "Ho") | {"images": "a.jpg"}]}, 'turn 1: "images" must be a list'),
        ({"conversations": [turn("<|image_2|>", "Ho", "a.jpg")]}, "do not match its 1 image"),
        ({"conversations": [turn("Look", "Ho", "a"), turn("<|image_1|>", "Ho", "b")]}, "turn 2: the text's image tags"),
        ({"conversations": [turn("<|image_1|>", "Ho", "a", "b"), turn("<|image_2|>", "Ho")]}, "do not match its 2 image"),
    ],
)
def test_invalid_conversations_are_refused(content, message):
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3") as raised:
        check_conversation(content, "data.jsonl, line 3")
    assert message in str(raised.value) and len(str(raised.value)) < 300


def test_image_marks_and_system_prompts(processor):
    turns = [turn("Is <image> left of <image>?", "No", picture(), picture(90)), turn("And <image>?", "So", picture())]
    marked = {"system": "Be brief.", "conversations": turns}
    text = prompt_text(marked, processor)
    assert text.startswith("<|system|>\nBe brief.<|end|>\n<|user|>\nIs <|image_1|> left of <|image_2|>?<|end|>\n")
    assert "<|user|>\nAnd <|image_3|>?<|end|>\n" in text
    sample = encode_conversation(marked, processor)
    (begin, end), _ = answer_spans(sample["labels"])
    assert sample["input_ids"][:begin] == encode_prompt(marked | {"conversations": turns[:1]}, processor)["input_ids"]


TEXTS = [("What is it?", "A cat."), ("Sure?", "Yes.")]
LLAVA = [{"from": role, "value": text} for texts in TEXTS for role, text in zip(("human", "gpt"), texts, strict=True)]
MESSAGES = [{"role": role, "content": text} for texts in TEXTS for role, text in zip(("user", "assistant"), texts, strict=True)]
TURNS = [{"user": user, "assistant": assistant} for user, assistant in TEXTS]


def first(message, **fields):
    """The messages with other fields in the first one."""
    return [message[0] | fields, *message[1:]]


PARTS = [
    [{"type": "image", "image": None}, {"type": "text", "text": "What?"}],
    [{"type": "text", "text": "Is"}, {"type": "image_url", "image_url": {"url": "a"}}, {"type": "image", "image": "b"}],
]


@pytest.mark.parametrize(
    ("row", "images", "question", "system"),
    [
        ({"image": "a", "conversations": first(LLAVA, value="<image>\nWhat?")}, [["a"], []], "<image>\nWhat?", None),
        ({"image": ["a", "b"], "id": 7, "conversations": LLAVA}, [["a", "b"], []], "What is it?", None),
        ({"images": ["a", "b"], "conversations": first(LLAVA, value="<image>?")}, None, None, None),
        ({"conversations": [{"from": "system", "value": "Be brief."}, *LLAVA]}, [[], []], "What is it?", "Be brief."),
        ({"system": "Be brief.", "conversations": LLAVA}, [[], []], "What is it?", "Be brief."),
        ({"system": "Be brief.", "conversations": TURNS}, [[], []], "What is it?", "Be brief."),
        ({"images": ["a"], "messages": MESSAGES}, [["a"], []], "What is it?", None),
        ({"images": [], "image": "a", "messages": MESSAGES}, [["a"], []], "What is it?", None),
        ({"messages": first(MESSAGES, content=PARTS[0]), "image": "a"}, [["a"], []], "<image>\nWhat?", None),
        ({"messages": first(MESSAGES, content=PARTS[1])}, [["a", "b"], []], "Is\n<image>\n<image>", None),
    ],
)
def test_rows_of_other_formats_are_read(row, images, question, system):
    if images is None:
        with pytest.raises(ValueError, match=r"line 3: the row has 2 images and 1 <image> mark: "):
            read_conversation(row, "line 3")
        return
    found = read_conversation(row, "line 3")
    check_conversation(found, "line 3")
    assert [turn.get("images", []) for turn in found["conversations"]] == images
    assert [turn["assistant"] for turn in found["conversations"]] == ["A cat.", "Yes."]
    assert found["conversations"][0]["user"] == question and found["system"] == system
    assert found["id"] == ("7" if "id" in row else None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": []}, 'line 3: "conversations" must be a list of at least one turn'),
        ({"image": "0.png", "conversations": TURNS}, 'move it into a turn, as a list "images"'),
        ({"conversations": first(TURNS, image="0.png")}, 'line 3, turn 1: unknown field "image" (known are "images", '),
        ({"conversations": first(TURNS, system="Be brief.")}, "move it from the turn to the row"),
        ({"conversations": TURNS, "sytem": "Be brief."}, 'did you mean "system"?'),
        ({"conversations": TURNS, "w" * 500: 1}, "w… (500 characters)"),
        ({"images": ["a"], "image": "b", "conversations": LLAVA}, 'line 3: the row has both "image" and "images": remove one'),
        ({"conversations": [{"from": "system", "value": "A"}, *LLAVA], "system": "B"}, "a system prompt twice"),
        ({"conversations": first(LLAVA, weight=0)}, 'line 3, message 1: unknown field "weight"'),
        ({"conversations": LLAVA[1:]}, "line 3, message 1: a message of the assistant is not expected here"),
        ({"conversations": [LLAVA[0], *LLAVA]}, "line 3, message 2: a message of the user is not expected here"),
        ({"messages": [*MESSAGES, {"role": "system", "content": "Be brief."}]}, "message 5: a message of the system is not"),
        ({"messages": first(MESSAGES, role="tool")}, 'message 1: unknown "role" tool: expected human, '),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "there is no message of the user"),
        ({"messages": first(MESSAGES, content=7)}, "message 1: the text must be a string or a list of parts"),
        ({"messages": first(MESSAGES, content=[{"type": "audio", "audio": "a"}])}, "unknown part of type audio"),
        ({"messages": first(MESSAGES, content=[{"type": "k" * 9000, "k": 1}])}, "k… (9,000 characters)"),
        ({"conversations": TURNS, "id": 1.5}, '"id" must be a string or an integer'),
    ],
)
def test_unknown_and_misplaced_fields_are_refused(row, message):
    with pytest.raises(ValueError, match="^line 3") as raised:
        read_conversation(row, "line 3")
    assert message in str(raised.value) and len(str(raised.value)) < 300


def test_a_last_question_without_answer_is_refused_in_training():
    found = read_conversation({"conversations": LLAVA[:3]}, "line 3")
    assert "assistant" not in found["conversations"][1]
    with pytest.raises(ValueError, match='line 3, turn 2: "assistant" must be a non-empty string'):
        check_conversation(found, "line 3")


def test_a_prompt_longer_than_the_context_is_refused(processor, monkeypatch):
    asked = {"conversations": [turn("What is it?", "That.")]}
    length = len(encode_prompt(asked, processor)["input_ids"])
    monkeypatch.setattr(processor.tokenizer, "model_max_length", length + 1)
    encode_prompt(asked, processor)
    monkeypatch.setattr(processor.tokenizer, "model_max_length", length)
    with pytest.raises(ValueError, match=rf"{length + 1} tokens exceed the model's context of {length}"):
        encode_prompt(asked, processor)
