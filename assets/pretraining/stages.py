"""The training functions of the six stages."""

import numpy as np
import torch
import torch.nn.functional as F

from ..samples.page import LINES
from . import documents, shapes
from .batches import (
    KINDS,
    LAST_KINDS,
    batch_conversations,
    code_features,
    draw_kind,
    draw_pictures,
    draw_samples,
    image_tokens,
    merged_patches,
)
from .model import CODE_SCALE, GLYPHS, LEFT, RIGHT, ROW_END, VIEW_END, WIDTH, codebook, symbols
from .optimization import FactProbe, Progress, answer_loss, mean_over_processes, optimizers_for, step_size, take_step


def train_tower(model, processor, rng: np.random.Generator, steps: int) -> None:
    """Train tower, projector and separators so that each image token is the sum of the codes of its symbols."""
    vision = model.model.vision_embed_tokens
    codes, optimizer, progress = codebook(), optimizers_for(vision), Progress("tower", steps)
    separators = torch.stack([codes[ROW_END], codes[VIEW_END]])
    for step in range(steps):
        pages = [documents.type_specimen(rng) for _ in range(4)]
        pages += [documents.form(rng, 12, 0)[0] for _ in range(2)]
        pages += [shapes.scene(rng, 0)[0][0] for _ in range(3)] + [shapes.single(rng) for _ in range(6)]
        pages += [shapes.captioned(rng)[0][0] for _ in range(2)]
        target = torch.from_numpy(np.stack([symbols(page) for page in pages]))
        features = vision.img_projection(merged_patches(model, draw_pictures(pages, rng, processor)))
        left, right = target[..., 0] - LEFT, target[..., 1] - RIGHT
        is_shape, blank = left >= GLYPHS, (left == 0) & (right == 0)
        weight = torch.where(is_shape, 8.0, torch.where(blank, 0.3, 1.0))
        weight = weight / weight.sum()
        loss = (((features - codes[target].sum(-2)) ** 2).mean(-1) * weight).sum() / (2 * CODE_SCALE**2)
        hits = []
        for goal, table in ((left, codes[LEFT:RIGHT]), (right, codes[RIGHT:ROW_END])):
            scores = features @ table.T * (16 / (WIDTH * CODE_SCALE**2))
            loss = loss + (F.cross_entropy(scores.permute(0, 3, 1, 2), goal, reduction="none") * weight).sum()
            hits.append((scores.argmax(-1) == goal).float())
        ends = vision.img_projection(torch.stack([vision.sub_GN.flatten(), vision.glb_GN.flatten()]))
        loss = loss + ((ends - separators) ** 2).mean() / CODE_SCALE**2
        take_step(vision, optimizer, loss, step_size(step, steps, 1.5e-3))
        text = ~is_shape & ~blank
        progress.update(
            step,
            loss=loss.item(),
            characters=torch.stack(hits)[:, text].mean().item(),
            shapes=hits[0][is_shape].mean().item(),
            colours=hits[1][is_shape].mean().item(),
        )


def train_decoder(model, processor, rng: np.random.Generator, steps: int, autocast: bool) -> None:
    """Train the decoder to answer from codes, on pages that grow as its accuracy increases."""
    model.model.vision_embed_tokens.requires_grad_(False)
    codes, optimizers, progress = codebook(), optimizers_for(model), Progress("decoder", steps)
    # In each step, all processes draw the same kind and number of lines, so that none waits for longer rows of another.
    plan, lines, mastery = np.random.default_rng(0), 1, 0.0
    for step in range(steps):
        # Reading comes first, because nearly all of its tokens teach copying.
        if lines == 1:
            kind, size, drawn_lines = "reading", 8, int(plan.integers(1, 5))
        elif lines < 6 and step < 0.45 * steps:
            kind, size, drawn_lines = "form", 12 if lines < 3 else 8, int(plan.integers(max(1, lines - 3), lines + 1))
        else:
            kind, size, drawn_lines = draw_kind(plan, KINDS), 6, int(plan.integers(3, lines + 1))
        samples = draw_samples(kind, rng, size, drawn_lines)
        whole = lines >= 6 and plan.random() < (0.6 if step < 0.8 * steps else 1)
        features = code_features([page for pages, _ in samples for page in pages], codes, whole)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, first, every = answer_loss(model, *batch_conversations(model, processor, samples, features))
        take_step(model, optimizers, loss, step_size(step, steps, 2e-3))
        seen = mean_over_processes(torch.tensor(every if lines == 1 else first)).item()
        if kind in ("reading", "form"):
            mastery += 0.1 * (seen - mastery)
        if mastery > (0.85 if lines == 1 else 0.7) and lines < LINES:
            lines, mastery = lines + 1, 0.5
        progress.update(step, loss=loss.item(), lines=lines, mastery=mastery, first=first, character=every)
    model.model.vision_embed_tokens.requires_grad_(True)
    model.freeze_unused()


def train_on(stage: str, kinds: dict[str, float], count: int, model, processor, rng, steps: int, autocast: bool) -> None:
    """Continue training the decoder with codes of full pages of the given kinds."""
    model.model.vision_embed_tokens.requires_grad_(False)
    codes, progress, plan = codebook(), Progress(stage, steps), np.random.default_rng(1)
    model.probe = probe = FactProbe(model)
    optimizers = optimizers_for(model)
    for step in range(steps):
        kind, lines, whole = draw_kind(plan, kinds), int(plan.integers(6, LINES + 1)), plan.random() < 0.25
        samples = draw_samples(kind, rng, count, lines)
        features = code_features([page for pages, _ in samples for page in pages], codes, whole)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            batch = batch_conversations(model, processor, samples, features)
            loss, first, _ = answer_loss(model, *batch)
            fact_loss, facts = probe(samples, batch[-1])
        take_step(model, optimizers, loss + fact_loss, step_size(step, steps, 1.5e-3, warmup=20))
        progress.update(step, loss=loss.item(), **facts, **{name: first if name == kind else np.nan for name in kinds})
    del model.probe
    for layer in model.model.layers:
        layer._forward_hooks.clear()
    model.model.vision_embed_tokens.requires_grad_(True)
    model.freeze_unused()


def train_together(model, processor, rng: np.random.Generator, steps: int, autocast: bool) -> None:
    """Train all parameters on images."""
    train_on_pictures("together", KINDS, 6, model, processor, rng, steps, autocast)


def train_last(model, processor, rng: np.random.Generator, steps: int, autocast: bool) -> None:
    """Continue training the decoder on images, with a frozen tower."""
    model.model.vision_embed_tokens.requires_grad_(False)
    train_on_pictures("last", LAST_KINDS, 8, model, processor, rng, steps, autocast)
    model.model.vision_embed_tokens.requires_grad_(True)
    model.freeze_unused()


def train_on_pictures(stage: str, kinds: dict[str, float], count: int, model, processor, rng, steps: int, autocast) -> None:
    """Train all parameters that are not frozen on images of the given kinds."""
    vision = model.model.vision_embed_tokens
    optimizers, progress, plan = optimizers_for(model), Progress(stage, steps), np.random.default_rng(0)
    for step in range(steps):
        kind = draw_kind(plan, kinds)
        samples = draw_samples(kind, rng, count)
        pictures = draw_pictures([page for pages, _ in samples for page in pages], rng, processor)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            body = merged_patches(model, pictures)
            features = vision.img_projection(image_tokens(body, vision.sub_GN[0], vision.glb_GN))
            loss, first, _ = answer_loss(model, *batch_conversations(model, processor, samples, list(features)))
        take_step(model, optimizers, loss, step_size(step, steps, 6e-4, warmup=20, decay_from=0.3))
        progress.update(step, loss=loss.item(), **{name: first if name == kind else np.nan for name in kinds})
