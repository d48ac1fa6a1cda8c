"""Render predicted, measured and published speed into docs/performance.md and README.md: `make bench-table`."""

from pathlib import Path
from typing import Any

import torch

from common.model.loading import base_model
from common.phi3v import Phi3VConfig
from common.phi3v.flops import BatchSizes, TrainingFlops
from common.runtime.files import read_json, write_file
from tools.runs import METHOD_TITLES, load_published, markdown_table

from . import RESULTS
from .micro_batch import build_model

ROOT = Path(__file__).parents[1]
DOCUMENT, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
BEGIN, END = "<!-- make bench-table: begin -->", "<!-- make bench-table: end -->"
PEAK = {"8×A100-80GB": 312e12, "8×V100-32GB": 125e12}
# Mean sample of the published run: 2,443 tokens, of which 30 are text and the rest from 15.33 crops and the global view.
_MEAN_VIEWS: Any = 16.33
PUBLISHED_BATCH = BatchSizes(tokens=2443, pairs=2443 * 2444 // 2, views=_MEAN_VIEWS, image_tokens=2413, supervised=8)
EPOCH = 39463  # questions of DocVQA's train split
EIGHT_BIT = "--optim adamw_bnb_8bit"
# What the README shows of the predictions: method and number of GPUs, title, flags.
CHOICES = {
    ("full", 8): ("full, on 8 GPUs", "--bf16 --use_flash_attention"),
    ("full", 1): ("full, on one GPU", f"--bf16 --use_flash_attention {EIGHT_BIT}"),
    ("frozen", 1): ("frozen vision, on one GPU", f"--bf16 --use_flash_attention --freeze_vision_model {EIGHT_BIT}"),
    ("lora", 1): ("LoRA", "--bf16 --use_flash_attention --use_lora --lora_rank 32"),
    ("qlora", 1): ("QLoRA", "--bf16 --use_flash_attention --use_qlora --lora_rank 32"),
}
MODES = {"L": "grayscale", "RGB": "color", "1": "black and white"}  # by mode of Pillow
# MFU and peak GB. The memory targets are for full recomputation and one sample per micro-batch.
GPU_TARGETS = {"full": ("≥ 40 %", "–"), "lora": ("≥ 40 %", "≤ 16"), "qlora": ("≥ 33 %", "≤ 10"), "frozen": ("≥ 40 %", "–")}


def sample_flops() -> dict[str, float]:
    """Return the model FLOPs of the mean published sample by method, for LoRA rank 32."""
    found = {}
    for method in METHOD_TITLES:
        model = build_model("lora" if method == "qlora" else method, Phi3VConfig(), torch.device("meta"))
        found[method] = sum(TrainingFlops(base_model(model)).count(PUBLISHED_BATCH))
    return found


def read_results() -> dict[str, list[dict]]:
    """Read all result files, grouped by benchmark."""
    found: dict[str, list[dict]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = read_json(path, "measure it again") | {"file": path.name}
        found.setdefault(result["benchmark"], []).append(result)
    return found


def spread(ratio: dict[str, float]) -> str:
    """Format a ratio with its spread."""
    return f"**{ratio['median']:.2f}×** ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"


def where(result: dict) -> str:
    """Format the hardware and the date of a result, with a link to its file."""
    machine = result["hardware"]
    name = machine.get("gpu") or f"{machine['threads']} core(s) of {machine['cpu']}"
    return f"{name}, {result['date'][:10]} ([{result['file']}](../benchmarks/results/{result['file']}))"


def any_machine(results: dict[str, list[dict]]) -> str:
    """Render the benchmarks that require no GPU, with their targets."""
    rows = []
    for result in results.get("inputs", []):
        for name, target in (("as they are", "≥ 3×"), ("in colour", "–")):
            measured = result["results"][name]
            times = {way: summary["median"] for way, summary in measured["milliseconds_a_picture"].items()}
            names = [MODES.get(mode, mode) for mode in result["pictures"]["modes"]]
            modes = f"{result['pictures']['count']} pages in their own mode ({', '.join(names)})"
            what = f"input pipeline, {modes if name == 'as they are' else 'the same pages in color'}"
            figures = f"{times['ours']:.1f} ms vs. {times['plain']:.1f} ms per page"
            rows.append([what, target, spread(measured["times_faster"]), figures, where(result)])
    for result in results.get("evaluation", []):
        seconds = {name: value["median"] for name, value in result["seconds"].items()}
        figures = f"{seconds['batched']:.1f} s vs. {seconds['one by one']:.1f} s for {result['questions']} questions"
        what = f"evaluation, batch size {result['batch_size']} vs. one at a time"
        rows.append([what, "≥ 4×", spread(result["times_faster"]), figures, where(result)])
    return markdown_table(["benchmark", "target", "measured", "values", "hardware"], rows)


def predictions(results: dict[str, list[dict]]) -> dict[tuple[str, int], list[dict]]:
    """Return the predicted rows of each method and number of GPUs, cheapest GPU first."""
    rows = [row for result in results.get("roofline", []) for row in result["rows"]]
    return {key: [row for row in rows if (row["method"], row["gpus"]) == key] for key in CHOICES}


def hours(row: dict) -> str:
    """Format the time of an epoch of DocVQA."""
    return f"{EPOCH / row['images_per_second'] / 3600:.1f}"


def predicted_table(results: dict[str, list[dict]]) -> str:
    """Render the best predicted settings of every method on every GPU."""
    rows = []
    for key, found in predictions(results).items():
        for row in found:
            name = [CHOICES[key][0], f"{row['gpus']} × {row['gpu']}"]
            if "ms" not in row:
                rows.append([*name, "does not fit", *["–"] * 6])
                continue
            speed = [f"{row['ms']:,}", f"{100 * row['mfu']:.0f} %", f"{row['images_per_second']:.2f}", hours(row)]
            rows.append([*name, row["checkpointing"], row["samples_at_once"], f"{row['peak_gb']:.1f}", *speed])
    header = "method|GPU|recomputation|pages at once|peak GB|ms per micro-batch|MFU|images/s|hours per epoch"
    return markdown_table(header.split("|"), rows)


def choice_table(results: dict[str, list[dict]]) -> str:
    """Render the README's table: for each method its flags, and peak memory per GPU, speed and time of an epoch on two GPUs."""
    rows = []
    for key, found in predictions(results).items():
        fitting = {row["gpu"]: row for row in found if "ms" in row}
        cells = [
            f"{row['peak_gb']:.0f} GB, {row['images_per_second']:.{0 if row['images_per_second'] >= 10 else 1}f} images/s, "
            f"{hours(row)} h"
            for row in (next(iter(fitting.values())), fitting["H100"])
        ]
        title, flags = CHOICES[key]
        rows.append([title, f"`{flags}`", f"{key[1]} × {next(iter(fitting))}: {cells[0]}", f"{key[1]} × H100: {cells[1]}"])
    return markdown_table(["method", "flags", "cheapest GPU that fits, predicted", "H100, predicted"], rows)


def gpu_rows(results: dict[str, list[dict]], method: str) -> list[tuple[dict, dict]]:
    """Return the GPU measurements of a method with the real configuration, as pairs of result and row."""
    found = [result for result in results.get("train", []) if "gpu" in result["hardware"] and result["config"] != "tiny"]
    return [(result, row) for result in found for row in result["rows"] if row["method"] == method]


def gpu_table(results: dict[str, list[dict]]) -> str:
    """Render training on one GPU with the targets for an H100; missing measurements are marked."""
    rows = []
    for method, (mfu_target, memory_target) in GPU_TARGETS.items():
        measured = gpu_rows(results, method)
        if not measured:
            rows.append([METHOD_TITLES[method], "–", "–", *["not measured"] * 6, mfu_target, memory_target, "–"])
        for result, row in measured:
            how = f"{row['attention']}, packing {row['packing']}, {row['samples_at_once']} per micro-batch"
            how += f", {row['kernels']} kernels" + (f", {row['optim']}" if "optim" in row else "")
            alone = row["checkpointing"] == "full" and row["samples_at_once"] == 1
            if "error" in row:
                figures = [f"failed: {row['error']}"] + ["–"] * 5
            else:
                figures = [f"{row['images_per_second']:.2f}", f"{row['tokens_per_second']:,.0f}", f"{row['tflops']:.0f}"]
                figures += ["unknown" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"]
                figures += [f"{row['peak_memory_gb']:.1f}", f"{100 * row['data_wait_share']:.1f} %"]
            targets = [mfu_target, memory_target if alone else "–"]
            rows.append([METHOD_TITLES[method], how, row["checkpointing"], *figures, *targets, where(result)])
    header = (
        "method|configuration|recomputation|images/s|tokens/s|TFLOP/s|MFU|peak GB|data wait|MFU target|peak GB target|hardware"
    )
    return markdown_table(header.split("|"), rows)


def published_table(published: dict, results: dict[str, list[dict]]) -> str:
    """Render the published table with the MFU computed from it, followed by the values measured here."""
    flops = sample_flops()
    rows = []
    for row in published["rows"]:
        gpus = 8 * row["nodes"]
        mfu = row["images_per_second"] * flops[row["method"]] / (gpus * PEAK[row["hardware"]])
        method = METHOD_TITLES[row["method"]] + (" + flash attention" if row["flash_attention"] else "")
        speed = [f"{row['images_per_second']:.3f}", f"~{row['peak_memory_gb']}", f"{100 * mfu:.1f} %"]
        rows.append([row["hardware"], str(row["nodes"]), method, *speed, "published upstream"])
    for method, title in METHOD_TITLES.items():
        measured = [(result, row) for result, row in gpu_rows(results, method) if "error" not in row]
        if not measured:
            rows.append(["one GPU", "1", title, *["not measured"] * 3, "–"])
            continue
        result, row = max(measured, key=lambda found: found[1]["images_per_second"])
        speed = [f"{row['images_per_second']:.3f}", f"{row['peak_memory_gb']:.1f}"]
        speed += ["unknown" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"]
        rows.append([f"1×{result['hardware']['gpu']}", "1", title, *speed, where(result)])
    header = "hardware per node|nodes|method|images/s|peak GB|MFU|source"
    return markdown_table(header.split("|"), rows)


def render() -> dict[Path, str]:
    """Render the tables of each document."""
    results = read_results()
    sections = [
        "### Predicted for every method and GPU",
        "**Predicted by `benchmarks.roofline`, not measured.** For each GPU the fastest recomputation and number of pages\n"
        "at once that fit, with 16 crops and batch size 64. An epoch is DocVQA's train split, 39,463 questions. Full\n"
        "training runs under ZeRO-2, on one GPU with 8-bit optimizer states. On 8 GPUs, images/s is the total without\n"
        "communication.",
        predicted_table(results),
        "### Whole training steps on one GPU, measured",
        "The targets are for one H100 80 GB; memory targets are for full recomputation and one sample per micro-batch.\n"
        "For full training, the targets also include ≥ 5.1 images/s and a data wait of ≤ 2 % of a step.",
        gpu_table(results),
        "### Comparison with the published table",
        "The rows with 8 GPUs per node were published upstream and not measured here; their MFU is computed from the\n"
        "published speed. The rows below show the fastest configuration measured here, on one GPU. Peak memory is per GPU.",
        published_table(load_published()["speed"], results),
        "### Data and evaluation, on a CPU",
        any_machine(results),
    ]
    return {DOCUMENT: "\n\n".join(sections), README: choice_table(results)}


def fill(document: str, tables: str) -> str:
    """Insert the tables between the markers of a document.

    Raises
    ------
    ValueError
        If the markers are missing.
    """
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"missing markers {BEGIN} and {END}; restore them")
    return f"{head}{BEGIN}\n{tables}\n{END}{tail}"


def main() -> None:
    for path, tables in render().items():
        write_file(path, fill(path.read_text(encoding="utf-8"), tables))
        print(f"Wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
