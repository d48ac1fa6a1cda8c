"""Code shared by the task scripts. A module may only import modules further down in this list.

training/     the steps of a run: the Trainer, checkpoints, the memory estimate
report/       run.json; the model card and the HTML report, which are imported only when needed
evaluation/   batched generation, metrics, predictions
model/        checking and loading checkpoints
data/         from dataset rows to batches
arguments.py  command-line flags
phi3v/        the model; importing it registers Phi-3-vision and Phi-3.5-vision with transformers
runtime/      process-level utilities: errors and messages, collectives, files, progress
"""

import logging

# bitsandbytes logs an error about a package that is not needed here. Every training process imports it if it is installed:
# transformers' Trainer imports PEFT, which imports it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
