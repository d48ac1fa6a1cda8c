"""Images and official metrics of NLVR2 and Hateful Memes for lmms-eval; docs/evaluation.md explains the metrics."""

import ast

from PIL import Image
from scipy.special import expit

from common.evaluation.metrics import auroc, consistency, normalize_answer


def nlvr2_images(doc):
    stem = doc["identifier"].rpartition("-")[0]
    return [Image.open(f"data/nlvr2/images/dev/{stem}-img{side}.png") for side in (0, 1)]


def nlvr2_results(doc, results):
    expected = {"True": "yes", "False": "no"}[str(doc["label"])]
    correct = float(normalize_answer(results[0]) == expected)
    return {"accuracy": correct, "consistency": (doc["identifier"], correct)}


def nlvr2_consistency(items):
    return consistency(*zip(*items, strict=True))


def meme(doc):
    return [Image.open(f"data/hateful_memes/{doc['img']}")]


def meme_results(doc, results):
    # lmms-eval 0.7.3 passes results through its filters as text.
    loss_no, loss_yes = (ast.literal_eval(result)[0] if isinstance(result, str) else result[0] for result in results)
    p_yes = expit(loss_no - loss_yes)
    return {"auroc": (doc["label"], p_yes), "accuracy_by_likelihood": float((p_yes > 0.5) == bool(doc["label"]))}


def meme_auroc(items):
    return auroc(*zip(*items, strict=True))
