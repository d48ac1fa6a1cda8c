"""Checking and loading checkpoints, for training (freezing, LoRA, QLoRA) and for inference (full models, adapters).

May import :mod:`common.phi3v` and :mod:`common.runtime`; the only room that uses PEFT and bitsandbytes. Start reading at
:func:`common.model.loading.load_model`.
"""
