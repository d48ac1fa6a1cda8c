"""Process-level utilities: flags, errors and messages, collectives, files, progress, the machine.

Imports nothing else from :mod:`common`; :mod:`~common.runtime.process` and :mod:`~common.runtime.parser` import only the
standard library, so that flags are checked before PyTorch is imported. Start reading at :func:`common.runtime.script.run`.
"""
