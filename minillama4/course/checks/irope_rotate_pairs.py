"""RoPE as Llama 4 stores it: adjacent channels turn as a pair, by position times the pair's own frequency."""

import math
import random
from collections.abc import Iterable

import torch

from ..exercise import Card, different, normal, runs, same
from ..observe import call

CARD = Card("02", "Rotate pairs", difficulty=2, importance=5, minutes=20, trains="RoPE, adjacent pairs, dtypes")

HINTS = (
    "Forget theta and take one pair (a, b) at position p. It is an arrow in the plane, turned by p radians: write both "
    "of its new numbers with cos(p) and sin(p).",
    "x[..., 0::2] holds the first numbers of all pairs, x[..., 1::2] the second ones. Pair i has frequency "
    "theta ** (-2i / dim), so the angles are [tokens, dim / 2]; they need one more axis, of size 1, for the heads.",
    "first * cos - second * sin, and first * sin + second * cos. Stack the two on a new last axis and flatten it, and "
    "they take turns again. The angles are float32; only the result goes to x's dtype.",
)

ANSWERED_BY = ("minillama4.attention.rotate", "minillama4.attention.rotation")


def draw(rng: random.Random) -> dict:
    batch, tokens, heads = different(rng, 3, 6, 3)
    dim = rng.choice((14, 16, 18))  # so there are more pairs than there are tokens or heads
    return {
        "x": normal(rng, batch, tokens, heads, dim),
        "positions": torch.tensor(rng.sample(range(7, 60), tokens)),  # in any order, and none is its own index
        "theta": rng.uniform(20_000, 90_000),  # neither 10,000 nor 500,000, which one may write down as constants
        "push": normal(rng, batch, tokens, heads, dim),
        "far": torch.tensor(rng.sample(range(7_001, 8_192, 2), tokens)),  # bfloat16 counts by 32 up there
    }


def observe(function, inputs: dict) -> dict:
    x, positions, theta = inputs["x"], inputs["positions"], inputs["theta"]
    return (
        call("pair", function, x[..., :2], positions, theta)
        | call("alike", function, x, positions, 1.0)
        | call("plain", function, x, positions, theta, cotangent=inputs["push"], wrt=(0,))
        | call("half", function, x.bfloat16(), inputs["far"], theta)
    )


def judge(inputs: dict, observed: dict):
    x, positions, theta = inputs["x"], inputs["positions"], inputs["theta"]
    dim, pairs = x.shape[-1], range(x.shape[-1] // 2)
    where = f"positions {positions.tolist()}"

    one = x[..., :2]
    given = f"x [batch, tokens, heads, dim] = {list(one.shape)}, {where}, theta {theta:.0f}"
    yield from runs(observed, "pair", one.shape, given)
    a, b = one.double().unbind(-1)  # [batch, tokens, heads] each
    p = positions.double()[:, None]  # with dim 2 there is one pair, and it turns by the position itself
    cos, sin = p.cos(), p.sin()
    keeps = "A rotation keeps a*a + b*b. Put in (1, 1): is it still 2 at every position?"
    start = "Nothing turns at position 0. What does your function make of (1, 0) there?"
    first = "With dim 2 there is one pair, the first. What is its frequency in yours, and what is theta ** 0?"
    yield same(
        "a pair turns by its position", observed["pair/value"], turned(one, p), given,
        "An arrow (1, 0) that turns by 1 radian: where does it point, and where in yours?",
        {
            "identity": (one, "Your function gives x back. Which line should turn it?"),
            "the other way": (
                turned(one, -p), "A small turn takes (1, 0) to about (1, 0.1). Which sign has your second number?",
            ),
            "sin and cos swapped": (torch.stack([a * sin - b * cos, a * cos + b * sin], dim=-1), start),
            "mirrored": (
                torch.stack([a * cos + b * sin, a * sin - b * cos], dim=-1),
                "Nothing turns at position 0. What does your function make of (0, 1) there?",
            ),
            "no minus": (torch.stack([a * cos + b * sin, a * sin + b * cos], dim=-1), keeps),
            "two minuses": (torch.stack([a * cos - b * sin, a * sin - b * cos], dim=-1), keeps),
            "one position too far": (turned(one, p + 1), start),
            "one position too few": (turned(one, p - 1), start),
            "index for position": (
                turned(one, torch.arange(len(p))[:, None]),
                "The first token here is not at position 0. Which argument says where it is?",
            ),
            "degrees": (
                turned(one, p * math.pi / 180), "Angles are in radians. Is there a factor that should not be there?",
            ),
            "frequency of the next pair": (turned(one, p / theta), first),
            "odd numbers for even ones": (turned(one, p / theta**0.5), first),
        },
    )  # fmt: skip

    halves = [*range(0, dim, 2), *range(1, dim, 2)]  # first the first numbers of all pairs, then the second ones
    split = [channel for i in pairs for channel in (i, i + dim // 2)]  # as Llama 1 to 3 pair them on the Hub
    p = p.expand(-1, dim // 2)
    right = turned(x, p)
    yield same(
        "adjacent channels make a pair", observed["alike/value"], right, f"x {list(x.shape)}, {where}, theta 1",
        "With theta 1 all pairs turn alike. Put a 1 into channel 2, 0 elsewhere: which channels are not 0 afterwards?",
        {
            "half-split pairs": (
                turned(x, p, split),
                "Put a 1 into channel 0 and 0 elsewhere. Which two channels of your result are not 0: neighbours?",
            ),
            "results side by side": (
                right[..., halves], "In which channel does the second number of the first pair come out?",
            ),
            "taken from the halves": (
                turned(x[..., split], p), "Your results take turns. Did you take x apart in the same way?",
            ),
            "only the first pair": (
                torch.cat([right[..., :2], x[..., 2:]], dim=-1), "How many pairs are there, and how many of them turn?",
            ),
        },
    )  # fmt: skip

    given = f"x {list(x.shape)}, {where}, theta {theta:.0f}"
    slower = [theta ** (-2 * i / dim) for i in pairs]
    yield same(
        "pair i turns theta ** (-2i / dim) radians a token", observed["plain/value"],
        turned(x, angles(positions, slower)), given,
        f"Write down the frequencies of pairs 0, 1 and {dim // 2 - 1}, by the formula and as you compute them. Equal?",
        {
            "one frequency": (turned(x, p), "What does your function do with theta? Which pair turns more slowly?"),
            "exponent i / dim": (
                turned(x, angles(positions, [theta ** (-i / dim) for i in pairs])),
                "The exponents run from 0 to almost -1. How far do yours go?",
            ),
            "exponent reaches -1": (
                turned(x, angles(positions, [theta ** (-2 * i / (dim - 2)) for i in pairs])),
                "By what do you divide 2i: by dim, or by something that makes the last exponent just -1?",
            ),
            "exponent 4i / dim": (
                turned(x, angles(positions, [theta ** (-4 * i / dim) for i in pairs])),
                "Pair 1 has exponent -2 / dim. Did you double it twice?",
            ),
            "slowest first": (
                turned(x, angles(positions, slower[::-1])), "Which pair is the fastest: the first or the last?",
            ),
            "theta 10,000": (
                turned(x, angles(positions, [10_000 ** (-2 * i / dim) for i in pairs])),
                "Which theta stands in your function: the argument, or a number from another model?",
            ),
            "theta 500,000": (
                turned(x, angles(positions, [500_000 ** (-2 * i / dim) for i in pairs])),
                "Which theta stands in your function: the argument, or Llama's own number?",
            ),
        },
    )  # fmt: skip

    yield same(
        "the gradient turns back", observed["plain/grad0"],
        turned(inputs["push"], -angles(positions, slower)), given,  # a rotation's transpose is its inverse
        "Does every step from x to the result stay a tensor: no .detach(), .item(), .data, no_grad?",
        {"x without gradient": (torch.zeros_like(x), "Which of your lines takes x out of the graph?")}, tolerance=1e-3,
    )  # fmt: skip

    half, far = x.bfloat16(), inputs["far"]
    given = f"x {list(x.shape)} in bfloat16, positions {far.tolist()}, theta {theta:.0f}"
    yield from list(runs(observed, "half", x.shape, given, dtype="bfloat16"))[:3]
    yield same(
        "angles are float32 when x is bfloat16", observed["half/value"], turned(half, angles(far, slower)), given,
        f"What is position {int(far[0])} in bfloat16, which has 8 significant bits? In which dtype is your angle?",
        tolerance=3e-2,
    )  # fmt: skip


def angles(positions: torch.Tensor, frequencies: Iterable[float]) -> torch.Tensor:
    """[tokens, pairs] float64, in radians."""
    return torch.tensor([[p * f for f in frequencies] for p in positions.tolist()], dtype=torch.float64)


def turned(x: torch.Tensor, angle: torch.Tensor, channels: list[int] | None = None) -> torch.Tensor:
    """x [batch, tokens, heads, dim] as complex numbers times e^(i angle), in float64; angle: [tokens, dim / 2].

    channels: the two of the first pair, the two of the second, ...; if not given, adjacent ones.
    """
    channels = list(range(x.shape[-1])) if channels is None else channels
    z = torch.view_as_complex(x.double()[..., channels].unflatten(-1, (-1, 2)))  # [batch, tokens, heads, dim / 2]
    z = z * torch.exp(1j * angle)[:, None]
    out = torch.empty(x.shape, dtype=torch.float64)
    out[..., channels] = torch.view_as_real(z).flatten(-2)
    return out
