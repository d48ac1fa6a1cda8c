"""A training step of a small model with packing, compared with the baseline: padded, or one sample at a time.

    python -m benchmarks.step
    python -m benchmarks.step --bf16
    python -m benchmarks.step --config tiny --repetitions 1

The baseline uses float pixels with blank crops, runs all layers of the vision tower on them, pads, and computes logits at
every position. One sample at a time with eager attention and recomputation of all layers is the published configuration.
All variants share the weights of one model. Before the measurement, their losses and gradients are checked to be equal in
fp32.

Samples are packed into micro-batches of --max_tokens_per_batch tokens. By default this is the maximum length of a sample,
so that the activations fit into the caches of one core; on a GPU, larger micro-batches are faster.

CPU time on one core is measured, so that other load on the machine does not count.
"""

import argparse
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from common.data.batches import best_fit
from common.model.loading import set_gradient_checkpointing
from common.phi3v import Phi3VConfig
from common.phi3v.flops import TrainingFlops
from common.phi3v.image_processing import (
    CROP_SIZE,
    crop_grid_size,
    grid_to_crops,
    normalise_with_global_view,
    num_image_tokens,
    num_views,
    to_crop_grid,
)
from common.phi3v.processing import pad_rows

from .measure import RESULTS, display_path, interleave, ratios, summarise, write_result

NUM_CROPS = 4
CONFIGS = {
    "small": {
        "decoder": {"hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1376, "vocab_size": 32064},
        "tower": {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 1024},
        "samples": 8,
        "tokens": (800, 2400),
    },
    "tiny": {
        "decoder": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 1000},
        "tower": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128},
        "samples": 3,
        "tokens": (300, 1200),
    },
}
# Height and width of the images, from square to elongated.
SHAPES = ((300, 300), (300, 640), (620, 330), (700, 700), (330, 1000), (900, 300))


def build_model(config):
    """Build a model with random float32 weights; the head dimension is 64, as in the vision tower."""
    decoder, tower = config["decoder"], config["tower"]
    heads = decoder["hidden_size"] // 64
    factors = [1.0] * 32
    return AutoModelForCausalLM.from_config(
        Phi3VConfig(
            **decoder,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            pad_token_id=0,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_scaling={"type": "su", "short_factor": factors, "long_factor": factors},
            vision_config={
                **tower,
                "num_attention_heads": tower["hidden_size"] // 64,
                "image_size": CROP_SIZE,
                "patch_size": 14,
            },
        ),
        attn_implementation="varlen",
    )


def draw_samples(config, rng):
    """Draw samples of one to three images of mixed shapes and 20 to 400 text tokens, the last of which are the answer."""
    samples = []
    while len(samples) < config["samples"]:
        shapes = [SHAPES[index] for index in rng.integers(len(SHAPES), size=rng.integers(1, 4))]
        sizes = [crop_grid_size(width, height, NUM_CROPS) for height, width in shapes]
        text = rng.integers(3, config["decoder"]["vocab_size"], size=rng.integers(20, 401)).tolist()
        ids = [-number for number, size in enumerate(sizes, start=1) for _ in range(num_image_tokens(*size))] + text
        if config["tokens"][0] <= len(ids) <= config["tokens"][1]:
            answer = min(len(text) - 1, int(rng.integers(4, 65)))
            labels = [-100] * (len(ids) - answer) + ids[-answer:]
            grids = [to_crop_grid(Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)), NUM_CROPS) for s in shapes]
            crops = [grid_to_crops(grid) for grid in grids]
            samples.append({"input_ids": ids, "labels": labels, "crops": crops, "sizes": sizes})
    return samples


def packed_batch(samples):
    """Build a packed batch with uint8 crops, as the collator does."""
    ids, labels, ends, pictures = [], [], [0], 0
    for sample in samples:
        ids += [token - pictures * (token < 0) for token in sample["input_ids"]]
        labels += sample["labels"]
        ends.append(len(ids))
        pictures += len(sample["sizes"])
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "cu_seq_lens_q": torch.tensor(ends, dtype=torch.int32),
        "max_length_q": int(np.diff(ends).max()),
        "pixel_values": torch.cat([crops for sample in samples for crops in sample["crops"]]),
        "image_sizes": torch.tensor([size for sample in samples for size in sample["sizes"]]),
    }


def packed_loss(model, batch, num_items):
    """Compute the loss as in training."""
    return model(**batch, num_items_in_batch=num_items).loss


def plain_batch(samples):
    """Baseline: build a padded batch with float pixels and blank crops, as the published processor and collator do."""
    batch = pad_rows([sample["input_ids"] for sample in samples], 0, "right")
    batch["labels"] = pad_rows([sample["labels"] for sample in samples], -100, "right")["input_ids"]
    batch["sizes"] = [sample["sizes"] for sample in samples]
    batch["pixel_values"] = []
    for sample in samples:
        pixels = torch.zeros(len(sample["sizes"]), NUM_CROPS + 1, 3, CROP_SIZE, CROP_SIZE)
        for picture, crops, size in zip(pixels, sample["crops"], sample["sizes"], strict=True):
            picture[: 1 + len(crops)] = normalise_with_global_view(crops, [size])
        batch["pixel_values"].append(pixels)
    batch["pixel_values"] = torch.cat(batch["pixel_values"])
    return batch


def plain_image_tokens(vision, pixel_values, sizes):
    """Baseline: yield the tokens of each image, with all layers of the tower applied to all crops, including blank ones."""
    tower, side = vision.tower, vision.side
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values.flatten(0, 1).to(vision.glb_GN.dtype)))
    states = [hidden]
    for layer in tower.encoder.layers:
        states.append(layer(states[-1], None))
    tower.post_layernorm(states[-1][:, 0])
    features = states[-2][:, 1:]
    width = features.shape[-1]
    features = features.reshape(-1, side, 2, side, 2, width).transpose(2, 3).reshape(-1, side, side, 4 * width)
    features = features.unflatten(0, (-1, NUM_CROPS + 1))
    for views, (height, width) in zip(features, sizes, strict=True):
        rows, columns = height // CROP_SIZE, width // CROP_SIZE
        crops = views[1 : 1 + rows * columns].reshape(rows, columns, side, side, -1).transpose(1, 2)
        crops = crops.reshape(rows * side, columns * side, -1)
        crops = torch.cat([crops, vision.sub_GN[0].expand(rows * side, 1, -1)], dim=1).flatten(0, 1)
        whole = torch.cat([views[0], vision.sub_GN[0].expand(side, 1, -1)], dim=1).flatten(0, 1)
        yield vision.img_projection(torch.cat([crops, vision.glb_GN[0], whole]))


def plain_loss(model, batch, num_items):
    """Baseline: compute the loss with logits at every position."""
    sizes = [size for row in batch["sizes"] for size in row]
    tokens = plain_image_tokens(model.model.vision_embed_tokens, batch["pixel_values"], sizes)
    embeddings = model.model.embed_tokens(batch["input_ids"].clamp(min=0))
    for row, row_sizes in enumerate(batch["sizes"]):
        for number in range(1, len(row_sizes) + 1):
            columns = (batch["input_ids"][row] == -number).nonzero()[:, 0]
            embeddings = embeddings.index_put((torch.tensor(row), columns), next(tokens))
    hidden = model.model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).last_hidden_state
    logits = model.lm_head(hidden).float()
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / num_items


def step(model, optimizer, losses, attention, recompute=False):
    """Run one optimizer step over micro-batches, given as callables that compute the loss; return the sum of the losses."""
    set_up(model, attention, recompute)
    optimizer.zero_grad()
    total = 0.0
    for loss in losses:
        value = loss()
        value.backward()
        total += value.item()
    optimizer.step()
    return total


def set_up(model, attention, recompute):
    """Set the attention implementation of decoder and tower, and whether their activations are recomputed."""
    model.config._attn_implementation = model.config.vision_config._attn_implementation = attention
    set_gradient_checkpointing(model, "full" if recompute else "none")


def check_equal(model, variants):
    """Check that all variants agree in loss and gradients; return the largest relative difference from the first."""
    idle = torch.optim.SGD(model.parameters(), lr=0.0)
    reference, worst = None, 0.0
    for name, variant in variants.items():
        loss = variant(model, idle)
        gradients = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
        # The softmax is invariant to a bias of the keys, so its gradient is only rounding error.
        gradients = {key: value for key, value in gradients.items() if not key.endswith("k_proj.bias")}
        reference = reference or (loss, gradients)
        norms = {key: value.norm().clamp(min=1e-6) for key, value in reference[1].items()}
        differences = [abs(loss - reference[0]) / abs(reference[0])]
        differences += [float((gradients[key] - reference[1][key]).norm() / norms[key]) for key in norms]
        if gradients.keys() != norms.keys() or max(differences) > 1e-3:
            raise SystemExit(f"error: {name} computes a different loss or gradients, so the comparison is invalid")
        worst = max(worst, *differences)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="small", help="size of the model and the batch (default: small)")
    parser.add_argument("--repetitions", type=int, default=3, help="measured repetitions (default: 3)")
    parser.add_argument("--max_tokens_per_batch", type=int, default=2400, help="tokens per packed micro-batch (default: 2400)")
    parser.add_argument(
        "--padded_samples", type=int, default=4, help="samples per padded micro-batch (default: 4; all 8 require 21 GB)"
    )
    parser.add_argument("--bf16", action="store_true", help="use bf16 instead of fp32 for weights and computation")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights and samples (default: 0)")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/step.json or step_bf16.json)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    config = CONFIGS[args.config]
    torch.manual_seed(args.seed)
    model = build_model(config).train()
    samples = draw_samples(config, np.random.default_rng(args.seed))
    num_items = sum(label != -100 for sample in samples for label in sample["labels"])

    lengths = np.array([len(sample["input_ids"]) for sample in samples])
    bins = best_fit(lengths, args.max_tokens_per_batch)
    packed = [packed_batch([samples[index] for index in members]) for members in bins]
    size = min(args.padded_samples, len(samples))
    padded = [plain_batch(samples[start : start + size]) for start in range(0, len(samples), size)]
    alone = [plain_batch([sample]) for sample in samples]
    packed_losses = [partial(packed_loss, model, batch, num_items) for batch in packed]
    padded_losses = [partial(plain_loss, model, batch, num_items) for batch in padded]
    alone_losses = [partial(plain_loss, model, batch, num_items) for batch in alone]
    variants = {
        "packed": partial(step, losses=packed_losses, attention="varlen"),
        "padded, SDPA": partial(step, losses=padded_losses, attention="sdpa"),
        "one by one, SDPA": partial(step, losses=alone_losses, attention="sdpa"),
        "one by one, eager": partial(step, losses=alone_losses, attention="eager"),
        "one by one, eager, recomputing": partial(step, losses=alone_losses, attention="eager", recompute=True),
    }
    difference = check_equal(model, variants)
    if args.bf16:
        model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    timed = {name: partial(variant, model, optimizer) for name, variant in variants.items()}
    # The check above was the warmup.
    seconds = interleave(timed, args.repetitions, clock=time.process_time, uncounted=0)

    sizes = [size for sample in samples for size in sample["sizes"]]
    views = sum(num_views(*size) for size in sizes)
    flops = sum(TrainingFlops(model)(batch) for batch in packed)
    faster = {name: ratios(values, seconds["packed"]) for name, values in seconds.items() if name != "packed"}
    for name, values in seconds.items():
        times = summarise(values)
        behind = ""
        if name in faster:
            ratio = faster[name]
            behind = f"; speedup of packing: {ratio['median']:.2f}x ({ratio['lowest']:.2f}x to {ratio['highest']:.2f}x)"
        print(f"{name}: {times['median']:.2f} s, {flops / times['median'] / 1e9:.0f} model GFLOP/s{behind}")
    batch = {
        "tokens": lengths.tolist(),
        "packed micro-batches": [int(lengths[members].sum()) for members in bins],
        "views": views,
        "views with blank crops": len(sizes) * (NUM_CROPS + 1),
        "supervised": num_items,
        "samples of a padded micro-batch": size,
        "model_tflop": round(flops / 1e12, 4),
    }
    content = {
        "benchmark": "step",
        "precision": "bf16" if args.bf16 else "fp32",
        "config": {"name": args.config} | {key: value for key, value in config.items() if key != "samples"},
        "batch": batch,
        "largest_relative_difference_of_loss_and_gradients": difference,
        "seconds": {name: summarise(values) for name, values in seconds.items()},
        "times_faster": faster,
    }
    out = args.out or RESULTS / ("step_bf16.json" if args.bf16 else "step.json")
    write_result(out, content)
    print(f"Wrote {display_path(out)}")


if __name__ == "__main__":
    main()
