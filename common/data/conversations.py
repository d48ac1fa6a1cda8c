"""Conversations, and encoding them as token ids, labels and image references.

A conversation is a plain dict, one line of the general JSONL format::

    {"id": "42", "conversations": [{"images": ["a.jpg", "b.jpg"], "user": "Same?", "assistant": "Yes."}, …]}

Images are numbered from 1 across all turns; :mod:`common.data.pictures` lists the types of images. In the user's text,
``<|image_k|>`` places image k, and ``<image>`` the turn's next image. If the text has neither, the tags are inserted before it.
A conversation can have a ``system`` prompt. :func:`common.data.reading.read_conversation` reads rows of other formats as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

from common.phi3v import Phi3VProcessor
from common.phi3v.processing import (
    END_OF_TURN,
    IMAGE_TAG,
    SECTION_END,
    check_image_numbers,
    end_of_conversation,
    image_numbers,
    image_tag,
)
from common.runtime.process import InputError

from .pictures import Picture, picture_size

Conversation = dict[str, Any]

IMAGE_MARK = "<image>"
# Further bytes of a turn that :func:`max_text_tokens` counts for the chat template's tokens.
BYTES_PER_TURN = 64


def pictures(conversation: Conversation) -> list[Picture]:
    """All images of a conversation, in the order of their numbers."""
    return [picture for turn in conversation["conversations"] for picture in turn.get("images") or []]


def prompt_text(conversation: Conversation, processor: Phi3VProcessor) -> str:
    """Chat text up to the beginning of the last turn's answer, as used for inference.

    The last turn's ``assistant`` is ignored and may be missing.
    """
    system = conversation.get("system")
    messages = [{"role": "system", "content": system}] if system else []
    for turn, content in zip(conversation["conversations"], user_contents(conversation), strict=True):
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.get("assistant")}]
    return processor.chat_text(messages[:-1])


def encode_prompt(conversation: Conversation, processor: Phi3VProcessor) -> dict[str, Any]:
    """Encode a prompt for inference.

    Returns
    -------
    dict
        ``input_ids`` list of int (−k at each token of image k), ``images`` list of images.

    Raises
    ------
    InputError
        If the image tags do not match the images, or the prompt exceeds the context of the model.
    """
    images = pictures(conversation)
    image_tokens = count_image_tokens(images, processor)
    input_ids = _tokenize(prompt_text(conversation, processor), image_tokens, processor)
    check_context(len(input_ids) + 1, processor)  # with at least one token of the answer
    return {"input_ids": input_ids, "images": images}


def encode_conversation(conversation: Conversation, processor: Phi3VProcessor) -> dict[str, Any]:
    """Encode a conversation with labels for training.

    All answers are supervised. Each answer ends with ``<|end|>`` and a newline, the last one also with ``<|endoftext|>``.
    The tokens before an answer are the same as at inference with this history.

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
    image_tokens = count_image_tokens(images, processor)
    spans = []  # of all answers but the last one
    for number in range(1, len(turns)):
        part = conversation | {"conversations": turns[:number]}
        history, used = prompt_text(part, processor), image_tokens[: len(pictures(part))]
        begin = len(processor.tokenize(history, used))
        end = len(processor.tokenize(f"{history}{turns[number - 1]['assistant']}{END_OF_TURN}\n", used))
        spans.append((begin, end))

    input_ids = _tokenize(prompt_text(conversation, processor), image_tokens, processor)
    labels = [-100] * len(input_ids)
    for begin, end in spans:
        labels[begin:end] = input_ids[begin:end]
    answer = f"{turns[-1]['assistant']}{end_of_conversation(processor)}"
    answer_ids = processor.tokenizer(answer, add_special_tokens=False).input_ids
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
    ending = end_of_conversation(processor)
    added = processor.tokenizer.num_special_tokens_to_add()  # to the text before and after each image
    split, counts = [], []
    for index, (conversation, tokens) in enumerate(zip(conversations, image_tokens, strict=True)):
        text = prompt_text(conversation, processor)
        numbers = image_numbers(text)
        try:
            check_tags(numbers, len(tokens))
        except InputError as error:
            raise error.at(place(index)) from None
        split.append(SECTION_END.split(text) + SECTION_END.split(conversation["conversations"][-1]["assistant"] + ending))
        counts.append(added * (len(numbers) + 1) + sum(tokens[number - 1] for number in numbers))
    of_section = _count_text_tokens(chain.from_iterable(split), processor)
    return [count + sum(map(of_section.__getitem__, sections)) for count, sections in zip(counts, split, strict=True)]


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
    counts = _count_text_tokens(answers, processor)
    return [1 + counts[answer] for answer in answers]


def longest_answer(conversations: Iterable[Conversation], processor: Phi3VProcessor) -> int:
    """Return the largest of the :func:`answer_lengths`; 1 if there are no conversations."""
    return max(answer_lengths(conversations, processor), default=1)


def _tokenize(text: str, image_tokens: list[int], processor: Phi3VProcessor) -> list[int]:
    check_tags(image_numbers(text), len(image_tokens))
    return processor.tokenize(text, image_tokens)


def check_tags(numbers: list[int], num_images: int) -> None:
    try:
        check_image_numbers(numbers, num_images)
    except ValueError as error:
        raise InputError(str(error)) from None


def _count_text_tokens(texts: Iterable[str], processor: Phi3VProcessor) -> dict[str, int]:
    unique = list(dict.fromkeys(texts))  # many system prompts, questions and answers repeat
    tokenizer = processor.tokenizer.backend_tokenizer  # itself, because the ids would be converted to lists
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch_fast(unique, add_special_tokens=False)
    return dict(zip(unique, map(len, encoded), strict=True))


def user_contents(conversation: Conversation) -> list[str]:
    """Return the user's text of each turn, with image marks replaced by numbered tags, or the tags inserted before it."""
    contents, number = [], 0
    for turn in conversation["conversations"]:
        count = len(turn.get("images") or [])
        content = turn["user"]
        tags = [image_tag(number + index + 1) for index in range(count)]
        if content.count(IMAGE_MARK) == count and count:
            for tag in tags:
                content = content.replace(IMAGE_MARK, tag, 1)
        elif count and not IMAGE_TAG.search(content):
            content = "".join(tags) + "\n" + content
        number += count
        contents.append(content)
    return contents
