"""A run from its start to its end: settings, the Trainer, checkpoints, the memory estimate, DeepSpeed.

May import all other rooms, :mod:`common.report` only at the end of a run. Begin with :mod:`common.training.run`, whose
functions the scripts call, then :mod:`common.training.trainer`.
"""
