"""From rows of a data set to batches: conversations, pictures, sources, rows, samples, the plan of the batches, streaming.

May import :mod:`common.phi3v` and :mod:`common.runtime`; knows no model weights and no training. Begin with
:mod:`common.data.conversations`, which describes the general format, then :mod:`common.data.samples`.
"""
