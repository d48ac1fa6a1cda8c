"""Batched greedy generation over all processes, with results in the order of the data set."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .collator import Collator
from .conversations import Conversation, encode_prompt
from .model import base_model, stop_token_ids
from .phi3v import Phi3VProcessor


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


def share_by_length(lengths: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Batches of one process: prompts of like length together, longest first, dealt to the processes in turn.

    Returns
    -------
    list of list of int
        Indices. Over all processes every index occurs once.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
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
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    prompts = _Prompts(conversations, processor)
    lengths = _gather_in_order([len(prompts[i]["input_ids"]) for i in range(rank, len(prompts), world_size)])
    batches = share_by_length(lengths, args.eval_batch_size, rank, world_size)
    loader = DataLoader(
        prompts,
        batch_sampler=batches,
        collate_fn=Collator(processor, padding_side="left"),
        num_workers=min(args.dataloader_num_workers, len(batches)),
    )
    stop = stop_token_ids(processor)
    was_training = model.training
    model.eval()
    answers: dict[int, str] = {}
    with autocast(model, args):
        for indices, batch in zip(batches, _progress(loader, args, rank), strict=True):
            batch = {name: tensor.to(base_model(model).device) for name, tensor in batch.items()}
            generated = model.generate(
                **batch,
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=processor.tokenizer.pad_token_id,
            )
            texts = processor.tokenizer.batch_decode(
                generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
            answers.update(zip(indices, texts, strict=True))
    model.train(was_training)
    gathered = answers
    if world_size > 1:
        shares: list[dict[int, str]] = [{}] * world_size
        dist.all_gather_object(shares, answers)
        gathered = {index: text for share in shares for index, text in share.items()}
    return [gathered[index] for index in range(len(conversations))]


def autocast(model: nn.Module, args: argparse.Namespace) -> torch.autocast:
    """Autocast as in training: to bf16 or fp16 where weights are wider, else off."""
    device = base_model(model).device
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    enabled = args.bf16 or device.type == "cuda"
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def write_evaluation(path: Path, metric: str, values: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
    """Write an evaluation's figures and predictions as JSON, whole or not at all, from the first process.

    Parameters
    ----------
    metric : str
        Name of the main figure among ``values``.
    values : dict
        Figures by name.
    predictions : list of dict
        One a sample: ``id``, ``question``, ``prediction``, ``answers``, ``score``, and what else the task states.
    """
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    content = {"metric": metric, **values, "samples": len(predictions), "predictions": predictions}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _progress(loader: DataLoader, args: argparse.Namespace, rank: int) -> Iterator[dict[str, torch.Tensor]]:
    return tqdm(loader, desc="Evaluating", disable=not args.tqdm or rank > 0)


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
