"""A checkpoint, checked and loaded: to train (freezing, LoRA, QLoRA) or to answer (adapters and their base).

May import :mod:`common.phi3v` and :mod:`common.runtime`; the only room that knows PEFT and bitsandbytes. Begin with
:func:`common.model.loading.load_model`.
"""
