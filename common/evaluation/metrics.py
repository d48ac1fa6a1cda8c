"""The metrics of the tasks."""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05


def normalize_answer(text: str, lower: bool = True) -> str:
    """Strip whitespace and periods from both ends of an answer, and lowercase it, as the published evaluation does."""
    text = text.strip().strip(".").strip()
    return text.lower() if lower else text


def anls(prediction: str, answers: Sequence[str], case_sensitive: bool = False) -> float:
    """Average normalized Levenshtein similarity of one prediction: the maximum over the reference answers.

    Parameters
    ----------
    prediction : str
        Answer of the model.
    answers : sequence of str
        Reference answers, at least one.
    case_sensitive : bool
        Compare as in the tables of the published recipe: case-sensitively, after stripping whitespace and periods.

    Returns
    -------
    float
        ``1 - NL`` if ``NL < 0.5``, otherwise 0. NL is the Levenshtein distance divided by the longer length, after collapsing
        whitespace and lowercasing. Source: Biten et al., Scene Text Visual Question Answering, ICCV 2019, eq. 1.
    """

    def compared(text: str) -> str:
        return normalize_answer(text, lower=False) if case_sensitive else " ".join(text.split()).lower()

    best = 0.0
    for answer in answers:
        distance = Levenshtein.normalized_distance(compared(prediction), compared(answer))
        if distance < ANLS_THRESHOLD:
            best = max(best, 1.0 - distance)
    return best


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if a prediction equals a reference answer, ignoring case, and whitespace and periods at both ends; otherwise 0."""
    return float(normalize_answer(prediction) in map(normalize_answer, answers))


def relaxed(prediction: str, answers: Sequence[str]) -> float:
    """1 if a prediction is a number that deviates from a reference answer by at most 5 %, or equals it otherwise.

    Thousands separators, currency and percent signs are ignored. Source: Masry et al., ChartQA, Findings of ACL 2022.
    """
    found = _number(prediction)
    for answer in answers:
        expected = _number(answer)
        if found is not None and expected is not None and abs(found - expected) <= RELAXED_TOLERANCE * abs(expected):
            return 1.0
    return exact(prediction, answers)


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1 if a prediction contains a reference answer as whole words, ignoring case and whitespace; otherwise 0."""
    text = " ".join(prediction.casefold().split())
    words = (" ".join(normalize_answer(answer).casefold().split()) for answer in answers)
    # An answer of punctuation only has no words; every prediction would contain it.
    return float(any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) if answer else text in answers for answer in words))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 score of the words of a prediction: the maximum over the reference answers.

    Case, punctuation and English articles are ignored. Source: Rajpurkar et al., SQuAD, EMNLP 2016.
    """
    found, best = _words(prediction), 0.0
    for answer in answers:
        expected = _words(answer)
        shared = (found & expected).total()
        total = found.total() + expected.total()
        best = max(best, 2 * shared / total if total else 1.0)
    return best


def _number(text: str) -> float | None:
    """Read a number such as ``$1,234.50`` or ``12 %``; None if the text is none."""
    text = re.sub(r"[\s$€£¥%]|,(?=\d{3}(\D|$))", "", normalize_answer(text))
    return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text) else None


def _words(text: str) -> Counter[str]:
    words = re.sub(f"[{re.escape(string.punctuation)}]", "", text.lower()).split()
    return Counter(word for word in words if word not in ("a", "an", "the"))


# Scores of one answer, from 0 to 1, which ``--metric`` selects by name.
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "anls": anls,
    "relaxed": relaxed,
    "contains": contains,
    "f1": f1,
}


def accuracy(correct: Sequence[float]) -> float:
    """Share of correct answers."""
    return float(np.mean(correct))


def accuracy_per_class(classes: Sequence[str], correct: Sequence[float]) -> dict[str, float]:
    """Share of correct answers for each class, with classes in alphabetical order."""
    groups = defaultdict(list)
    for name, is_correct in zip(classes, correct, strict=True):
        groups[name].append(is_correct)
    return {name: accuracy(groups[name]) for name in sorted(groups)}


def auroc(labels: Sequence[int], scores: Sequence[float]) -> float:
    """Area under the ROC curve, computed by scikit-learn; NaN if all labels are equal."""
    if len(set(labels)) < 2:
        return float("nan")
    from sklearn.metrics import roc_auc_score  # imported here because it takes one to two seconds

    return float(roc_auc_score(labels, scores))


def consistency(identifiers: Sequence[str], correct: Sequence[float]) -> float:
    """Share of sentences that are answered correctly for all of their image pairs (NLVR2's second metric).

    Parameters
    ----------
    identifiers : sequence of str
        NLVR2's identifier of each sample: split, set, pair and sentence, joined by hyphens.
    correct : sequence of bool
        Whether each sample was answered correctly.
    """
    all_correct: dict[tuple[str, ...], bool] = defaultdict(lambda: True)
    for identifier, is_correct in zip(identifiers, correct, strict=True):
        split, set_number, _, sentence = identifier.split("-")
        all_correct[split, set_number, sentence] &= bool(is_correct)
    return float(np.mean(list(all_correct.values())))
