"""Checking conversations, and encoding them as token ids, labels and image references, without decoding images.

A conversation is a plain dict, one line of the general JSONL format::

    {"id": "42", "conversations": [{"images": ["a.jpg", "b.jpg"], "user": "Same?", "assistant": "Yes."}, …]}

Images are numbered over the whole conversation; :mod:`common.data.pictures` lists the types of images.
If the user's text has no image tag, the tags of its images are inserted before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from common.phi3v import Phi3VProcessor
from common.phi3v.processing import IMAGE_TAG, check_image_numbers, image_numbers
from common.runtime import InputError

from .pictures import Picture, check_picture, open_picture

Conversation = dict[str, Any]

# Special tokens of the published tokenizers, except image tags.
SPECIAL_TOKEN = re.compile(r"<\|(?!image_\d+\|>)\w+\|>|</?s>|<unk>")


def check_conversation(conversation: Any, name: str) -> None:
    """Check that a conversation has the fields of the general format, and image tags that match its images.

    Parameters
    ----------
    conversation : Any
        Content of the row.
    name : str
        Location for messages, for example ``data.jsonl, line 3``.

    Raises
    ------
    InputError
        For the first error found; the message names the row and what is expected.
    """
    for error in conversation_faults(conversation, name):
        raise error


def conversation_faults(conversation: Any, name: str) -> Iterator[InputError]:
    """Yield all errors that :func:`check_conversation` looks for."""
    turns = conversation.get("conversations") if isinstance(conversation, dict) else None
    if not isinstance(turns, list) or not turns:
        yield InputError('"conversations" must be a list of at least one turn', name)
        return
    valid = True
    for number, turn in enumerate(turns, start=1):
        for fault in _turn_faults(turn):
            valid = False
            yield InputError(fault, f"{name}, turn {number}")
    if not valid:
        return
    num_images, tags = 0, []
    for number, (turn, content) in enumerate(zip(turns, _user_contents(conversation), strict=True), start=1):
        # At inference, a turn only sees the images up to this turn.
        num_images += len(turn.get("images") or [])
        tags += image_numbers(content)
        try:
            _check_tags(tags, num_images)
        except InputError as error:
            yield error.at(f"{name}, turn {number}" if len(turns) > 1 else name)
            return


def _turn_faults(turn: Any) -> Iterator[str]:
    if not isinstance(turn, dict):
        yield 'a turn must be an object with "user" and "assistant"'
        return
    for field in ("user", "assistant"):
        if not isinstance(turn.get(field), str) or not turn[field].strip():
            yield f'"{field}" must be a non-empty string'
        elif token := SPECIAL_TOKEN.search(turn[field]):
            yield (f'"{field}" contains the special token {token[0]}: remove it, the chat template inserts special tokens')
    images = turn.get("images") or []
    if not isinstance(images, list) or not all(map(_is_picture, images)):
        yield '"images" must be a list of file names or images'
    if isinstance(turn.get("assistant"), str) and IMAGE_TAG.search(turn["assistant"]):
        yield 'image tags are only allowed in "user", not in "assistant"'


def pictures(conversation: Conversation) -> list[Picture]:
    """All images of a conversation, in the order of their numbers."""
    return [picture for turn in conversation["conversations"] for picture in turn.get("images") or []]


def prompt_text(conversation: Conversation, processor: Phi3VProcessor) -> str:
    """Chat text up to the beginning of the last turn's answer, as used for inference.

    The last turn's ``assistant`` is ignored and may be missing.
    """
    messages = []
    for turn, content in zip(conversation["conversations"], _user_contents(conversation), strict=True):
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.get("assistant")}]
    return processor.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)


def encode_prompt(
    conversation: Conversation, processor: Phi3VProcessor, image_tokens: list[int] | None = None
) -> dict[str, Any]:
    """Encode a prompt for inference.

    Parameters
    ----------
    conversation : Conversation
    processor : Phi3VProcessor
    image_tokens : list of int, optional
        Number of tokens of each image, if known. By default, they are computed from the image headers.

    Returns
    -------
    dict
        ``input_ids`` list of int (−k for image k), ``images`` list of images.
    """
    images = pictures(conversation)
    for image in images:
        if isinstance(image, dict):  # images stored in the dataset have not been checked before
            check_picture(image)
    image_tokens = image_tokens or count_image_tokens(images, processor)
    return {"input_ids": _tokenize(prompt_text(conversation, processor), image_tokens, processor), "images": images}


def encode_conversation(
    conversation: Conversation, processor: Phi3VProcessor, image_tokens: list[int] | None = None
) -> dict[str, Any]:
    """Encode a conversation with labels for training.

    All answers are supervised. Each answer ends with ``<|end|>`` and a newline, the last one also with ``<|endoftext|>``.
    The tokens before an answer are the same as at inference with this history.

    Parameters
    ----------
    conversation : Conversation
    processor : Phi3VProcessor
    image_tokens : list of int, optional
        As in :func:`encode_prompt`.

    Returns
    -------
    dict
        ``input_ids`` list of int (−k for image k), ``labels`` list of int (−100 outside answers), ``images`` list of
        images.
    """
    turns = conversation["conversations"]
    images = pictures(conversation)
    image_tokens = image_tokens or count_image_tokens(images, processor)
    spans = []
    for number in range(1, len(turns)):
        history = prompt_text({"conversations": turns[:number]}, processor)
        used = image_tokens[: len(pictures({"conversations": turns[:number]}))]
        begin = len(processor.tokenize(history, used))
        end = len(processor.tokenize(f"{history}{turns[number - 1]['assistant']}<|end|>\n", used))
        spans.append((begin, end))

    input_ids = _tokenize(prompt_text(conversation, processor), image_tokens, processor)
    labels = [-100] * len(input_ids)
    for begin, end in spans:
        labels[begin:end] = input_ids[begin:end]
    answer_ids = processor.tokenizer(_last_answer(conversation, processor), add_special_tokens=False).input_ids
    return {"input_ids": input_ids + answer_ids, "labels": labels + answer_ids, "images": images}


def count_tokens(
    conversations: Iterable[Conversation], image_tokens: Iterable[list[int]], names: Iterable[str], processor: Phi3VProcessor
) -> list[int]:
    """Count the tokens that :func:`encode_conversation` would produce for each conversation, in one batch.

    Parameters
    ----------
    conversations : iterable of Conversation
    image_tokens : iterable of list of int
        Number of tokens of each image of each conversation.
    names : iterable of str
        Location of each conversation, for messages.
    processor : Phi3VProcessor

    Raises
    ------
    InputError
        If the image tags of a conversation do not match its images; the message names the conversation.
    """
    split, answers, counts = [], [], []
    for conversation, tokens, name in zip(conversations, image_tokens, names, strict=True):
        pieces = IMAGE_TAG.split(prompt_text(conversation, processor))
        numbers = [int(number) for number in pieces[1::2]]
        try:
            _check_tags(numbers, len(tokens))
        except InputError as error:
            raise error.at(name) from None
        split.append(pieces[::2])
        answers.append(_last_answer(conversation, processor))
        counts.append(sum(tokens[number - 1] for number in numbers))
    of_piece = _count_text_tokens([piece for pieces in split for piece in pieces], processor)
    of_answer = _count_text_tokens(answers, processor, add_special_tokens=False)
    return [
        count + sum(of_piece[piece] for piece in pieces) + of_answer[answer]
        for count, pieces, answer in zip(counts, split, answers, strict=True)
    ]


def count_image_tokens(images: list[Picture], processor: Phi3VProcessor) -> list[int]:
    """Number of tokens of each image, computed from its size."""
    return [processor.image_processor.num_tokens(*open_picture(image).size) for image in images]


def _tokenize(text: str, image_tokens: list[int], processor: Phi3VProcessor) -> list[int]:
    _check_tags(image_numbers(text), len(image_tokens))
    return processor.tokenize(text, image_tokens)


def _check_tags(numbers: list[int], num_images: int) -> None:
    try:
        check_image_numbers(numbers, num_images)
    except ValueError as error:
        raise InputError(str(error)) from None


def _is_picture(entry: Any) -> bool:
    if isinstance(entry, dict):
        return entry.get("bytes") is not None or isinstance(entry.get("path"), str)
    return isinstance(entry, str | Path | Image.Image)


def _last_answer(conversation: Conversation, processor: Phi3VProcessor) -> str:
    return f"{conversation['conversations'][-1]['assistant']}<|end|>\n{processor.tokenizer.eos_token}"


def _count_text_tokens(texts: list[str], processor: Phi3VProcessor, **options: Any) -> dict[str, int]:
    unique = list(dict.fromkeys(texts))  # many questions, answers and empty texts between images repeat
    encoded = processor.tokenizer(unique, return_attention_mask=False, **options).input_ids
    return dict(zip(unique, map(len, encoded), strict=True))


def _user_contents(conversation: Conversation) -> list[str]:
    contents, number = [], 0
    for turn in conversation["conversations"]:
        count = len(turn.get("images") or [])
        content = turn["user"]
        if count and not IMAGE_TAG.search(content):
            content = "".join(f"<|image_{number + index + 1}|>" for index in range(count)) + "\n" + content
        number += count
        contents.append(content)
    return contents
