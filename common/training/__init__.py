"""A run from its start to its end: what is settled at the start, the Trainer, checkpoints, the memory estimate, DeepSpeed.

May import all other rooms, of :mod:`common.report` what is heavy only at the end of a run. Begin with
:func:`common.training.start.start` and :func:`common.training.trainer.build_trainer`, which the scripts call.
"""
