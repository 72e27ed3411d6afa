"""Embedded data: small drawn scenes, and captions and questions about them in English, French, Hindi and Arabic.

A scene is 144 x 48 pixels, three tiles of 48 beside each other, with six places in 2 rows x 3 columns. Each object has
a shape, a colour, a size, a digit and a place of its own. No file is read and nothing is downloaded: everything follows
from a `random.Random`, and the words lie in `scene_words.py`.

Held out by combination: 60 of the 300 (colour, shape, digit) triples appear in no training scene, though each pair of
attributes does. A model that answers about them has composed what it learned rather than remembered it.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, permutations
from math import cos, pi, sin

import numpy as np
from PIL import Image

from . import scene_words as w
from .scene_words import GLOSSARY, LANGUAGES, phrase, text_only

KINDS = ("attribute", "place", "relation", "count")
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
PLACES = ("top left", "top middle", "top right", "bottom left", "bottom middle", "bottom right")  # reading order
DIGITS = tuple(range(10))
RELATIONS = ("left of", "right of", "above", "below")

TILE, WIDTH, HEIGHT = 48, 144, 48  # pixels
CELL_WIDTH, CELL_HEIGHT = TILE, TILE // 2
PIXELS = {"small": 15, "large": 21}  # width and height of an object; odd, so that it has a middle pixel
MOST_ALIKE = 4  # objects of one shape, or of one colour, in a scene

# Close hues differ in lightness too (red dark, green light; blue light, purple dark), for readers who see few hues.
RGB = {
    "red": (205, 25, 35),
    "green": (60, 185, 75),
    "blue": (45, 110, 235),
    "yellow": (255, 225, 30),
    "purple": (115, 25, 145),
    "orange": (250, 140, 20),
}


@dataclass(frozen=True)
class Item:
    """One object. All words are the English keys; (dx, dy) shifts it from the middle of its cell, in pixels."""

    shape: str
    colour: str
    size: str
    place: str
    digit: int
    dx: int
    dy: int

    @property
    def centre(self) -> tuple[int, int]:
        """(x, y) of its middle pixel in the picture."""
        return CELL_WIDTH * self.column + CELL_WIDTH // 2 + self.dx, CELL_HEIGHT * self.row + CELL_HEIGHT // 2 + self.dy

    @property
    def row(self) -> int:
        return PLACES.index(self.place) // 3

    @property
    def column(self) -> int:
        return PLACES.index(self.place) % 3


@dataclass(frozen=True)
class Scene:
    items: tuple[Item, ...]  # in reading order, each in its own place
    background: int  # grey level, 225 to 250


@dataclass(frozen=True)
class Question:
    kind: str  # of KINDS
    form: str  # what exactly is asked: colour_of, shape_of, digit_on, ... (see `ask`)
    language: str
    text: str
    answer: str
    choices: tuple[str, ...]  # every answer that this form can have in this language


def is_held_out(colour: str, shape: str, digit: int) -> bool:
    return (COLOURS.index(colour) + SHAPES.index(shape) + digit) % 5 == 0


def draw_scene(rng: random.Random, split: str = "train", count: int | None = None) -> Scene:
    """`count` objects (None: 3 to 6), all of them from the `split` "train" or all from "held-out".

    No two share both colour and shape, so "the red circle" is always one object. Places are drawn independently of
    everything else: no word of a question tells where its object lies.
    """
    if split not in ("train", "held-out"):
        raise ValueError(f'split is {split!r}; it must be "train" or "held-out"')
    count = rng.randint(3, 6) if count is None else count
    if not 1 <= count <= len(PLACES):
        raise ValueError(f"count is {count}; a scene has 1 to {len(PLACES)} objects")
    kinds = []
    while len(set(kinds)) < count:
        kinds = list(zip(_with_repeats(rng, SHAPES, count), _with_repeats(rng, COLOURS, count), strict=True))
    places = sorted(rng.sample(PLACES, count), key=PLACES.index)
    items = []
    for place, (shape, colour) in zip(places, kinds, strict=True):
        digit = rng.choice([d for d in DIGITS if is_held_out(colour, shape, d) == (split == "held-out")])
        size = rng.choice(SIZES)
        half = PIXELS[size] // 2 + 1  # one pixel of air, so that neighbours never touch
        dx, dy = (rng.randint(half - cell // 2, cell // 2 - half) for cell in (CELL_WIDTH, CELL_HEIGHT))
        items.append(Item(shape, colour, size, place, digit, dx, dy))
    return Scene(tuple(items), background=rng.randint(225, 250))


def _with_repeats(rng: random.Random, values: tuple[str, ...], count: int) -> list[str]:
    """`count` values, one of them often: free draws would leave little to count beyond two."""
    most = min(MOST_ALIKE, count)
    while True:
        often = rng.choice(values)
        repeats = rng.choices(range(1, most + 1), (1, 1, 2, 4)[:most])[0]
        drawn = [often] * repeats + rng.choices([v for v in values if v != often], k=count - repeats)
        if max(Counter(drawn).values()) <= MOST_ALIKE:
            rng.shuffle(drawn)
            return drawn


# Our own 5 x 7 bitmap font and our own masks: no font file, and the same bytes with every version of Pillow.
FONT = """
.###. ..#.. .###. ####. ...#. ##### ..##. ##### .###. .###.
#...# .##.. #...# ....# ..##. #.... .#... ....# #...# #...#
#...# ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
#...# ..#.. ..##. .###. #..#. ....# ####. ..#.. .###. .####
#...# ..#.. .#... ....# ##### ....# #...# ..#.. #...# ....#
#...# ..#.. #.... ....# ...#. #...# #...# .#... #...# ...#.
.###. .###. ##### ####. ...#. .###. .###. .#... .###. .##.."""
# Pixels from the middle down to where the shape is wide enough.
DIGIT_DROP = {("triangle", "small"): 3, ("triangle", "large"): 4, ("star", "small"): 1, ("star", "large"): 1}
SAMPLES = 4  # per pixel and axis, for smooth edges


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners (x, y) in [-1, 1], y down."""
    if shape == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if shape == "triangle":
        return [(0, -1), (1, 1), (-1, 1)]
    if shape == "star":  # fatter than a pentagram, so that the digit fits
        corners = [(r * sin(k * pi / 5), -r * cos(k * pi / 5)) for k, r in enumerate((1.05, 0.56) * 5)]
        return [(x, y + 0.1) for x, y in corners]
    a = 0.47  # half the width of an arm of the cross
    quarter = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
    return quarter + [(-x, -y) for x, y in quarter]


@cache
def _mask(shape: str, size: str, scale: int) -> np.ndarray:
    """How much of each pixel the shape covers, in 1/SAMPLES**2: int [pixels, pixels]."""
    pixels = PIXELS[size] * scale
    axis = (np.arange(pixels * SAMPLES) + 0.5) / (pixels * SAMPLES) * 2 - 1
    x, y = axis[None, :], axis[:, None]
    if shape == "circle":
        inside = x * x + y * y <= 1
    else:
        corners = _outline(shape)
        inside = np.zeros((len(axis), len(axis)), bool)
        for (x1, y1), (x2, y2) in pairwise(corners + corners[:1]):
            if y1 != y2:  # a ray to the right crosses this edge, or not; an odd number of crossings is inside
                inside ^= ((y1 > y) != (y2 > y)) & (x < x1 + (x2 - x1) * (y - y1) / (y2 - y1))
    return inside.reshape(pixels, SAMPLES, pixels, SAMPLES).sum(axis=(1, 3))


@cache
def _glyph(digit: int, scale: int) -> np.ndarray:
    """bool [7 * scale, 5 * scale]"""
    rows = [[dot == "#" for dot in row.split()[digit]] for row in FONT.strip().splitlines()]
    return np.array(rows).repeat(scale, 0).repeat(scale, 1)


def render(scene: Scene, scale: int = 1) -> Image.Image:
    """The RGB picture, 144 x 48 pixels times `scale`. Models see scale 1; larger ones are for people."""
    canvas = np.full((HEIGHT * scale, WIDTH * scale, 3), scene.background, np.int32)
    full = SAMPLES**2
    for item in scene.items:
        colour, pixels = np.array(RGB[item.colour]), PIXELS[item.size] * scale
        x, y = item.centre
        left, top = ((middle - PIXELS[item.size] // 2) * scale for middle in (x, y))
        cover = _mask(item.shape, item.size, scale)[:, :, None]
        spot = canvas[top : top + pixels, left : left + pixels]
        spot[:] = (spot * (full - cover) + colour * cover + full // 2) // full
        left, top = (x - 2) * scale, (y - 3 + DIGIT_DROP.get((item.shape, item.size), 0)) * scale
        ink = 0 if colour @ (0.3, 0.6, 0.1) > 128 else 255  # black or white, whichever stands out more
        canvas[top : top + 7 * scale, left : left + 5 * scale][_glyph(item.digit, scale)] = ink
    return Image.fromarray(canvas.astype(np.uint8))


def caption(scene: Scene, language: str) -> str:
    """Every object in reading order, with place, size, colour, shape and digit (in the language's own word order)."""
    parts = []
    for item in scene.items:
        noun = w.NOUNS[language][item.shape]
        size, colour = w.SIZES[language][item.size], w.COLOURS[language][item.colour]
        names = {"shape": noun.bare, "size": size[noun.gender], "colour": colour[noun.gender]}
        place = w.PLACES[language][item.place]
        parts.append(w.CAPTION_ITEM[language].format(place=place, digit=item.digit, **names))
    return w.CAPTION_JOIN[language].join(parts)


def describe_request(language: str) -> str:
    return w.DESCRIBE[language]


def request(what: str, language: str) -> str:
    """What a user says to get an "exam", an "inventory" or a "tally"."""
    return {"exam": w.EXAM, "inventory": w.INVENTORY, "tally": w.TALLY}[what][language]


def size_word(language: str, size: str) -> str:
    """ "large" as the answer to a question for the size."""
    return w.SIZES[language][size][w.SIZE_GENDER[language]]


def inventory(scene: Scene, rng: random.Random, language: str) -> list[tuple[str, list[str]]]:
    """(name, [place, size, digit]) of each object, in any order: what follows a name can only be found by the name."""
    items = list(scene.items)
    rng.shuffle(items)
    alone = {attribute: _unique(scene, attribute) for attribute in ("colour", "shape")}
    rows = []
    for item in items:
        names = [{"colour": item.colour, "shape": item.shape}]
        names += [{attribute: getattr(item, attribute)} for attribute in alone if item in alone[attribute]]
        name = phrase(language, "the", **rng.choice(names))
        rows.append((name, [w.PLACES[language][item.place], size_word(language, item.size), str(item.digit)]))
    return rows


def tally(scene: Scene, rng: random.Random, language: str) -> list[tuple[str, list[str]]]:
    """(name, [count]) of each shape and colour, in any order."""
    kinds = [{"shape": shape} for shape in SHAPES] + [{"colour": colour} for colour in COLOURS]
    rng.shuffle(kinds)
    return [
        (phrase(language, "many", **kind), [str(sum(kind.items() <= vars(item).items() for item in scene.items))])
        for kind in kinds
    ]


def ask(scene: Scene, rng: random.Random, kind: str, language: str) -> Question:
    """A question of this kind with one right answer; which form and about what, `rng` decides.

    attribute: colour_of (a shape), colour_of_digit, shape_of, digit_on, size_of or at_place. A form that cannot name
        an object uniquely here (no shape is unique, say) is left out; at_place can always be asked.
    place: where.
    relation: left_of, right_of, above or below, by column and by row alone: an object in the same column is neither
        left nor right. Yes and no are equally likely whatever the text says.
    count: count_shape, count_colour (0 to 4) or count_all (3 to 6).
    Raises ValueError if the scene has no such question (a relation needs two objects).
    """
    return {"attribute": _attribute, "place": _where, "relation": _relation, "count": _count}[kind](
        scene, rng, language
    )


def _unique(scene: Scene, *names: str) -> list[Item]:
    """The items that no other item equals in all the attributes named."""
    seen = Counter(tuple(getattr(item, n) for n in names) for item in scene.items)
    return [item for item in scene.items if seen[tuple(getattr(item, n) for n in names)] == 1]


def _attribute(scene: Scene, rng: random.Random, language: str) -> Question:
    alone = {name: _unique(scene, name) for name in ("colour", "shape", "digit")}
    pairs = _unique(scene, "colour", "shape")
    askable = {"colour_of": alone["shape"], "colour_of_digit": alone["digit"], "shape_of": alone["colour"]}
    askable |= {"digit_on": pairs, "size_of": pairs, "at_place": scene.items}
    form = rng.choice([form for form, items in askable.items() if items])
    item = rng.choice(askable[form])
    name = {"colour": item.colour, "shape": item.shape}
    if form == "colour_of":
        name = {"shape": item.shape}
    elif form == "digit_on":  # one word if one is enough
        name = rng.choice([{key: name[key]} for key in name if item in alone[key]] or [name])
    # The answers as English key -> word.
    if form in ("colour_of", "colour_of_digit"):
        answer, choices = item.colour, {c: w.COLOURS[language][c]["m"] for c in COLOURS}
    elif form == "shape_of":
        answer, choices = item.shape, {s: w.NOUNS[language][s].bare for s in SHAPES}
    elif form == "digit_on":
        answer, choices = item.digit, {d: str(d) for d in DIGITS}
    elif form == "size_of":
        answer, choices = item.size, {s: size_word(language, s) for s in SIZES}
    else:
        answer = (item.colour, item.shape)
        choices = {(c, s): phrase(language, "bare", c, s) for c in COLOURS for s in SHAPES}
    text = w.QUESTIONS[language][form].format(
        **{case: phrase(language, case, **name) for case in ("the", "of")},
        **{gender: w.COLOURS[language][item.colour][gender] for gender in "mf"},
        **{"place": w.PLACES[language][item.place], "digit": item.digit},
    )
    return Question("attribute", form, language, text, choices[answer], tuple(choices.values()))


def _where(scene: Scene, rng: random.Random, language: str) -> Question:
    items = _unique(scene, "colour", "shape")
    if not items:
        raise ValueError("no object of this scene can be told from the others by colour and shape")
    item, answers = rng.choice(items), w.PLACES[language]
    text = w.QUESTIONS[language]["where"].format(the=phrase(language, "the", item.colour, item.shape))
    return Question("place", "where", language, text, answers[item.place], tuple(answers.values()))


def _holds(relation: str, a: Item, b: Item) -> bool:
    right, down = a.column - b.column, a.row - b.row
    return {"left of": right < 0, "right of": right > 0, "above": down < 0, "below": down > 0}[relation]


def _relation(scene: Scene, rng: random.Random, language: str) -> Question:
    """Relation and answer first, then two objects that fit.

    A pair that says yes says no when swapped, so either answer is available whenever one is. And colours and shapes do
    not depend on places, so they tell nothing about the answer.
    """
    pairs = list(permutations(_unique(scene, "colour", "shape"), 2))
    possible = [r for r in RELATIONS if any(_holds(r, a, b) for a, b in pairs)]
    if not possible:
        raise ValueError("a relation needs two objects that can be told apart by colour and shape")
    relation, answer = rng.choice(possible), rng.random() < 0.5
    a, b = rng.choice([(a, b) for a, b in pairs if _holds(relation, a, b) == answer])
    yes, no = w.YES_NO[language]
    first, second = phrase(language, "the", a.colour, a.shape), phrase(language, "of", b.colour, b.shape)
    text = w.QUESTIONS[language][relation].format(the=first, of=second)
    return Question("relation", relation.replace(" ", "_"), language, text, yes if answer else no, (yes, no))


# Large counts are rare in scenes and zero is in nearly all: these odds make the answers 0 to 4 about equally frequent.
COUNT_WEIGHTS = (1, 1, 1.5, 2.2, 8)


def _count(scene: Scene, rng: random.Random, language: str) -> Question:
    """The answer first, then a shape or colour that has it: a guesser who does not look is right one time in five."""
    if rng.random() < 1 / 3:
        form, answer, name = "count_all", len(scene.items), {}
        choices = range(3 if answer >= 3 else 1, len(PLACES) + 1)
    else:
        counts = {
            (attribute, value): sum(getattr(item, attribute) == value for item in scene.items)
            for attribute, values in (("shape", SHAPES), ("colour", COLOURS))
            for value in values
        }
        available = sorted({n for n in counts.values() if n <= MOST_ALIKE})
        answer = rng.choices(available, [COUNT_WEIGHTS[n] for n in available])[0]
        attribute = rng.choice(sorted({attribute for (attribute, _), n in counts.items() if n == answer}))
        name = {attribute: rng.choice([v for (a, v), n in counts.items() if a == attribute and n == answer])}
        form, choices = f"count_{attribute}", range(MOST_ALIKE + 1)
    pattern = w.QUESTIONS[language]["count_shape" if form == "count_shape" else "count_object"]
    text = pattern.format(many=phrase(language, "many", **name))
    return Question("count", form, language, text, str(answer), tuple(map(str, choices)))


def words(scenes: int = 400) -> Iterator[str]:
    """Every kind of sentence in the data, about as often as in training: what a tokenizer learns its merges from."""
    rng = random.Random("words")
    for _ in range(scenes):
        scene = draw_scene(rng)
        for language in LANGUAGES:
            yield from (describe_request(language), caption(scene, language), *text_only(rng, language))
            for kind in KINDS:
                question = ask(scene, rng, kind, language)
                yield from (question.text, question.answer)
    for pair in GLOSSARY * (scenes // 20):
        yield from pair


def data_fingerprint() -> str:
    """SHA-256 (hex) of 200 scenes' pixels and of all kinds of text: the "data hash" of a model card."""
    digest = hashlib.sha256(repr(GLOSSARY).encode())
    for split in ("train", "held-out"):
        rng = random.Random(f"fingerprint {split}")
        for _ in range(100):
            scene = draw_scene(rng, split)
            digest.update(render(scene).tobytes())
            for language in LANGUAGES:
                asked = [ask(scene, rng, kind, language) for kind in KINDS]
                digest.update(repr((asked, caption(scene, language), text_only(rng, language))).encode())
    return digest.hexdigest()
