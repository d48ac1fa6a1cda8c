"""Images of shapes for pretraining, with questions that are worded unlike the sample data."""

import numpy as np

from ..samples.page import COLOURS, COLUMNS, NAMED_COLOURS, NAMED_SHAPES, SHAPES, Page, Shape
from .documents import LABEL_WORDS, Turn, pick

ALL_COLOURS = tuple(COLOURS)
# Facts that determine a verdict: the color and kind in the statement, those of the shape in each image, and whether they
# agree (0 or 1). Each is a number below FACT_VALUES, or NO_FACT.
FACTS = ("named colour", "named kind", "first colour", "first kind", "second colour", "second kind")
FACTS += ("first colour agrees", "first kind agrees", "second colour agrees", "second kind agrees")
NOT_NAMED, FACT_VALUES, NO_FACT = 4, 5, -100
SIDES = (("left", "first"), ("right", "second"))
# Verdicts for false and true statements: never the words of the sample tasks, which finetuning has to teach.
VERDICTS = (("False.", "True."), ("Wrong.", "Right."), ("Mistaken.", "Correct."), ("Bad.", "Good."))
# Wordings of a request to judge a statement, most of them with irrelevant words around it.
REQUESTS = (
    "{no} or {yes}: {statement}.",
    "{statement}. {yes} or {no}?",
    'Is "{statement}." {yes}? Say {yes} or {no}.',
    'First image left, second image right. What is "{statement}."? Write {yes} or {no}.',
    'The left image comes first, the right image second. Would you call "{statement}." {yes} or {no}?',
    'With the first image on the left and the second on the right, how is "{statement}."? Give {yes} or {no}.',
    'You see one image or two, left before right. Judge the words "{statement}." by them. Tell {yes} or {no}.',
    'Look at all that is given and at the sentence "{statement}." after it. Reply with {yes} or {no}.',
    '{words} "{statement}." {words} {yes} or {no}?',
)
# Statements about one image, and about two.
IN_IT = ("There is a {thing}", "It has a {thing}", "A {thing} is drawn", "One sees a {thing}")
ON_SIDE = (
    "The {side} {noun} has a {thing}",
    "A {thing} is in the {side} {noun}",
    "There is a {thing} in the {side} {noun}",
    "The {side} {noun} contains a {thing}",
)
ON_BOTH = ("Both {noun}s have a {thing}", "A {thing} is in both {noun}s", "Both {noun}s contain a {thing}")
ON_ANY = ("Some {noun} has a {thing}", "A {thing} is in one {noun} or both", "There is a {thing} somewhere")
TITLE_REQUESTS = (
    "{words}: {listed}",
    "Which of these is it: {listed}?",
    "Sort the frames into one of these groups: {listed}.",
    "Choose a title of the list for what is shown: {listed}.",
    "{words}?",
)
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "nowhere": (0, 0)}


def _scatter(rng: np.random.Generator, count: int) -> Page:
    """Draw `count` shapes at different positions of a 4 × 4 grid."""
    kinds, colours = rng.choice(SHAPES, 3, replace=False), rng.choice(ALL_COLOURS, 3, replace=False)
    shapes = [
        Shape(str(pick(rng, kinds)), str(pick(rng, colours)), 1 + 3 * (i // 4), 1 + 3 * (i % 4), rng.uniform(16, 34))
        for i in map(int, rng.choice(16, count, replace=False))
    ]
    return Page(shapes=shapes)


def single(rng: np.random.Generator, named: bool = False) -> Page:
    """Draw one shape at any position; with `named`, only in the colors and kinds that the sample data names."""
    (row, column), size = rng.integers(2, 10, 2), rng.uniform(18, 45)
    kind, colour = pick(rng, NAMED_SHAPES if named else SHAPES), pick(rng, NAMED_COLOURS if named else ALL_COLOURS)
    return Page(shapes=[Shape(kind, colour, int(row), int(column), size)])


def _wanted(rng: np.random.Generator, pages: list[Page]) -> tuple[str, str, str]:
    """Draw a description that matches shapes on the pages or nearly does; return it with color and kind, empty if not named."""
    shape = pick(rng, [shape for page in pages for shape in page.shapes])
    colour = shape.colour if rng.random() < 0.5 else pick(rng, NAMED_COLOURS)
    kind = shape.kind if rng.random() < 0.5 else pick(rng, NAMED_SHAPES)
    form = rng.integers(5)
    if form == 0:
        return kind, "", kind
    if form == 1:
        return f"{colour} shape", colour, ""
    return f"{colour} {kind}", colour, kind


def _count(page: Page, colour: str, kind: str) -> int:
    return sum(colour in ("", shape.colour) and kind in ("", shape.kind) for shape in page.shapes)


def _facts(colour: str, kind: str, pages: list[Page]) -> tuple[int, ...]:
    """Return FACTS as numbers, for pages with one shape each."""
    named = [NAMED_COLOURS.index(colour) if colour else NOT_NAMED, NAMED_SHAPES.index(kind) if kind else NOT_NAMED]
    drawn, agree = [NO_FACT] * 4, [NO_FACT] * 4
    for number, page in enumerate(pages):
        shape, here = page.shapes[0], slice(2 * number, 2 * number + 2)
        drawn[here] = [NAMED_COLOURS.index(shape.colour), NAMED_SHAPES.index(shape.kind)]
        agree[here] = [colour in ("", shape.colour), kind in ("", shape.kind)]
    return (*named, *drawn, *map(int, agree))


def scene(rng: np.random.Generator, turns: int) -> tuple[list[Page], list[Turn]]:
    """Draw an image of shapes with questions about number, kind, color and position."""
    page, asked = _scatter(rng, int(rng.integers(1, 7))), []
    while len(asked) < turns:
        shape, question = pick(rng, page.shapes), rng.integers(5)
        if question == 0:
            words, *wanted = _wanted(rng, [page])
            asked.append(Turn(f"How many {words}s?", str(_count(page, *wanted))))
        elif question == 1:
            words, *wanted = _wanted(rng, [page])
            asked.append(Turn(f"Any {words}?", "Yes." if _count(page, *wanted) else "No."))
        elif question == 2 and sum(other.kind == shape.kind for other in page.shapes) == 1:
            asked.append(Turn(f"Colour of the {shape.kind}?", shape.colour))
        elif question == 3 and sum(other.colour == shape.colour for other in page.shapes) == 1:
            asked.append(Turn(f"What is {shape.colour}?", shape.kind))
        elif question == 4:
            asked.append(Turn(f"At row {shape.row // 3 + 1}, column {shape.column // 3 + 1}?", f"{shape.colour} {shape.kind}"))
    return [page], asked


def pair(rng: np.random.Generator, turns: int) -> tuple[list[Page], list[Turn]]:
    """Draw two images of shapes with questions that compare them."""
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
    """Draw a statement about one or two images; return it with its truth value and its facts."""
    words, *wanted = _wanted(rng, pages)
    found, facts = [_count(page, *wanted) > 0 for page in pages], _facts(*wanted, pages)
    if len(pages) == 1:
        return pick(rng, IN_IT).format(thing=words), found[0], facts
    form, side = rng.choice(3, p=(0.5, 0.25, 0.25)), int(rng.integers(2))
    truth = (found[side], all(found), any(found))[form]
    names = {"side": pick(rng, SIDES[side]), "noun": pick(rng, ("image", "picture"))}
    return pick(rng, (ON_SIDE, ON_BOTH, ON_ANY)[form]).format(thing=words, **names), truth, facts


def _some_words(rng: np.random.Generator, most: int) -> str:
    return " ".join(pick(rng, LABEL_WORDS) for _ in range(rng.integers(1, most + 1)))


def _judgement(rng: np.random.Generator, pages: list[Page]) -> Turn:
    """Draw a statement to judge; half of them are true, if a true one can be found."""
    wanted = bool(rng.integers(2))
    for _ in range(20):
        sentence, truth, facts = _statement(rng, pages)
        if truth == wanted:
            break
    no, yes = pick(rng, VERDICTS)
    words = {"yes": yes.lower().rstrip("."), "no": no.lower().rstrip("."), "words": _some_words(rng, 6)}
    question = pick(rng, REQUESTS).format(statement=sentence, **words)
    return Turn(question, yes if truth else no, facts=facts)


def judged(rng: np.random.Generator, pictures: int, turns: int) -> tuple[list[Page], list[Turn]]:
    """Draw one or two images of one shape each, with statements to judge, half of which are true."""
    pages = [single(rng, named=True) for _ in range(pictures)]
    return pages, [_judgement(rng, pages) for _ in range(turns)]


def captioned(rng: np.random.Generator) -> tuple[list[Page], list[Turn]]:
    """Draw a large shape between two lines of words, with questions about both."""
    colour, kind = pick(rng, NAMED_COLOURS), pick(rng, NAMED_SHAPES)
    page = Page(shapes=[Shape(kind, colour, int(rng.integers(4, 8)), int(rng.integers(3, 9)), rng.uniform(28, 48))])
    turns = [Turn("Drawn?", f"{colour} {kind}")]
    for place, line in (("Above", int(rng.integers(0, 2))), ("Below", int(rng.integers(10, 12)))):
        text = _some_words(rng, 3)[:20].strip()
        text = (text.upper(), text)[rng.random() < 0.3]
        page.write(line, int(rng.integers(0, COLUMNS - len(text) + 1)), text)
        turns.append(Turn(f"{place}?", text))
    turns += [_judgement(rng, [page]) for _ in range(2)]
    return [page], [turns[i] for i in rng.permutation(len(turns))]


def motion(rng: np.random.Generator) -> tuple[list[Page], list[Turn]]:
    """Draw three or four frames of a moving shape with questions about it.

    The first question asks for a title made of shape and direction, usually from a list.
    """
    frames, (name, (down, right)) = int(rng.integers(3, 5)), pick(rng, list(WAYS.items()))
    step, size = int(rng.integers(1, 4)), rng.uniform(18, 45)
    colour, kind = pick(rng, ALL_COLOURS), pick(rng, SHAPES)
    reach = step * (frames - 1)
    row, column = (int(rng.integers(1 + reach * (way < 0), 11 - reach * (way > 0))) for way in (down, right))
    pages = [Page(shapes=[Shape(kind, colour, row + down * step * i, column + right * step * i, size)]) for i in range(frames)]
    titles = [(kind, way) for kind in SHAPES for way in WAYS]
    others = [titles[i] for i in rng.choice(len(titles), rng.integers(2, 9), replace=False)]
    shown = sorted({(kind, name), *others})
    listed = ", ".join(f"{kind.capitalize()}{way.capitalize()}" for kind, way in shown)
    asked = pick(rng, TITLE_REQUESTS).format(listed=listed, words=_some_words(rng, 6))
    title = Turn(asked, f"{kind.capitalize()}{name.capitalize()}")
    return pages, [title, Turn("Which way does it go?", name), Turn("What is it?", f"{colour} {kind}")]
