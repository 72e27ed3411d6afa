"""What stands where: the pixels of each picture token, the object in them, and the objects that a question names.

Pixels -> patches -> pixel shuffle -> tokens: in a scene of 144 x 48, each of a tile's 16 tokens stands for 12 x 12
pixels, and each of the 16 that see the whole picture squeezed into one tile, for 36 x 12.
"""

from functools import lru_cache
from unicodedata import normalize

from ... import scene_words as w
from ... import scenes
from ...config import VisionConfig
from ...fusion import choose_grid

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the picture; right and bottom are outside
MARKS = '.,:;!?؟،؛«»"()'  # around words


def squares(vision: VisionConfig, width: int, height: int) -> list[Box]:
    """The pixels of each picture token in the order of the prompt: tile by tile, row by row, then the whole picture's.

    After pixel shuffle a token is shuffle x shuffle patches. The last tile is the picture squeezed into a square, so
    its tokens stand for wider or taller boxes. ValueError: a picture that does not fill its tiles exactly.
    """
    side, per_side = vision.tile_size, round(vision.tokens_per_tile**0.5)
    rows, columns = choose_grid(height, width, side, vision.max_tiles)
    if (width, height) != (columns * side, rows * side):
        raise ValueError(f"the picture is {width} x {height}; it must fill tiles of {side} x {side} pixels exactly")
    tiles = [(side * column, side * row, side, side) for row in range(rows) for column in range(columns)]
    tiles += [(0, 0, width, height)] if len(tiles) > 1 else []
    boxes = []
    for left, top, wide, high in tiles:
        x, y = (
            [start + size * i // per_side for i in range(per_side + 1)] for start, size in ((left, wide), (top, high))
        )
        boxes += [(x[j], y[i], x[j + 1], y[i + 1]) for i in range(per_side) for j in range(per_side)]
    return boxes


def box_of(item: scenes.Item) -> Box:
    """The smallest square around an object."""
    (x, y), half = item.centre, scenes.PIXELS[item.size] // 2
    return x - half, y - half, x + half + 1, y + half + 1


def owner(box: Box, scene: scenes.Scene) -> int | None:
    """Which object fills most of a square of pixels; None: the background, where no object reaches into it."""

    def shared(item: scenes.Item) -> int:
        (left, top, right, bottom), (x1, y1, x2, y2) = box, box_of(item)
        return max(0, min(right, x2) - max(left, x1)) * max(0, min(bottom, y2) - max(top, y1))

    best = max(range(len(scene.items)), key=lambda i: shared(scene.items[i]), default=None)
    return best if best is not None and shared(scene.items[best]) else None


@lru_cache(maxsize=1)
def _names() -> tuple[dict[str, tuple[str, str]], dict[str, dict[str, str]]]:
    """(phrase -> (colour, shape), attribute -> {word: value}), in all four languages and grammatical cases."""
    cases, both, single = w.Noun._fields[1:], {}, {name: {} for name in ("colour", "shape", "digit", "place")}
    for language in scenes.LANGUAGES:
        for colour in scenes.COLOURS:
            single["colour"] |= {_plain(word): colour for word in w.COLOURS[language][colour].values()}
        for shape in scenes.SHAPES:
            single["shape"] |= {_plain(getattr(w.NOUNS[language][shape], case)): shape for case in cases}
            for colour in scenes.COLOURS:
                phrases = (scenes.phrase(language, case, colour=colour, shape=shape) for case in cases)
                both |= {_plain(phrase): (colour, shape) for phrase in phrases}
        single["place"] |= {_plain(place): key for key, place in w.PLACES[language].items()}
    single["digit"] = {f" {digit} ": digit for digit in scenes.DIGITS}
    return both, single


def _plain(text: str) -> str:
    """In lower case, punctuation as spaces, a space on either side: `in` then compares whole words."""
    words = "".join(" " if letter in MARKS else letter for letter in normalize("NFC", text).casefold()).split()
    return f" {' '.join(words)} "


def named(scene: scenes.Scene, question: str) -> list[int]:
    """The objects of the scene that a question's own words name, in any of the four languages; none if it names none.

    A colour beside its shape ("the red circle") is one name. Without such a pair, an object must fit every colour,
    shape, digit and place that the question mentions.
    """
    text, (both, single) = _plain(question), _names()
    pairs = {pair for phrase, pair in both.items() if phrase in text}
    if pairs:
        return [i for i, item in enumerate(scene.items) if (item.colour, item.shape) in pairs]
    found = {name: {value for word, value in words.items() if word in text} for name, words in single.items()}
    found = {name: values for name, values in found.items() if values}
    fits = (all(getattr(item, name) in values for name, values in found.items()) for item in scene.items)
    return [i for i, fit in enumerate(fits) if found and fit]
