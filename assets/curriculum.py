"""What the tiny checkpoint is pretrained on: pages and shapes with plain questions, in other words than the sample tasks'.

The answers are drawn from the strings that the DocVQA sample does not hold out for evaluation.
"""

import numpy as np

from .samples.docvqa import FIELDS, VALUE_KINDS, draw_form, draw_value, is_held_out
from .samples.page import COLOURS, COLUMNS, LINES, SHAPES, Page, Shape

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
# How a form's values are asked for: by where they stand, or just by their label.
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
# A question, its answer, and where in the answer the text from the page begins (if not at once).
Turns = list[tuple[str, str] | tuple[str, str, int]]


def _pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def _label(rng: np.random.Generator) -> str:
    """Draw a label of at most 11 characters: one that is on most forms, other words, or random letters."""
    chance = rng.random()
    if chance < 0.5:
        text = _pick(rng, COMMON_LABELS)
        if chance < 0.35:
            return text
    elif chance < 0.65:
        text = "".join(_pick(rng, PRINTABLE[32:58]) for _ in range(rng.integers(3, 9))).lower()
    else:
        text = _pick(rng, LABEL_WORDS)
        if rng.random() < 0.5:
            text = f"{text} {_pick(rng, LABEL_WORDS)}"
    text = text[:11].strip()
    return (text.upper(), text.capitalize(), text.title(), text)[rng.integers(4)]


def _value(rng: np.random.Generator) -> str:
    if rng.random() < 0.75:
        return draw_value(_pick(rng, VALUE_KINDS), rng, held_out=False)
    while True:
        pool = (PRINTABLE[16:26], PRINTABLE[32:58], PRINTABLE[64:90], PRINTABLE)[rng.integers(4)]
        text = "".join(_pick(rng, pool) for _ in range(rng.integers(3, 12)))
        if not is_held_out(text):
            return text


def form(rng: np.random.Generator, lines: int, turns: int) -> tuple[Page, Turns]:
    """Draw a form of the given number of lines with questions that quote what is printed on it.

    Labels stand left of their values or above them, in one column or two.
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
        if kind == 0 or line + 1 >= lines:  # a label and its value beside it
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
    # Nothing is asked for twice in a conversation: the answer shall come from the page, not from an earlier turn.
    asked: Turns = []
    for label, value, relation in (questions[i] for i in rng.permutation(len(questions))):
        if len(asked) == turns:
            break
        # Small pages come first, and there the label is quoted as it stands in one form of words.
        plain = lines < 6
        if rng.random() < 0.1:
            row = int(rng.integers(lines))
            question, answer = f"Line {row + 1}?", " ".join("".join(grid[row]).split())
        elif not plain and rng.random() < 0.12:
            question, answer = _pick(rng, ("Label of {}?", "What labels {}?")).format(value), label
        else:
            quoted = label if plain else (label, label, label.lower(), label.upper())[rng.integers(4)]
            wordings = WORDINGS[relation]
            question, answer = wordings[0 if plain else rng.integers(len(wordings))].format(quoted), value
        if answer and not is_held_out(answer) and not any(answer in "".join(turn) for turn in asked):
            asked.append((question, answer))
    return page, asked


def invoice(rng: np.random.Generator, turns: int) -> tuple[Page, Turns]:
    """Draw a form as the DocVQA sample has them, with questions about its fields.

    Questions that quote a label get the bare value; questions in sentences get a sentence, in which finetuning on DocVQA finds
    something to change.
    """
    page, values = draw_form(rng, held_out=False)
    asked: Turns = []
    for field in (list(values)[i] for i in rng.permutation(len(values))[:turns]):
        if rng.random() < 0.4:
            label = field.label if rng.random() < 0.5 else field.label.lower()
            asked.append((_pick(rng, WORDINGS["below"] + WORDINGS["value"]).format(label), values[field]))
        else:
            sentence = _pick(rng, SENTENCES)
            asked.append((_pick(rng, REQUESTS).format(NOUNS[field.label]), sentence.format(values[field]), sentence.index("{")))
    return page, asked


def reading(rng: np.random.Generator, lines: int) -> tuple[Page, Turns]:
    """Draw lines of random words, to be read from the first to the last."""
    page, texts = Page(), []
    for line in range(lines):
        column = 2 * int(rng.integers(0, 3))
        pool = (PRINTABLE[16:26], PRINTABLE[32:58], PRINTABLE[64:90], PRINTABLE)[rng.integers(4)]
        length = int(rng.integers(8, COLUMNS - column + 1))
        text = "".join(_pick(rng, pool) if rng.random() < 0.88 else " " for _ in range(length))
        text = " ".join(text.split()) or "x"
        page.write(line, column, text)
        texts.append(text)
    return page, [("Read all.", "\n".join(texts))]


def type_specimen(rng: np.random.Generator) -> Page:
    """Draw a page densely filled with random characters."""
    page, density = Page(), _pick(rng, (1.0, 0.75, 0.4))
    for line in range(LINES):
        if rng.random() > density + 0.2:
            continue
        column = 0
        while column < COLUMNS:
            length = min(int(rng.integers(1, 13)), COLUMNS - column)
            if rng.random() < density:
                pool = _pick(rng, (PRINTABLE, PRINTABLE, PRINTABLE[32:58], PRINTABLE[64:90], "0123456789.,$/-:"))
                page.write(line, column, "".join(_pick(rng, pool) for _ in range(length)))
            column += length + (int(rng.integers(0, 3)) if density < 1 else 0)
    if rng.random() < 0.4:
        page.rules = [int(i) for i in rng.choice(LINES - 1, 3, replace=False)]
    return page


def _scatter(rng: np.random.Generator, count: int) -> Page:
    """Draw `count` shapes at different places of a 4 × 4 grid."""
    kinds, colours = rng.choice(SHAPES, 3, replace=False), rng.choice(list(COLOURS), 3, replace=False)
    shapes = [
        Shape(str(_pick(rng, kinds)), str(_pick(rng, colours)), 1 + 3 * (i // 4), 1 + 3 * (i % 4), rng.uniform(16, 34))
        for i in map(int, rng.choice(16, count, replace=False))
    ]
    return Page(shapes=shapes)


def _wanted(rng: np.random.Generator, pages: list[Page]) -> tuple[str, callable]:
    """Draw words for some shapes, mostly such as are on the pages, and the test for them."""
    seen = [shape for page in pages for shape in page.shapes] * 3
    shape = _pick(rng, seen + [Shape(str(_pick(rng, SHAPES)), str(_pick(rng, list(COLOURS))), 0, 0, 0)])
    form = rng.integers(4)
    if form == 0:
        return shape.kind, lambda other: other.kind == shape.kind
    if form == 1:
        return f"{shape.colour} shape", lambda other: other.colour == shape.colour
    if form == 2:
        return "shape", lambda other: True
    return f"{shape.colour} {shape.kind}", lambda other: (other.kind, other.colour) == (shape.kind, shape.colour)


def scene(rng: np.random.Generator, turns: int) -> tuple[list[Page], Turns]:
    """Draw a picture of shapes with questions about number, kind, colour and place."""
    page, asked = _scatter(rng, int(rng.integers(1, 7))), []
    while len(asked) < turns:
        shape, question = _pick(rng, page.shapes), rng.integers(5)
        if question == 0:
            words, test = _wanted(rng, [page])
            asked.append((f"How many {words}s?", str(sum(map(test, page.shapes)))))
        elif question == 1:
            words, test = _wanted(rng, [page])
            asked.append((f"Any {words}?", "present" if any(map(test, page.shapes)) else "absent"))
        elif question == 2 and sum(other.kind == shape.kind for other in page.shapes) == 1:
            asked.append((f"Colour of the {shape.kind}?", shape.colour))
        elif question == 3 and sum(other.colour == shape.colour for other in page.shapes) == 1:
            asked.append((f"What is {shape.colour}?", shape.kind))
        elif question == 4:
            asked.append((f"At row {shape.row // 3 + 1}, column {shape.column // 3 + 1}?", f"{shape.colour} {shape.kind}"))
    return [page], asked


def pair(rng: np.random.Generator, turns: int) -> tuple[list[Page], Turns]:
    """Draw two pictures of shapes with questions that compare them."""
    pages, asked = [_scatter(rng, int(rng.integers(1, 6))) for _ in range(2)], []
    for _ in range(turns):
        words, test = _wanted(rng, pages)
        first, second = (sum(map(test, page.shapes)) for page in pages)
        question = rng.integers(3)
        if question == 0:
            answer = (("neither", "second"), ("first", "both"))[first > 0][second > 0]
            asked.append((f"Which picture has a {words}?", answer))
        elif question == 1:
            answer = "first" if first > second else "second" if second > first else "equal"
            asked.append((f"Where are more {words}s?", answer))
        else:
            asked.append((f"Count the {words}s in each.", f"{first}, {second}"))
    return pages, asked


def captioned(rng: np.random.Generator) -> tuple[list[Page], Turns]:
    """Draw a large shape with a line of words that names it, or another one."""
    colour, kind = str(_pick(rng, list(COLOURS))), str(_pick(rng, SHAPES))
    named = [colour, kind]
    for i, options in enumerate((list(COLOURS), SHAPES)):
        if rng.random() < 0.3:
            named[i] = str(_pick(rng, options))
    line = int(_pick(rng, (0, 1, 9, 10, 11)))
    row = int(rng.integers(3, 7)) if line > 1 else int(rng.integers(5, 9))
    page = Page(shapes=[Shape(kind, colour, row, int(rng.integers(3, 9)), rng.uniform(35, 65))])
    before = _pick(rng, LABEL_WORDS) + " " if rng.random() < 0.7 else ""
    text = f"{before}{named[0]} {named[1]}"
    text = (text[-24:].upper(), text[-24:])[rng.integers(2)]
    page.write(line, int(rng.integers(0, COLUMNS - len(text) + 1)), text)
    turns = [
        ("Words and shape?", "they agree" if named == [colour, kind] else "they differ"),
        ("Drawn?", f"{colour} {kind}"),
        ("Written?", f"{named[0]} {named[1]}"),
        ("Colours?", "same" if named[0] == colour else "other"),
    ]
    return [page], [turns[i] for i in rng.permutation(4)[:3]]


def motion(rng: np.random.Generator, frames: int = 3) -> tuple[list[Page], Turns]:
    """Draw the frames of one moving shape with questions about it."""
    name, (down, right) = _pick(
        rng, (("left", (0, -1)), ("right", (0, 1)), ("up", (-1, 0)), ("down", (1, 0)), ("nowhere", (0, 0)))
    )
    step, size = int(rng.integers(1, 4)), rng.uniform(18, 45)
    colour, kind = str(_pick(rng, list(COLOURS))), str(_pick(rng, SHAPES))
    reach = step * (frames - 1)
    row, column = (int(rng.integers(1 + reach * (way < 0), 11 - reach * (way > 0))) for way in (down, right))
    pages = [Page(shapes=[Shape(kind, colour, row + down * step * i, column + right * step * i, size)]) for i in range(frames)]
    return pages, [("Which way does it go?", name), ("What is it?", f"{colour} {kind}")]
