"""Checking and loading checkpoints, for training (freezing, LoRA, QLoRA) and for inference (full models, adapters).

May import :mod:`common.arguments`, :mod:`common.phi3v` and :mod:`common.runtime`; the only package that uses PEFT and
bitsandbytes. Start reading at
:func:`common.model.loading.load_model`.
"""
