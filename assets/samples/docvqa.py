"""Document images with questions, in the layout of the official DocVQA release.

The documents are forms in a monospaced font with labels above their values. Answers are open-ended strings: all values in the
evaluation split are from a set of strings that neither the training split nor the pretraining data contains.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .page import COLUMNS, Page, write_json

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
FIRST_NAMES = ("Ana", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivan", "Jill", "Kai", "Lena", "Max", "Nora")
SYLLABLES = ["ba", "ber", "con", "dal", "den", "el", "far", "gan", "hol", "jen", "kor", "lin", "mar", "mon", "ner"]
SYLLABLES += ["or", "pel", "quin", "ras", "ren", "sal", "son", "tal", "ter", "um", "val", "ven", "wick", "xan", "zor"]
COMPANY_ENDINGS = ("Ltd", "Inc", "Co", "AG", "LLC")


def is_held_out(text: str) -> bool:
    """Whether a string is held out for evaluation: one in four is, and never occurs in training."""
    return zlib.crc32(text.encode()) % 4 == 0


def _word(rng: np.random.Generator, syllables: int) -> str:
    return "".join(SYLLABLES[i] for i in rng.integers(0, len(SYLLABLES), syllables)).capitalize()


def _draw_value(kind: str, rng: np.random.Generator) -> str:
    number = rng.integers
    if kind == "amount":
        sign = ("$", "$", "EUR ", "")[number(4)]
        return f"{sign}{number(1, 10 ** number(2, 5)):,}.{number(100):02d}"
    if kind == "date":
        day, month, year = number(1, 29), number(12), number(1980, 2030)
        forms = (f"{day} {MONTHS[month]} {year}", f"{year}-{month + 1:02d}-{day:02d}", f"{month + 1}/{day}/{year}")
        return forms[number(3)]
    if kind == "name":
        first = FIRST_NAMES[number(len(FIRST_NAMES))]
        return f"{first} {_word(rng, 2)[: 11 - len(first)]}"
    if kind == "company":
        return f"{_word(rng, 2)[:7]} {COMPANY_ENDINGS[number(len(COMPANY_ENDINGS))]}"
    if kind == "city":
        return _word(rng, 3)[:11]
    if kind == "phone":
        return f"{number(10, 100)} {number(100, 1000)} {number(10000):04d}"
    letters = "".join(chr(65 + i) for i in number(0, 26, number(1, 4)))
    return f"{letters}{('-', '', '/')[number(3)]}{number(1000, 10 ** number(4, 7) + 1000)}"


VALUE_KINDS = ("amount", "date", "name", "company", "city", "phone", "code")


def draw_value(kind: str, rng: np.random.Generator, held_out: bool) -> str:
    """Draw an open-ended string of at most 11 characters.

    Parameters
    ----------
    kind
        One of VALUE_KINDS.
    rng
        Source of randomness.
    held_out
        Draw from the strings that are held out for evaluation, or from the others.
    """
    while True:
        value = _draw_value(kind, rng)
        if len(value) <= 11 and is_held_out(value) == held_out:
            return value


@dataclass(frozen=True)
class Field:
    """A field of a form: the kind of its value, its label, and questions about it."""

    kind: str
    label: str
    questions: tuple[str, ...]


TITLES = ("INVOICE", "RECEIPT", "ORDER FORM", "DELIVERY NOTE", "STATEMENT", "CONTRACT")
FIELDS = (
    Field("code", "INVOICE NO", ("What is the invoice number?", "Which invoice number is given?")),
    Field("date", "DATE", ("What is the date of this form?", "Which date is given?")),
    Field("date", "DUE", ("When is the payment due?", "What is the due day?")),
    Field("amount", "TOTAL", ("What is the total amount?", "How much is the total?")),
    Field("amount", "TAX", ("How much is the tax?", "What is the tax amount?")),
    Field("name", "CUSTOMER", ("Who is the customer?", "What is the name of the customer?")),
    Field("name", "CLERK", ("Who is the clerk?", "What is the name of the clerk?")),
    Field("company", "VENDOR", ("Who is the vendor?", "Which company is the vendor?")),
    Field("city", "SHIP TO", ("Where does it ship to?", "To which city does it ship?")),
    Field("phone", "TEL", ("What is the telephone number?", "Which telephone number is given?")),
)


def draw_form(rng: np.random.Generator, held_out: bool) -> tuple[Page, dict[Field, str]]:
    """Draw a form with five to eight fields; return it with the values by field."""
    page = Page()
    title = TITLES[rng.integers(len(TITLES))]
    page.write(0, 2 * int(rng.integers(0, (COLUMNS - len(title)) // 2 + 1)), title)
    rows = int(rng.integers(3, 5))
    pitch = 2 if rows == 4 else int(rng.integers(2, 4))
    first = int(rng.integers(1, 13 - pitch * rows if pitch == 2 else 3))
    page.rules = [first - 1] if rng.random() < 0.5 else [first + pitch * i - 1 for i in range(rows)]
    places = [(first + pitch * i, column) for i in range(rows) for column in (0, 12)]
    count = min(len(places), int(rng.integers(5, 9)))
    chosen = [FIELDS[i] for i in rng.choice(len(FIELDS), count, replace=False)]
    values: dict[Field, str] = {}
    for field, place in zip(chosen, rng.permutation(len(places))[:count], strict=True):
        line, column = places[place]
        while (value := draw_value(field.kind, rng, held_out)) in values.values():
            pass
        page.write(line, column, field.label)
        page.write(line + 1, column, value)
        values[field] = value
    return page, values


def draw_split(out_dir: Path, split: str, documents: int, rng: np.random.Generator, questions_each: int = 4) -> None:
    """Draw one split: `documents/<split>_<number>.png` and `<split>_v1.0_withQT.json`."""
    rows: list[dict] = []
    (out_dir / "documents").mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        page, values = draw_form(rng, held_out=split == "val")
        name = f"documents/{split}_{number:04d}.png"
        page.draw(rng).save(out_dir / name, compress_level=1)
        fields = list(values)
        for i in rng.choice(len(fields), questions_each, replace=False):
            question = fields[i].questions[rng.integers(len(fields[i].questions))]
            rows.append(
                {
                    "questionId": len(rows),
                    "question": question,
                    "question_types": ["form"],
                    "image": name,
                    "docId": number,
                    "answers": [values[fields[i]]],
                    "data_split": split,
                }
            )
    dataset = {"dataset_name": "tiny forms", "dataset_version": "1.0", "dataset_split": split, "data": rows}
    write_json(out_dir / f"{split}_v1.0_withQT.json", dataset)
