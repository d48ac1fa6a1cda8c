"""What a run documents: ``run.json``, the model card, and the HTML report with metrics, curves and sample gallery.

May import :mod:`common.data`, :mod:`common.evaluation.metrics`, :mod:`common.phi3v` and :mod:`common.runtime`. The pages
and the model card are imported late and only on the main process, because they load matplotlib.
Start reading at :func:`common.report.page.write_report`; :mod:`common.report.run` describes the run directory.
"""
