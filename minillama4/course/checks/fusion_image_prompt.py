"""From the size of a picture to its special tokens: which grid of tiles, and in which order they are written."""

import math
import random
from itertools import groupby

import numpy as np

from ..exercise import Card, Step, runs, same
from ..observe import call

CARD = Card("01", "Image prompt", difficulty=3, importance=4, minutes=25, trains="tiling, what a picture costs")

HINTS = (
    "There are few grids: list all (rows, columns) with rows * columns <= max_tiles. For each work out the scale, and "
    "let Python compare: `min(grids, key=...)` with a key that is a tuple.",
    "The key of a grid: first whether it makes the picture smaller (False sorts before True), then how far its scale "
    "is from 1, then the number of tiles. For the prompt, take one tile and several tiles apart.",
    "Several tiles: for each row, the patches of its tiles, with an x separator behind all but the last one, and then "
    "a y separator, whichever row it is. Then the image token and the patches of the whole picture: with one tile, "
    "this is all there is. Start and end are around it.",
)

ANSWERED_BY = tuple(
    f"minillama4.fusion.{name}" for name in ("choose_grid", "image_prompt", "cut_tiles", "build_prompt")
)

NAMES = {
    "S": "<|image_start|>", "P": "<|patch|>", "X": "<|tile_x_separator|>", "Y": "<|tile_y_separator|>",
    "I": "<|image|>", "E": "<|image_end|>",
}  # fmt: skip
LETTERS = {name: letter for letter, name in NAMES.items()}  # a prompt is easily written as a word
SCOUT = (336, 16, 144)  # tile_size, max_tiles, tokens_per_tile
KNOWN = {(336, 336): 147, (337, 337): 727, (640, 480): 727, (1920, 1080): 2322, (1344, 1344): 2467}  # width x height

# Of a picture's grid: what is right, and the question for an answer that is not a known mistake.
GRIDS = {
    "full": ("a picture that just fills one tile gets one", "Which grids have room for it, and which needs least?"),
    "exact": (
        "a picture that just fills eight tiles gets these",
        "Work out the scale for 1 x 2, 2 x 4 and 4 x 2 tiles. Which is the smallest that is not below 1?",
    ),
    "small": ("a picture smaller than a tile gets one too", "How many rows does it need at least? How many columns?"),
    "seam": ("one pixel more takes another row and another column", "What is its scale on 1 x 1, on 1 x 2, on 2 x 2?"),
    "grid": ("of the grids with room, the one that grows the picture least", "What is the scale on each of them?"),
    "row": ("a picture may be one row of tiles", "How many rows does its height need, how many its width?"),
    "column": ("a picture may be one column of tiles", "How many columns does its width need, how many its height?"),
    "tall": ("a column may have max_tiles tiles", "How many rows has the highest grid that you look at?"),
    "large": (
        "if all grids shrink it, the one that shrinks it least",
        "Write down the scale for each grid of max_tiles or fewer. Which of them is the nearest to 1?",
    ),
    "tie": (
        "of equal grids, the one with fewer tiles",
        "Several grids have the same scale here, all below 1. Which ones, and which of them holds most black?",
    ),
}  # fmt: skip
# Of some of them also the prompt.
PROMPTS = {
    "small": ("one tile: start, image, patches, end", "Which tokens come before the patches here, and which behind?"),
    "grid": (
        "several tiles: row by row with separators, then the whole picture",
        "Write the first row down piece by piece, then the last one. What comes after its last patch, up to the end?",
    ),
    "row": ("one row of tiles is closed too", "How many tiles has this picture? Which of the two layouts is it?"),
    "column": ("one column of tiles has no x separators", "How many tiles stand side by side here?"),
}  # fmt: skip


def draw(rng: random.Random) -> dict:
    tile, max_tiles = rng.randint(10, 12), rng.randint(14, 15)
    rows, columns = rng.sample((2, 3), 2)
    within, less = rng.sample(range(4, tile - 3), 2)  # pixels of a tile that is not full

    def larger(tie: bool) -> tuple[int, int]:
        """Of a picture for which no grid is large enough; is there a tie?"""
        while True:
            size = (rng.randint(tile, 9 * tile), rng.randint(tile, 9 * tile))
            right, wrong = truth(*size, tile, max_tiles), wrong_grids(*size, tile, max_tiles)
            tied = wrong["larger of equals"][0] != right
            if wrong["more tiles than allowed"][0] != right != wrong["cut off"][0] and tied == tie:
                return size

    return {
        "tile": tile,
        "max_tiles": max_tiles,
        "patches": rng.randint(4, 7),
        "pictures": {  # (height, width)
            "full": (tile, tile),
            "exact": tuple(rng.sample((2 * tile, 4 * tile), 2)),
            "small": (within, less),
            "seam": (tile + 1, tile + 1),
            "grid": ((rows - 1) * tile + within, (columns - 1) * tile + less),
            "row": (within, tile + less),
            "column": (rng.randint(3, 5) * tile - within, less),
            "tall": (max_tiles * tile - within, less),
            "large": larger(tie=False),
            "tie": larger(tie=True),
        },
    }


def observe(function, inputs: dict) -> dict:
    numbers = (inputs["tile"], inputs["max_tiles"], inputs["patches"])
    seen = {}
    for name, size in inputs["pictures"].items():
        seen |= call(f"{name}/grid", lambda *given: tuple(function(*given)[0]), *size, *numbers)
        seen |= call(f"{name}/tokens", lambda *given: function(*given)[1], *size, *numbers)
    for width, height in KNOWN:
        seen |= call(f"{width}x{height}", lambda *given: len(function(*given)[1]), height, width, *SCOUT)
    return seen


def judge(inputs: dict, observed: dict):
    tile, max_tiles, patches = inputs["tile"], inputs["max_tiles"], inputs["patches"]
    given = {
        name: f"height {height}, width {width}, tile_size {tile}, max_tiles {max_tiles}, tokens_per_tile {patches}"
        for name, (height, width) in inputs["pictures"].items()
    }
    for name, (step, question) in GRIDS.items():
        sizes = (*inputs["pictures"][name], tile, max_tiles)
        yield from runs(observed, f"{name}/grid", [2], given[name], dtype="tuple")
        got, want = tuple(observed[f"{name}/grid/value"].tolist()), truth(*sizes)
        yield compared(step, got, want, given[name], question, wrong_grids(*sizes))
    for name, (step, question) in PROMPTS.items():
        grid = truth(*inputs["pictures"][name], tile, max_tiles)
        yield from list(runs(observed, f"{name}/tokens", [], given[name], dtype="list"))[:2]
        got = [str(token) for token in np.atleast_1d(observed[f"{name}/tokens/value"]).tolist()]
        want = [NAMES[letter] for letter in layout(*grid, patches)]
        wrong = {key: ([NAMES[x] for x in word], asks) for key, (word, asks) in wrong_layouts(*grid, patches).items()}
        about = f"{given[name]}, so {grid[0]} x {grid[1]} tiles"
        yield compared(step, got, want, about, question, wrong, words=in_runs)
    for (width, height), tokens in KNOWN.items():
        name = f"{width}x{height}"
        about = "width {}, height {}, tile_size {}, max_tiles {}, tokens_per_tile {}".format(width, height, *SCOUT)
        yield from runs(observed, name, [], about, dtype="int")
        yield same(
            f"Llama 4: {width} x {height} pixels are {tokens} tokens", observed[f"{name}/value"], tokens, about,
            "Small pictures came out right. Is there a number in your function that fits those only?",
        )  # fmt: skip


def compared(name: str, got, want, given: str, question: str, mistakes: dict[str, tuple], words=str) -> Step:
    """As `same`, of what is no array."""
    known = "" if got == want else next((key for key, (wrong, _) in mistakes.items() if wrong == got), "")
    return Step(name, got == want, given, words(got), words(want), mistakes[known][1] if known else question, known)


def in_runs(tokens: list[str]) -> str:
    counted = [(len(list(run)), name) for name, run in groupby(tokens)]
    return ", ".join(name if count == 1 else f"{count} x {name}" for count, name in counted)[:900] or "no tokens"


def best(height: int, width: int, tile: int, max_tiles: int, key) -> tuple[int, int]:
    """The grid with the smallest key(scale * height * width, rows, columns): whole numbers have no rounding."""
    grids = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles + 1) if r * c <= max_tiles]
    return min(grids, key=lambda grid: key(min(grid[0] * tile * width, grid[1] * tile * height), *grid))


def covering(height: int, width: int, tile: int) -> tuple[int, int]:
    return math.ceil(height / tile), math.ceil(width / tile)


def truth(height: int, width: int, tile: int, max_tiles: int) -> tuple[int, int]:
    """If the tiles that cover the picture are allowed, no grid with room is smaller; else all grids shrink it."""
    rows, columns = covering(height, width, tile)
    if rows * columns <= max_tiles:
        return rows, columns
    return best(height, width, tile, max_tiles, lambda scale, r, c: (-scale, r * c))


def wrong_grids(height: int, width: int, tile: int, max_tiles: int) -> dict[str, tuple]:
    """Mistake -> (the grid it gives, its question)."""
    (rows, columns), one = covering(height, width, tile), height * width  # what a scale of 1 is in `best`

    def by(key) -> tuple[int, int]:
        return best(height, width, tile, max_tiles, key)

    return {
        "more tiles than allowed": ((rows, columns), "How many tiles has your grid? How many are allowed?"),
        "larger of equals": (
            by(lambda s, r, c: (s < one, s if s >= one else -s, -r * c)),
            "Two grids may have the same scale. What would the larger one be filled with?",
        ),
        "cut off": (
            (min(rows, max_tiles), max(1, min(columns, max_tiles // rows))),
            "You take the rows first, and columns as far as they go. What becomes of the picture's width?",
        ),
        "transposed": (
            truth(height, width, tile, max_tiles)[::-1], "Which is first in yours: rows or columns? Height or width?",
        ),
        "one more than needed": (
            (height // tile + 1, width // tile + 1), "How many tiles does a length of just tile_size need, in yours?",
        ),
        "made smaller": (
            by(lambda s, r, c: abs(s - one)),
            "A picture is made smaller only where no grid has room for it. Does one have room here?",
        ),
        "shrinks most": (
            by(lambda s, r, c: (s < one, s)), "Which is the better of two scales above 1? And of two scales below 1?",
        ),
        "grows most": (by(lambda s, r, c: -s), "On which grid does the picture keep its size, or nearly so?"),
        "shape alone": (
            by(lambda s, r, c: abs(width / height - c / r)),
            "Your grid has the shape of the picture. Where does its size in pixels come in?",
        ),
        "most tiles": (
            by(lambda s, r, c: (-r * c, -s)), "Each tile costs tokens. Does a picture take all that are allowed?",
        ),
    }  # fmt: skip


def layout(rows: int, columns: int, patches: int) -> str:
    """The prompt as a word, a letter a token: see NAMES."""
    return "S" + tiles(rows, columns, patches) + "I" + "P" * patches + "E"


def tiles(rows: int, columns: int, patches: int) -> str:
    row = "X".join(["P" * patches] * columns) + "Y"
    return row * rows if rows * columns > 1 else ""


def wrong_layouts(rows: int, columns: int, patches: int) -> dict[str, tuple]:
    """Mistake -> (the prompt it gives, its question)."""
    tile, right, grid = "P" * patches, layout(rows, columns, patches), tiles(rows, columns, patches)
    row = "X".join([tile] * columns)
    return {
        "global view of one tile": (
            f"S{row}YI{tile}E" if not grid else "", "The one tile shows the whole picture. What is it sent again for?"
        ),
        "one row or column taken for one tile": (
            f"SI{tile}E", "Your prompt has the patches of one tile. How many tiles are there?"
        ),
        "no global view": (f"S{grid}E", "Who sees the picture as a whole in yours?"),
        "image token first": (
            f"SI{grid}{tile}E", "What does the image token announce: the picture, or the view of it as a whole?"
        ),
        "global view first": (f"SI{tile}{grid}E", "In which order are the tiles stored, and where is the global one?"),
        "image token last": (f"S{grid}{tile}IE", "Does the image token come before the patches it announces?"),
        "no image token": (f"S{grid}{tile}E", "Which token of yours announces the picture as a whole?"),
        "x separator after the last column": (
            right.replace("PY", "PXY"), "An x separator stands between two tiles. What is right of the last column?"
        ),
        "no y separator after the last row": (
            right.replace("YI", "I"), "By what is a row closed: by the next row, or by its own end? What of the last?"
        ),
        "separators swapped": (
            right.translate(str.maketrans("XY", "YX")), "Along which axis do you go when you pass an x separator?"
        ),
        "no separators": (
            right.replace("X", "").replace("Y", ""),
            "2 x 3 and 3 x 2 tiles have equally many patches. How is one told from the other in yours?",
        ),
        "rows and columns swapped": (
            layout(columns, rows, patches), "How many tiles are there before your first y separator? How many columns?"
        ),
        "one patch token a tile": (layout(rows, columns, 1), "How many vectors come out of the projector for a tile?"),
        "no end": (right[:-1], "What tells the model that the picture is over?"),
    }  # fmt: skip
