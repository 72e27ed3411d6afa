"""Find the bug: from a picture to a sequence with one of five planted mistakes, to be told apart by experiments alone.

Each is right in some other model, or has been met in public code. open_clip issue 204: CLIP's colours where 0.5 was
meant. llama.cpp issue 25814: a class token at one end, and taken off at the other. LLaVA-NeXT puts the global tile
first. InternVL issue 962 asks why not to merge patches by a plain reshape. And on the Hub `image_token_index` is the id
of `<|patch|>`, and not of `<|image|>`.
"""

import random

import torch
import torch.nn.functional as F

from ...fusion import image_prompt
from ...vision import patchify, pixel_shuffle
from .. import bug_hunt
from ..exercise import Card, normal

CARD = Card("01", "Find the bug", difficulty=4, importance=4, minutes=40, trains="experiments, one cause at a time")

HINTS = (
    "No patch sees another one here. So paint one patch of a grey picture, and see which rows of the sequence change: "
    "which of them should, in a picture of two tiles? And which colour should leave no trace at all?",
    "Three patches tell four bugs. The first one of the picture: does <|image|> change, and does the second row that "
    "changes come after it? The very last one: does anything change? The one below the first: is it in the same token? "
    "The fifth bug is in every row: (v / 255 - 0.5) / 0.5 is 0 for which v?",
    "picture = torch.full((3, SIDE, 2 * SIDE), 127.5), and rows(y, x) are those that differ if the pixel there is 255. "
    "rows(0, 0) has the row of <|image|>: IMAGE; its last one lies before <|image|>: GLOBAL. rows(-1, -1) is empty: "
    "CLASS. rows(PATCH, 0) is not rows(0, 0): SHUFFLE. And a row of <|patch|> that is not 0 for grey: COLOUR.",
)

ANSWERED_BY = ()

BUGS = ("right", "CLIP's colours", "class token first", "global tile first", "plain reshape", "<|image|> overwritten")
RIGHT, COLOUR, CLASS, GLOBAL, SHUFFLE, IMAGE = range(len(BUGS))
SIDE, PATCH, BLOCK = 18, 3, 2  # pixels of a tile and of a patch; patches that become one token: all of them a side
TOKENS = (SIDE // PATCH // BLOCK) ** 2  # of a tile
CLIP = torch.tensor([[0.481, 0.458, 0.408], [0.269, 0.261, 0.276]])[..., None, None]  # mean, and standard deviation
SPECIAL = (
    "<|image_start|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>", "<|image_end|>",
)  # fmt: skip


def layout(rows: int, columns: int) -> list[str]:
    """The tokens of a picture: there is no bug in here."""
    return image_prompt(rows, columns, TOKENS)


def suspect(bug: int, seed: int = 0):
    """The way into a model with the bug of this number; called as `fuse(pixels) -> embeddings`.

    pixels: [3, rows * SIDE, columns * SIDE] float, from 0 to 255; embeddings: [tokens of layout(rows, columns), 16].
    """
    w = weights(seed)

    def fuse(pixels):
        if pixels.ndim != 3 or len(pixels) != 3 or any(size < SIDE or size % SIDE for size in pixels.shape[1:]):
            raise ValueError(f"pixels are {list(pixels.shape)}; it takes [3, rows * {SIDE}, columns * {SIDE}]")
        rows, columns = (size // SIDE for size in pixels.shape[1:])
        mean, deviation = CLIP if bug == COLOUR else (0.5, 0.5)
        picture = (pixels.float() / 255 - mean) / deviation
        tiles = picture.reshape(3, rows, SIDE, columns, SIDE).permute(1, 3, 0, 2, 4).flatten(0, 1)
        if rows * columns > 1:
            overview = F.adaptive_avg_pool2d(picture, SIDE)[None]
            tiles = torch.cat([overview, tiles] if bug == GLOBAL else [tiles, overview])  # [tiles, 3, SIDE, SIDE]

        x = patchify(tiles, PATCH) @ w["patch"]  # [tiles, patches, 8]
        class_token = w["class"].expand(len(x), 1, -1)
        x = torch.cat([class_token, x] if bug == CLASS else [x, class_token], dim=1)
        x = x + F.gelu(x @ w["up"]) @ w["down"]  # a layer of the encoder without its attention
        x = x[:, :-1]
        x = x.reshape(len(x), TOKENS, -1) if bug == SHUFFLE else pixel_shuffle(x, BLOCK)
        vectors = F.gelu(F.gelu(x @ w["fc1"]) @ w["fc2"]) @ w["projector"]  # [tiles, TOKENS, 16]

        replaced = ("<|patch|>", "<|image|>") if bug == IMAGE else ("<|patch|>",)
        names = layout(rows, columns)
        places = [place for place, name in enumerate(names) if name in replaced][: len(tiles) * TOKENS]
        embeddings = w["words"][[SPECIAL.index(name) for name in names]]  # [tokens, 16]
        embeddings[places] = vectors.flatten(0, 1)
        return embeddings

    return fuse


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Those of a little model, without biases, positions or norms: an input of 0 stays 0."""
    shapes = {
        "patch": (3 * PATCH**2, 8), "up": (8, 32), "down": (32, 8), "fc1": (8 * BLOCK**2, 24), "fc2": (24, 24),
        "projector": (24, 16), "class": (1, 8), "words": (6, 16),
    }  # fmt: skip
    rng = random.Random(seed)
    return {name: normal(rng, *shape) / shape[0] ** 0.5 for name, shape in shapes.items()}


def planted(seed: int):
    """The suspect of this seed, with weights that nobody is told."""

    def fuse(pixels):  # holds no more than its seed, and has the same name for every bug
        rng = random.Random(seed)
        return suspect(bug_hunt.bug_of(rng, BUGS), rng.getrandbits(62))(pixels)

    return fuse


def draw(rng: random.Random) -> dict:
    return bug_hunt.draw(rng, BUGS)


def observe(function, inputs: dict) -> dict:
    return bug_hunt.observe(function, inputs, planted)


# Bug -> what is right when it is found, the question for any other answer, and for particular ones their name and own.
STEPS = {
    RIGHT: (
        "a right suspect is found right",
        "Take suspect(RIGHT). Which of your experiments raises the alarm, and is it sure that it should?",
        {
            COLOUR: (
                "right taken for CLIP's colours",
                "(v / 255 - 0.5) / 0.5 is 0 for which v? And which rows of the sequence come from no pixel at all?",
            ),
            CLASS: (
                "right taken for class first",
                "Which patch is the last one of a tile, and in which row of the sequence should it show?",
            ),
            GLOBAL: (
                "right taken for global first", "Of the tiles of a picture, is the global one the first or the last?",
            ),
            SHUFFLE: (
                "right taken for a plain reshape",
                "BLOCK is 2: which patches share a token with the first one, and which is the first that does not?",
            ),
            IMAGE: (
                "right taken for <|image|> overwritten",
                "Count again in layout(rows, columns): which token is in the row that you watch?",
            ),
        },
    ),
    COLOUR: (
        "CLIP's colours are found",
        "Which colour becomes 0 for a mean of 0.5, and what should come of a picture in nothing but that colour?",
        {
            RIGHT: (
                "colours missed",
                "Which patches change is right with any mean. Which colour says something about the mean itself?",
            ),
            CLASS: (
                "colours taken for class first",
                "Grey left a trace. In one token of each tile, or in all of them?",
            ),
            IMAGE: (
                "colours taken for <|image|> overwritten",
                "Grey left a trace. In one row of <|patch|>, or in all of them?",
            ),
        },
    ),
    CLASS: (
        "a class token at the wrong end is found",
        "One vector too many at the front, and one taken off at the end: which patch is lost?",
        {
            RIGHT: (
                "class first missed",
                "Which patches did you paint? If all move on by one, which of them is lost for good?",
            ),
            COLOUR: (
                "class first taken for colours",
                "Grey left a trace. In all tokens of a tile, or in one that something else has come into?",
            ),
            GLOBAL: (
                "class first taken for global first",
                "The last patch changes nothing in your last tile. Does it change anything in another one?",
            ),
            SHUFFLE: (
                "class first taken for a plain reshape",
                "A patch shows in the wrong token. Is it there with its neighbours, or has all moved on by one?",
            ),
            IMAGE: (
                "class first taken for <|image|> overwritten",
                "The last patch is not in the last row. Is it in the row before, or nowhere?",
            ),
        },
    ),
    GLOBAL: (
        "a global tile at the front is found",
        "Paint something in the first tile. Which two tiles of the sequence should change, and which do?",
        {
            RIGHT: (
                "global first missed",
                "How many tiles did your picture have, and did you ask which of them changed?",
            ),
            CLASS: (
                "global first taken for class first",
                "You looked for a patch in one tile. Is it lost, or is it in another tile?",
            ),
            SHUFFLE: (
                "global first taken for a plain reshape",
                "A patch is not in the row where you looked. Is it in another token of its tile, or in another tile?",
            ),
            IMAGE: (
                "global first taken for <|image|> overwritten",
                "Did the row of <|image|> itself change, or one behind it, or before it?",
            ),
        },
    ),
    SHUFFLE: (
        "patches merged by a plain reshape are found",
        "Which patches share a token: four in a row, or the four of a square? Which two tell these apart?",
        {
            RIGHT: (
                "plain reshape missed",
                "Which patches did you paint? Is there one that is in the same token, or in the same row of them, "
                "both ways?",
            ),
            CLASS: (
                "plain reshape taken for class first",
                "A patch shows in the wrong token. Is the last patch of the tile lost as well?",
            ),
            GLOBAL: (
                "plain reshape taken for global first",
                "A patch shows in the wrong row. Is that row in the wrong tile, too?",
            ),
        },
    ),
    IMAGE: (
        "a vector over <|image|> is found",
        "Which rows may depend on the picture? Which row does, and which one does not any more?",
        {
            RIGHT: (
                "<|image|> missed",
                "Did your experiments look at the rows of <|patch|> alone, or at what is not to change as well?",
            ),
            COLOUR: (
                "<|image|> taken for colours",
                "Grey left a trace. In all rows of <|patch|>, or in the one that never got a vector?",
            ),
            CLASS: (
                "<|image|> taken for class first",
                "The last patch is not in the row where you looked. Is it lost, or in the row before?",
            ),
            GLOBAL: (
                "<|image|> taken for global first",
                "Which row changed in the place of the global tile: one of its own, or the one before it?",
            ),
        },
    ),
}  # fmt: skip


def judge(inputs: dict, observed: dict):
    yield from bug_hunt.judge(inputs, observed, BUGS, STEPS)
