"""Temperature: queries far into a context get larger logits, on NoPE layers only. Facts: Meta's `model.py`.

Meta cites Scalable-Softmax (arXiv 2501.19399) for it: a softmax over more and more keys flattens.
"""

import math
import random

import numpy as np
import torch

from ..exercise import Card, different, normal, runs, same
from ..observe import call

CARD = Card("02", "Temperature", difficulty=2, importance=4, minutes=15, trains="which layers, absolute positions")

HINTS = (
    "Two questions come before the formula. For an interval of 4, is this layer one of 3, 7, 11, ...? And where in the "
    "whole context does each query stand, which is not where it stands in q?",
    "A query at position p is the (p + 1)-th token. How many times does floor_scale fit into that? This whole number, "
    "plus one, goes into a natural logarithm, and for a short context the logarithm is 0.",
    "Return q as it is unless (layer + 1) % nope_interval == 0. Else factor = 1 + scale * log(1 + (positions + 1) // "
    "floor_scale), which is [tokens]; give it two axes of length 1 for heads and channels, and go back to q's dtype.",
)

ANSWERED_BY = ("minillama4.attention.temperature",)

# Position -> factor of the released models (scale 0.1, floor_scale 8192).
RELEASED = {
    0: 1.0, 8190: 1.0, 8191: 1.069315, 16383: 1.109861, 131071: 1.283321, 1048575: 1.485981, 10485759: 1.715540,
}  # fmt: skip


def draw(rng: random.Random) -> dict:
    batch, heads, dim = different(rng, 2, 6, 3)
    floor_scale = rng.randint(7, 9)
    tokens = 3 * floor_scale + rng.randint(1, 4)  # one call crosses several steps, and its indices would cross some too
    start = floor_scale * rng.randint(2, 4) + rng.randint(1, floor_scale - 2)
    return {
        "q": normal(rng, batch, tokens, heads, dim),
        "positions": start + torch.arange(tokens),
        "interval": rng.choice((3, 5, 6)),  # not the 4 of Llama 4, which need not be passed
        "scale": rng.uniform(0.6, 0.9),  # so that factors pass 2, and a whole number is seen to be none
        "floor_scale": floor_scale,
        "push": normal(rng, batch, tokens, heads, dim),
        "ones": torch.ones(batch, len(RELEASED), heads, dim),
        "half": normal(rng, batch, tokens, heads, dim).half(),
        "late": 8192 * rng.randint(8, 12) + 500 * torch.arange(tokens),  # float16 ends at 65,504
    }


def observe(function, inputs: dict) -> dict:
    q, positions, interval = inputs["q"], inputs["positions"], inputs["interval"]
    sizes = interval, inputs["scale"], inputs["floor_scale"]
    nope, released = interval - 1, torch.tensor(list(RELEASED))
    seen = call("nope", function, q, positions, nope, *sizes)
    for layer in _layers(interval):
        seen |= call(f"layer{layer}", function, q, positions, layer, *sizes)
    return (
        seen
        | call("push", function, q, positions, nope, *sizes, cotangent=inputs["push"], wrt=(0,))
        | call("released", function, inputs["ones"], released, nope, interval, 0.1, 8192)
        | call("half", function, inputs["half"], inputs["late"], nope, interval, 0.1, 8192)
    )


def _layers(interval: int) -> range:
    return range(2 * interval + 1)


def judge(inputs: dict, observed: dict):
    q, positions, interval = inputs["q"], inputs["positions"], inputs["interval"]
    scale, floor_scale = inputs["scale"], inputs["floor_scale"]
    sizes = f"q {list(q.shape)}, nope_interval {interval}, scale {scale:.3g}, floor_scale {floor_scale}"
    given = f"{sizes}, positions {positions[0]} to {positions[-1]}, layer {interval - 1}"
    yield from runs(observed, "nope", q.shape, given)
    for layer in _layers(interval):
        yield from runs(observed, f"layer{layer}", q.shape, given.replace(f"layer {interval - 1}", f"layer {layer}"))
    layer = np.array(_layers(interval))
    scaled = np.array([not np.array_equal(observed[f"layer{i}/value"], q) for i in layer])
    yield same(
        "NoPE layers scale their queries, and RoPE layers leave them alone", scaled, nope_layers(interval),
        f"{sizes}, layers {layer[0]} to {layer[-1]}, one by one: does q change?",
        "With 12 layers and an interval of 3, write down the NoPE layers. Which ones does your condition find?",
        {
            "identity": (layer < 0, "q comes back as it was, from every layer. Which line scales it, and by how much?"),
            "every layer": (layer >= 0, "What does your function do with layer and nope_interval?"),
            "RoPE layers": (
                (layer + 1) % interval != 0, "Your function leaves just the NoPE layers alone. Which way round is it?",
            ),
            "first of each group": (
                layer % interval == 0, "Llama 4's NoPE layers are 3, 7, 11, ... Is layer 0 one of them in yours?",
            ),
            "interval by heart": (
                (layer + 1) % 4 == 0, f"nope_interval is {interval} here. Where is it in your function?",
            ),
            "one layer only": (layer == interval - 1, "How many NoPE layers does a model of 48 layers have?"),
            "all after the first": (
                layer >= interval - 1, "The layer after a NoPE layer: is it one as well, in your function?",
            ),
            "one layer early": ((layer + 2) % interval == 0, "Counted from 0, which number has the fourth layer?"),
        },
    )  # fmt: skip
    p = positions.double()
    steps = ((p + 1) / floor_scale).floor()
    right = factors(positions, scale, floor_scale)

    def by(factor: torch.Tensor) -> torch.Tensor:
        return q.double() * factor[:, None, None]

    def log(inside: torch.Tensor) -> torch.Tensor:
        return by(1 + scale * inside.log())

    yield same(
        "a query is scaled by 1 + scale ln(1 + floor((p + 1) / floor_scale))", observed["nope/value"], by(right), given,
        "Take one query and work out its factor by hand. What is your factor for it?",
        {
            "index in the call": (
                by(factors(torch.arange(len(p)), scale, floor_scale)),
                "In decode a call has one token. Would its query get the factor that it got in prefill?",
            ),
            "no plus one": (
                log(1 + (p / floor_scale).floor()),
                "Position 8191 is the 8192nd token. Does the first step begin there, for a floor_scale of 8192?",
            ),
            "no floor": (log(1 + (p + 1) / floor_scale), "Should the factor grow at every token, or in steps?"),
            "rounded": (log(1 + ((p + 1) / floor_scale).round()), "What do you make of 1.7, and what is its floor?"),
            "one step early": (  # the same as ceil((p + 1) / floor_scale)
                log(2 + (p / floor_scale).floor()), "Should the very first token be scaled already?",
            ),
            "one too many": (log(2 + steps), "log1p(x) is ln(1 + x). How many ones are added in yours?"),
            "no one inside the logarithm": (
                log(steps), "What is your logarithm for a position below floor_scale, and what should it be?",
            ),
            "log10": (
                by(1 + scale * (1 + steps).log10()), "Which base has your logarithm? What is ln(2), and what is yours?",
            ),
            "log2": (
                by(1 + scale * (1 + steps).log2()), "Which base has your logarithm? What is ln(2), and what is yours?",
            ),
            "no logarithm": (by(1 + scale * steps), "At 10M tokens the released factor is 1.7. What is yours?"),
            "floor of the logarithm": (
                by(1 + scale * (1 + steps).log().floor()), "What is rounded down: the logarithm, or what goes into it?",
            ),
            "scale outside": (
                by(scale * (1 + (1 + steps).log())), "For a short context the factor is 1. What is yours, and why?",
            ),
            "scale inside": (
                by(1 + (1 + scale * steps).log()), "What does scale multiply: the steps, or their logarithm?",
            ),
            "no one outside": (
                by(scale * (1 + steps).log()), "For a short context the factor is 1. What is yours: perhaps 0?",
            ),
            "ignores scale": (by(1 + (1 + steps).log()), "What does your function do with scale?"),
            "divided": (by(1 / right), "Do far queries need larger logits, or smaller ones?"),
            "twice": (by(right**2), "How many times does q meet the factor in your function?"),
            "added": (q.double() + right[:, None, None], "Is the factor added to q, or does it multiply q?"),
            "whole number": (
                by(right.floor()), "Your factors are whole numbers. Which of your tensors has the dtype of positions?",
            ),
            "one factor for the call": (
                by(right[-1:].expand(len(p))), "Two queries of one call: may their factors differ in yours?",
            ),
            "first position for all": (
                by(right[:1].expand(len(p))), "Two queries of one call: may their factors differ in yours?",
            ),
            "position in the chunk": (
                log(1 + ((p % floor_scale + 1) / floor_scale).floor()),
                "Does the factor start again with every chunk? Who attends across chunks, and to how many keys?",
            ),
            "attention's own scale": (
                by(right / math.sqrt(q.shape[-1])),
                "Attention itself divides by the root of dim. Should this function do it as well?",
            ),
        },
    )  # fmt: skip
    yield same(
        "the gradient reaches q", observed["push/grad0"], inputs["push"].double() * right[:, None, None], given,
        "Does every step from q to the result stay a tensor: no .detach(), .data, .item(), torch.tensor(...), no_grad?",
    )  # fmt: skip
    ones, places = inputs["ones"], list(RELEASED)
    given = f"q {list(ones.shape)} of ones, positions {places}, scale 0.1, floor_scale 8192, a NoPE layer"
    yield from runs(observed, "released", ones.shape, given)
    yield same(
        "the factors of the released models, up to position 10,485,759", observed["released/value"],
        ones.double() * torch.tensor(list(RELEASED.values()), dtype=torch.float64)[:, None, None], given,
        "Positions come in any order, with gaps. Which line of yours relies on more than each position by itself?",
        {
            "consecutive positions": (
                ones, "These positions are not neighbours. Do you use each of them, or the first one and a count?",
            ),
        },
        tolerance=2e-6,
    )  # fmt: skip
    half, late = inputs["half"], inputs["late"]
    given = f"q {list(half.shape)} in float16, positions {late[0]} to {late[-1]}, scale 0.1, floor_scale 8192"
    yield from runs(observed, "half", half.shape, given, dtype="float16")
    want = half.double() * factors(late, 0.1, 8192)[:, None, None]
    yield same(
        "float16 queries beyond position 65,504", observed["half/value"], want, given,
        "Which of your lines work in float16? Which numbers are too large, or too close to each other, for that?",
        {
            "positions in float16": (want * math.inf, "What is the largest number in float16? Is one of yours larger?"),
        },
        tolerance=2e-3,
    )  # fmt: skip


def nope_layers(interval: int) -> np.ndarray:
    """Is it one? For each of `_layers`; counted off in groups, whose last one it is."""
    group = [False] * (interval - 1) + [True]
    return np.array((group * 3)[: len(_layers(interval))])


def factors(positions: torch.Tensor, scale: float, floor_scale: int) -> torch.Tensor:
    """[tokens] float64, in whole numbers and one by one."""
    return torch.tensor(
        [1 + scale * math.log(1 + (p + 1) // floor_scale) for p in positions.tolist()], dtype=torch.float64
    )
