"""RMS norm: the warm-up, and the norm in front of every attention and every feed-forward of Llama 4."""

import random

import numpy as np
import torch

from ..exercise import Card, different, normal, runs, same
from ..observe import call

CARD = Card("00", "RMS norm", difficulty=1, importance=4, minutes=10, trains="reductions, dtypes, reading a check")

HINTS = (
    "Each token is scaled by itself alone: which axis of [batch, tokens, hidden] holds one token's numbers?",
    "The root mean square is the square root of the mean of the squares. `eps` keeps the division finite for a token "
    "of zeros, and it belongs under the root.",
    "In float32: x32 = x.float(); x32 * rsqrt(mean of x32 squared over the last axis, axis kept, + eps). Then go back "
    "to x's own dtype, and multiply by the weight.",
)

# What the exercise is about; a function that calls one of these has not done it.
ANSWERED_BY = (
    "minillama4.model.RMSNorm",
    "torch.nn.functional.rms_norm",
    "torch.nn.RMSNorm",
    "torch.rms_norm",
    "torch.nn.functional.layer_norm",
)


def draw(rng: random.Random) -> dict:
    batch, tokens, hidden = different(rng, 3, 9, 3)
    return {
        "x": 3 * normal(rng, batch, tokens, hidden) + 2,  # a mean far from 0, which a LayerNorm would take away
        "weight": 1 + 0.5 * normal(rng, hidden),
        "eps": 10 ** rng.uniform(-6, -5),
        "large_eps": rng.uniform(8.0, 20.0),  # about the mean square of x
        "push": normal(rng, batch, tokens, hidden),
        "half": (1000 * (1 + normal(rng, tokens, hidden))).half(),  # float16 ends at 65,504: no room for the squares
    }


def observe(function, inputs: dict) -> dict:
    x, weight, eps = inputs["x"], inputs["weight"], inputs["eps"]
    return (
        call("plain", function, x, torch.ones_like(weight), eps)
        | call("weighted", function, x, weight, eps)
        | call("eps", function, x, weight, inputs["large_eps"])
        | call("zeros", function, torch.zeros_like(x), weight, eps)
        | call("push", function, x, weight, eps, cotangent=inputs["push"], wrt=(0, 1))
        | call("half", function, inputs["half"], weight.half(), eps)
    )


def judge(inputs: dict, observed: dict):
    x, weight, eps = inputs["x"], inputs["weight"], inputs["eps"]
    ones = torch.ones_like(weight)
    shapes = f"x [batch, tokens, hidden] = {list(x.shape)}, weight [{len(weight)}], eps {eps:.1e}"
    yield from runs(observed, "plain", x.shape, shapes)
    x64, plain = x.double(), observed["plain/value"]
    yield same(
        "each token is divided by its own root mean square", plain, truth(x, ones, eps),
        f"{shapes}, all weights 1", "For x = [3, 4], what is the root mean square, by hand, and what does yours give?",
        {
            "identity": (x, "Your function gives x back. Which line should change it?"),
            "does not use x": (
                np.full_like(plain, plain.flat[0]), "All your values are equal. Which line works on the numbers in x?",
            ),
            "subtracts the mean": (
                (x64 - x64.mean(-1, keepdim=True)) / (x64.var(-1, unbiased=False, keepdim=True) + eps).sqrt(),
                "Yours has mean 0 in each token, as LayerNorm does. Which of LayerNorm's two steps does RMS norm keep?",
            ),
            "deviation from the mean": (
                x64 / (x64.var(-1, unbiased=False, keepdim=True) + eps).sqrt(),
                "What does a variance take away before it squares? Should that be taken away here?",
            ),
            "off by one": (
                x64 / (x64.square().sum(-1, keepdim=True) / (x.shape[-1] - 1) + eps).sqrt(),
                "For a token of n numbers, by what do you divide the sum of the squares? Is it n?",
            ),
            "sum instead of mean": (
                x64 / (x64.square().sum(-1, keepdim=True) + eps).sqrt(),
                "Each of your tokens has length 1. What length should a token of n numbers have, if each is about 1?",
            ),
            "no root": (
                x64 / (x64.square().mean(-1, keepdim=True) + eps),
                "Make x twice as large. Does your result stay the same, as it should?",
            ),
            "over tokens": (
                x64 / (x64.square().mean(1, keepdim=True) + eps).sqrt(),
                "Change one token: does another token's result change? Which axis does your mean run over?",
            ),
            "over everything": (
                x64 / (x64.square().mean() + eps).sqrt(),
                "How many root mean squares did you compute, one a token or one for all of them?",
            ),
            "mean of absolute values": (
                x64 / (x64.abs().mean(-1, keepdim=True) + eps),
                "For x = [3, 4], is the root of the mean of the squares the same as the mean of 3 and 4?",
            ),
        },
    )  # fmt: skip
    yield same(
        "the weight scales each channel", observed["weighted/value"], truth(x, weight, eps), shapes,
        "Where in your function does `weight` come in, and does channel c meet weight c?",
        {
            "no weight": (truth(x, ones, eps), "What does your function do with `weight`?"),
            "one plus weight": (
                truth(x, 1 + weight, eps),
                "With weight 0 some models (Gemma) keep x, since they add 1 to it. What does Llama give for weight 0?",
            ),
            "weight before the norm": (
                truth(x64 * weight, ones, eps), "Is the root mean square taken of x, or of x times the weight?",
            ),
            "weight inside the root": (
                x64 * weight / ((weight * x64.square()).mean(-1, keepdim=True) + eps).sqrt(),
                "Does the weight belong to the size of a token, or is it applied after the token has a standard size?",
            ),
        },
    )  # fmt: skip
    large = inputs["large_eps"]
    mean = x64.square().mean(-1, keepdim=True)
    yield same(
        "eps is added to the mean square, under the root", observed["eps/value"], truth(x, weight, large),
        f"{shapes.rsplit(',', 1)[0]}, eps {large:.3f}", "Is it the eps of the argument that you add, and where?",
        {
            "ignores eps": (
                truth(x, weight, 1e-6), "Is what you add the argument eps? What changes in your result when it is 10?",
            ),
            "eps outside the root": (
                x64 / (mean.sqrt() + large) * weight, "Is eps added before the root is taken, or after?",
            ),
            "eps as a floor": (
                x64 / mean.clamp_min(large).sqrt() * weight, "Is eps added to the mean square, or its smallest value?",
            ),
        },
    )  # fmt: skip
    yield same(
        "a token of zeros stays zero", observed["zeros/value"], torch.zeros_like(x), f"x all 0, eps {eps:.1e}",
        "What is 0 / 0? What does eps do against it?",
    )  # fmt: skip
    leaf, leaf_weight = x64.clone().requires_grad_(), weight.double().requires_grad_()
    (truth(leaf, leaf_weight, eps) * inputs["push"]).sum().backward()
    asks = "Does every step from the argument to the result stay a tensor: no .detach(), .item(), .data, no_grad?"
    for name, i, want in (("x", 0, leaf.grad), ("the weight", 1, leaf_weight.grad)):
        yield same(f"the gradient reaches {name}", observed[f"push/grad{i}"], want, shapes, asks, tolerance=1e-3)

    half = inputs["half"]
    given = f"x [{', '.join(map(str, half.shape))}] in float16, with values about 1,000"
    yield from list(runs(observed, "half", half.shape, given, dtype="float16"))[:2]
    yield same(
        "float16 is squared in float32", observed["half/value"], truth(half, weight.half(), eps), given,
        "What is 1,000 squared in float16, whose largest number is 65,504? In which dtype do you take the mean?",
        tolerance=5e-3,
    )  # fmt: skip


def truth(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In float64, from the definition: x_i / sqrt(sum_j x_j^2 / n + eps) * w_i."""
    x = x.double()
    squares = sum(x[..., j] ** 2 for j in range(x.shape[-1]))
    return x / torch.sqrt(squares / x.shape[-1] + eps)[..., None] * weight.double()
