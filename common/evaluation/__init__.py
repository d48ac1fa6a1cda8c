"""Evaluation: batched generation over all processes, metrics, predictions.

May import :mod:`common.data`, :mod:`common.model`, :mod:`common.phi3v` and :mod:`common.runtime`. Start reading at
:func:`common.evaluation.generation.generate_answers`.
"""
