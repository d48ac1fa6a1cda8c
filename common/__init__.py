"""What the task scripts share, in eight rooms; imports go only down this list.

report/       what a run leaves for people: run.json, model card, HTML; imported late
training/     a run from start to end: the Trainer, checkpoints, the memory estimate
evaluation/   batched generation, metrics, predictions
model/        a checkpoint, checked and loaded
data/         rows to batches
arguments.py  the flags
phi3v/        the model itself
runtime.py    this process among others

Importing it registers Phi-3-vision and Phi-3.5-vision with transformers.
"""

import logging

from . import phi3v as phi3v

# bitsandbytes asks CPU users for a package that nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
