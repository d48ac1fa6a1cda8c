"""Pictures of shapes that the tiny checkpoint is pretrained on, with questions in other words than the sample tasks'."""

import numpy as np

from ..samples.page import COLOURS, COLUMNS, SHAPES, Page, Shape
from .documents import LABEL_WORDS, Turn, pick

ALL_COLOURS = tuple(COLOURS)
# What a verdict follows from: colour and kind that words name, and those of the one shape in each picture; each is a number
# below FACT_VALUES, or NO_FACT.
FACTS = ("named colour", "named kind", "first colour", "first kind", "second colour", "second kind")
NOT_NAMED, FACT_VALUES, NO_FACT = 8, 9, -100
SIDES = (("left", "first"), ("right", "second"))
# What a question can ask a verdict in, by truth: never the words of the sample tasks, which finetuning is to teach.
VERDICTS = (("false", "true"), ("wrong", "right"), ("mistaken", "correct"), ("bad", "good"))
# Statements about one picture, and about two.
IN_IT = ("There is a {thing}", "It has a {thing}", "A {thing} is drawn", "One sees a {thing}")
ON_SIDE = (
    "The {side} {noun} has a {thing}",
    "A {thing} is in the {side} {noun}",
    "There is a {thing} in the {side} {noun}",
    "The {side} {noun} contains a {thing}",
)
ON_BOTH = ("Both {noun}s have a {thing}", "A {thing} is in both {noun}s", "Both {noun}s contain a {thing}")
ON_ONE_ONLY = ("Only the {side} {noun} has a {thing}", "A {thing} is in the {side} {noun} only")
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "nowhere": (0, 0)}
AGREEMENT = ("Words and shape?", "Does it show what it says?", "Are the words about what is drawn?", "Is the caption in order?")


def _scatter(rng: np.random.Generator, count: int) -> Page:
    """Draw `count` shapes at different places of a 4 × 4 grid."""
    kinds, colours = rng.choice(SHAPES, 3, replace=False), rng.choice(ALL_COLOURS, 3, replace=False)
    shapes = [
        Shape(str(pick(rng, kinds)), str(pick(rng, colours)), 1 + 3 * (i // 4), 1 + 3 * (i % 4), rng.uniform(16, 34))
        for i in map(int, rng.choice(16, count, replace=False))
    ]
    return Page(shapes=shapes)


def _single(rng: np.random.Generator) -> Page:
    """Draw one shape anywhere."""
    place, size = rng.integers(2, 10, 2), rng.uniform(18, 60)
    return Page(shapes=[Shape(pick(rng, SHAPES), pick(rng, ALL_COLOURS), int(place[0]), int(place[1]), size)])


def _wanted(rng: np.random.Generator, pages: list[Page]) -> tuple[str, str, str]:
    """Draw words for some shapes that are on the pages, or nearly so; with their colour and kind, empty where not named."""
    shape = pick(rng, [shape for page in pages for shape in page.shapes])
    colour = shape.colour if rng.random() < 0.75 else pick(rng, ALL_COLOURS)
    kind = shape.kind if rng.random() < 0.75 else pick(rng, SHAPES)
    form = rng.integers(5)
    if form == 0:
        return kind, "", kind
    if form == 1:
        return f"{colour} shape", colour, ""
    return f"{colour} {kind}", colour, kind


def _count(page: Page, colour: str, kind: str) -> int:
    return sum(colour in ("", shape.colour) and kind in ("", shape.kind) for shape in page.shapes)


def _facts(colour: str, kind: str, pages: list[Page]) -> tuple[int, ...]:
    """Give FACTS as numbers, for pages of one shape each."""
    shapes = [(colour, kind), *((page.shapes[0].colour, page.shapes[0].kind) for page in pages)]
    numbers = []
    for colour, kind in shapes:
        numbers.append(ALL_COLOURS.index(colour) if colour else NOT_NAMED)
        numbers.append(SHAPES.index(kind) if kind else NOT_NAMED)
    return (*numbers, *[NO_FACT] * (len(FACTS) - len(numbers)))


def scene(rng: np.random.Generator, turns: int) -> tuple[list[Page], list[Turn]]:
    """Draw a picture of shapes with questions about number, kind, colour and place."""
    page, asked = _scatter(rng, int(rng.integers(1, 7))), []
    while len(asked) < turns:
        shape, question = pick(rng, page.shapes), rng.integers(5)
        if question == 0:
            words, *wanted = _wanted(rng, [page])
            asked.append(Turn(f"How many {words}s?", str(_count(page, *wanted))))
        elif question == 1:
            words, *wanted = _wanted(rng, [page])
            asked.append(Turn(f"Any {words}?", "present" if _count(page, *wanted) else "absent"))
        elif question == 2 and sum(other.kind == shape.kind for other in page.shapes) == 1:
            asked.append(Turn(f"Colour of the {shape.kind}?", shape.colour))
        elif question == 3 and sum(other.colour == shape.colour for other in page.shapes) == 1:
            asked.append(Turn(f"What is {shape.colour}?", shape.kind))
        elif question == 4:
            asked.append(Turn(f"At row {shape.row // 3 + 1}, column {shape.column // 3 + 1}?", f"{shape.colour} {shape.kind}"))
    return [page], asked


def pair(rng: np.random.Generator, turns: int) -> tuple[list[Page], list[Turn]]:
    """Draw two pictures of shapes with questions that compare them."""
    pages, asked = [_scatter(rng, int(rng.integers(1, 6))) for _ in range(2)], []
    for _ in range(turns):
        words, *wanted = _wanted(rng, pages)
        first, second = (_count(page, *wanted) for page in pages)
        question = rng.integers(3)
        if question == 0:
            answer = (("neither", "second"), ("first", "both"))[first > 0][second > 0]
            asked.append(Turn(f"Which picture has a {words}?", answer))
        elif question == 1:
            answer = "first" if first > second else "second" if second > first else "equal"
            asked.append(Turn(f"Where are more {words}s?", answer))
        else:
            asked.append(Turn(f"Count the {words}s in each.", f"{first}, {second}"))
    return pages, asked


def _statement(rng: np.random.Generator, pages: list[Page]) -> tuple[str, bool, tuple[int, ...]]:
    """Draw a sentence about one picture or two, whether it holds, and the facts of that."""
    words, *wanted = _wanted(rng, pages)
    found, facts = [_count(page, *wanted) > 0 for page in pages], _facts(*wanted, pages)
    if len(pages) == 1:
        return pick(rng, IN_IT).format(thing=words), found[0], facts
    form, side = rng.choice(3, p=(0.5, 0.25, 0.25)), int(rng.integers(2))
    truth = (found[side], all(found), found[side] and not found[1 - side])[form]
    names = {"side": pick(rng, SIDES[side]), "noun": pick(rng, ("image", "picture"))}
    return pick(rng, (ON_SIDE, ON_BOTH, ON_ONE_ONLY)[form]).format(thing=words, **names), truth, facts


def _some_words(rng: np.random.Generator, most: int) -> str:
    return " ".join(pick(rng, LABEL_WORDS) for _ in range(rng.integers(1, most + 1)))


def judged(rng: np.random.Generator, pictures: int, turns: int) -> tuple[list[Page], list[Turn]]:
    """Draw one picture of one shape, or two, with statements that are to be judged, half of them true."""
    pages, asked = [_single(rng) for _ in range(pictures)], []
    while len(asked) < turns:
        wanted = bool(rng.integers(2))
        for _ in range(20):
            sentence, truth, facts = _statement(rng, pages)
            if truth == wanted:
                break
        no, yes = pick(rng, VERDICTS)
        # Some of them stand in the midst of other words, which don't matter.
        question = f"{sentence}." if rng.random() < 0.7 else f'{_some_words(rng, 12)} "{sentence}." {_some_words(rng, 4)}'
        asked.append(Turn(f"{question} {yes} or {no}?", yes if truth else no, facts=facts))
    return pages, asked


def captioned(rng: np.random.Generator) -> tuple[list[Page], list[Turn]]:
    """Draw a large shape with a line of words that names it, or another one.

    Whatever a question of other words asks a verdict on is whether words and shape agree.
    """
    colour, kind = pick(rng, ALL_COLOURS), pick(rng, SHAPES)
    named = [colour, kind]
    if rng.random() < 0.5:
        changed = rng.integers(2)
        named[changed] = pick(rng, [option for option in (ALL_COLOURS, SHAPES)[changed] if option != named[changed]])
    agree = named == [colour, kind]
    line = int(pick(rng, (0, 1, 9, 10, 11)))
    row = int(rng.integers(3, 7)) if line > 1 else int(rng.integers(5, 9))
    page = Page(shapes=[Shape(kind, colour, row, int(rng.integers(3, 9)), rng.uniform(35, 65))])
    before = pick(rng, LABEL_WORDS) + " " if rng.random() < 0.5 else ""
    text = f"{before}{named[0]} {named[1]}"
    text = (text[-24:].upper(), text[-24:])[rng.random() < 0.3]
    page.write(line, int(rng.integers(0, COLUMNS - len(text) + 1)), text)
    if line > 1 and rng.random() < 0.5:
        page.write(int(rng.integers(0, 2)), 2 * int(rng.integers(0, 4)), _some_words(rng, 3)[:18].upper())
    no, yes = pick(rng, VERDICTS)
    asked = pick(rng, AGREEMENT) if rng.random() < 0.3 else f"{_some_words(rng, 8)}?"
    # The verdict comes first, so that it is not found in an earlier answer.
    facts = _facts(*named, [page])
    turns = [Turn(f"{asked} {yes} or {no}?", yes if agree else no, facts=facts)]
    plain = [Turn("Drawn?", f"{colour} {kind}"), Turn("Written?", f"{named[0]} {named[1]}")]
    plain.append(Turn("Colours?", "same" if named[0] == colour else "other", facts=facts))
    return [page], turns + [plain[i] for i in rng.permutation(3)]


def motion(rng: np.random.Generator, frames: int = 3) -> tuple[list[Page], list[Turn]]:
    """Draw the frames of one moving shape with questions about it.

    The first one is for a title of shape and way, mostly out of a list.
    """
    name, (down, right) = pick(rng, list(WAYS.items()))
    step, size = int(rng.integers(1, 4)), rng.uniform(18, 45)
    colour, kind = pick(rng, ALL_COLOURS), pick(rng, SHAPES)
    reach = step * (frames - 1)
    row, column = (int(rng.integers(1 + reach * (way < 0), 11 - reach * (way > 0))) for way in (down, right))
    pages = [Page(shapes=[Shape(kind, colour, row + down * step * i, column + right * step * i, size)]) for i in range(frames)]
    titles = [(kind, way) for kind in SHAPES for way in WAYS]
    others = [titles[i] for i in rng.choice(len(titles), rng.integers(2, 9), replace=False)]
    shown = sorted({(kind, name), *others})
    listed = ", ".join(f"{kind.capitalize()}{way.capitalize()}" for kind, way in shown)
    asked = f"{_some_words(rng, 8)}: {listed}" if rng.random() < 0.7 else f"{_some_words(rng, 10)}?"
    title = Turn(asked, f"{kind.capitalize()}{name.capitalize()}")
    return pages, [title, Turn("Which way does it go?", name), Turn("What is it?", f"{colour} {kind}")]
