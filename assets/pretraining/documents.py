"""Text pages for pretraining, with simple questions that are worded unlike the DocVQA sample data.

Answers never contain the strings that the DocVQA sample data holds out for evaluation.
"""

from typing import NamedTuple

import numpy as np

from ..samples.docvqa import FIELDS, VALUE_KINDS, draw_form, draw_value, is_held_out
from ..samples.page import COLUMNS, LINES, Page

PRINTABLE = tuple(chr(i) for i in range(33, 127))
# fmt: off
LABEL_WORDS = (
    "account", "address", "agent", "amount", "area", "article", "batch", "bill", "branch", "buyer", "card",
    "case", "cashier", "category", "centre", "city", "class", "client", "code", "company", "contact",
    "contract", "country", "course", "credit", "customer", "date", "day", "deadline", "delivery", "department",
    "deposit", "desk", "discount", "district", "document", "due", "email", "end", "entry", "event", "exam",
    "expiry", "fax", "fee", "file", "firm", "flight", "floor", "from", "gate", "grade", "grand", "group",
    "guest", "hotel", "hour", "house", "id", "invoice", "issued", "issuer", "item", "job", "journey", "kind",
    "licence", "line", "load", "lot", "manager", "member", "method", "mobile", "month", "name", "net", "no",
    "number", "office", "order", "origin", "owner", "page", "paid", "parcel", "part", "party", "patient", "pay",
    "phone", "place", "plan", "policy", "port", "position", "price", "product", "project", "purchase",
    "quantity", "rate", "receipt", "ref", "region", "rent", "report", "room", "route", "sale", "seat", "seller",
    "sender", "service", "ship", "shop", "site", "size", "staff", "start", "state", "status", "store", "street",
    "sum", "supplier", "tax", "team", "tel", "term", "ticket", "time", "title", "to", "total", "town", "train",
    "type", "unit", "until", "user", "valid", "value", "vendor", "visit", "visitor", "voucher", "ward",
    "weight", "year",
)
# fmt: on
COMMON_LABELS = tuple(field.label for field in FIELDS)
# Questions about the values of a form, by position relative to the label or only by label.
WORDINGS = {
    "right": ("Right of {}?", "Text right of {}?", "{}, to the right?"),
    "below": ("Below {}?", "Text below {}?", "{}, one down?"),
    "value": ("Value of {}?", "{}?", "Read {}.", "Entry for {}?", "{} ="),
}
NOUNS = {
    "INVOICE NO": "invoice number",
    "DATE": "date",
    "DUE": "due day",
    "TOTAL": "total amount",
    "TAX": "tax",
    "CUSTOMER": "customer",
    "CLERK": "clerk",
    "VENDOR": "vendor",
    "SHIP TO": "city to ship to",
    "TEL": "telephone number",
}
REQUESTS = (
    "Tell me the {}.",
    "Please read out the {} that is printed here.",
    "I need the {} of this paper.",
    "Can you find the {}?",
    "Which {} does it show?\nUse a sentence.",
    "What do you see as {}?",
    "Look up the {}, please.\nTake your time.",
    "And the {}?",
)
SENTENCES = ("It says {} on this paper.", "The paper shows {} for that.", "You can read {} in the form.")


class Turn(NamedTuple):
    """A question and its answer.

    Attributes
    ----------
    quote_start
        Position in the answer where the text from the page begins.
    facts
        Facts that determine the answer, as numbers, if they are hard to learn; see `shapes.FACTS`.
    """

    question: str
    answer: str
    quote_start: int = 0
    facts: tuple[int, ...] = ()


def pick(rng: np.random.Generator, options):
    """Draw one of the options."""
    return options[rng.integers(len(options))]


def _label(rng: np.random.Generator) -> str:
    """Draw a label of at most 11 characters: a common label, other words, or random letters."""
    chance = rng.random()
    if chance < 0.5:
        text = pick(rng, COMMON_LABELS)
        if chance < 0.35:
            return text
    elif chance < 0.65:
        text = "".join(pick(rng, PRINTABLE[32:58]) for _ in range(rng.integers(3, 9))).lower()
    else:
        text = pick(rng, LABEL_WORDS)
        if rng.random() < 0.5:
            text = f"{text} {pick(rng, LABEL_WORDS)}"
    text = text[:11].strip()
    return (text.upper(), text.capitalize(), text.title(), text)[rng.integers(4)]


def _value(rng: np.random.Generator) -> str:
    if rng.random() < 0.75:
        return draw_value(pick(rng, VALUE_KINDS), rng, held_out=False)
    while True:
        pool = (PRINTABLE[16:26], PRINTABLE[32:58], PRINTABLE[64:90], PRINTABLE)[rng.integers(4)]
        text = "".join(pick(rng, pool) for _ in range(rng.integers(3, 12)))
        if not is_held_out(text):
            return text


def form(rng: np.random.Generator, lines: int, turns: int) -> tuple[Page, list[Turn]]:
    """Draw a form with the given number of lines, and questions whose answers are quoted from it.

    Labels are left of their values or above them, in one or two columns.
    """
    page, seen, questions = Page(), set(), []

    def fresh(draw):
        while True:
            text = draw(rng)
            if text.lower() not in seen:
                seen.add(text.lower())
                return text

    line = int(rng.integers(0, 2)) if lines > 3 else 0
    if line == 1:
        title = fresh(_value)
        page.write(0, 2 * int(rng.integers(0, (COLUMNS - len(title)) // 2 + 1)), title)
    style = rng.choice(3, p=(0.3, 0.15, 0.55))
    while line < lines:
        kind = style if rng.random() < 0.7 else rng.integers(3)
        if kind == 0 or line + 1 >= lines:  # a label with its value on the right
            label, value = fresh(_label), fresh(_value)
            colon = ":" if len(label) < 11 and rng.random() < 0.5 else ""
            start = (len(label) + len(colon) + 2) // 2 * 2
            gap = 2 * int(rng.integers(0, (COLUMNS - start - len(value)) // 2 + 1))
            page.write(line, 0, label + colon)
            page.write(line, start + gap, value)
            questions += [(label, value, "right"), (label, value, "value")]
            line += 1
        else:  # labels above their values
            columns = (0,) if kind == 1 and rng.random() < 0.5 else (0, 12)
            if len(columns) == 1:
                columns = (2 * int(rng.integers(0, 7)),)
            for column in columns:
                if len(columns) == 2 and rng.random() < 0.15:
                    continue
                label, value = fresh(_label), fresh(_value)
                page.write(line, column, label)
                page.write(line + 1, column, value)
                questions += [(label, value, "below"), (label, value, "value")]
            line += 2
        if rng.random() < 0.15:
            line += 1
        elif rng.random() < 0.2 and line < LINES:
            page.rules.append(line - 1)
    grid = page.grid()
    # An answer never appears in an earlier turn, so that the model has to find it on the page.
    asked: list[Turn] = []
    for label, value, relation in (questions[i] for i in rng.permutation(len(questions))):
        if len(asked) == turns:
            break
        # Small pages come first in training; they quote the label unchanged, in a single wording.
        plain = lines < 6
        if rng.random() < 0.1:
            row = int(rng.integers(lines))
            question, answer = f"Line {row + 1}?", " ".join("".join(grid[row]).split())
        elif not plain and rng.random() < 0.12:
            question, answer = pick(rng, ("Label of {}?", "What labels {}?")).format(value), label
        else:
            quoted = label if plain else (label, label, label.lower(), label.upper())[rng.integers(4)]
            wordings = WORDINGS[relation]
            question, answer = wordings[0 if plain else rng.integers(len(wordings))].format(quoted), value
        if answer and not is_held_out(answer) and not any(answer in turn.question + turn.answer for turn in asked):
            asked.append(Turn(question, answer))
    return page, asked


def invoice(rng: np.random.Generator, turns: int) -> tuple[Page, list[Turn]]:
    """Draw a form as in the DocVQA sample data, with questions about its fields.

    Questions that quote a label are answered with the value; questions in sentences are answered with a sentence, which
    finetuning on DocVQA has to change.
    """
    page, values = draw_form(rng, held_out=False)
    asked: list[Turn] = []
    for field in (list(values)[i] for i in rng.permutation(len(values))[:turns]):
        if rng.random() < 0.4:
            label = field.label if rng.random() < 0.5 else field.label.lower()
            asked.append(Turn(pick(rng, WORDINGS["below"] + WORDINGS["value"]).format(label), values[field]))
        else:
            sentence = pick(rng, SENTENCES)
            question = pick(rng, REQUESTS).format(NOUNS[field.label])
            asked.append(Turn(question, sentence.format(values[field]), sentence.index("{")))
    return page, asked


def reading(rng: np.random.Generator, lines: int) -> tuple[Page, list[Turn]]:
    """Draw lines of random words, all of which are to be read."""
    page, texts = Page(), []
    for line in range(lines):
        column = 2 * int(rng.integers(0, 3))
        pool = (PRINTABLE[16:26], PRINTABLE[32:58], PRINTABLE[64:90], PRINTABLE)[rng.integers(4)]
        length = int(rng.integers(8, COLUMNS - column + 1))
        text = "".join(pick(rng, pool) if rng.random() < 0.88 else " " for _ in range(length))
        text = " ".join(text.split()) or "x"
        page.write(line, column, text)
        texts.append(text)
    return page, [Turn("Read all.", "\n".join(texts))]


def type_specimen(rng: np.random.Generator) -> Page:
    """Draw a page densely filled with random characters."""
    page, density = Page(), pick(rng, (1.0, 0.75, 0.4))
    for line in range(LINES):
        if rng.random() > density + 0.2:
            continue
        column = 0
        while column < COLUMNS:
            length = min(int(rng.integers(1, 13)), COLUMNS - column)
            if rng.random() < density:
                pool = pick(rng, (PRINTABLE, PRINTABLE, PRINTABLE[32:58], PRINTABLE[64:90], "0123456789.,$/-:"))
                page.write(line, column, "".join(pick(rng, pool) for _ in range(length)))
            column += length + (int(rng.integers(0, 3)) if density < 1 else 0)
    if rng.random() < 0.4:
        page.rules = [int(i) for i in rng.choice(LINES - 1, 3, replace=False)]
    return page
