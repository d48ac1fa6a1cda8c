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

The checkpoint in the repository was made by this script as it stands, with --bf16 and all else as by default: 119 minutes on
two cores of an AMD EPYC (torch 2.13.0, transformers 5.23.0), some twenty of them beside other work. At its end the answers'
first characters from the page were right for 100 % of the documents' plain questions, 99 % of verdicts on two pictures, and
100 % of titles of a motion.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.distributed as dist

from common.phi3v import Phi3VForCausalLM

from .pretraining.batches import LOOKUP_KINDS, SHAPE_KINDS
from .pretraining.model import build, save
from .pretraining.stages import train_decoder, train_last, train_on, train_together, train_tower

PROCESSES = 2


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
