"""Render the measured and the published results into docs/performance.md: `make bench-table`."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from common.model.loading import base_model
from common.phi3v import Phi3VConfig
from common.phi3v.flops import BatchSizes, TrainingFlops
from common.phi3v.parts import DECODER_LORA_MODULES, PROJECTOR_LORA_MODULES, TOWER_LINEARS
from common.runtime import read_json, write_file
from tools.runs import METHOD_TITLES, load_published, markdown_table

from .measure import RESULTS

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- make bench-table: begin -->", "<!-- make bench-table: end -->"
PEAK = {"8×A100-80GB": 312e12, "8×V100-32GB": 125e12}
# Mean sample of the published run: 2,443 tokens, of which 30 are text and the rest from 15.33 crops and the global view.
PUBLISHED_BATCH = BatchSizes(tokens=2443, pairs=2443 * 2444 // 2, views=16.33, image_tokens=2413, supervised=8)
MODES = {"L": "grayscale", "RGB": "color", "1": "black and white"}  # by mode of Pillow
# MFU and peak GB. The memory targets are for full recomputation and one sample per micro-batch.
GPU_TARGETS = {"full": ("≥ 40 %", "–"), "lora": ("≥ 40 %", "≤ 16"), "qlora": ("≥ 33 %", "≤ 10"), "frozen": ("≥ 40 %", "–")}


def sample_flops() -> dict[str, float]:
    """Return the model FLOPs of the mean published sample by method, for LoRA rank 32."""
    found = {}
    for method in METHOD_TITLES:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(Phi3VConfig())
            if method == "frozen":
                model.model.vision_embed_tokens.requires_grad_(False)
            elif method in ("lora", "qlora"):
                used = "|".join(map(str, range(model.config.vision_config.num_hidden_layers - 1)))
                tower = rf".*encoder\.layers\.({used})\.{TOWER_LINEARS}"
                targets = f"{DECODER_LORA_MODULES}|{tower}|{PROJECTOR_LORA_MODULES}"
                model = get_peft_model(model, LoraConfig(r=32, target_modules=targets))
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
    for result in results.get("step", []):
        faster, seconds = result["times_faster"], {name: value["median"] for name, value in result["seconds"].items()}
        plain = min((name for name in faster if "SDPA" in name), key=lambda name: faster[name]["median"])
        targets = {plain: "≥ 1.5×", "one by one, eager": "≥ 4×"}
        for name, ratio in faster.items():
            figures = f"{seconds['packed']:.2f} s vs. {seconds[name]:.2f} s"
            other = name.replace("one by one", "one at a time").replace("recomputing", "with recomputation")
            what = f"training step in {result['precision']}, packed vs. {other}"
            rows.append([what, targets.get(name, "–"), spread(ratio), figures, where(result)])
    for result in results.get("evaluation", []):
        seconds = {name: value["median"] for name, value in result["seconds"].items()}
        figures = f"{seconds['batched']:.1f} s vs. {seconds['one by one']:.1f} s for {result['questions']} questions"
        what = f"evaluation, batch size {result['batch_size']} vs. one at a time"
        rows.append([what, "≥ 4×", spread(result["times_faster"]), figures, where(result)])
    for result in results.get("memory", []):
        peak = result["peak_mib"]
        what = f"peak memory of head and loss at {result['batch']['samples']} × {result['batch']['tokens']:,} tokens"
        figures = f"{peak['answer']:,.0f} MiB vs. {peak['full']:,.0f} MiB"
        rows.append([what, "≤ 1/20", f"**1/{result['times_less']:.0f}**", figures, where(result)])
    targets = {
        "inputs": ("input pipeline vs. the published float pipeline", "≥ 3×"),
        "step": ("training step, packed vs. padded or one at a time with SDPA", "≥ 1.5×"),
        "evaluation": ("evaluation, batched vs. one at a time", "≥ 4×"),
        "memory": ("peak memory of head and loss", "≤ 1/20"),
    }
    rows += [[*targets[name], "not measured", "–", "–"] for name in targets if name not in results]
    return markdown_table(["benchmark", "target", "measured", "values", "hardware"], rows)


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
            packing = row["packing"] if isinstance(row["packing"], str) else "on" if row["packing"] else "off"
            how = f"{row['attention']}, packing {packing}, {row['samples_at_once']} per micro-batch, {row['kernels']} kernels"
            how += f", {row['optim']}" if "optim" in row else ""
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


def render() -> str:
    """Render all tables."""
    results = read_results()
    published = load_published()["speed"]
    return "\n\n".join(
        [
            "### Without a GPU",
            "The targets are set by this project; missed targets stay in the table.",
            any_machine(results),
            "### On one GPU, with the real model configuration",
            "The targets are for one H100 80 GB; memory targets are for full recomputation and one sample per micro-batch.\n"
            "For full training, the targets also include ≥ 5.1 images/s and a data wait of ≤ 2 % of a step.",
            gpu_table(results),
            "### Comparison with the published table",
            "The rows with 8 GPUs per node were published upstream and not measured here; their MFU is computed from the\n"
            "published speed. The rows below show the fastest configuration measured here, on one GPU. Peak memory is per GPU.",
            published_table(published, results),
        ]
    )


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
        raise ValueError(f"{DOCUMENT.name}: missing markers {BEGIN} and {END}; restore them")
    return f"{head}{BEGIN}\n{tables}\n{END}{tail}"


def main() -> None:
    try:
        content = fill(DOCUMENT.read_text(encoding="utf-8"), render())
    except ValueError as error:
        sys.exit(f"error: {error}")
    write_file(DOCUMENT, content)
    print(f"Wrote {DOCUMENT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
