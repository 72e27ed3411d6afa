"""Pixel shuffle: a square of patches becomes one token, its channels side by side and nothing lost."""

import random

import torch

from ..exercise import Card, normal, runs, same
from ..observe import call

CARD = Card("01", "Pixel shuffle", difficulty=2, importance=4, minutes=15, trains="2-D order in a 1-D sequence")

HINTS = (
    "The patches lie row by row, so patch (row, column) is number row * rows + column. Which four numbers are merged "
    "into the first token, if there are 6 rows? They do not follow each other.",
    "Split the axis of patches into rows and columns, and each of these into cell and place in the cell: [tiles, cell "
    "row, row in the cell, cell column, column in the cell, C]. Which axes say which token, and which what is in it?",
    "Swap row in the cell and cell column: `permute(0, 1, 3, 2, 4, 5)`. Then the last three axes are one token, and "
    "the two before them are the place: `reshape` to [tiles, cells * cells, block * block * C].",
)

ANSWERED_BY = ("minillama4.vision.pixel_shuffle",)

LABELS = "each value is 1000 * tile + 100 * row + 10 * column + channel"  # all below 10: it is read off


def draw(rng: random.Random) -> dict:
    tiles, channels = rng.sample((5, 7, 9), 2)
    block, cells, (many, width) = rng.choice((4, 5)), rng.choice((2, 3)), rng.sample((6, 7, 8), 2)
    return {
        "one": labelled(tiles, 2, channels),
        "two": labelled(tiles, 2 * rng.choice((3, 4)), channels),
        "three": labelled(tiles, 6, channels),
        "large": normal(rng, many, (cells * block) ** 2, width),
        "block": block,
        "push": normal(rng, many, cells**2, block**2 * width),
    }


def labelled(tiles: int, rows: int, channels: int) -> torch.Tensor:
    """[tiles, rows * rows, channels] float32, each number with its place for a value."""
    axes = torch.meshgrid(*map(torch.arange, (tiles, rows, rows, channels)), indexing="ij")
    return sum(scale * axis for scale, axis in zip((1000, 100, 10, 1), axes, strict=True)).flatten(1, 2).float()


def observe(function, inputs: dict) -> dict:
    return (
        call("one", function, inputs["one"], 2)
        | call("two", function, inputs["two"], 2)
        | call("three", function, inputs["three"], 3)
        | call("large", function, inputs["large"], inputs["block"], cotangent=inputs["push"], wrt=(0,))
    )


def judge(inputs: dict, observed: dict):
    x = inputs["one"]
    tiles, _, channels = x.shape
    given = f"x {list(x.shape)}, block 2, so one token a tile; {LABELS}"
    yield from runs(observed, "one", [tiles, 1, 4 * channels], given)
    right = merged(x, squares(2, 2))
    yield same(
        "inside a token: row by row, and all channels of a patch together", observed["one/value"], right, given,
        f"Read the first {channels + 1} numbers of your first token as places. Which of row, column, channel changes?",
        {
            "column by column inside": (
                merged(x, [[(b, a) for a, b in square] for square in squares(2, 2)]),
                "The first patch is at the upper left. Where is your second: right of it, or below?",
            ),
            "channels interleaved": (
                right.unflatten(2, (4, channels)).mT.flatten(2),
                f"Your first four numbers are four patches. Where are the other {channels - 1} channels of the first?",
            ),
            "tiles mixed": (
                x.transpose(0, 1).reshape(right.shape), "Look at the thousands. From how many tiles is your token?",
            ),
        },
        tolerance=0,
    )  # fmt: skip

    for name, block in (("two", 2), ("three", 3)):
        x = inputs[name]
        rows = round(x.shape[1] ** 0.5)
        cells = rows // block
        given = f"x {list(x.shape)}, so {rows} x {rows} patches; block {block}; {LABELS}"
        yield from runs(observed, name, [tiles, cells**2, block**2 * channels], given)
        right, places = squares(rows, block), range(block)
        yield same(
            f"block {block}: a token is a square of neighbours", observed[f"{name}/value"], merged(x, right), given,
            f"Write down row and column of each patch in your second token. Do these {block**2} make a square?",
            {
                "reading order": (
                    x.reshape(tiles, cells**2, -1),
                    "The patches of a token follow each other in yours. In which row of the picture is its last one?",
                ),
                "tokens column by column": (
                    merged(x, [right[j * cells + i] for i in range(cells) for j in range(cells)]),
                    "Where does your second token lie: right of the first one, or below it?",
                ),
                "far apart": (
                    merged(x, [[(i + a * cells, j + b * cells) for a in places for b in places]
                               for i in range(cells) for j in range(cells)]),
                    f"The columns in your first token are {cells} apart. Which part of a split axis is the slow one?",
                ),
            },
            tolerance=0,
        )  # fmt: skip

    x, block = inputs["large"], inputs["block"]
    given = f"x {list(x.shape)}, block {block}"
    yield from runs(observed, "large", inputs["push"].shape, given)
    leaf = x.clone().requires_grad_()
    want = merged(leaf, squares(round(x.shape[1] ** 0.5), block))
    yield same(
        "for any block", observed["large/value"], want, given,
        "Blocks of 2 and 3 came out right. Which number in your function fits those only?",
    )  # fmt: skip
    want.mul(inputs["push"]).sum().backward()
    yield same(
        "the gradient reaches x", observed["large/grad0"], leaf.grad, given,
        "Does every step from x to the result stay a tensor: no .detach(), .numpy(), .data, no_grad? Without a "
        "gradient the encoder would be frozen: what is early fusion then?",
        {"x without gradient": (torch.zeros_like(x), "Which of your lines takes x out of the graph?")},
    )  # fmt: skip


def squares(rows: int, block: int) -> list[list[tuple[int, int]]]:
    """Of each token the (row, column) of its patches: tokens row by row, and the same inside."""
    tops = range(0, rows, block)
    return [[(y + a, x + b) for a in range(block) for b in range(block)] for y in tops for x in tops]


def merged(x: torch.Tensor, tokens: list[list[tuple[int, int]]]) -> torch.Tensor:
    """Patches picked one by one, by their number in the sequence."""
    rows = round(x.shape[1] ** 0.5)
    picked = [torch.cat([x[:, row * rows + column] for row, column in token], dim=-1) for token in tokens]
    return torch.stack(picked, dim=1)
