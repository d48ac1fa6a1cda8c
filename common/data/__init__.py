"""From dataset rows to batches: sources, rows, conversations, images, samples, batch planning, collation, streaming.

May import :mod:`common.phi3v` and :mod:`common.runtime`; contains nothing about model weights or training. Start with
:mod:`common.data.conversations`, which describes the general format, then :mod:`common.data.samples`.
"""
