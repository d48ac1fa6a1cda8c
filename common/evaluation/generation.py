"""Batched greedy generation and answer probabilities over all processes, with results in the order of the dataset."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers.cache_utils import Cache
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from common.data.collator import load_crops
from common.data.conversations import Conversation, encode_prompt, longest_answer
from common.data.loader import WorkerLoader
from common.data.pictures import picture_content
from common.model.loading import autocast, base_model
from common.phi3v import Phi3VForCausalLM, Phi3VProcessor
from common.phi3v.cache import new_cache
from common.phi3v.processing import control_token_ids, pad_rows, stop_token_ids
from common.runtime.collectives import gather, interrupted, raise_if_interrupted
from common.runtime.process import InputError, rank, world_size
from common.runtime.progress import Progress

T = TypeVar("T")

MIN_ANSWER_LIMIT = 64  # without --max_new_tokens

# Finished answers are removed from a batch when at most this share is unfinished. Removing them copies the cache.
COMPACT_BELOW = 0.5


@dataclass(frozen=True)
class Answering:
    """Settings of :func:`generate_answers`, named as the flags of the scripts, whose namespace can be passed instead."""

    eval_batch_size: int = 8  # prompts per process per batch
    max_new_tokens: int | None = None  # per answer; None: see answer_limit
    dataloader_num_workers: int = 0  # per process
    tqdm: bool = True  # show a progress bar on a terminal


class _Prompts(Dataset):
    """Prompts as token ids. Each has a prefix, up to its last image token, that prompts on the same images can share."""

    def __init__(self, conversations: Sequence[Conversation], processor: Phi3VProcessor) -> None:
        self.conversations = conversations
        self.processor = processor

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            prompt = encode_prompt(self.conversations[index], self.processor)
        except InputError as error:
            raise error.at(f"evaluation row {index}") from None
        ids = prompt["input_ids"]
        prefix_length = max((position for position, token in enumerate(ids) if token < 0), default=0) + 1
        content = hashlib.blake2b(np.array(ids[:prefix_length]).tobytes())
        for image in prompt["images"]:
            content.update(str(image).encode() if isinstance(image, str | Path) else picture_content(image))
        return prompt | {"prefix_length": prefix_length, "prefix": content.hexdigest(), "place": f"evaluation row {index}"}


class _PromptCollator:
    """Collates prompts into a left-padded batch that contains every distinct prefix once.

    Parameters
    ----------
    max_shared_length : int
        Length in tokens of the longest prompt whose prefix may be computed separately: LongRoPE rotates longer prompts
        differently. 0 turns sharing off.
    """

    def __init__(self, processor: Phi3VProcessor, max_shared_length: int) -> None:
        self.num_crops = processor.image_processor.num_crops
        self.pad_token_id = processor.tokenizer.pad_token_id
        self.max_shared_length = max_shared_length

    def __call__(self, prompts: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if max(len(prompt["input_ids"]) for prompt in prompts) > self.max_shared_length:
            return self._pad([prompt["input_ids"] for prompt in prompts]) | self._images(prompts)
        distinct = {prompt["prefix"]: prompt for prompt in prompts}
        numbers = {prefix: number for number, prefix in enumerate(distinct)}
        rows = torch.tensor([numbers[prompt["prefix"]] for prompt in prompts])
        prefixes = self._pad([prompt["input_ids"][: prompt["prefix_length"]] for prompt in distinct.values()])
        rest = self._pad([prompt["input_ids"][prompt["prefix_length"] :] for prompt in prompts])
        whole = {name: torch.cat([prefixes[name][rows], rest[name]], dim=1) for name in rest}
        prefixes = {f"prefix_{name}": tensor for name, tensor in prefixes.items()}
        return whole | prefixes | {"prefix_rows": rows} | self._images(distinct.values())

    def _pad(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        return pad_rows(rows, self.pad_token_id, "left")

    def _images(self, prompts: Iterable[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [image for prompt in prompts for image in prompt["images"]]
        places = [prompt["place"] for prompt in prompts for _ in prompt["images"]]
        if not images:
            return {}
        return dict(zip(("pixel_values", "image_sizes"), load_crops(images, self.num_crops, places), strict=True))


def batches_by_length(
    lengths: Sequence[int],
    batch_size: int,
    rank: int,
    world_size: int,
    same_number: bool = False,
    prefixes: Sequence[str] | None = None,
) -> list[list[int]]:
    """Return the batches of one process.

    Prompts of similar length share a batch; the longest come first. Batches are assigned to the processes in turn.

    Parameters
    ----------
    same_number : bool
        Give every process the same number of batches, by repeating the last batch if necessary.
    prefixes : sequence of str, optional
        Identifies the prefix of each prompt. Prompts with the same prefix are kept together.

    Returns
    -------
    list of list of int
        Indices. Every index occurs on one process; with ``same_number`` it may be repeated.
    """
    groups: dict[Any, list[int]] = {}
    for index, prefix in enumerate(range(len(lengths)) if prefixes is None else prefixes):
        groups.setdefault(prefix, []).append(index)
    for group in groups.values():
        group.sort(key=lambda index: -lengths[index])
    order = [index for group in sorted(groups.values(), key=lambda group: -lengths[group[0]]) for index in group]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if same_number:
        batches += [batches[-1]] * (-len(batches) % world_size)
    return batches[rank::world_size]


def answer_limit(longest: int) -> int:
    """Return the default of ``--max_new_tokens`` for reference answers of at most ``longest`` tokens."""
    return max(MIN_ANSWER_LIMIT, longest)


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    processor: Phi3VProcessor,
    conversations: Sequence[Conversation],
    settings: Answering | argparse.Namespace,
) -> list[str]:
    """Generate the answer to the last turn of each conversation, greedily.

    Parameters
    ----------
    model : torch.nn.Module
        The model, not wrapped by DDP or DeepSpeed.
    conversations : sequence of dict
        See :mod:`common.data.conversations`; the answer to the last turn is ignored.
    settings : Answering or argparse.Namespace
        The script's flags, for example.

    Returns
    -------
    list of str
        Answers without control tokens, in the order of ``conversations``, on every process.
    """
    answers, _ = generate_with_log_probabilities(model, processor, conversations, (), settings)
    return answers


@torch.no_grad()
def generate_with_log_probabilities(
    model: nn.Module,
    processor: Phi3VProcessor,
    conversations: Sequence[Conversation],
    candidates: Sequence[str],
    settings: Answering | argparse.Namespace,
    generate: bool = True,
) -> tuple[list[str], np.ndarray]:
    """Generate the answer to the last turn of each conversation, and compute the log-probabilities of given answers.

    The prefix of each prompt, including its images, is computed once for both.

    Parameters
    ----------
    model, processor, conversations, settings
        See :func:`generate_answers`.
    candidates : sequence of str
        Complete answers whose log-probabilities are computed, the same for all conversations.
    generate : bool
        If False, only the log-probabilities are computed.

    Returns
    -------
    answers : list of str
        As returned by :func:`generate_answers`; empty without ``generate``.
    log_probabilities : numpy.ndarray
        float64 (conversations, candidates), summed over the tokens of each answer, in the order of ``conversations``, on every
        process.

    Raises
    ------
    Interrupted
        On all processes, if a signal ends the training that this is part of.
    """
    candidate_ids = [
        torch.tensor(processor.tokenizer(candidate, add_special_tokens=False).input_ids, dtype=torch.long)
        for candidate in candidates
    ]
    limit = settings.max_new_tokens or answer_limit(longest_answer(conversations, processor))
    max_tokens = max([limit if generate else 0, *map(len, candidate_ids)])
    base = base_model(model)
    results: dict[int, tuple[str, list[float]]] = {}
    with _evaluating(model):
        for indices, batch in _prompt_batches(base, processor, conversations, settings, max_tokens):
            if interrupted():
                break
            prompts = _prefill(base, batch)
            columns = [_answer_log_probabilities(base, prompts, ids.to(base.device)) for ids in candidate_ids]
            rows = torch.stack(columns, dim=1).double().tolist() if columns else [[]] * len(indices)
            texts = _generate(base, processor, prompts, limit) if generate else [""] * len(indices)
            results.update(zip(indices, zip(texts, rows, strict=True), strict=True))
    raise_if_interrupted()
    answers, log_probabilities = zip(*_gather_by_index(results), strict=True)
    return list(answers) if generate else [], np.array(log_probabilities)


def _generate(base: Phi3VForCausalLM, processor: Phi3VProcessor, prompts: dict[str, Any], max_new_tokens: int) -> list[str]:
    """Generate the answers to a batch of prompts."""
    stops = stop_token_ids(processor)
    if "past_key_values" in prompts:
        answers = _continue_answers(base, **prompts, max_new_tokens=max_new_tokens, stops=stops)
    else:
        options = {"do_sample": False, "eos_token_id": stops, "pad_token_id": processor.tokenizer.pad_token_id}
        whole: Any = base.generate(  # type: ignore[misc]  # typed for a protocol
            **prompts, past_key_values=new_cache(), max_new_tokens=max_new_tokens, **options
        )
        answers = whole[:, prompts["input_ids"].shape[1] :].tolist()
    control = control_token_ids(processor)
    return processor.tokenizer.batch_decode([[token for token in answer if token not in control] for answer in answers])


def _continue_answers(
    base: Phi3VForCausalLM,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    past_key_values: Cache,
    max_new_tokens: int,
    stops: list[int],
) -> list[list[int]]:
    """Generate answers to prompts whose prefixes are cached. Finished answers are removed from the batch."""
    answers: list[list[int]] = [[] for _ in input_ids]
    unfinished = list(range(len(answers)))
    new = input_ids[:, past_key_values.get_seq_length() :]
    for _ in range(max_new_tokens):
        logits = base(
            input_ids=new,
            attention_mask=attention_mask,
            position_ids=_positions(attention_mask)[:, -new.shape[1] :],
            past_key_values=past_key_values,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        new = logits[:, -1:].argmax(-1)
        left = []
        for row, (prompt, [token]) in enumerate(zip(unfinished, new.tolist(), strict=True)):
            if not answers[prompt] or answers[prompt][-1] not in stops:
                answers[prompt].append(token)
                left += [row] * (token not in stops)
        if not left:
            break
        if len(left) <= COMPACT_BELOW * len(unfinished):
            rows = torch.tensor(left, device=new.device)
            past_key_values.batch_select_indices(rows)
            new, attention_mask, unfinished = new[rows], attention_mask[rows], [unfinished[row] for row in left]
        attention_mask = torch.cat([attention_mask, torch.ones_like(new)], dim=1)
    return answers


def _answer_log_probabilities(base: Phi3VForCausalLM, prompts: dict[str, Any], answer: torch.Tensor) -> torch.Tensor:
    """Compute the log-probability, float32 (prompts,), of an answer, int64 (tokens,), after each prompt."""
    mask, cache = prompts["attention_mask"], prompts.get("past_key_values")
    answers = answer.expand(len(mask), -1)
    mask = torch.cat([mask, torch.ones_like(answers)], dim=1)
    cached = cache.get_seq_length() if cache else 0
    logits = base(
        **prompts
        | {
            "input_ids": torch.cat([prompts["input_ids"], answers], dim=1)[:, cached:],
            "attention_mask": mask,
            "position_ids": _positions(mask)[:, cached:],
        },
        use_cache=cache is not None,
        logits_to_keep=len(answer) + 1,
    ).logits[:, :-1]
    if cache:
        cache.crop(cached - cache.get_seq_length())
    log_probabilities = logits.float().log_softmax(-1)
    return log_probabilities.gather(2, answers[..., None]).sum((1, 2))


def _prefill(base: Phi3VForCausalLM, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Prefill each distinct prefix once; return the prompts with the cache.

    Questions about the same image share its prefill, which is nearly all of the computation for a prompt.
    """
    if "prefix_rows" not in batch:
        return batch
    names = ("prefix_rows", "prefix_input_ids", "prefix_attention_mask", "pixel_values", "image_sizes")
    prefix = {name.removeprefix("prefix_"): batch.pop(name) for name in names if name in batch}
    rows, positions = prefix.pop("rows"), _positions(prefix["attention_mask"])
    cache = base(**prefix, position_ids=positions, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_select_indices(rows)
    return batch | {"past_key_values": cache}


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Return positions counted from the start of each prompt, so that padding does not change the result."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    base, was_training = base_model(model), model.training
    attention = base.config._attn_implementation
    # For every token, flash attention would remove the padding from the whole cache of each layer.
    switch = attention.startswith("flash_attention")
    model.eval()
    if switch:
        base.set_attn_implementation({"": "sdpa"})
    try:
        # Compiled layers would be recompiled as the cache grows.
        with autocast(model, base.dtype == torch.bfloat16), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        if switch:
            base.set_attn_implementation({"": attention})
        model.train(was_training)


def _prompt_batches(
    base: Phi3VForCausalLM,
    processor: Phi3VProcessor,
    conversations: Sequence[Conversation],
    settings: Answering | argparse.Namespace,
    max_new_tokens: int,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield this process's share of the prompts: indices, and left-padded batches on the model's device."""
    prompts = _Prompts(conversations, processor)
    share = ((index, prompts[index]) for index in range(rank(), len(prompts), world_size()))
    encoded = _gather_by_index({index: (len(prompt["input_ids"]), prompt["prefix"]) for index, prompt in share})
    lengths, prefixes = zip(*encoded, strict=True)
    # ZeRO-3 gathers the weights of each layer collectively, so all processes need the same number of batches.
    same_number = is_deepspeed_zero3_enabled()
    batches = batches_by_length(lengths, settings.eval_batch_size, rank(), world_size(), same_number, prefixes)
    max_shared_length = 0 if same_number else base.model.rotary_emb.limit - max_new_tokens
    loader = WorkerLoader(
        prompts,
        batch_sampler=batches,
        collate_fn=_PromptCollator(processor, max_shared_length),
        num_workers=min(settings.dataloader_num_workers, len(batches)),
    )
    with Progress("Answering", "samples", len(lengths), settings.tqdm, shared=True) as progress:
        for indices, batch in zip(batches, loader, strict=True):
            yield indices, {name: tensor.to(base.device) for name, tensor in batch.items()}
            progress.update(len(indices))


def _gather_by_index(results: dict[int, T]) -> list[T]:
    """Merge the results of all processes, by index."""
    merged = {index: result for share in gather(results) for index, result in share.items()}
    return [merged[index] for index in range(len(merged))]
