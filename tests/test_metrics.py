"""The metrics on examples calculated by hand."""

import math

import pytest

import finetune_hf_trainer_docvqa as docvqa
from common.evaluation.metrics import METRICS, accuracy, accuracy_per_class, anls, auroc, consistency, normalize_answer


@pytest.mark.parametrize(
    ("text", "lower", "plain"),
    [(" Yes.\n", True, "yes"), ("Yes . ", True, "yes"), ("U.S.A.", False, "U.S.A"), ("...", True, ""), ("1.5", True, "1.5")],
)
def test_answers_are_normalized(text, lower, plain):
    assert normalize_answer(text, lower) == plain


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("ab", ["ac"], 0),  # NL is 0.5: no longer counted
        ("abc", ["abd"], 1 - 1 / 3),
        ("kitten", ["dog", "sitting", "mitten"], 1 - 1 / 6),
        ("JUNE  3,\n1998", ["June 3, 1998"], 1),
        ("", ["June"], 0),
        ("June", ["a"], 0),
    ],
)
def test_anls(prediction, answers, score):
    assert anls(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("June", "june", 1 - 1 / 4),
        ("JUNE", "june", 0),
        ("June  3", "June 3", 1 - 1 / 7),  # inner white space counts
        (" SDN. BHD.\n", "SDN. BHD", 1),  # at the ends neither it nor full stops, on both sides
        ("$5", "$5.", 1),
        ("", "June", 0),
    ],
)
def test_anls_in_the_published_recipes_form(prediction, answer, score):
    assert anls(prediction, ["Neither", answer], case_sensitive=True) == pytest.approx(score)


@pytest.mark.parametrize(
    ("metric", "prediction", "answers", "score"),
    [
        ("exact", " June. ", ["May", "june"], 1),
        ("exact", "June 3", ["June"], 0),
        ("anls", "june", ["May", "June"], 1),
        ("relaxed", "1,040.00", ["$1000"], 1),
        ("relaxed", "1060", ["1000"], 0),
        ("relaxed", "-95 %", ["-100"], 1),
        ("relaxed", "0.01", ["0"], 0),
        ("relaxed", "1,5", ["15"], 0),  # a decimal comma
        ("relaxed", "Yes", ["yes."], 1),
        ("contains", "The total is $5.", ["$5"], 1),
        ("contains", "The total is 50.", ["5"], 0),
        ("contains", "One, two.", ["."], 0),
        ("contains", " . ", ["."], 1),
        ("contains", "In  NEW York, of course", ["new york"], 1),
        ("f1", "the red car", ["A red, fast car!"], 4 / 5),
        ("f1", "blue", ["red", "dark blue"], 2 / 3),
        ("f1", "no", ["yes"], 0),
    ],
)
def test_metrics_of_one_answer(metric, prediction, answers, score):
    assert METRICS[metric](prediction, answers) == pytest.approx(score)


def test_accuracy():
    assert accuracy([True, False, True, True]) == 0.75
    classes = ["Surfing", "Archery", "Surfing", "Archery", "Archery"]
    per_class = accuracy_per_class(classes, [1.0, 1.0, 0.0, 1.0, 0.0])
    assert per_class == {"Archery": pytest.approx(2 / 3), "Surfing": 0.5}
    assert list(per_class) == ["Archery", "Surfing"]


def test_auroc():
    # Of the four pairs of a positive and a negative, 0.35 < 0.4 alone is out of order.
    assert auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75
    assert auroc([0, 1, 1], [0.5, 0.5, 0.9]) == 0.75  # a tie counts half
    assert math.isnan(auroc([1, 1], [0.2, 0.3]))


def test_consistency():
    # By the official definition a sentence counts once, and only if right on all of its pairs.
    samples = ["dev-0-0-0", "dev-0-1-0", "dev-0-2-0", "dev-0-0-1", "dev-0-3-1", "dev-1-0-0"]
    assert consistency(samples, [1, 1, 0, 1, 1, 1]) == pytest.approx(2 / 3)
    assert consistency(samples, [0, 1, 0, 1, 0, 0]) == 0
    assert consistency(samples, [1] * 6) == 1


@pytest.mark.parametrize(
    ("full_train", "answer", "truth", "prediction", "score"),
    [
        (False, "SDN. BHD.", "SDN. BHD.", "SDN. BHD.", 1),
        (False, "$5.", "$5", "$5.", 2 / 3),
        (True, "$5.", "$5", "$5", 1),
        (True, "BHD..", "BHD.", "BHD.", 1),
    ],
)
def test_docvqa_removes_only_the_full_stop_of_its_training_data(full_train, answer, truth, prediction, score):
    row = {"id": "1", "question": "What?", "image": "a.png", "answers": [truth]}
    entry = docvqa.score(row, f" {answer}\n", full_train)
    assert (entry.id, entry.question, entry.prediction) == ("1", "What?", prediction)
    assert entry.score == pytest.approx(score)
    assert entry.more["score_case_sensitive"] == 1
