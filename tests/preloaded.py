"""Imported once by the process that others are forked from, see forked.py."""

import gc
from importlib import import_module

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

for name in (
    "finetune_hf_trainer_docvqa",
    "deepspeed",
    "transformers.integrations.deepspeed",
    "common.report.page",
    "common.report.model_card",
    "forked",
):
    import_module(name)
get_checkpoint_conversion_mapping("phi3_v")  # compiles the regular expressions of all models
gc.freeze()  # a collection in a forked process does not visit these objects
