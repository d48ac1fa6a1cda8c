"""Convert pages and questions to inputs of the model: images or codes, embeddings, labels and loss weights."""

import numpy as np
import torch
from PIL import Image

from common.phi3v import Phi3VForCausalLM, Phi3VProcessor

from ..samples.page import LINES, Page
from . import documents, shapes
from .documents import Turn
from .model import ROW_END, VIEW_END, symbols

# Probabilities of the kinds of full pages: forms like the sample data and other forms, lines to read, shapes in one image and
# in two, statements to judge about one image and two, a captioned shape, motion.
KINDS = {"invoice": 0.3, "form": 0.15, "reading": 0.03, "scene": 0.06, "pair": 0.03, "judged": 0.07, "judged_pair": 0.16}
KINDS |= {"captioned": 0.1, "motion": 0.1}
LOOKUP_KINDS = {"invoice": 0.45, "form": 0.25, "scene": 0.06, "pair": 0.11, "captioned": 0.07, "motion": 0.06}
SHAPE_KINDS = {"invoice": 0.14, "form": 0.04, "scene": 0.04, "judged": 0.1, "judged_pair": 0.4, "captioned": 0.12}
SHAPE_KINDS |= {"motion": 0.16}
LAST_KINDS = {"invoice": 0.26, "form": 0.04, "scene": 0.14, "judged": 0.06, "judged_pair": 0.38, "captioned": 0.04}
LAST_KINDS |= {"motion": 0.08}


def draw_kind(plan: np.random.Generator, kinds: dict[str, float]) -> str:
    """Draw the kind of the next batch."""
    return str(plan.choice(list(kinds), p=list(kinds.values())))


def draw_samples(kind: str, rng: np.random.Generator, count: int, lines: int = LINES) -> list[tuple[list[Page], list[Turn]]]:
    """Draw about `count` conversations of one kind, fewer if they have several images."""
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


def draw_pictures(pages: list[Page], rng: np.random.Generator, processor: Phi3VProcessor) -> torch.Tensor:
    """Render pages as input of the model, float32 (pages, 3, 336, 336). A single crop is also the global view."""
    images: list[Image.Image] = [page.draw(rng) for page in pages]
    return processor.image_processor(images)["pixel_values"][:, 0]


def merged_patches(model: Phi3VForCausalLM, pictures: torch.Tensor) -> torch.Tensor:
    """Run the vision tower and merge 2 × 2 patches: (pages, 3, 336, 336) to (pages, 12, 12, 4 × width)."""
    features = model.model.vision_embed_tokens.tower(pictures)
    features = features.reshape(len(pictures), 12, 2, 12, 2, -1).transpose(2, 3)
    return features.reshape(len(pictures), 12, 12, -1)


def code_features(pages: list[Page], codes: torch.Tensor, whole: bool) -> list[torch.Tensor]:
    """Encode pages as codes of their symbols, (tokens, WIDTH) each, with noise that stands for errors of the tower.

    Unless `whole`, only the global view is used, truncated after the last line, because short rows are cheaper.
    """
    features = []
    for page in pages:
        body = codes[torch.from_numpy(symbols(page))].sum(-2)[None]
        tokens = image_tokens(body, codes[ROW_END], codes[VIEW_END])[0]
        used = LINES if page.shapes else max(line for line, _, _ in page.texts) + 1
        features.append(tokens if whole else tokens[157 : 157 + 13 * used])
    return [f + 0.05 * torch.randn_like(f) for f in features]


def image_tokens(body: torch.Tensor, row_end: torch.Tensor, view_end: torch.Tensor) -> torch.Tensor:
    """Arrange features like an image with one crop: (pages, 12, 12, width) to (pages, 313, width)."""
    pages, _, _, width = body.shape
    view = torch.cat([body, row_end.expand(pages, 12, 1, width)], dim=2).reshape(pages, 156, width)
    return torch.cat([view, view_end.expand(pages, 1, width), view], dim=1)


def encode(processor: Phi3VProcessor, tokens_per_image: list[int], turns: list[Turn], first_weight: float):
    """Return the ids, labels and loss weights of a conversation as lists."""
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


def batch_conversations(model, processor, samples, features: list[torch.Tensor], first_weight: float = 6.0):
    """Embed conversations, insert the features of their pages, and pad on the right."""
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
