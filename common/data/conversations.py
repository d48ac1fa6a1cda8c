"""Reading rows as conversations, checking them, and encoding them as token ids, labels and image references.

A conversation is a plain dict, one line of the general JSONL format::

    {"id": "42", "conversations": [{"images": ["a.jpg", "b.jpg"], "user": "Same?", "assistant": "Yes."}, …]}

Images are numbered over the whole conversation; :mod:`common.data.pictures` lists the types of images.
If the user's text has no image tag, the tags of its images are inserted before it; ``<image>`` marks the place of the next one.
A conversation can have a ``system`` prompt. :func:`read_conversation` also accepts rows of other common formats.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from common.phi3v import Phi3VProcessor
from common.phi3v.processing import IMAGE_TAG, SPECIAL_TOKEN, check_image_numbers, image_numbers
from common.runtime.process import InputError, counted, excerpt

from .pictures import Picture, check_picture, picture_size

Conversation = dict[str, Any]

IMAGE_MARK = "<image>"
NOTES = ("id", "source", "metadata")  # fields of a row that are not trained on
TURN_FIELDS = ("images", "user", "assistant")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Further bytes of a turn that :func:`max_text_tokens` counts for the chat template's tokens.
BYTES_PER_TURN = 64


def read_conversation(row: Any, place: str) -> Conversation:
    """Convert a row of a file to a conversation.

    Parameters
    ----------
    row : Any
        A dict of the general format; or ``messages`` of ``role`` and ``content`` (as OpenAI's API, TRL), or ``conversations``
        of ``from`` and ``value`` (LLaVA, ShareGPT), with the images in ``image`` or ``images`` of the row, whose places in the
        texts may be marked by ``<image>``, or in the parts of a ``content``. None counts as missing.
    place : str
        Location of the row, for messages.

    Returns
    -------
    Conversation
        ``id``, ``system`` (str or None) and ``conversations``; still to be checked with :func:`conversation_faults`. The last
        turn has no ``assistant`` if the row ends with a question.

    Raises
    ------
    InputError
        If a field is unknown or the turns are not recognized; the message names the row.
    """
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object, got {type(row).__name__}", place)
    row = _without_none(row)
    name = "messages" if "messages" in row else "conversations"
    turns = row.get(name)
    if not isinstance(turns, list) or not turns:
        raise InputError('"conversations" must be a list of at least one turn', place)
    if not all(isinstance(turn, dict) for turn in turns):
        number = next(number for number, turn in enumerate(turns, start=1) if not isinstance(turn, dict))
        raise InputError("a turn must be an object", f"{place}, turn {number}")
    turns = [_without_none(turn) for turn in turns]
    keys = {key for turn in turns for key in turn}
    if "from" in keys or "role" in keys:
        check_fields(row, (name, *NOTES, "system", "image", "images"), {}, place)
        turns, system = _merge_messages(turns, ("from", "value") if "from" in keys else ("role", "content"), place)
        if system and row.get("system"):
            raise InputError("the row has a system prompt twice: remove one", place)
        row["system"] = system or row.get("system")
        _place_images(turns, row.get("images", row.get("image", [])), place)
    else:
        misplaced = dict.fromkeys(("image", "images"), 'move it into a turn, as a list "images"')
        check_fields(row, (name, *NOTES, "system"), misplaced, place)
        for number, turn in enumerate([] if keys.issubset(TURN_FIELDS) else turns, start=1):
            misplaced = {"system": 'move it from the turn to the row, next to "conversations"'}
            check_fields(turn, TURN_FIELDS, misplaced, f"{place}, turn {number}")
    identifier = row.get("id")
    if identifier is not None and not isinstance(identifier, str | int):
        raise InputError('"id" must be a string or an integer', place)
    identifier = None if identifier is None else str(identifier)
    return {"id": identifier, "system": row.get("system"), "conversations": turns}


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def format_name(row: dict[str, Any]) -> str:
    """Name the format of a row that :func:`read_conversation` accepts."""
    turns = row.get("messages", row.get("conversations"))
    if isinstance(turns, list) and turns and isinstance(turns[0], dict):
        for field, name in (("from", "LLaVA or ShareGPT"), ("role", "chat messages (OpenAI, TRL)")):
            if field in turns[0]:
                return name
    return "general format"


def check_fields(
    found: Iterable[str], known: Collection[str], misplaced: Mapping[str, str], place: str, kind: str = "field"
) -> None:
    """Raise an :class:`InputError` for an unknown name, with the nearest known one, or where it belongs."""
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = misplaced.get(name) or (f'did you mean "{near[0]}"?' if near else "remove it")
            names = ", ".join(f'"{excerpt(field)}"' for field in known)
            raise InputError(f'unknown {kind} "{excerpt(name)}" (known are {names}): {remedy}', place)


def _merge_messages(messages: list[Any], keys: tuple[str, str], place: str) -> tuple[list[dict[str, Any]], str | None]:
    """Merge messages of alternating roles into turns, and return the system prompt if there is one."""
    turns: list[dict[str, Any]] = []
    system = None
    for number, message in enumerate(messages, start=1):
        here = f"{place}, message {number}"
        check_fields(message, keys, {}, here)
        role, (text, images) = ROLES.get(str(message.get(keys[0]))), _read_content(message.get(keys[1]), here)
        if role is None:
            raise InputError(f'unknown "{keys[0]}" {excerpt(message.get(keys[0]))}: expected {", ".join(ROLES)}', here)
        if images and role != "user":
            raise InputError("only the user's messages can contain images", here)
        open_turn = bool(turns) and "assistant" not in turns[-1]
        if role == "system" and number == 1:
            system = text
        elif role == "user" and not open_turn:
            turns.append({"images": images, "user": text})
        elif role == "assistant" and open_turn:
            turns[-1]["assistant"] = text
        else:
            raise InputError(
                f"a message of the {role} is not expected here: after a system message at the start, user and assistant must "
                "alternate, and the user begins; merge or remove messages",
                here,
            )
    if not turns:
        raise InputError("there is no message of the user", place)
    return turns, system


def _read_content(content: Any, place: str) -> tuple[str, list[Any]]:
    """Return the text of a message, in which every image part is a mark, and the images that are named in it."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise InputError("the text must be a string or a list of parts", place)
    texts, images = [], []
    for part in map(_without_none, content):
        kind = part.get("type")
        check_fields(part, ("type", str(kind)), {}, place)
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            texts.append(IMAGE_MARK)
            image = part.get(kind)
            images += [image["url"] if isinstance(image, dict) and "url" in image else image] if image is not None else []
        else:
            raise InputError(f"unknown part of type {excerpt(kind)}: expected text, image or image_url", place)
    return "\n".join(texts), images


def _place_images(turns: list[dict[str, Any]], images: Any, place: str) -> None:
    """Give the images of a row to the turns by their marks, or to the first turn if there are no marks."""
    images = list(images) if isinstance(images, list) else [images]
    if not images:
        return
    marks = [turn["user"].count(IMAGE_MARK) for turn in turns]
    if any(turn["images"] for turn in turns) or sum(marks) not in (0, len(images)):
        counts = f"{counted(len(images), 'image')} and {counted(sum(marks), f'{IMAGE_MARK} mark')}"
        raise InputError(f"the row has {counts}: use one mark per image, or none", place)
    marks = marks if any(marks) else [len(images)]
    ends = [0, *accumulate(marks)]
    for turn, (begin, end) in zip(turns, pairwise(ends), strict=False):
        turn["images"] = images[begin:end]


def check_conversation(conversation: Any, place: str) -> None:
    """Check the texts and images of a conversation, and that its image tags match its images.

    Parameters
    ----------
    conversation : Any
        As returned by :func:`read_conversation`.
    place : str
        Location for messages, for example ``data.jsonl, line 3``.

    Raises
    ------
    InputError
        For the first error found; the message names the row and what is expected.
    """
    for error in conversation_faults(conversation, place):
        raise error


def conversation_faults(conversation: Conversation, place: str) -> Iterator[InputError]:
    """Yield all errors that :func:`check_conversation` looks for."""
    turns = conversation["conversations"]
    system = conversation.get("system")
    if _is_plain("-" if system is None else system) and all(map(_is_plain_turn, turns)):
        return
    faults = [InputError(fault, place) for fault in _text_faults("system", "-" if system is None else system)]
    for number, turn in enumerate(turns, start=1):
        faults += [InputError(fault, f"{place}, turn {number}") for fault in _turn_faults(turn)]
    yield from faults
    if faults:
        return
    num_images, tags = 0, []
    for number, (turn, content) in enumerate(zip(turns, _user_contents(conversation), strict=True), start=1):
        # At inference, a turn only sees the images up to this turn.
        num_images += len(turn.get("images") or [])
        tags += image_numbers(content)
        try:
            _check_tags(tags, num_images)
        except InputError as error:
            yield error.at(f"{place}, turn {number}" if len(turns) > 1 else place)
            return


def _is_plain(text: Any) -> bool:
    """Whether a text is not empty and has no ``<``, with which special tokens, image tags and marks begin."""
    return isinstance(text, str) and "<" not in text and bool(text.strip())


def _is_plain_turn(turn: dict[str, Any]) -> bool:
    """Whether a turn has no errors at first sight, which takes a tenth of the time of :func:`_turn_faults`."""
    images = turn.get("images")
    valid = images is None or (isinstance(images, list) and all(map(is_picture, images)))
    return valid and _is_plain(turn.get("user")) and _is_plain(turn.get("assistant"))


def _turn_faults(turn: dict[str, Any]) -> Iterator[str]:
    for field in ("user", "assistant"):
        yield from _text_faults(field, turn.get(field))
    images = [] if turn.get("images") is None else turn["images"]
    if not isinstance(images, list) or not all(map(is_picture, images)):
        wrong = [image for image in images if not is_picture(image)] if isinstance(images, list) else [images]
        yield f'"images" must be a list of file names or images, got {excerpt(wrong[0])}'
        return
    marks = str(turn.get("user")).count(IMAGE_MARK)
    if marks and (marks != len(images) or IMAGE_TAG.search(turn["user"])):
        counts = f"{counted(marks, f'{IMAGE_MARK} mark')}, but the turn has {counted(len(images), 'image')}"
        yield f'"user" has {counts}: use one mark per image, and no tags beside them'


def _text_faults(field: str, text: Any) -> Iterator[str]:
    if not isinstance(text, str) or not text.strip():
        use = ": it is the answer to learn or, in evaluation, to compare with" if field == "assistant" else ""
        yield f'"{field}" must be a non-empty string{use}'
    elif token := SPECIAL_TOKEN.search(text):
        yield f'"{field}" contains the special token {excerpt(token[0])}: remove it, the chat template inserts special tokens'
    elif field != "user" and (tag := IMAGE_TAG.search(text) or re.search(IMAGE_MARK, text)):
        yield f'image tags are only allowed in "user", but "{field}" contains {tag[0]}'


def pictures(conversation: Conversation) -> list[Picture]:
    """All images of a conversation, in the order of their numbers."""
    return [picture for turn in conversation["conversations"] for picture in turn.get("images") or []]


def prompt_text(conversation: Conversation, processor: Phi3VProcessor) -> str:
    """Chat text up to the beginning of the last turn's answer, as used for inference.

    The last turn's ``assistant`` is ignored and may be missing.
    """
    return prompt_texts([conversation], processor)[0]


def prompt_texts(conversations: Iterable[Conversation], processor: Phi3VProcessor) -> list[str]:
    """Return the :func:`prompt_text` of each conversation, which takes less time together."""
    chats = []
    for conversation in conversations:
        system = conversation.get("system")
        messages = [{"role": "system", "content": system}] if system else []
        for turn, content in zip(conversation["conversations"], _user_contents(conversation), strict=True):
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.get("assistant")}]
        chats.append(messages[:-1])
    return processor.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)


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
        ``input_ids`` list of int (−k at each token of image k), ``images`` list of images.
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
        ``input_ids`` list of int (−k at each token of image k), ``labels`` list of int (−100 outside answers), ``images`` list
        of images.

    Raises
    ------
    InputError
        If the image tags do not match the images, or the conversation exceeds the context of the model.
    """
    turns = conversation["conversations"]
    images = pictures(conversation)
    image_tokens = image_tokens or count_image_tokens(images, processor)
    spans = []  # of all answers but the last one
    for number in range(1, len(turns)):
        part = conversation | {"conversations": turns[:number]}
        history, used = prompt_text(part, processor), image_tokens[: len(pictures(part))]
        begin = len(processor.tokenize(history, used))
        end = len(processor.tokenize(f"{history}{turns[number - 1]['assistant']}<|end|>\n", used))
        spans.append((begin, end))

    input_ids = _tokenize(prompt_text(conversation, processor), image_tokens, processor)
    labels = [-100] * len(input_ids)
    for begin, end in spans:
        labels[begin:end] = input_ids[begin:end]
    answer_ids = processor.tokenizer(_last_answer(conversation, processor), add_special_tokens=False).input_ids
    check_context(len(input_ids) + len(answer_ids), processor)
    return {"input_ids": input_ids + answer_ids, "labels": labels + answer_ids, "images": images}


def count_tokens(
    conversations: Sequence[Conversation],
    image_tokens: Sequence[list[int]],
    place: Callable[[int], str],
    processor: Phi3VProcessor,
) -> list[int]:
    """Count the tokens that :func:`encode_conversation` would produce for each conversation, in one batch.

    Parameters
    ----------
    conversations : sequence of Conversation
    image_tokens : sequence of list of int
        Number of tokens of each image of each conversation.
    place : callable
        Returns the location of a conversation, by its index, for messages.
    processor : Phi3VProcessor

    Raises
    ------
    InputError
        If the image tags of a conversation do not match its images; the message names the conversation.
    """
    split, answers, counts = [], [], []
    texts = prompt_texts(conversations, processor)
    for index, (conversation, text, tokens) in enumerate(zip(conversations, texts, image_tokens, strict=True)):
        pieces = IMAGE_TAG.split(text)
        numbers = [int(number) for number in pieces[1::2]]
        try:
            _check_tags(numbers, len(tokens))
        except InputError as error:
            raise error.at(place(index)) from None
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
    return [processor.image_processor.num_tokens(*picture_size(image)) for image in images]


def max_text_tokens(conversation: Conversation) -> int:
    """Return an upper bound of the number of tokens of a conversation's texts: at most one per byte."""
    texts = [conversation.get("system") or ""]
    texts += [turn[field] for turn in conversation["conversations"] for field in ("user", "assistant")]
    return len("".join(texts).encode()) + BYTES_PER_TURN * len(texts)


def check_context(num_tokens: int, processor: Phi3VProcessor) -> None:
    """Check that a row fits into the context of the model.

    Raises
    ------
    InputError
        If it does not.
    """
    if num_tokens > (context := processor.tokenizer.model_max_length):
        raise InputError(f"{num_tokens:,} tokens exceed the model's context of {context:,}: shorten or split the row")


def answer_lengths(conversations: Iterable[Conversation], processor: Phi3VProcessor) -> list[int]:
    """Return the number of tokens of the answer to each last turn, including the token that ends it."""
    answers = [conversation["conversations"][-1].get("assistant") or "" for conversation in conversations]
    counts = _count_text_tokens(answers, processor, add_special_tokens=False)
    return [1 + counts[answer] for answer in answers]


def longest_answer(conversations: Iterable[Conversation], processor: Phi3VProcessor) -> int:
    """Return the largest of the :func:`answer_lengths`; 1 if there are no conversations."""
    return max(answer_lengths(conversations, processor), default=1)


def _tokenize(text: str, image_tokens: list[int], processor: Phi3VProcessor) -> list[int]:
    _check_tags(image_numbers(text), len(image_tokens))
    return processor.tokenize(text, image_tokens)


def _check_tags(numbers: list[int], num_images: int) -> None:
    try:
        check_image_numbers(numbers, num_images)
    except ValueError as error:
        raise InputError(str(error)) from None


def is_picture(entry: Any) -> bool:
    """Whether an entry of ``images`` is one of the types of :mod:`common.data.pictures`, and no URL."""
    if isinstance(entry, dict):
        return entry.get("bytes") is not None or isinstance(entry.get("path"), str)
    if isinstance(entry, str):
        return not entry.startswith(("data:", "http:", "https:"))
    return isinstance(entry, Path | Image.Image)


def _last_answer(conversation: Conversation, processor: Phi3VProcessor) -> str:
    return f"{conversation['conversations'][-1]['assistant']}<|end|>\n{processor.tokenizer.eos_token}"


def _count_text_tokens(texts: list[str], processor: Phi3VProcessor, add_special_tokens: bool = True) -> dict[str, int]:
    unique = list(dict.fromkeys(texts))  # many questions, answers and empty texts between images repeat
    tokenizer = processor.tokenizer.backend_tokenizer  # itself, because the ids would be converted to lists
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch_fast(unique, add_special_tokens=add_special_tokens)
    return dict(zip(unique, map(len, encoded), strict=True))


def _user_contents(conversation: Conversation) -> list[str]:
    """Return the user's text of each turn, with image marks replaced by numbered tags, or the tags inserted before it."""
    contents, number = [], 0
    for turn in conversation["conversations"]:
        count = len(turn.get("images") or [])
        content = turn["user"]
        tags = [f"<|image_{number + index + 1}|>" for index in range(count)]
        if content.count(IMAGE_MARK) == count and count:
            for tag in tags:
                content = content.replace(IMAGE_MARK, tag, 1)
        elif count and not IMAGE_TAG.search(content):
            content = "".join(tags) + "\n" + content
        number += count
        contents.append(content)
    return contents
