"""Peak memory of head and loss, forward and backward: supervised positions only, compared with logits at every position.

    python -m benchmarks.memory                       # 8 samples of 2,443 tokens, 16 supervised tokens each

Each variant runs in its own process. On a CPU, the result is the peak increase of the process's resident memory, as
reported by the Linux kernel; on a GPU, it is the peak of PyTorch's allocator.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from common.phi3v import Phi3VConfig

from .measure import RESULTS, display_path, write_result


def build_head(hidden_size, device):
    """Build a model without layers, only with the head and its loss, for the published vocabulary."""
    config = Phi3VConfig(
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        num_hidden_layers=0,
        intermediate_size=64,
        vision_config={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
        | {"image_size": 336, "patch_size": 14},
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device).train()
    model.model.norm = nn.Identity()
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)  # allocated before measuring, in both variants
    return model


def full_loss(model, hidden, labels):
    """Baseline: compute logits at every position, then the loss, as models in transformers do."""
    logits = model(inputs_embeds=hidden, use_cache=False).logits.float()
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def answer_loss(model, hidden, labels):
    """Compute logits and loss at supervised positions only."""
    return model(inputs_embeds=hidden, labels=labels, use_cache=False).loss


def peak_bytes(way, args):
    """Measure the peak memory of a forward and backward pass; return it with the loss."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = build_head(args.hidden_size, device)
    hidden = torch.randn(args.samples, args.tokens, args.hidden_size, device=device, requires_grad=True)
    labels = torch.full((args.samples, args.tokens), -100, device=device)
    labels[:, -args.supervised :] = torch.randint(model.vocab_size, (args.samples, args.supervised), device=device)
    loss_of = {"full": full_loss, "answer": answer_loss}[way]
    # Warmup, because libraries allocate their buffers on the first call.
    loss_of(model, hidden[:1, -args.supervised - 1 :], labels[:1, -args.supervised - 1 :]).backward()
    hidden.grad = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _resident("VmRSS")
    loss = loss_of(model, hidden, labels)
    loss.backward()
    after = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM")
    return {"bytes": after - before, "loss": loss.item()}


def _resident(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8, help="number of samples (default: 8)")
    parser.add_argument("--tokens", type=int, default=2443, help="tokens per sample (default: 2443)")
    parser.add_argument("--supervised", type=int, default=16, help="supervised tokens per sample (default: 16)")
    parser.add_argument("--hidden_size", type=int, default=512, help="hidden size of the decoder (default: 512)")
    parser.add_argument("--way", choices=("full", "answer"), help="measure one variant in this process and print it")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "memory.json", help="result file (default: benchmarks/results/memory.json)"
    )
    args = parser.parse_args()
    if args.way:
        print(json.dumps(peak_bytes(args.way, args)))
        return
    found = {}
    for way in ("full", "answer"):
        command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--way", way]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if run.returncode:
            raise SystemExit(
                f"error: measuring {way!r} failed with exit code {run.returncode}; full logits require about 10 GB of memory"
            )
        found[way] = json.loads(run.stdout.splitlines()[-1])
    if abs(found["full"]["loss"] - found["answer"]["loss"]) > 1e-4 * found["full"]["loss"]:
        raise SystemExit(f"error: the two variants compute different losses: {found}")
    mib = {way: round(result["bytes"] / 2**20, 1) for way, result in found.items()}
    logits = args.samples * args.tokens * Phi3VConfig().vocab_size * 4 / 2**20
    times = found["full"]["bytes"] / found["answer"]["bytes"]
    print(f"peak memory of head and loss: {mib['answer']} MiB vs. {mib['full']} MiB with full logits (1/{times:.0f})")
    content = {
        "benchmark": "memory",
        "batch": {"samples": args.samples, "tokens": args.tokens, "supervised": args.supervised},
        "hidden_size": args.hidden_size,
        "peak_mib": mib,
        "mib_of_full_logits_alone": round(logits, 1),
        "times_less": times,
    }
    write_result(args.out, content)
    print(f"Wrote {display_path(args.out)}")


if __name__ == "__main__":
    main()
