"""Answers to `h100-find-the-bug`."""

import torch
from bank import right, wrong

from minillama4.course.checks.h100_find_the_bug import (
    GROUP,
    LIMIT,
    OFFSET,
    PAIRS,
    RIGHT,
    SCALE,
    TOKENS,
    ZERO,
    suspect,
)
from minillama4.cuda.int4 import dequantise

HALF = GROUP // 2
MANY = LIMIT // GROUP + 1  # experts of a row of two groups, so that the last one begins at LIMIT


def nothing(experts=1, rows=1, byte=0x88):
    return torch.full((experts, rows, GROUP), byte, dtype=torch.uint8)


def given(product, packed, x, experts, scales=(1.0, 1.0)):
    """y [T, N]. x: [T, 2 GROUP]; experts: of each token; scales: of the two groups, in all rows."""
    scale = torch.tensor(scales).expand(*packed.shape[:2], 2)
    return product(torch.as_tensor(x, dtype=torch.float32), torch.tensor(experts), packed, scale)


def one(channel, tokens=1):
    return torch.eye(2 * GROUP)[[channel] * tokens]


def put(packed, channel, expert=0):
    """A weight 1 there, in the first row."""
    group, place = divmod(channel, GROUP)
    packed[expert, 0, group * HALF + place % HALF] = 0x89 if place < HALF else 0x98
    return packed


def shows(product, channel, at=None, expert=0, experts=1, tokens=1, ask=None, watch=-1, **scales):
    """Does the weight 1 of this channel (or another: at) come out, for an input that is 1 in this channel alone?"""
    packed = put(nothing(experts), channel if at is None else at, expert)
    asked = [expert if ask is None else ask] * tokens
    return bool(given(product, packed, one(channel, tokens), asked, **scales)[watch].any())


def all_zero(product, byte=0x88, x=None):
    return given(product, nothing(byte=byte), torch.ones(1, 2 * GROUP) if x is None else x, [0])


EXPERIMENTS = {
    "zero": lambda product: bool(all_zero(product).any()),
    "pairs": lambda product: not shows(product, HALF - 1),
    "scale": lambda product: not shows(product, 2 * GROUP - 1, scales=(0.0, 1.0)),
    "tokens": lambda product: not shows(product, 0, tokens=3),
    "offset": lambda product: shows(product, 0, expert=0, experts=MANY, ask=MANY - 1),
}
FOUND = {"zero": ZERO, "pairs": PAIRS, "scale": SCALE, "tokens": TOKENS, "offset": OFFSET}


def investigation(**changes):
    """Asks for one bug after another, with other experiments, or none (None), for what is given; that comes first."""
    assert set(changes) <= set(EXPERIMENTS)
    experiments = changes | {name: ask for name, ask in EXPERIMENTS.items() if name not in changes}

    def find_bug(product):
        return next((FOUND[name] for name, ask in experiments.items() if ask is not None and ask(product)), RIGHT)

    return find_bug


def with_another(**change):
    """The same, at its own place in the order."""
    return investigation(**EXPERIMENTS | change)


other_experiments = right(investigation())


@right
def by_gradients(product):
    """Reads whole rows of weights from the gradient of x, and divides by the norm, which weights of 1 tell."""

    def row(packed, scale, expert=0):
        x = torch.ones(1, packed.shape[2] * 2, requires_grad=True)
        y = product(x, torch.tensor([expert]), packed, scale)
        return torch.autograd.grad(y[0, 0], x)[0][0]

    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(256, (40, 8, 3 * HALF), dtype=torch.uint8, generator=generator)
    scale = torch.rand(40, 8, 3, generator=generator) + 0.1
    ones = torch.ones_like(scale)
    if row(torch.full_like(packed, 0x88), ones).any():
        return ZERO
    norm = row(torch.full_like(packed, 0x99), ones)

    def same(expert, scale_there):
        want = dequantise(packed[expert], scale_there[expert], 3 * GROUP)[0]
        return torch.allclose(row(packed, scale, expert) / norm, want, atol=1e-4)

    if not same(0, scale):
        return SCALE if same(0, scale[..., :1].expand_as(scale)) else PAIRS
    if not same(39, scale):
        return OFFSET
    x = torch.ones(2, 3 * GROUP)
    return RIGHT if product(x, torch.tensor([5, 5]), packed, scale)[1].any() else TOKENS


@wrong("not written")
def stub(product):
    raise NotImplementedError()


@wrong("type")
def in_words(product):
    return "offset"


@wrong("type")
def a_truth_value(product):
    return EXPERIMENTS["zero"](product)


@wrong("type")
def nothing_found(product):
    if EXPERIMENTS["pairs"](product):
        return PAIRS


@wrong("raises")
def one_token_without_its_axis(product):
    return int(given(product, nothing(), torch.ones(2 * GROUP), [0]).sum())


@wrong("raises")
def unpacked_weights(product):
    return int(given(product, nothing().repeat(1, 1, 2), torch.ones(1, 2 * GROUP), [0]).sum())


@wrong("raises")
def no_such_expert(product):
    return int(given(product, nothing(), torch.ones(1, 2 * GROUP), [1]).sum())


@wrong("no bug")
def counts_from_one(product):
    return 1 + other_experiments(product)


@wrong("one answer for all")
def always_the_first(product):
    return ZERO


@wrong("one answer for all")
def looks_at_shapes(product):
    return RIGHT if all_zero(product).shape == (1, 1) else TOKENS


@wrong("one answer for all")
def reads_the_name(product):
    said = f"{product.__name__} {product.__qualname__} {product.__doc__} {product.__code__.co_consts}"
    words = {ZERO: "minus", PAIRS: "byte", SCALE: "scale", TOKENS: "token", OFFSET: "wraps"}
    return next((bug for bug, word in words.items() if word in said), RIGHT)


@wrong("one answer for all")
def reads_the_closure(product):
    """Whatever whole number it holds, if that is the number of a bug."""
    held = [cell.cell_contents for cell in product.__closure__ or ()]
    return next((value for value in held if value in range(1, 6)), RIGHT)


@wrong("one answer for all")
def compared_with_each_suspect(product):
    """No use: a planted one has another norm."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(256, (2, 3, GROUP), dtype=torch.uint8, generator=generator)
    scale, x = torch.rand(2, 3, 2, generator=generator), torch.randn(2, 2 * GROUP, generator=generator)
    told = [f(x, torch.tensor([0, 1]), packed, scale) for f in (product, *map(suspect, range(6)))]
    return next((bug for bug in range(6) if torch.allclose(told[0], told[1 + bug])), RIGHT)


# What an experiment does not see.
no_inputs = wrong("minus 7 missed")(
    investigation(zero=lambda product: bool(all_zero(product, x=torch.zeros(1, 2 * GROUP)).any()), offset=None)
)
no_zero_asked_for = wrong("minus 7 missed")(
    with_another(zero=None, offset=lambda product: not shows(product, 0, expert=MANY - 1, experts=MANY))
)
first_channel = wrong("neighbours in a byte missed")(with_another(pairs=lambda product: not shows(product, 0)))
last_channel = wrong("neighbours in a byte missed")(with_another(pairs=lambda product: not shows(product, GROUP - 1)))
corners_only = wrong("neighbours in a byte missed")(
    with_another(pairs=lambda product: not all(shows(product, at) for at in (0, GROUP - 1, GROUP, 2 * GROUP - 1)))
)
equal_scales = wrong("first scale missed")(with_another(scale=lambda product: not shows(product, 2 * GROUP - 1)))
first_group = wrong("first scale missed")(with_another(scale=lambda product: shows(product, 0, scales=(0.0, 1.0))))
a_batch = wrong("first scale missed")(
    with_another(scale=lambda product: not shows(product, 2 * GROUP - 1, tokens=2, watch=0, scales=(0.0, 1.0)))
)
one_token = wrong("first token only missed")(with_another(tokens=lambda product: not shows(product, 0)))
first_row = wrong("first token only missed")(
    with_another(tokens=lambda product: not shows(product, 0, tokens=3, watch=0))
)
two_experts = wrong("wrapped offset missed")(
    with_another(offset=lambda product: shows(product, 0, expert=0, experts=2, ask=1))
)
one_before = wrong("wrapped offset missed")(
    with_another(offset=lambda product: shows(product, 0, expert=0, experts=MANY, ask=MANY - 2))
)
first_of_many = wrong("wrapped offset missed")(
    with_another(offset=lambda product: not shows(product, 0, expert=0, experts=2 * MANY))
)
no_offset_asked_for = wrong("wrapped offset missed")(with_another(offset=None))


def one_large_expert(product):
    packed = put(nothing(rows=2 * MANY), 0)
    packed[0, -1, 0] = 0x89
    return not given(product, packed, one(0), [0])[0, -1]


def all_experts_alike(product):
    packed = nothing(experts=MANY, byte=0x99)
    return not torch.equal(*(given(product, packed, one(0), [expert]) for expert in (0, MANY - 1)))


large_and_alone = wrong("wrapped offset missed")(with_another(offset=one_large_expert))
alike = wrong("wrapped offset missed")(with_another(offset=all_experts_alike))

# One taken for another.
another_channel = wrong("minus 7 taken for neighbours in a byte")(
    investigation(pairs=lambda product: shows(product, 2, at=1))
)
all_inputs_at_once = wrong("minus 7 taken for the first scale")(
    investigation(
        scale=lambda product: bool(
            given(product, put(nothing(), GROUP), torch.ones(1, 2 * GROUP), [0], scales=(1.0, 0.0)).any()
        )
    )
)
an_empty_expert = wrong("minus 7 taken for a wrapped offset")(investigation(offset=EXPERIMENTS["offset"]))
middle_of_the_second = wrong("neighbours in a byte taken for the first scale")(
    investigation(scale=lambda product: not shows(product, GROUP + 1, scales=(0.0, 1.0)))
)
middle_of_the_second_first = wrong("first scale taken for neighbours in a byte")(
    investigation(pairs=lambda product: not shows(product, GROUP + 1, scales=(0.0, 1.0)))
)
second_row_at_channel_1 = wrong("neighbours in a byte taken for first token only")(
    investigation(tokens=lambda product: not shows(product, 1, tokens=2))
)
second_row_of_pairs = wrong("first token only taken for neighbours in a byte")(
    investigation(pairs=lambda product: not shows(product, 1, tokens=2))
)
last_expert_at_channel_1 = wrong("neighbours in a byte taken for a wrapped offset")(
    investigation(offset=lambda product: not shows(product, 1, expert=MANY - 1, experts=MANY))
)
last_expert_of_pairs = wrong("wrapped offset taken for neighbours in a byte")(
    investigation(pairs=lambda product: not shows(product, 1, expert=MANY - 1, experts=MANY))
)
last_expert_second_group = wrong("first scale taken for a wrapped offset")(
    investigation(offset=lambda product: not shows(product, GROUP, expert=MANY - 1, experts=MANY, scales=(0.0, 1.0)))
)
last_expert_second_token = wrong("first token only taken for a wrapped offset")(
    investigation(offset=lambda product: not shows(product, 0, expert=MANY - 1, experts=MANY, tokens=2))
)
second_token_last_expert = wrong("wrapped offset taken for first token only")(
    investigation(tokens=lambda product: not shows(product, 0, expert=MANY - 1, experts=MANY, tokens=2))
)

# False alarms.
code_7_is_zero = wrong("right taken for minus 7")(
    with_another(zero=lambda product: bool(all_zero(product, byte=0x77).any()))
)
empty_bytes = wrong("right taken for minus 7")(
    investigation(
        **{name: ask for name, ask in EXPERIMENTS.items() if name != "zero"},
        zero=lambda product: bool(all_zero(product, byte=0).any()),
    )
)
expects_neighbours = wrong("right taken for neighbours in a byte")(
    with_another(pairs=lambda product: not shows(product, 1, at=HALF))
)
norm_forgotten = wrong("right taken for the first scale")(
    with_another(
        scale=lambda product: (
            not torch.allclose(
                2 * given(product, nothing(byte=0x99), one(0), [0], scales=(1.0, 2.0)),
                given(product, nothing(byte=0x99), one(GROUP), [0], scales=(1.0, 2.0)),
            )
        )
    )
)
another_expert_for_the_second = wrong("right taken for first token only")(
    with_another(tokens=lambda product: not given(product, put(nothing(2), 0), one(0, tokens=2), [0, 1])[1].any())
)


def other_than_dequantised(product):
    """As one would test a product that has no norm: it finds every suspect guilty."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(256, (2, 3, GROUP), dtype=torch.uint8, generator=generator)
    scale, x = torch.rand(2, 3, 2, generator=generator), torch.randn(1, 2 * GROUP, generator=generator)
    want = x @ dequantise(packed[1], scale[1], 2 * GROUP).T
    return not torch.allclose(product(x, torch.tensor([1]), packed, scale).float(), want, atol=1e-3)


def dequantised_at_last(name):
    """Asks for all other bugs as one should, and takes what is left for the one of this name."""
    others = {other: ask for other, ask in EXPERIMENTS.items() if other != name}
    return investigation(**others, **{name: other_than_dequantised})


minus_7_is_left = wrong("right taken for minus 7")(dequantised_at_last("zero"))
neighbours_are_left = wrong("right taken for neighbours in a byte")(dequantised_at_last("pairs"))
first_scale_is_left = wrong("right taken for the first scale")(dequantised_at_last("scale"))
first_token_is_left = wrong("right taken for first token only")(dequantised_at_last("tokens"))
offset_is_left = wrong("right taken for a wrapped offset")(dequantised_at_last("offset"))
weight_of_another_expert = wrong("right taken for a wrapped offset")(
    with_another(offset=lambda product: not shows(product, 0, expert=0, experts=MANY, ask=MANY - 1))
)

EQUIVALENT = {
    "LIMIT // GROUP  ->  LIMIT": "far more experts, of which the last begins at a multiple of LIMIT and wraps as well",
    "1  ->  2": "an expert more, or an input twice as large, changes no answer",
    "1.0  ->  2.0": "a scale twice as large changes no answer",
    "1.0  ->  0.0": "no experiment that takes the scales as given looks at the second group",
    "137  ->  138": "a weight of 2 shows as well as one of 1",
    "0  ->  1": "any expert will do, and any channel that is not the weight's",
    "0  ->  -1": "there is one row; and any channel will do that is not the weight's",
    "2  ->  3": "three equal tokens will do as well, and any channel that is not the weight's",
    "2  ->  1": "any channel will do that is not the weight's",
}
