"""Pretrain the embedded tiny Phi-3-V from nothing and write it to `assets/tiny_phi3v/`.

    python -m assets.pretrain_tiny [--output_dir DIR] [--seed N] [--bf16]

Two processes of one thread each make one run, in six stages, each of which writes the checkpoint:

1. tower: it learns which characters and shapes stand where; each image token is to become the sum of fixed codes, one a symbol.
2. decoder: it learns to answer from pages that are given to it as these very codes, which needs no pictures: first reading,
   which teaches it to copy, then small forms, then whole ones and shapes. Finding the right line is what takes the time.
3. together: both are put together and trained on pictures.
4. lookup: the decoder goes on with codes, mostly of documents.
5. shapes: and with codes of shapes, in one picture, two, and several that show motion.
6. last: the decoder goes on with what the tower sees in pictures.

The checkpoint in the repository was made with --bf16 in several runs, while this script grew: stages 1 to 4 in two runs
(101 minutes of processor time on an Intel Xeon with AMX); then, once words for colours and shapes had become tokens, stage
5 (1,250 steps), stage 1 anew (370 steps) and stage 6 (510 steps), in turns, on an AMD EPYC, about 100 minutes of processor
time (torch 2.13.0, transformers 5.23.0). What the stages drew changed a little in between. A run of the whole script as it
stands has not been made; by the steps it takes an hour and a half on two cores. At the end the answers' first characters
from the page were right for 99 % of the documents' plain questions, 33 % of those on any forms, 96 % of verdicts on two
pictures, and 99 % of titles of a motion.
"""

import argparse
import copy
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common.phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VImageProcessor, Phi3VProcessor

from .curriculum import documents, shapes
from .curriculum.documents import Turn
from .samples.page import COLOURS, LINES, SHAPES, Page

HUB_REPOSITORY = "microsoft/Phi-3.5-vision-instruct"
WIDTH = 192
PROCESSES = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# Symbols of an image token: a character in its left half and one in its right half, or a shape and its colour.
GLYPHS = 95
LEFT, RIGHT = 0, GLYPHS + len(SHAPES)
ROW_END, VIEW_END = RIGHT + GLYPHS + len(COLOURS), RIGHT + GLYPHS + len(COLOURS) + 1
CODE_SCALE = 0.35
# Words that are a token each, as the colours and shapes that they name are a symbol each; all others are read by character.
WORDS = (*SHAPES, *COLOURS)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters with the published special tokens."""
    characters = ["\n", *map(chr, range(32, 127)), *"£€¥§°·×–—‘’“”…•éèàçüöäß"]
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    vocabulary = {token: i for i, token in enumerate(special + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    # As published, <|assistant|> swallows the newline after it, so an answer follows it directly.
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, rstrip=token == "<|assistant|>") for token in special])
    tokenizer.add_tokens([AddedToken(word, normalized=False, single_word=True) for word in WORDS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
        padding_side="right",
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Phi3VConfig:
    """Return the configuration: real picture geometry, everything else small."""
    half_head = 16
    return Phi3VConfig(
        architectures=["Phi3VForCausalLM"],
        auto_map={
            "AutoConfig": f"{HUB_REPOSITORY}--configuration_phi3_v.Phi3VConfig",
            "AutoModelForCausalLM": f"{HUB_REPOSITORY}--modeling_phi3_v.Phi3VForCausalLM",
        },
        vocab_size=160,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_theta=10000.0,
        rope_scaling={
            "type": "su",
            "short_factor": [1.0] * half_head,
            "long_factor": [round(1 + 3 * (i / (half_head - 1)) ** 2, 3) for i in range(half_head)],
        },
        rms_norm_eps=1e-5,
        sliding_window=262144,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("</s>"),
        pad_token_id=tokenizer.pad_token_id,
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "num_channels": 3,
            "image_size": 336,
            "patch_size": 14,
            "hidden_act": "quick_gelu",
        },
    )


def codebook() -> torch.Tensor:
    """Return the code of every symbol, float32 (symbols, WIDTH)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(VIEW_END + 1, WIDTH, generator=generator) * CODE_SCALE


def symbols(page: Page) -> np.ndarray:
    """Return what each of a page's 12 × 12 tokens shows, int64 (12, 12, 2) of codebook rows."""
    characters = np.vectorize(ord)(page.grid()) - 32
    both = np.stack([LEFT + characters[:, 0::2], RIGHT + characters[:, 1::2]], axis=-1)
    for shape in page.shapes:
        both[shape.row, shape.column] = (
            LEFT + GLYPHS + SHAPES.index(shape.kind),
            RIGHT + GLYPHS + list(COLOURS).index(shape.colour),
        )
    return both


def step_size(step: int, steps: int, peak: float, warmup: int = 100, decay_from: float = 0.6) -> float:
    """Learning rate: a linear rise, a plateau, and a linear fall to a hundredth."""
    fall = (1 - step / steps) / (1 - decay_from)
    return peak * min((step + 1) / warmup, 1, max(fall, 0.01))


class Progress:
    """Prints means of what a stage measures."""

    def __init__(self, stage: str, steps: int, every: int = 50) -> None:
        self.stage, self.steps, self.every, self.start, self.seen = stage, steps, every, time.monotonic(), []

    def update(self, step: int, **figures: float) -> None:
        self.seen.append(figures)
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            if dist.is_initialized() and dist.get_rank() > 0:
                return
            means = "  ".join(f"{key} {np.nanmean([row[key] for row in self.seen] + [np.nan]):.3f}" for key in figures)
            print(f"{self.stage} {step + 1}/{self.steps}  {time.monotonic() - self.start:.0f} s  {means}", flush=True)
            self.seen = []


def draw_pictures(pages: list[Page], rng: np.random.Generator, processor: Phi3VProcessor) -> torch.Tensor:
    """Draw pages as the model's input, float32 (pages, 3, 336, 336). One crop is its own global view."""
    images: list[Image.Image] = [page.draw(rng) for page in pages]
    return processor.image_processor(images)["pixel_values"][:, 0]


def merged_patches(model: Phi3VForCausalLM, pictures: torch.Tensor) -> torch.Tensor:
    """Run the tower: (pages, 3, 336, 336) to (pages, 12, 12, 4 × its width)."""
    features = model.model.vision_embed_tokens.tower(pictures)
    features = features.reshape(len(pictures), 12, 2, 12, 2, -1).transpose(2, 3)
    return features.reshape(len(pictures), 12, 12, -1)


def image_tokens(body: torch.Tensor, row_end: torch.Tensor, view_end: torch.Tensor) -> torch.Tensor:
    """Lay out a page as an image of one crop: (pages, 12, 12, width) to (pages, 313, width)."""
    pages, _, _, width = body.shape
    view = torch.cat([body, row_end.expand(pages, 12, 1, width)], dim=2).reshape(pages, 156, width)
    return torch.cat([view, view_end.expand(pages, 1, width), view], dim=1)


def encode(processor: Phi3VProcessor, tokens_per_image: list[int], turns: list[Turn], first_weight: float):
    """Return a conversation's ids, labels and loss weights, as lists."""
    tokenizer = processor.tokenizer
    tags = "".join(f"<|image_{i + 1}|>" for i in range(len(tokens_per_image)))
    ids, labels, weights = [], [], []
    for i, turn in enumerate(turns):
        if i == 0:
            prompt = processor.tokenize(f"<|user|>\n{tags}\n{turn.question}<|end|>\n<|assistant|>\n", tokens_per_image)
        else:
            text = f"<|user|>\n{turn.question}<|end|>\n<|assistant|>\n"
            prompt = tokenizer(text, add_special_tokens=False).input_ids
        ending = "<|end|>\n<|endoftext|>" if i + 1 == len(turns) else "<|end|>\n"
        reply = tokenizer(turn.answer + ending, add_special_tokens=False).input_ids
        ids += prompt + reply
        labels += [-100] * len(prompt) + reply
        weights += [0.0] * len(prompt) + [1.0] * len(reply)
        weights[len(weights) - len(reply) + turn.quote_start] = first_weight
    return ids, labels, weights


def answer_loss(model, embeddings: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor):
    """Return the weighted loss and the shares of right first characters and right characters."""
    # Padding stands on the right, where a causal decoder never looks back from, so no mask is needed.
    hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[:, :-1]
    labels, weights = labels[:, 1:], weights[:, 1:]
    supervised = labels >= 0
    logits = model.lm_head(hidden[supervised]).float()
    labels, weights = labels[supervised], weights[supervised]
    loss = (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
    right = (logits.argmax(-1) == labels).float()
    return loss, right[weights > 1].mean().item(), right.mean().item()


def batch_conversations(model, processor, samples, features: list[torch.Tensor], first_weight: float = 6.0):
    """Embed conversations with their pages' features in place, padded on the right."""
    rows, start = [], 0
    for pages, turns in samples:
        rows.append(encode(processor, [len(f) for f in features[start : start + len(pages)]], turns, first_weight))
        start += len(pages)
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(row[0]) for row in rows], batch_first=True, padding_value=processor.tokenizer.pad_token_id)
    labels = pad([torch.tensor(row[1]) for row in rows], batch_first=True, padding_value=-100)
    weights = pad([torch.tensor(row[2]) for row in rows], batch_first=True)
    embeddings = model.model.embed_tokens(ids.clamp(min=0))
    placeholders = torch.nonzero(ids < 0, as_tuple=True)
    return embeddings.index_put(placeholders, torch.cat(features).to(embeddings.dtype)), labels, weights


# Shares of what whole pages are drawn for: forms of the sample's kind and any others, lines to read, shapes in one picture
# and two, statements to judge, words about a shape, motion.
KINDS = {"invoice": 0.3, "form": 0.15, "reading": 0.03, "scene": 0.06, "pair": 0.03, "judged": 0.07, "judged_pair": 0.16}
KINDS |= {"captioned": 0.1, "motion": 0.1}
LOOKUP_KINDS = {"invoice": 0.45, "form": 0.25, "scene": 0.06, "pair": 0.11, "captioned": 0.07, "motion": 0.06}
SHAPE_KINDS = {"invoice": 0.14, "form": 0.04, "scene": 0.04, "judged": 0.1, "judged_pair": 0.4, "captioned": 0.12}
SHAPE_KINDS |= {"motion": 0.16}
LAST_KINDS = {"invoice": 0.26, "form": 0.04, "scene": 0.14, "judged": 0.06, "judged_pair": 0.38, "captioned": 0.04}
LAST_KINDS |= {"motion": 0.08}


def draw_kind(plan: np.random.Generator, kinds: dict[str, float]) -> str:
    """Choose what the next batch is about."""
    return str(plan.choice(list(kinds), p=list(kinds.values())))


def draw_samples(kind: str, rng: np.random.Generator, count: int, lines: int = LINES) -> list[tuple[list[Page], list[Turn]]]:
    """Draw about `count` conversations of one kind, fewer where they have several pictures."""
    if kind == "pair":
        return [shapes.pair(rng, 5) for _ in range(count * 5 // 8)]
    if kind == "judged":
        return [shapes.judged(rng, 1, 10) for _ in range(count)]
    if kind == "judged_pair":
        return [shapes.judged(rng, 2, 8) for _ in range(count * 5 // 8)]
    if kind == "motion":
        return [shapes.motion(rng) for _ in range(count // 2)]
    if kind == "scene":
        return [shapes.scene(rng, 5) for _ in range(count)]
    if kind == "captioned":
        return [shapes.captioned(rng) for _ in range(count)]
    if kind == "reading":
        drawn = (documents.reading(rng, min(lines, 4)) for _ in range(count))
    elif kind == "invoice":
        drawn = (documents.invoice(rng, 6) for _ in range(count))
    else:
        drawn = (documents.form(rng, lines, 5) for _ in range(count))
    return [([page], turns) for page, turns in drawn if turns]


def optimizers_for(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the decoder layers' matrices, which find copying several times sooner with it, and AdamW for the rest."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if name.startswith("model.layers.") and p.ndim == 2]
    others = [p for name, p in trained.items() if not (name.startswith("model.layers.") and p.ndim == 2)]
    optimizers = [torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.01, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Average a tensor over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def take_step(model, optimizers, loss: torch.Tensor, rate: float) -> None:
    """Make one step with the gradient of all processes."""
    model.zero_grad()
    loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    mean = mean_over_processes(torch.cat([g.flatten() for g in gradients]))
    for parameter, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


def train_tower(model, processor, rng: np.random.Generator, steps: int) -> None:
    """Teach tower, projection and separators to give each token of a picture the sum of its symbols' codes."""
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


def code_features(pages: list[Page], codes: torch.Tensor, whole: bool) -> list[torch.Tensor]:
    """Give pages as the codes of what stands on them: (tokens, WIDTH) each, with noise for what the tower will get wrong.

    Unless `whole`, a page is its global view alone, cut below its last line: short rows are cheap.
    """
    features = []
    for page in pages:
        body = codes[torch.from_numpy(symbols(page))].sum(-2)[None]
        tokens = image_tokens(body, codes[ROW_END], codes[VIEW_END])[0]
        used = LINES if page.shapes else max(line for line, _, _ in page.texts) + 1
        features.append(tokens if whole else tokens[157 : 157 + 13 * used])
    return [f + 0.05 * torch.randn_like(f) for f in features]


def train_decoder(model, processor, rng: np.random.Generator, steps: int, autocast: bool) -> None:
    """Teach the decoder to answer from codes, on pages that grow as it gets its answers right."""
    model.model.vision_embed_tokens.requires_grad_(False)
    codes, optimizers, progress = codebook(), optimizers_for(model), Progress("decoder", steps)
    # All processes draw the same kind and number of lines at a step, so that none waits for another's longer rows.
    plan, lines, mastery = np.random.default_rng(0), 1, 0.0
    for step in range(steps):
        # Reading comes first: nearly every token of it teaches to copy.
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


class FactProbe(torch.nn.Module):
    """Reads what an answer follows from off the second and third layer, before the answer begins.

    Whether two things are equal, say, is learned late unless something makes the layers bring the two together. Used as a
    further loss, and thrown away after the stage.
    """

    def __init__(self, model: Phi3VForCausalLM) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, shapes.FACT_VALUES * len(shapes.FACTS)) for _ in range(2))
        for head in self.heads:
            torch.nn.init.zeros_(head.weight)  # the same in all processes
            torch.nn.init.zeros_(head.bias)
        self.seen: list[torch.Tensor] = []
        for layer in model.model.layers[1:3]:
            layer.register_forward_hook(lambda module, inputs, output: self.seen.append(output))

    def forward(
        self, samples: list[tuple[list[Page], list[Turn]]], weights: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss for what the model has just read, and the share that is right at the third layer, by kind of fact."""
        none = (shapes.NO_FACT,) * len(shapes.FACTS)
        facts = torch.tensor([turn.facts or none for _, turns in samples for turn in turns])
        rows, columns = torch.nonzero(weights > 1, as_tuple=True)
        stated, loss = facts != shapes.NO_FACT, 0.0
        for head, hidden in zip(self.heads, self.seen, strict=True):
            read = head(F.rms_norm(hidden[rows, columns - 1].float(), (WIDTH,))).view(len(facts), -1, len(shapes.FACTS))
            loss = loss + F.cross_entropy(read, facts, reduction="sum") / max(1, stated.sum())
        self.seen.clear()
        right = torch.where(stated, (read.argmax(1) == facts).float(), torch.nan)
        parts = {"named": right[:, :2], "drawn": right[:, 2:6], "agree": right[:, 6:]}
        return loss, {name: part.nanmean().item() for name, part in parts.items()}


def train_on(stage: str, kinds: dict[str, float], count: int, model, processor, rng, steps: int, autocast: bool) -> None:
    """Let the decoder go on with codes of whole pages, of given kinds."""
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
    """Train everything on pictures."""
    train_on_pictures("together", KINDS, 6, model, processor, rng, steps, autocast)


def train_last(model, processor, rng: np.random.Generator, steps: int, autocast: bool) -> None:
    """Let the decoder go on with what the tower sees in pictures."""
    model.model.vision_embed_tokens.requires_grad_(False)
    train_on_pictures("last", LAST_KINDS, 8, model, processor, rng, steps, autocast)
    model.model.vision_embed_tokens.requires_grad_(True)
    model.freeze_unused()


def train_on_pictures(stage: str, kinds: dict[str, float], count: int, model, processor, rng, steps: int, autocast) -> None:
    """Train what isn't frozen on pictures of given kinds."""
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


def save(model, processor, output_dir: Path) -> None:
    """Write the checkpoint in the published layout, with weights in bfloat16."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(output_dir)
    processor.save_pretrained(output_dir)


def build(seed: int) -> tuple[Phi3VForCausalLM, Phi3VProcessor]:
    """Return the untrained model and its processor."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = Phi3VForCausalLM(build_config(tokenizer))
    model.config.vision_config._attn_implementation = "sdpa"
    codes = codebook()
    glyphs = codes[LEFT : LEFT + GLYPHS] + codes[RIGHT : RIGHT + GLYPHS]
    rows = tokenizer.convert_tokens_to_ids([chr(32 + i) for i in range(GLYPHS)] + list(WORDS))
    looks = torch.cat([glyphs, codes[LEFT + GLYPHS : RIGHT], codes[RIGHT + GLYPHS : ROW_END]])
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (module for module in layer.modules() if isinstance(module, torch.nn.Linear)):
                # The usual 0.02 suits models many times as wide.
                linear.weight.normal_(std=0.6 * linear.in_features**-0.5)
            # Heads start by looking for what is alike and passing it on.
            query, key, value = layer.self_attn.qkv_proj.weight.chunk(3)
            query.copy_(key)
            layer.self_attn.o_proj.weight.copy_(value.T)
        # A character or word of text starts as what it looks like on a page.
        model.model.embed_tokens.weight.normal_(std=CODE_SCALE)[rows] = looks
        model.lm_head.weight[rows] = 0.1 * looks
    return model, Phi3VProcessor(Phi3VImageProcessor(num_crops=1), tokenizer)


def pretrain(rank: int, args: argparse.Namespace, meeting_point: str) -> None:
    """Run all stages as one of the two processes; the first one saves after each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=PROCESSES)
    model, processor = build(args.seed)
    stages = {
        "tower": lambda rng: train_tower(model, processor, rng, args.tower_steps),
        "decoder": lambda rng: train_decoder(model, processor, rng, args.decoder_steps, args.bf16),
        "together": lambda rng: train_together(model, processor, rng, args.together_steps, args.bf16),
        # Finding the right line takes longest to learn; then come what stands where in two pictures, and what agrees.
        "lookup": lambda rng: train_on("lookup", LOOKUP_KINDS, 6, model, processor, rng, args.lookup_steps, args.bf16),
        "shapes": lambda rng: train_on("shapes", SHAPE_KINDS, 8, model, processor, rng, args.shapes_steps, args.bf16),
        "last": lambda rng: train_last(model, processor, rng, args.last_steps, args.bf16),
    }
    names = list(stages)
    if args.begin_with != names[0]:
        saved = Phi3VForCausalLM.from_pretrained(args.output_dir, dtype=torch.float32)
        model.load_state_dict(saved.state_dict())
    model.train()
    for number in range(names.index(args.begin_with), len(names)):
        torch.manual_seed(args.seed + 10 * number + rank)
        stages[names[number]](np.random.default_rng([args.seed, number, rank]))
        if rank == 0:
            save(model, processor, args.output_dir)
            print(f"Wrote {args.output_dir} after stage {names[number]}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "tiny_phi3v")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast: faster on processors with AMX")
    parser.add_argument("--tower_steps", type=int, default=600, help="default: %(default)s")
    parser.add_argument("--decoder_steps", type=int, default=2600, help="default: %(default)s")
    parser.add_argument("--together_steps", type=int, default=120, help="default: %(default)s")
    parser.add_argument("--lookup_steps", type=int, default=700, help="default: %(default)s")
    parser.add_argument("--shapes_steps", type=int, default=1200, help="default: %(default)s")
    parser.add_argument("--last_steps", type=int, default=400, help="default: %(default)s")
    stages = ("tower", "decoder", "together", "lookup", "shapes", "last")
    parser.add_argument("--begin_with", choices=stages, default="tower", help="go on with what --output_dir holds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(pretrain, (args, str(Path(folder) / "meeting_point")), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
