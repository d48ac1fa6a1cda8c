"""Batched greedy generation and answer probabilities over all processes, with results in the order of the data set."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .collator import Collator
from .conversations import Conversation, encode_prompt
from .model import base_model, stop_token_ids
from .phi3v import Phi3VForCausalLM, Phi3VProcessor
from .progress import track

T = TypeVar("T")


class _Prompts(Dataset):
    def __init__(self, conversations: Sequence[Conversation], processor: Phi3VProcessor) -> None:
        self.conversations = conversations
        self.processor = processor

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return encode_prompt(self.conversations[index], self.processor)
        except ValueError as error:
            raise ValueError(f"evaluation row {index}: {error}") from None


def share_by_length(
    lengths: Sequence[int], batch_size: int, rank: int, world_size: int, in_step: bool = False
) -> list[list[int]]:
    """Batches of one process: prompts of like length together, longest first, dealt to the processes in turn.

    Parameters
    ----------
    in_step : bool
        Give every process as many batches, the last ones a second time if need be.

    Returns
    -------
    list of list of int
        Indices. Over all processes every index occurs (without ``in_step`` once).
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if in_step:
        batches += [batches[-1]] * (-len(batches) % world_size)
    return batches[rank::world_size]


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    processor: Phi3VProcessor,
    conversations: Sequence[Conversation],
    args: argparse.Namespace,
) -> list[str]:
    """Answer the last turn of each conversation, greedily.

    Parameters
    ----------
    model : torch.nn.Module
        Not wrapped by DDP or DeepSpeed.
    conversations : sequence of dict
        See :mod:`common.conversations`; the answer to the last turn is ignored.
    args : argparse.Namespace
        ``eval_batch_size``, ``max_new_tokens``, ``dataloader_num_workers``, ``bf16``, ``tqdm``.

    Returns
    -------
    list of str
        Answers without special tokens, in the order of ``conversations``, on every process.
    """
    answers = {}
    with _evaluating(model, args):
        for indices, batch in _prompt_batches(model, processor, conversations, args):
            generated = model.generate(
                **batch,
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
                eos_token_id=stop_token_ids(processor),
                pad_token_id=processor.tokenizer.pad_token_id,
            )
            texts = processor.tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            answers.update(zip(indices, texts, strict=True))
    return _gather_results(answers)


@torch.no_grad()
def answer_log_probabilities(
    model: nn.Module,
    processor: Phi3VProcessor,
    conversations: Sequence[Conversation],
    answers: Sequence[str],
    args: argparse.Namespace,
) -> np.ndarray:
    """Log-probability of each of some whole answers to the last turn of each conversation, teacher-forced.

    Parameters
    ----------
    model, processor, conversations, args
        As for :func:`generate_answers`.
    answers : sequence of str
        Answers to compare, the same for all conversations.

    Returns
    -------
    numpy.ndarray
        float64 (conversations, answers), sums over an answer's tokens, in the order of ``conversations``, on every process.
    """
    answer_ids = [torch.tensor(ids) for ids in processor.tokenizer(list(answers), add_special_tokens=False).input_ids]
    base = base_model(model)
    results = {}
    with _evaluating(model, args):
        for indices, batch in _prompt_batches(model, processor, conversations, args):
            mask = batch.pop("attention_mask")
            prompts = base.model.embed(**batch)  # once: the tower has as much work as the decoder
            columns = [_answer_log_probabilities(base, prompts, mask, ids.to(mask.device)) for ids in answer_ids]
            results.update(zip(indices, torch.stack(columns, dim=1).double().tolist(), strict=True))
    return np.array(_gather_results(results))


def _answer_log_probabilities(
    base: Phi3VForCausalLM, prompts: torch.Tensor, mask: torch.Tensor, answer: torch.Tensor
) -> torch.Tensor:
    """Log-probability of one answer, int64 (tokens,), after each of some embedded, left-padded prompts; (prompts,)."""
    count = len(prompts)
    answers = base.model.embed(answer.expand(count, -1)).to(prompts.dtype)
    mask = torch.cat([mask, mask.new_ones(answers.shape[:2])], dim=1)
    logits = base(
        inputs_embeds=torch.cat([prompts, answers], dim=1),
        attention_mask=mask,
        # Counted from each prompt's own start, so that padding does not even change rounding.
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=len(answer) + 1,
    ).logits[:, :-1]
    log_probabilities = logits.float().log_softmax(-1)
    return log_probabilities.gather(2, answer.expand(count, -1)[..., None]).sum((1, 2))


def autocast(model: nn.Module, args: argparse.Namespace) -> torch.autocast:
    """Autocast as in training: to bf16 or fp16 where weights are wider, else off."""
    device = base_model(model).device
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    enabled = args.bf16 or device.type == "cuda"
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes
    ----------
    metric : str
        Name of the main figure.
    values : dict
        Figures by name, the main one among them.
    predictions : list of dict
        One a sample: ``id``, ``question``, ``prediction``, ``answers``, ``score``, and what else the task states.
    """

    metric: str
    values: dict[str, Any]
    predictions: list[dict[str, Any]]

    def __str__(self) -> str:
        figures = (f"{name} {value:.4f}" for name, value in self.values.items() if isinstance(value, float))
        return f"{', '.join(figures)} on {len(self.predictions)} samples"


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write an evaluation as JSON, whole or not at all, from the first process."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    content = {
        "metric": evaluation.metric,
        **evaluation.values,
        "samples": len(evaluation.predictions),
        "predictions": evaluation.predictions,
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


@contextmanager
def _evaluating(model: nn.Module, args: argparse.Namespace) -> Iterator[None]:
    was_training = model.training
    model.eval()
    # Compiled layers would be compiled anew for the cache's growing shapes.
    with autocast(model, args), torch.compiler.set_stance("force_eager"):
        yield
    model.train(was_training)


def _prompt_batches(
    model: nn.Module, processor: Phi3VProcessor, conversations: Sequence[Conversation], args: argparse.Namespace
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """This process's share of the prompts: indices, and left-padded batches on the model's device."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    prompts = _Prompts(conversations, processor)
    lengths = _gather_in_order([len(prompts[i]["input_ids"]) for i in range(rank, len(prompts), world_size)])
    # ZeRO-3 gathers the weights of each layer from all processes: none may have a batch more than another.
    batches = share_by_length(lengths, args.eval_batch_size, rank, world_size, in_step=is_deepspeed_zero3_enabled())
    loader = DataLoader(
        prompts,
        batch_sampler=batches,
        collate_fn=Collator(processor, padding_side="left"),
        num_workers=min(args.dataloader_num_workers, len(batches)),
    )
    device = base_model(model).device
    for indices, batch in zip(batches, track(loader, "Evaluating", "batches", args.tqdm), strict=True):
        yield indices, {name: tensor.to(device) for name, tensor in batch.items()}


def _gather_results(results: dict[int, T]) -> list[T]:
    """Put together, by index, what each process found out."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        shares: list[dict[int, T]] = [{}] * dist.get_world_size()
        dist.all_gather_object(shares, results)
        results = {index: result for share in shares for index, result in share.items()}
    return [results[index] for index in range(len(results))]


def _gather_in_order(share: list[int]) -> list[int]:
    """Put together what each process measured of items ``rank``, ``rank + world_size``, …."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return share
    shares: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(shares, share)
    merged = [0] * sum(map(len, shares))
    for index, part in enumerate(shares):
        merged[index :: len(shares)] = part
    return merged
