"""Answers of a model and what they are worth: batched generation over all processes, metrics, predictions.

May import :mod:`common.data`, :mod:`common.model`, :mod:`common.phi3v` and :mod:`common.runtime`. Begin with
:func:`common.evaluation.generation.generate_answers`.
"""
