"""Patchify: a picture as a sequence of squares, by moving axes and without any loop."""

import random

import torch
from torch.overrides import TorchFunctionMode

from ..exercise import Card, Step, different, normal, runs, same
from ..observe import call

CARD = Card("01", "Patchify", difficulty=2, importance=4, minutes=15, trains="view, permute, order of axes")

HINTS = (
    "A pixel's row is patch row * patch_size + row in the patch. A `view` can split one axis into two, the slow one "
    "first. Which two axes of [tiles, 3, side, side] would you split?",
    "You have six axes: tile, channel, patch row, row in the patch, patch column, column in the patch. A patch is a "
    "place in the sequence and a list of numbers. Which axes make the place, and which three make the list?",
    "`permute` them to tile, patch row, patch column, channel, row in the patch, column in the patch; then `reshape` "
    "to [tiles, rows * rows, 3 * patch_size * patch_size]. (`view` cannot join axes that lie apart in memory.)",
)

ANSWERED_BY = (
    "minillama4.vision.patchify",
    "minillama4.vision.LinearPatches",
    "torch.nn.functional.unfold",
    "torch.nn.functional.pixel_unshuffle",
)

LABELS = "the value of a pixel is 1000 * tile + 100 * channel + 10 * row + column"  # all below 10: it is read off
# (tiles, patches a side, pixels a side of a patch) of pictures whose calls of torch are counted
FEW, MORE = (2, 2, 2), {"tiles": (5, 2, 2), "patches": (2, 5, 2), "pixels of a patch": (2, 2, 5)}


def draw(rng: random.Random) -> dict:
    rows, patch = rng.choice(((2, 4), (4, 2), (2, 5), (5, 2)))
    large = different(rng, 4, 7, 3)  # tiles, patches a side, pixels a side of a patch
    side = large[1] * large[2]
    return {
        "tiles": rng.choice((6, 7, 9)),
        "rows": rows,
        "patch": patch,
        "large": normal(rng, large[0], 3, side, side),
        "large_patch": large[2],
        "push": normal(rng, large[0], large[1] ** 2, 3 * large[2] ** 2),
    }


def observe(function, inputs: dict) -> dict:
    tiles, rows, patch = (inputs[name] for name in ("tiles", "rows", "patch"))
    seen = (
        call("one", function, labelled(tiles, patch), patch)
        | call("dots", function, labelled(tiles, rows), 1)
        | call("all", function, labelled(tiles, rows * patch), patch)
        | call("large", function, inputs["large"], inputs["large_patch"], cotangent=inputs["push"], wrt=(0,))
    )
    for name, (tiles, rows, patch) in {"few": FEW, **MORE}.items():
        seen |= call(name, calls_of(function), torch.ones(tiles, 3, rows * patch, rows * patch), patch)
    return seen


def labelled(tiles: int, side: int) -> torch.Tensor:
    """[tiles, 3, side, side] float32, each pixel with its place for a value."""
    tile, channel, row, column = torch.meshgrid(*map(torch.arange, (tiles, 3, side, side)), indexing="ij")
    return (1000 * tile + 100 * channel + 10 * row + column).float()


def calls_of(function):
    """A function that gives how many functions and methods of torch `function` calls: with a loop, more for more."""

    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, operation, types, args=(), kwargs=None):
            self.calls += 1
            return operation(*args, **(kwargs or {}))

    def counted(*arguments):
        with Count() as count:
            function(*arguments)
        return count.calls

    return counted


def judge(inputs: dict, observed: dict):
    tiles, rows, patch = (inputs[name] for name in ("tiles", "rows", "patch"))

    one = labelled(tiles, patch)
    given = f"pixels {list(one.shape)}, patch_size {patch}, so one patch a tile; {LABELS}"
    yield from runs(observed, "one", [tiles, 1, 3 * patch**2], given)
    yield same(
        "inside a patch: channel, row, column", observed["one/value"], truth(one, patch), given,
        f"Read the first {patch + 1} values of your first patch as places. Which of channel, row, column changes?",
        {
            "channel last": (
                truth(one, patch, inside=lambda x: x.permute(0, 2, 3, 1)),
                "Your first three values are one pixel in its three colours. Which axis is the slow one?",
            ),
            "columns before rows": (
                truth(one, patch, inside=lambda x: x.mT),
                "Take your first two values: are they neighbours in a row, or in a column?",
            ),
            "inside out": (
                truth(one, patch, inside=lambda x: x.permute(0, 3, 2, 1)),
                "Your three axes are there in reverse. Which of them changes fastest, and which should?",
            ),
            "tiles mixed": (
                one.transpose(0, 1).reshape(tiles, 1, -1),
                "Look at the thousands in your first patch. From how many tiles does it come?",
            ),
        },
        tolerance=0,
    )  # fmt: skip

    dots = labelled(tiles, rows)
    given = f"pixels {list(dots.shape)}, patch_size 1, so each pixel is a patch; {LABELS}"
    yield from runs(observed, "dots", [tiles, rows**2, 3], given)
    yield same(
        "patches row by row", observed["dots/value"], truth(dots, 1), given,
        "Write down the places of your first three patches. Which path do they take through the picture?",
        {
            "column by column": (
                truth(dots.mT, 1), "Where is your second patch: right of the first one, or below it?",
            ),
            "view without permute": (
                dots.reshape(tiles, -1, 3),
                "Read the places of your first three values. A view keeps the order in memory: which step of yours "
                "brings the channels of one pixel together?",
            ),
            "channel not moved past the columns": (
                dots.transpose(1, 2).reshape(tiles, -1, 3),
                "A patch has three channels of one pixel. Which axes still lie between them and the end, in yours?",
            ),
        },
        tolerance=0,
    )  # fmt: skip

    whole = labelled(tiles, rows * patch)
    given = f"pixels {list(whole.shape)}, patch_size {patch}; {LABELS}"
    yield from runs(observed, "all", [tiles, rows**2, 3 * patch**2], given)
    yield same(
        "a patch is a square of neighbours", observed["all/value"], truth(whole, patch), given,
        f"The second patch begins at row 0, column {patch}. Where does yours begin, and which rows does it hold?",
        {
            "scattered pixels": (
                torch.stack([whole[:, :, i::rows, j::rows].flatten(1) for i in range(rows) for j in range(rows)], 1),
                f"Read the columns of your first values: are they neighbours, or {rows} apart? Which part of a split "
                "axis is the slow one?",
            ),
            "consecutive pixels": (
                whole.flatten(2).unflatten(2, (rows**2, -1)).transpose(1, 2).flatten(2),
                f"You cut the pixels as they follow each other. After {patch} pixels of a row, in which row is the "
                "next pixel of the same patch?",
            ),
        },
        tolerance=0,
    )  # fmt: skip

    large, patch = inputs["large"], inputs["large_patch"]
    given = f"pixels {list(large.shape)}, patch_size {patch}"
    yield from runs(observed, "large", inputs["push"].shape, given)
    yield same(
        "for any size", observed["large/value"], truth(large, patch), given,
        "Smaller pictures came out right. Which number in your function fits those only?",
    )  # fmt: skip
    leaf = large.clone().requires_grad_()
    truth(leaf, patch).mul(inputs["push"]).sum().backward()
    yield same(
        "the gradient reaches the pixels", observed["large/grad0"], leaf.grad, given,
        "Does every step from the pixels to the result stay a tensor: no .numpy(), .tolist(), .detach(), .data?",
    )  # fmt: skip

    sizes = "{0} tiles of {1} x {1} patches of {2} x {2} pixels"
    for what, size in {"few": FEW, **MORE}.items():  # what is returned was looked at above
        yield from list(runs(observed, what, [], sizes.format(*size), dtype="int"))[:1]
    few = int(observed["few/value"])
    for what, size in MORE.items():
        calls = int(observed[f"{what}/value"])
        yield Step(
            f"no loop over {what}", calls <= few, sizes.format(*size), f"{calls} calls of torch",
            f"{few}, as many as for {sizes.format(*FEW)}",
            f"Which line runs once for each of the {what}? Which axis would do all of them at once?",
        )  # fmt: skip


def truth(pixels: torch.Tensor, patch: int, inside=lambda squares: squares) -> torch.Tensor:
    """Cut out one by one. inside: how squares [tiles, 3, patch, patch] are turned before they are written down."""
    starts = range(0, pixels.shape[2], patch)
    cut = [pixels[:, :, y : y + patch, x : x + patch] for y in starts for x in starts]
    return torch.stack([inside(squares).flatten(1) for squares in cut], dim=1)
