"""Conversations to token ids, labels and picture references, without looking at pixels.

A conversation is a plain dict, a line of the general JSONL format::

    {"id": "42", "conversations": [{"images": ["a.jpg", "b.jpg"], "user": "Same?", "assistant": "Yes."}, …]}

Pictures are numbered through the whole conversation; see :mod:`common.data.pictures` for what they may be.
Where the user's text holds no image tag, its pictures' tags are put before it.
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

# Special tokens of the published tokenizers, but for tags of pictures.
CHAT_MARK = re.compile(r"<\|(?!image_\d+\|>)\w+\|>|</?s>|<unk>")


def check_conversation(conversation: Any, name: str) -> None:
    """Check that a conversation has the general format's fields, and tags that fit its pictures.

    Parameters
    ----------
    conversation : Any
        What was read.
    name : str
        Names it in messages, ``data.jsonl, line 3`` say.

    Raises
    ------
    InputError
        Naming the row, what is wrong first, and what belongs there.
    """
    for fault in conversation_faults(conversation, name):
        raise fault


def conversation_faults(conversation: Any, name: str) -> Iterator[InputError]:
    """All that :func:`check_conversation` finds wrong."""
    turns = conversation.get("conversations") if isinstance(conversation, dict) else None
    if not isinstance(turns, list) or not turns:
        yield InputError('"conversations" must be a list of at least one turn', name)
        return
    whole = True
    for number, turn in enumerate(turns, start=1):
        for fault in _turn_faults(turn):
            whole = False
            yield InputError(fault, f"{name}, turn {number}")
    if not whole:
        return
    num_images, tags = 0, []
    for number, (turn, content) in enumerate(zip(turns, _user_contents(conversation), strict=True), start=1):
        # What stands before an answer is all that inference has at that turn.
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
            yield f'"{field}" must be a text that is not empty'
        elif mark := CHAT_MARK.search(turn[field]):
            yield (
                f'"{field}" holds {mark[0]}, which is no text to the model, but divides turns or texts: '
                "leave it out, the chat template puts such marks where they belong"
            )
    images = turn.get("images") or []
    if not isinstance(images, list) or not all(map(_is_picture, images)):
        yield '"images" must be a list of names of files, or of pictures'
    if isinstance(turn.get("assistant"), str) and IMAGE_TAG.search(turn["assistant"]):
        yield 'image tags belong into "user", not into an answer'


def pictures(conversation: Conversation) -> list[Picture]:
    """All pictures of a conversation, in the order of their numbers."""
    return [picture for turn in conversation["conversations"] for picture in turn.get("images") or []]


def prompt_text(conversation: Conversation, processor: Phi3VProcessor) -> str:
    """Chat text up to where the answer to the last turn begins, as inference feeds it.

    The last turn's ``assistant`` is ignored and may be missing.
    """
    messages = []
    for turn, content in zip(conversation["conversations"], _user_contents(conversation), strict=True):
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.get("assistant")}]
    return processor.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)


def encode_prompt(
    conversation: Conversation, processor: Phi3VProcessor, image_tokens: list[int] | None = None
) -> dict[str, Any]:
    """Tokens of a prompt for inference.

    Parameters
    ----------
    image_tokens : list of int, optional
        Tokens of each picture where they are known already; else each picture's header is read, and one that is stored in the
        data set, which nobody has looked at before, is checked.

    Returns
    -------
    dict
        ``input_ids`` list of int (−k for picture k), ``images`` list of pictures.
    """
    images = pictures(conversation)
    for image in images:
        if isinstance(image, dict):
            check_picture(image)
    image_tokens = image_tokens or count_image_tokens(images, processor)
    return {"input_ids": _tokenize(prompt_text(conversation, processor), image_tokens, processor), "images": images}


def encode_conversation(
    conversation: Conversation, processor: Phi3VProcessor, image_tokens: list[int] | None = None
) -> dict[str, Any]:
    """Tokens and labels of a conversation for training.

    Every answer is trained on and ends in ``<|end|>`` and a newline; ``<|endoftext|>`` ends the last one. What stands
    before an answer is what inference would feed for that history.

    Parameters
    ----------
    image_tokens : list of int, optional
        As in :func:`encode_prompt`.

    Returns
    -------
    dict
        ``input_ids`` list of int (−k for picture k), ``labels`` list of int (−100 outside answers), ``images`` list of
        pictures.
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
    """Tokens of each conversation as :func:`encode_conversation` encodes it, counted many at once.

    Parameters
    ----------
    image_tokens : iterable of list of int
        Tokens of each conversation's pictures.
    names : iterable of str
        What messages call the conversations.

    Raises
    ------
    InputError
        Naming the conversation whose image tags don't fit its pictures.
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
    """Tokens that each picture becomes, from its size alone."""
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
    unique = list(dict.fromkeys(texts))  # questions and answers repeat, and between pictures there is often nothing
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
