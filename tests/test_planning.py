"""Planned batches: every row once per epoch, exact batch sizes, balanced processes, token budgets."""

import argparse
import dataclasses

import numpy as np
import pytest
import torch
from runs import save_checkpoint

from common.arguments import Setup
from common.data import loader as loader_module
from common.data.batches import Lengths, PlannedBatches, accumulation_for_budget, best_fit, epoch_steps, fill_bins
from common.data.rows import Rows
from common.data.samples import TrainingData
from common.data.streaming import Span, Stream, StreamedBatches
from common.evaluation.generation import batches_by_length
from common.training.memory import USABLE_SHARE, Footprint, Trial, least_recomputation
from common.training.plan import plan_batches
from common.training.start import _limit_micro_batches
from common.training.trainer import FinetuningTrainer


def lengths(rows, seed=0):
    random = np.random.default_rng(seed)
    return Lengths(tokens=random.integers(300, 3000, rows), views=random.integers(2, 18, rows))


def mixed_lengths(rows, seed):
    """Images of 1 to 16 crops with some text, and text alone."""
    random = np.random.default_rng(seed)
    crops, text = random.integers(1, 17, rows), random.integers(20, 200, rows)
    pictures = random.random(rows) < 0.7
    return Lengths(tokens=np.where(pictures, 144 * (crops + 1) + text, 5 * text), views=np.where(pictures, crops + 1, 0))


def part(measured, rows):
    return Lengths(tokens=measured.tokens[rows], views=measured.views[rows])


def plan(rows, batch_size, world_size, accumulation, epoch=0, measured=None, max_tokens=None):
    """Keys per step, process and micro-batch."""
    processes = []
    for rank in range(world_size):
        measure = (lambda _, rows: part(measured, rows)) if measured is not None else None
        batches = PlannedBatches(rows, batch_size, 7, rank, world_size, accumulation, measure, max_tokens)
        batches.set_epoch(epoch)
        own = list(batches)
        assert len(own) == len(batches)
        processes.append(own)
    steps = len(processes[0]) // accumulation
    return [[own[step * accumulation : (step + 1) * accumulation] for own in processes] for step in range(steps)]


@pytest.mark.parametrize("packing", [True, False])
def test_every_step_has_the_batch_size(packing):
    for epoch in range(2):
        taken = []
        for processes in plan(83, 16, 4, 2, epoch, lengths(83) if packing else None):
            keys = [key for own in processes for batch in own for key in batch]
            assert len(keys) == len(set(keys)) == 16
            assert all(batch for own in processes for batch in own)
            taken += keys
        assert len(taken) == 6 * 16 and set(taken) == {(epoch, row) for row in range(83)}


def test_steps_do_not_depend_on_processes_or_accumulation():
    for world_size, accumulation in ((1, 8), (8, 1), (2, 4)):
        steps = plan(40, 8, world_size, accumulation)
        rows = [sorted(row for own in step for batch in own for _, row in batch) for step in steps]
        assert rows == [sorted(step.tolist()) for step in epoch_steps(40, 8, 7, 0)]


@pytest.mark.parametrize("budget", [None, 9000])
def test_tokens_and_crops_are_balanced(budget):
    """Each of the two, on samples of which some are mostly images and some only text."""
    measured = mixed_lengths(640, 3)
    accumulation = accumulation_for_budget([measured], 64, 7, 8, budget) if budget else 2
    for sizes, most in ((measured.tokens, 1.2), (measured.views, 1.3)):

        def ratio(measured, sizes=sizes):
            """The largest share of a process, relative to the mean, averaged over the steps."""
            steps = plan(640, 64, 8, accumulation, measured=measured, max_tokens=budget)
            shares = np.array([[sum(sizes[row] for batch in own for _, row in batch) for own in step] for step in steps])
            return (shares.max(1) / shares.mean(1)).mean()

        assert ratio(measured) < min(most, ratio(None))


def test_a_crop_counts_less_with_a_frozen_tower():
    measured = Lengths(tokens=np.array([100, 200]), views=np.array([2, 0]))
    assert measured.work().tolist() == [190, 200]
    assert measured.work(vision_trains=False).tolist() == [130, 200]


@pytest.mark.parametrize("budget", [2000, 3100, 4096, 8192])
@pytest.mark.parametrize("seed", range(2))
def test_the_token_budget_holds(budget, seed):
    """Also where only best fit finds a solution, where single samples exceed it, and in epochs of other lengths."""
    epochs = [lengths(320, seed), lengths(320, 100 + seed)]
    accumulation = accumulation_for_budget(epochs, 32, 7, 4, budget)
    for epoch, measured in enumerate(epochs):
        for processes in plan(320, 32, 4, accumulation, epoch, measured, budget):
            batches = [[row for _, row in batch] for own in processes for batch in own]
            assert sum(map(len, batches)) == 32 and all(batches)
            assert all(measured.tokens[batch].sum() <= budget or len(batch) == 1 for batch in batches)


@pytest.mark.parametrize("packing, budget", [(False, None), (True, None), (True, 2000), (True, 4096), (True, 20_000)])
@pytest.mark.parametrize("seed", range(2))
def test_no_micro_batch_is_larger_than_predicted(packing, budget, seed):
    measured = mixed_lengths(320, seed)
    accumulation = accumulation_for_budget([measured], 32, 7, 4, budget) if budget else 4
    batches = PlannedBatches(320, 32, 7, 0, 4, accumulation, max_tokens=budget)
    tokens, views = batches.largest(measured)
    planned = plan(320, 32, 4, accumulation, measured=measured if packing else None, max_tokens=budget)
    bins = [[row for _, row in batch] for step in planned for own in step for batch in own]
    largest = max(measured.tokens[rows].sum() for rows in bins), max(measured.views[rows].sum() for rows in bins)
    assert largest[0] <= tokens <= 2 * largest[0]
    assert largest[1] <= views <= 2.5 * largest[1]
    if budget:
        assert tokens <= max(budget, measured.tokens.max())


def test_streamed_micro_batches_are_as_large_as_the_largest_samples():
    stream = Stream([Span("shard", 0, 0, 0, 0, 64)], read=lambda span: iter(()))
    measured = Lengths(tokens=np.array([300, 900, 500]), views=np.array([9, 2, 3]))
    assert StreamedBatches(stream, 16, 4, seed=0).largest(measured) == (3600, 36)


class Texts(TrainingData):
    """Rows with a long one that a look at some rows misses."""

    def __init__(self, rows):
        super().__init__(Rows(range(rows), str), None, None, seed=0)

    def _measure(self, epoch, rows):
        tokens = np.where(rows == 1, 1000, 100 + rows % 7) + epoch
        return np.stack([tokens, np.ones_like(tokens)], axis=1), np.ones(len(rows), dtype=bool)


SETUP = Setup(torch.device("cpu"), "fp32", "varlen", packing=True)


def plan_of(trial=None, setup=SETUP, **changes):
    flags = {"batch_size": 16, "num_train_epochs": 2, "max_steps": -1, "seed": 0, "tqdm": False, "streaming": False}
    flags |= {"gradient_checkpointing": "auto", "fused_layers": True, "torch_compile": False, "on_bad_sample": "raise"}
    flags |= {"freeze_vision_model": False, "train_only": None, "train_fully": ()}
    flops = argparse.Namespace(count=lambda sizes: (sizes.tokens, 2 * sizes.tokens))
    setup = dataclasses.replace(setup, batch_size_per_gpu=4, max_tokens_per_batch=changes.pop("max_tokens_per_batch", None))
    return plan_batches(argparse.Namespace(**flags | changes), setup, Texts(1024), flops, lambda: trial)


@pytest.mark.parametrize("budget, longest", [(None, 106), (3000, 1001)])
def test_with_a_token_budget_all_lengths_are_measured(budget, longest):
    batches, measured = plan_of(max_tokens_per_batch=budget)
    assert measured.tokens.max() == longest
    assert len(measured.tokens) == len(measured.views) == (2 * 1024 if budget else 256)
    assert batches.accumulation == (1 if budget else 4)
    assert batches.vision_trains
    for frozen in ({"freeze_vision_model": True}, {"train_only": ["decoder", "projector"]}):
        assert not plan_of(max_tokens_per_batch=budget, **frozen)[0].vision_trains


@pytest.mark.parametrize("free, fits", [(10_000, 0), (100_000, 1), (200_000, 1), (10**7, 1)])
def test_the_budget_follows_the_memory(free, fits, tmp_path):
    """A pretend GPU: a token keeps 100 bytes, 10 with full recomputation, of which a step has up to 2,600 tokens."""
    footprints = [Footprint(0, size, 0) for size in (100, 70, 10)]
    trial = Trial(*footprints, num_layers=10, states=1000, step=0, free=free, flops_per_second=1e9, launching=1e-6)
    batches, measured = plan_of(trial, max_tokens_per_batch="auto")
    if not fits:  # the longest sample: one micro-batch as --batch_size_per_gpu says
        assert batches.max_tokens is None and batches.accumulation == 4
        return
    mode = least_recomputation(trial, *batches.largest(measured))
    assert trial.needed(mode, *batches.largest(measured)) <= USABLE_SHARE * free
    for epoch in range(2):
        batches.set_epoch(epoch)
        taken = [[row for _, row in keys] for keys in batches]
        assert sorted(sum(taken, [])) == list(range(1024)) and len(taken) == 64 * batches.accumulation
        tokens = Texts(1024).measure(epoch, np.arange(1024)).tokens
        assert all(tokens[rows].sum() <= batches.max_tokens for rows in taken)
    # Resumed, it goes on with the budget of its checkpoint if it fits.
    for saved, expected in ((1500, 1500), (10**9, batches.max_tokens), (None, batches.max_tokens)):
        save_checkpoint(tmp_path / "checkpoint-0", max_tokens_per_batch=saved)
        resumed = dataclasses.replace(SETUP, checkpoint=tmp_path / "checkpoint-0")
        assert plan_of(trial, resumed, max_tokens_per_batch="auto")[0].max_tokens == expected


@pytest.mark.parametrize(
    ("samples", "max_tokens", "may_choose", "stage", "expected"),
    [
        (None, None, True, 2, (1, "auto")),
        (None, None, True, 3, (1, None)),  # no trial is possible
        (None, None, False, None, (1, None)),  # on a CPU, padded, or streaming
        (1, None, True, None, (1, None)),
        (None, 5000, True, None, (1, 5000)),
    ],
)
def test_several_samples_at_once_are_the_default_on_a_gpu(samples, max_tokens, may_choose, stage, expected):
    assert _limit_micro_batches(samples, max_tokens, may_choose, stage) == expected


@pytest.mark.parametrize("workers, accumulation, expected", [(2, 1, 2), (2, 65, 33), (1, 64, 64), (0, 64, None)])
def test_workers_prefetch_all_micro_batches_of_a_step(workers, accumulation, expected, monkeypatch):
    monkeypatch.setattr(loader_module, "cores_per_process", lambda: 2)
    asked = argparse.Namespace(dataloader_num_workers=workers), argparse.Namespace(ddp_timeout=60)
    trainer = argparse.Namespace(args=asked[0], flags=asked[1], data_collator=list)
    loader = FinetuningTrainer._loader(trainer, [1, 2], [[0], [1]], ahead=accumulation)
    assert loader.prefetch_factor == expected


def test_image_sizes_stay_on_the_cpu():
    batch = {"input_ids": torch.ones(1, 2), "image_sizes": torch.ones(1, 2), "max_length_q": 2}
    trainer = argparse.Namespace(args=argparse.Namespace(device=torch.device("meta")))
    moved = FinetuningTrainer._prepare_inputs(trainer, batch)
    assert moved["input_ids"].device.type == "meta" and moved["image_sizes"].device.type == "cpu"
    assert moved["max_length_q"] == 2


def test_a_sample_over_the_budget_is_alone():
    tokens = np.array([9000, 100, 100, 100, 100])
    bins = fill_bins(tokens, tokens.astype(float), 2, budget=1000)
    assert [0] in bins and sorted(sum(bins, [])) == [0, 1, 2, 3, 4]
    assert best_fit(np.array([[9000, 100, 100], [600, 300, 500]]), 1000).tolist() == [[0, 1, 1], [0, 0, 1]]


def test_a_sample_goes_where_it_leaves_the_least_room():
    tokens = lengths(800).tokens.reshape(50, 16)
    for found, sizes in zip(best_fit(tokens, 3500), tokens, strict=True):
        free = []
        for sample in np.argsort(-sizes, kind="stable"):
            fitting = [index for index, room in enumerate(free) if room >= sizes[sample]]
            if not fitting:
                fitting = [len(free)]
                free.append(3500)
            assert found[sample] == min(fitting, key=free.__getitem__)
            free[found[sample]] -= sizes[sample]


def test_shares_of_an_evaluation_are_complete():
    sizes = np.random.default_rng(1).integers(10, 500, 53)
    for world_size in (1, 2, 3):
        shares = [batches_by_length(sizes, 8, rank, world_size) for rank in range(world_size)]
        taken = [index for share in shares for batch in share for index in batch]
        assert sorted(taken) == list(range(53))
    shares = [batches_by_length(sizes, 8, rank, 4, same_number=True) for rank in range(4)]
    assert len({len(share) for share in shares}) == 1
