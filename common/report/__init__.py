"""The report of a run: its figures, curves, distributions and a gallery of samples, in one HTML file that needs nothing else.

A run directory holds what the training scripts write: `run.json`, `eval_before.json`, `eval_after.json`,
`trainer_state.json`, `train_results.json` and `gallery/<id>_<k>.jpg`. Any of them may be missing: the report shows what
there is and says what is not. What it shows depends on what the evaluations hold, not on the name of a task.
"""

from .gallery import save_gallery_images, select_gallery
from .page import write_comparison, write_report
from .run import FILES, Run, read_run

__all__ = ["FILES", "Run", "read_run", "save_gallery_images", "select_gallery", "write_comparison", "write_report"]
