"""The tasks' metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5


def normalise_answer(text: str, lower: bool = True) -> str:
    """Strip white space and full stops from an answer's ends, and lower-case it, as the published evaluation does."""
    text = text.strip().strip(".").strip()
    return text.lower() if lower else text


def anls(prediction: str, answers: Sequence[str], case_sensitive: bool = False) -> float:
    """Average normalized Levenshtein similarity of one prediction: the best over the accepted answers.

    Parameters
    ----------
    prediction : str
        What the model said.
    answers : sequence of str
        Accepted answers, at least one.
    case_sensitive : bool
        The form of the published recipe's tables: as written, but for white space and full stops at the ends of both sides.

    Returns
    -------
    float
        ``1 - NL`` where ``NL < 0.5``, else 0; NL is the Levenshtein distance divided by the longer length, white space
        folded and lower-cased. Source: Biten et al., Scene Text Visual Question Answering, ICCV 2019, eq. 1.
    """

    def compared(text: str) -> str:
        return normalise_answer(text, lower=False) if case_sensitive else " ".join(text.split()).lower()

    best = 0.0
    for answer in answers:
        distance = Levenshtein.normalized_distance(compared(prediction), compared(answer))
        if distance < ANLS_THRESHOLD:
            best = max(best, 1.0 - distance)
    return best


def accuracy(correct: Sequence[bool]) -> float:
    """Share of right answers."""
    return float(np.mean(correct))


def accuracy_per_class(classes: Sequence[str], correct: Sequence[bool]) -> dict[str, float]:
    """Share of right answers among the samples of each class, classes in alphabetical order."""
    groups = defaultdict(list)
    for name, right in zip(classes, correct, strict=True):
        groups[name].append(right)
    return {name: accuracy(groups[name]) for name in sorted(groups)}


def auroc(labels: Sequence[int], scores: Sequence[float]) -> float:
    """Area under the ROC curve, scikit-learn's; NaN if all labels are the same."""
    if len(set(labels)) < 2:
        return float("nan")
    from sklearn.metrics import roc_auc_score  # loads a second or two of libraries

    return float(roc_auc_score(labels, scores))


def consistency(sentences: Sequence[str], correct: Sequence[bool]) -> float:
    """Share of sentences that are right on all of their pairs of pictures (NLVR2's second metric).

    Parameters
    ----------
    sentences : sequence of str
        What names the sentence of each sample: its identifier without the field of the pair.
    correct : sequence of bool
        Whether each sample was answered right.
    """
    right = defaultdict(lambda: True)
    for sentence, is_right in zip(sentences, correct, strict=True):
        right[sentence] &= bool(is_right)
    return float(np.mean(list(right.values())))
