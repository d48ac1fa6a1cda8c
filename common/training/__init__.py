"""A training run: its setup, the Trainer, checkpoints, the memory estimate, DeepSpeed.

May import all other packages; the heavy modules of :mod:`common.report` are imported only at the end of a run. Start reading at
:func:`common.training.start.start` and :func:`common.training.build.build_trainer`, which the scripts call.
"""
