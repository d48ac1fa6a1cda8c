"""The input pipeline, from image file to collated batch, compared with the published float pipeline, on one core.

    python -m benchmarks.inputs                          # with generated pages
    python -m benchmarks.inputs --image_dir documents    # with a folder of images

CPU time is measured, so that other load on the machine does not count.
"""

import argparse
from pathlib import Path

from common.runtime.parser import Parser, check_inputs
from common.runtime.process import say

from . import RESULTS


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--image_dir", type=Path, help="folder of images (default: generated pages)")
    parser.add_argument("--num_crops", type=int, default=16, help="maximum number of crops per image (default: 16)")
    parser.add_argument("--num_images", type=int, default=24, help="number of images, spread over the folder (default: 24)")
    parser.add_argument("--batch_size", type=int, default=1, help="images per batch (default: 1, as published)")
    parser.add_argument("--repetitions", type=int, default=5, help="measured repetitions, after one for warmup (default: 5)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "inputs.json", help="result file (default: benchmarks/results/inputs.json)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_args()  # before the imports below, which take seconds
    check_inputs(args)
    say("Loading PyTorch and transformers")

import io
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor

from common.data.collator import Collator
from common.data.conversations import encode_conversation
from common.phi3v.image_processing import CROP_SIZE, IMAGE_MEAN, IMAGE_STD, crop_grid_size
from common.phi3v.processing import pad_rows

from .measure import interleave, ratios, summarise, write_result
from .pages import draw_pages, find_pages

MODEL = Path(__file__).parents[1] / "assets" / "tiny_phi3v"
TITLES = {"as they are": "in their own mode", "in colour": "in color"}  # of the results, by their name in the result file


def plain_crops(picture, num_crops):
    """Baseline: preprocess an image with the published pipeline.

    Returns
    -------
    crops : torch.Tensor
        float32 (num_crops + 1, 3, 336, 336): the global view, the crops, and blank crops.
    size : (int, int)
        Height and width of the crop grid in pixels.
    """
    image = Image.open(io.BytesIO(picture["bytes"]) if isinstance(picture, dict) else picture).convert("RGB")
    height, width = crop_grid_size(*image.size, num_crops)
    transposed = image.width < image.height
    if transposed:
        image = image.transpose(Image.Transpose.TRANSPOSE)
        height, width = width, height
    image = image.resize((width, int(width / (image.width / image.height))), Image.Resampling.BILINEAR)
    padded = Image.new("RGB", (width, height), "white")
    padded.paste(image, (0, (height - image.height) // 2))
    if transposed:
        padded = padded.transpose(Image.Transpose.TRANSPOSE)
        height, width = width, height

    pixels = torch.from_numpy(np.array(padded)).permute(2, 0, 1).contiguous().float().div(255)
    pixels.sub_(torch.tensor(IMAGE_MEAN).view(3, 1, 1)).div_(torch.tensor(IMAGE_STD).view(3, 1, 1))
    whole = torch.nn.functional.interpolate(pixels[None], size=(CROP_SIZE, CROP_SIZE), mode="bicubic")
    rows, columns = height // CROP_SIZE, width // CROP_SIZE
    crops = pixels.reshape(3, rows, CROP_SIZE, columns, CROP_SIZE).permute(1, 3, 0, 2, 4)
    crops = torch.cat([whole, crops.reshape(-1, 3, CROP_SIZE, CROP_SIZE)])
    blanks = torch.zeros(num_crops + 1 - len(crops), 3, CROP_SIZE, CROP_SIZE)
    return torch.cat([crops, blanks]), (height, width)


def plain_batch(samples, num_crops, pad_token_id):
    """Baseline: collate a padded batch with float pixels."""
    pixels, sizes = zip(*(plain_crops(picture, num_crops) for sample in samples for picture in sample["images"]), strict=True)
    batch = pad_rows([sample["input_ids"] for sample in samples], pad_token_id, "right")
    batch["labels"] = pad_rows([sample["labels"] for sample in samples], -100, "right")["input_ids"]
    return batch | {"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor(sizes)}


def in_colour(path):
    """Re-encode an image file in color."""
    buffer = io.BytesIO()
    Image.open(path).convert("RGB").save(buffer, "JPEG", quality=85)
    return {"bytes": buffer.getvalue(), "path": str(path)}


def measure(pictures, processor, batch_size, repetitions):
    """Measure the time and size per image of both pipelines, and the speedup."""
    num_crops, pad_token_id = processor.image_processor.num_crops, processor.tokenizer.pad_token_id
    turns = [{"images": [picture], "user": "What is it?", "assistant": "A page."} for picture in pictures]
    samples = [encode_conversation({"conversations": [turn]}, processor) for turn in turns]
    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    collator = Collator(processor, packing=True)

    # Both pipelines must give bit-identical pixels. The tests compare the processor with the published one.
    for batch in batches[:2]:
        images = [Image.open(io.BytesIO(s["bytes"]) if isinstance(s, dict) else s) for x in batch for s in x["images"]]
        expected = processor.image_processor(images)
        plain = plain_batch(batch, num_crops, pad_token_id)
        if not all(torch.equal(plain[name], expected[name]) for name in ("pixel_values", "image_sizes")):
            raise SystemExit("error: the baseline computes different pixels, so the comparison is invalid")

    variants = {
        "plain": lambda: [plain_batch(batch, num_crops, pad_token_id) for batch in batches],
        "ours": lambda: [collator(batch) for batch in batches],
    }
    seconds = interleave(variants, repetitions, clock=time.process_time)
    size = {name: function()[0]["pixel_values"].nbytes / len(batches[0]) / 2**20 for name, function in variants.items()}
    return {
        "milliseconds_a_picture": {
            name: summarise([1000 * value / len(pictures) for value in values]) for name, values in seconds.items()
        },
        "mib_a_picture": {name: round(value, 2) for name, value in size.items()},
        "times_faster": ratios(seconds["plain"], seconds["ours"]),
    }


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(MODEL, num_crops=args.num_crops)
    with tempfile.TemporaryDirectory() as directory:
        files = find_pages(args.image_dir) if args.image_dir else draw_pages(Path(directory), args.num_images)
        count = min(args.num_images, len(files))
        files = [files[index * len(files) // count] for index in range(count)]
        results = {
            "as they are": measure(files, processor, args.batch_size, args.repetitions),
            "in colour": measure([in_colour(path) for path in files], processor, args.batch_size, args.repetitions),
        }
        modes = sorted({Image.open(path).mode for path in files})
    for name, result in results.items():
        spread, times = result["times_faster"], result["milliseconds_a_picture"]
        print(
            f"pages {TITLES[name]}: {times['ours']['median']:.1f} ms per image, baseline {times['plain']['median']:.1f} ms: "
            f"speedup {spread['median']:.2f}x ({spread['lowest']:.2f}x to {spread['highest']:.2f}x)"
        )
    write_result(args.out, {"benchmark": "inputs", "pictures": {"count": len(files), "modes": modes}, "results": results})
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    main(args)
