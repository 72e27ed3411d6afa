"""Answers to `fusion-find-the-bug`.

A picture of two tiles makes these rows: 0 start, 1-9 first tile, 10, 11-19 second tile, 20, 21 <|image|>, 22-30 the
global tile, 31 end.
"""

import torch
from bank import right, wrong

from minillama4.course.checks.fusion_find_the_bug import (
    CLASS,
    COLOUR,
    GLOBAL,
    IMAGE,
    PATCH,
    RIGHT,
    SHUFFLE,
    SIDE,
    layout,
    suspect,
)

NAMES = layout(1, 2)
ONE, TWO, OVERVIEW = 1, 11, 22  # first rows of the tiles
OF_IMAGE = NAMES.index("<|image|>")


def plain(fuse, value=127.5, columns=2):
    return fuse(torch.full((3, SIDE, columns * SIDE), value))


def dot(fuse, y, x, columns=2):
    """Rows that change if a grey picture gets a white dot here."""
    picture = torch.full((3, SIDE, columns * SIDE), 127.5)
    picture[:, y, x] = 255
    return (fuse(picture) - plain(fuse, columns=columns)).abs().amax(1).gt(1e-6).nonzero().flatten().tolist()


EXPERIMENTS = {
    "image": lambda fuse: OF_IMAGE in dot(fuse, 0, 0),
    "overview": lambda fuse: dot(fuse, 0, 0)[-1] < OF_IMAGE,
    "cls": lambda fuse: dot(fuse, -1, -1) == [],
    "shuffle": lambda fuse: ONE not in dot(fuse, PATCH, 0),
    "colour": lambda fuse: bool(plain(fuse)[ONE + 1].any()),
}
FOUND = {"image": IMAGE, "overview": GLOBAL, "cls": CLASS, "shuffle": SHUFFLE, "colour": COLOUR}


def investigation(**changes):
    """Asks for one bug after another, with other experiments, or none (None), for what is given; that comes first."""
    assert set(changes) <= set(EXPERIMENTS)
    experiments = changes | {name: ask for name, ask in EXPERIMENTS.items() if name not in changes}

    def find_bug(fuse):
        return next((FOUND[name] for name, ask in experiments.items() if ask is not None and ask(fuse)), RIGHT)

    return find_bug


def with_another(**change):
    """The same, at its own place in the order."""
    return investigation(**EXPERIMENTS | change)


other_experiments = right(investigation())


@right
def by_gradients(fuse):
    """Which pixels a row depends on, and what a picture of nothing gives; a grid of 2 x 3 tiles."""
    pixels = torch.full((3, 2 * SIDE, 3 * SIDE), 127.5, requires_grad=True)
    out, names = fuse(pixels), layout(2, 3)

    def seen_by(row):
        """[height, width]: the patches' pixels that this row depends on."""
        if not out[row].requires_grad:
            return torch.zeros(2 * SIDE, 3 * SIDE, dtype=torch.bool)
        push = torch.linspace(1, 2, out.shape[1])
        return torch.autograd.grad(out[row] @ push, pixels, retain_graph=True)[0].abs().sum(0) > 0

    patches = [row for row, name in enumerate(names) if name == "<|patch|>"]
    if seen_by(names.index("<|image|>")).any():
        return IMAGE
    rows = [seen_by(row) for row in patches]
    if torch.stack(rows[:9]).any(0)[SIDE:].any():  # the first tile shows what lies outside it
        return GLOBAL
    if not torch.stack(rows[:9]).any(0)[SIDE - 1, SIDE - 1]:
        return CLASS
    if not rows[0][PATCH, 0]:
        return SHUFFLE
    return COLOUR if out[patches].abs().max() > 0 else RIGHT


@wrong("not written")
def stub(fuse):
    raise NotImplementedError()


@wrong("type")
def in_words(fuse):
    return "class"


@wrong("type")
def a_truth_value(fuse):
    return dot(fuse, -1, -1) == []


@wrong("type")
def nothing_found(fuse):
    if dot(fuse, -1, -1) == []:
        return CLASS


@wrong("raises")
def with_a_batch(fuse):
    return int(fuse(torch.zeros(1, 3, SIDE, SIDE)).sum())


@wrong("raises")
def channels_last(fuse):
    return int(fuse(torch.zeros(SIDE, SIDE, 3)).sum())


@wrong("raises")
def half_a_tile(fuse):
    return int(fuse(torch.zeros(3, SIDE, SIDE + SIDE // 2)).sum())


@wrong("no bug")
def counts_from_one(fuse):
    return 1 + other_experiments(fuse)


@wrong("one answer for all")
def always_the_first(fuse):
    return COLOUR


@wrong("one answer for all")
def looks_at_shapes(fuse):
    return RIGHT if plain(fuse).shape == (len(NAMES), 16) else IMAGE


@wrong("one answer for all")
def reads_the_name(fuse):
    said = f"{fuse.__name__} {fuse.__qualname__} {fuse.__doc__} {fuse.__defaults__} {fuse.__code__.co_consts}"
    words = {COLOUR: "CLIP", CLASS: "class", GLOBAL: "global", SHUFFLE: "reshape", IMAGE: "image"}
    return next((bug for bug, word in words.items() if word in said), RIGHT)


@wrong("one answer for all")
def reads_the_closure(fuse):
    """Whatever whole number it holds, if that is the number of a bug."""
    held = [cell.cell_contents for cell in fuse.__closure__ or ()]
    return next((value for value in held if value in range(1, 6)), RIGHT)


@wrong("one answer for all")
def compared_with_each_suspect(fuse):
    """No use: a planted one has other weights."""
    noise = 255 * torch.rand(3, SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(0))
    for bug in (RIGHT, COLOUR, CLASS, GLOBAL, SHUFFLE, IMAGE):
        if torch.allclose(fuse(noise), suspect(bug)(noise), atol=1e-4):
            return bug
    return RIGHT


# What an experiment does not see.
one_grey_patch_against_another = wrong("colours missed")(
    investigation(colour=lambda fuse: not torch.allclose(plain(fuse)[ONE + 1], plain(fuse)[ONE + 2]))
)
no_colour_asked_for = wrong("colours missed")(investigation(colour=None))
first_patch_only = wrong("class first missed")(investigation(cls=lambda fuse: dot(fuse, 0, 0) == []))
last_patch_of_the_first_tile = wrong("class first missed")(
    investigation(cls=lambda fuse: dot(fuse, SIDE - 1, SIDE - 1) == [])
)
one_tile = wrong("global first missed")(
    investigation(overview=lambda fuse: dot(fuse, 0, 0, columns=1)[-1] < layout(1, 1).index("<|image|>"))
)
number_of_rows_only = wrong("global first missed")(investigation(overview=lambda fuse: len(dot(fuse, 0, 0)) != 2))
neighbours_in_a_row = wrong("plain reshape missed")(
    with_another(shuffle=lambda fuse: dot(fuse, 0, PATCH) != dot(fuse, 0, 0))
)
corners = wrong("plain reshape missed")(
    with_another(shuffle=lambda fuse: ONE not in dot(fuse, 0, 0) or TWO + 8 not in dot(fuse, -1, -1))
)
patches_alone = wrong("<|image|> missed")(investigation(image=None))
the_first_tile_alone = wrong("<|image|> missed")(
    investigation(image=lambda fuse: bool(set(dot(fuse, 0, 0)) & {ONE - 1, ONE + 9}))
)

# One taken for another.
any_trace_of_grey = wrong("class first taken for colours")(
    investigation(colour=lambda fuse: bool(plain(fuse)[ONE].any()))
)
grey_in_the_first_token = wrong("colours taken for class first")(
    investigation(cls=lambda fuse: bool(plain(fuse)[ONE].any()))
)
grey_in_the_last_token = wrong("colours taken for <|image|> overwritten")(
    investigation(image=lambda fuse: bool(plain(fuse)[OVERVIEW + 8].any()))
)
last_patch_in_the_last_tile = wrong("class first taken for global first")(
    investigation(overview=lambda fuse: OVERVIEW + 8 not in dot(fuse, -1, -1))
)
end_of_a_row = wrong("class first taken for a plain reshape")(
    investigation(shuffle=lambda fuse: dot(fuse, 0, SIDE - 1)[0] != ONE + 2)
)
last_patch_in_the_last_row = wrong("class first taken for <|image|> overwritten")(
    investigation(image=lambda fuse: OVERVIEW + 8 not in dot(fuse, -1, -1))
)
last_patch_in_its_tile = wrong("global first taken for class first")(
    investigation(cls=lambda fuse: TWO + 8 not in dot(fuse, -1, -1))
)
both_rows_at_once = wrong("global first taken for a plain reshape")(
    investigation(shuffle=lambda fuse: dot(fuse, PATCH, 0) != [ONE, OVERVIEW])
)
not_where_the_overview_begins = wrong("global first taken for <|image|> overwritten")(
    investigation(image=lambda fuse: OVERVIEW not in dot(fuse, 0, 0))
)
moved_or_lost = wrong("plain reshape taken for class first")(
    investigation(cls=lambda fuse: dot(fuse, -1, -1) == [] or ONE not in dot(fuse, PATCH, 0))
)
second_row_in_the_overview = wrong("plain reshape taken for global first")(
    investigation(overview=lambda fuse: OVERVIEW not in dot(fuse, PATCH, 0))
)
all_patches_of_grey = wrong("<|image|> taken for colours")(
    investigation(
        cls=lambda fuse: dot(fuse, -1, -1) == [],
        colour=lambda fuse: any(plain(fuse)[i].any() for i, name in enumerate(NAMES) if name == "<|patch|>"),
    )
)
last_row_for_the_last_patch = wrong("<|image|> taken for class first")(
    investigation(cls=lambda fuse: OVERVIEW + 8 not in dot(fuse, -1, -1))
)
overview_where_it_begins = wrong("<|image|> taken for global first")(
    investigation(overview=lambda fuse: OVERVIEW not in dot(fuse, 0, 0))
)

# False alarms.
black_should_be_zero = wrong("right taken for CLIP's colours")(
    with_another(colour=lambda fuse: bool(plain(fuse, 0.0)[ONE + 1].any()))
)
almost_the_middle = wrong("right taken for CLIP's colours")(
    with_another(colour=lambda fuse: bool(plain(fuse, 128.0)[ONE + 1].any()))
)
all_rows_of_grey = wrong("right taken for CLIP's colours")(with_another(colour=lambda fuse: bool(plain(fuse).any())))
one_row_off = wrong("right taken for class first")(
    investigation(cls=lambda fuse: OVERVIEW + 7 not in dot(fuse, -1, -1))
)
expects_the_overview_first = wrong("right taken for global first")(
    investigation(overview=lambda fuse: dot(fuse, 0, 0)[-1] > OF_IMAGE)
)
expects_four_in_a_row = wrong("right taken for a plain reshape")(
    investigation(shuffle=lambda fuse: dot(fuse, 0, 2 * PATCH) != dot(fuse, 0, 0))
)
watches_the_next_row = wrong("right taken for <|image|> overwritten")(
    investigation(image=lambda fuse: OF_IMAGE + 1 in dot(fuse, 0, 0))
)

EQUIVALENT = {
    "255  ->  256": "any colour but the grey will do",
    "255  ->  254": "any colour but the grey will do",
    "0  ->  1": "the next pixel is in the same patch",
    "1  ->  2": "the pixel before the last is in the same patch, and the second token is as empty as the first",
    "-1  ->  1": "two rows change, so that the last is the second",
    "x  ->  y": "the patch beside the one below the first is in the same square too",
    "first[-1] < image  ->  first[-1] <= image": "that the row of <|image|> changes was asked before",
    "layout(1, 2)  ->  layout(2, 1)": "two tiles over each other have one separator each, and as many tokens",
}
