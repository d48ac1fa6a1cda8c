"""Reading rows of all accepted formats as conversations, and checking their texts, image lists and image tags."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from common.phi3v.processing import IMAGE_TAG, SPECIAL_TOKEN, image_numbers
from common.runtime.files import parse_json
from common.runtime.process import InputError, counted, excerpt

from .conversations import IMAGE_MARK, Conversation, check_tags, user_contents

NOTES = ("id", "source", "metadata")  # fields of a row that are not trained on
MAX_LINE = 16 * 2**20  # bytes
TURN_FIELDS = ("images", "user", "assistant")
OF_TURN = dict.fromkeys(("image", "images"), 'move it into a turn, as a list "images"')
OF_ROW = {"system": 'move it from the turn to the row, next to "conversations"'}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def parse_object(line: bytes | InputError, place: str | None = None) -> dict[str, Any]:
    """Parse a row of :func:`~.formats.read_lines`, or raise an :class:`InputError` if it is not a valid JSON object."""
    if isinstance(line, InputError):
        raise line
    if len(line) > MAX_LINE:
        raise InputError(f"longer than {MAX_LINE:,} bytes: split the conversation", place)
    return parse_json(line, "write one object per line, in UTF-8", place)


def parse_conversation(line: bytes | InputError, place: str) -> Conversation:
    """Parse one row of a file of conversations, and raise the first of its :func:`file_faults`."""
    conversation = read_conversation(parse_object(line, place), place)
    for error in file_faults(conversation, place):
        raise error
    return conversation


def read_conversation(row: dict[str, Any], place: str) -> Conversation:
    """Convert a row of a file to a conversation.

    Parameters
    ----------
    row : dict
        A row of the general format; or ``messages`` of ``role`` and ``content`` (as OpenAI's API, TRL), or ``conversations``
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
    row = _without_none(row)
    name = "messages" if "messages" in row else "conversations"
    turns = row.get(name)
    if not isinstance(turns, list) or not turns:
        raise InputError('"conversations" must be a list of at least one turn', place)
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise InputError("a turn must be an object", f"{place}, turn {number}")
    turns = [_without_none(turn) for turn in turns]
    keys = {key for turn in turns for key in turn}
    if "from" in keys or "role" in keys:
        check_fields(row, (name, *NOTES, "system", "image", "images"), {}, place)
        turns, system = _merge_messages(turns, ("from", "value") if "from" in keys else ("role", "content"), place)
        if system and row.get("system"):
            raise InputError("the row has a system prompt twice: remove one", place)
        row["system"] = system or row.get("system")
        if row.get("image") and row.get("images"):
            raise InputError('the row has both "image" and "images": remove one', place)
        _place_images(turns, row.get("images") or row.get("image", row.get("images", [])), place)
    else:
        check_fields(row, (name, *NOTES, "system"), OF_TURN, place)
        for number, turn in enumerate([] if keys.issubset(TURN_FIELDS) else turns, start=1):
            check_fields(turn, TURN_FIELDS, OF_ROW, f"{place}, turn {number}")
    identifier = row.get("id")
    if not isinstance(identifier, str | int | None):
        raise InputError('"id" must be a string or an integer', place)
    return {"id": None if identifier is None else str(identifier), "system": row.get("system"), "conversations": turns}


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


def check_conversation(conversation: Conversation, place: str) -> None:
    """Raise the first of the :func:`conversation_faults`."""
    for error in conversation_faults(conversation, place):
        raise error


def conversation_faults(conversation: Conversation, place: str) -> Iterator[InputError]:
    """Yield all errors in the texts, image lists and image tags of a conversation.

    Parameters
    ----------
    conversation : Conversation
        As returned by :func:`read_conversation`.
    place : str
        Location for messages, for example ``data.jsonl, line 3``.
    """
    turns = conversation["conversations"]
    system = "-" if conversation.get("system") is None else conversation["system"]
    if _is_plain(system) and all(map(_is_plain_turn, turns)):
        return
    faults = [InputError(fault, place) for fault in _text_faults("system", system)]
    for number, turn in enumerate(turns, start=1):
        faults += [InputError(fault, f"{place}, turn {number}") for fault in _turn_faults(turn)]
    yield from faults
    if faults:
        return
    num_images, tags = 0, []
    for number, (turn, content) in enumerate(zip(turns, user_contents(conversation), strict=True), start=1):
        # At inference, a turn only sees the images up to this turn.
        num_images += len(turn.get("images") or [])
        tags += image_numbers(content)
        try:
            check_tags(tags, num_images)
        except InputError as error:
            yield error.at(f"{place}, turn {number}" if len(turns) > 1 else place)
            return


def file_faults(conversation: Conversation, place: str) -> Iterator[InputError]:
    """Yield all errors of a conversation from a file of conversations, without checking the image files."""
    yield from conversation_faults(conversation, place)
    if any(isinstance(name, dict) for name in listed_images(conversation)):
        yield InputError('"images" must contain file names', place)


def listed_images(conversation: Conversation) -> list[Any]:
    """All usable entries of the ``images`` lists of a conversation, which may be invalid."""
    found = [turn.get("images") for turn in conversation["conversations"]]
    return [image for images in found if isinstance(images, list) for image in images if is_picture(image)]


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


def is_picture(entry: Any) -> bool:
    """Whether an entry of ``images`` is one of the types of :mod:`common.data.pictures`, and no URL."""
    if isinstance(entry, dict):
        return entry.get("bytes") is not None or isinstance(entry.get("path"), str)
    if isinstance(entry, str):
        return not entry.startswith(("data:", "http:", "https:"))
    return isinstance(entry, Path | Image.Image)
