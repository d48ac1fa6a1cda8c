"""What a run leaves for people: ``run.json``, the model card, and the HTML report with its figures, curves and gallery.

May import :mod:`common.evaluation.metrics` and :mod:`common.runtime`; since it loads matplotlib and scikit-learn, it is
imported late and on the main process. Begin with :func:`common.report.page.write_report`; what a run directory holds is in
:mod:`common.report.run`.
"""
