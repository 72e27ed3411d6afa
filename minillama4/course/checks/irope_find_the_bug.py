"""Find the bug: an iRoPE attention with one of five planted mistakes, to be told apart by experiments alone.

All have been met in public code. Meta's own reference forgets the chunk in one-token decode, torchtitan had its NoPE
layers elsewhere, and vLLM pull request 16311 replaced a norm over all heads by one for each head.
"""

import math
import random

import torch

from .. import bug_hunt
from ..exercise import Card

CARD = Card("02", "Find the bug", difficulty=4, importance=4, minutes=40, trains="experiments, one cause at a time")

HINTS = (
    "v is yours to choose. If row j of v is 1 at place j and 0 elsewhere, the output is the attention weights: you can "
    "read who sees whom. Which query would you watch, if a chunk has CHUNK tokens?",
    "The first query of the second chunk, on layer 0, sees only itself. Give it with others and give it alone: that is "
    "prefill and decode. On layer 3, compare the same two; but far enough that the temperature is not 1. And for the "
    "norm: what may a change of one head do to another?",
    "On layer 0, in a prefill of 3 * CHUNK tokens: the last query sees key 0 is LAYERS; query CHUNK sees key CHUNK - 1 "
    "is WINDOW, and if it does so only when it comes alone, DECODE. Head 0 of q times 9 changes head 1 is NORM. "
    "On layer 3, the last query alone gives another result than in the prefill: INDEX. Else it is RIGHT.",
)

ANSWERED_BY = ()

BUGS = ("right", "sliding window", "NoPE elsewhere", "decode without chunk", "one norm for all heads", "call index")
RIGHT, WINDOW, LAYERS, DECODE, NORM, INDEX = range(len(BUGS))
CHUNK, FLOOR_SCALE = 8, 4  # tokens; Llama 4 has 8192 for both


def suspect(bug: int, theta: float = 10_000.0, scale: float = 0.1):
    """The attention of any layer, with the bug of this number; called as `attend(q, k, v, layer) -> out`.

    q, out: [new, heads, dim], the last `new` of the tokens; k, v: [tokens, heads, dim], the cache and the new ones.
    """

    def attend(q, k, v, layer):
        if q.ndim != 3 or q.shape[1:] != k.shape[1:] or k.shape[:2] != v.shape[:2] or len(q) > len(k):
            raise ValueError(
                f"q, k, v are {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; it takes q [new, heads, dim] and "
                "k, v [tokens, heads, dim], with as many heads, k as wide as q, and no more new than tokens"
            )
        key = torch.arange(len(k))  # positions: [tokens]
        query = key[len(k) - len(q) :]  # [new]
        seen = key <= query[:, None]  # [new, tokens]
        first = 0 if bug == LAYERS else 3
        if layer % 4 == first:  # a NoPE layer
            position = torch.arange(len(q)) if bug == INDEX else query
            q = q * (1 + scale * torch.log1p((position + 1) // FLOOR_SCALE))[:, None, None]
        else:
            q, k = rotated(q, query, theta), rotated(k, key, theta)
            axes = (1, 2) if bug == NORM else 2
            q, k = (x * torch.rsqrt(x.square().mean(axes, keepdim=True) + 1e-5) for x in (q, k))
            if bug == WINDOW:
                seen = seen & (key > query[:, None] - CHUNK)
            elif bug != DECODE or len(q) > 1:
                seen = seen & (key // CHUNK == query[:, None] // CHUNK)
        logits = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
        weights = logits.masked_fill(~seen, -math.inf).softmax(dim=2)  # [heads, new, tokens]
        return torch.einsum("hqk,khd->qhd", weights, v)

    return attend


def rotated(x: torch.Tensor, position: torch.Tensor, theta: float) -> torch.Tensor:
    """[tokens, heads, dim], each adjacent pair of channels turned by its position: there is no bug in here."""
    angle = position[:, None, None] * theta ** (-torch.arange(0, x.shape[2], 2) / x.shape[2])  # [tokens, 1, dim / 2]
    even, odd, sin, cos = x[..., ::2], x[..., 1::2], angle.sin(), angle.cos()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=3).flatten(2)


def planted(seed: int):
    """The suspect of this seed, which also draws a theta and a scale that nobody is told."""

    def attend(q, k, v, layer):  # holds no more than its seed, and has the same name for every bug
        rng = random.Random(seed)
        bug, theta, scale = bug_hunt.bug_of(rng, BUGS), 10 ** rng.uniform(3, 6), rng.uniform(0.2, 0.4)
        return suspect(bug, theta, scale)(q, k, v, layer)

    return attend


def draw(rng: random.Random) -> dict:
    return bug_hunt.draw(rng, BUGS)


def observe(function, inputs: dict) -> dict:
    return bug_hunt.observe(function, inputs, planted)


# Bug -> what is right when it is found, the question for any other answer, and for particular ones their name and own.
STEPS = {
    RIGHT: (
        "a right layer is found right",
        "Take suspect(RIGHT). Which of your experiments raises the alarm, and is it sure that it should?",
        {
            WINDOW: (
                "right taken for a window",
                "Which keys does a query of a local layer see, if it stands in the middle of the second chunk?",
            ),
            LAYERS: ("right taken for NoPE elsewhere", "Layers count from 0. Which are the NoPE layers, if 3 is one?"),
            DECODE: (
                "right taken for decode without chunk",
                "Which layers forget what came before their chunk, and which must not? Did you ask a local one?",
            ),
            NORM: (
                "right taken for one norm",
                "Your experiment changed something. Was it in the head that you changed, or in another one?",
            ),
            INDEX: (
                "right taken for call index",
                "Which query is it that you compare with itself: the same position, with the same keys before it?",
            ),
        },
    ),
    WINDOW: (
        "a sliding window is told from chunks",
        "Which query sees different keys in a window of CHUNK tokens and in a chunk of as many?",
        {
            RIGHT: (
                "window missed",
                "Within the first chunk, window and chunk are the same. Which query is the first one to differ?",
            ),
            LAYERS: (
                "window taken for NoPE elsewhere",
                "Your query sees a key of another chunk. Does it see the very first key too, from far away?",
            ),
            DECODE: (
                "window taken for decode without chunk",
                "Your query sees a key of another chunk. Does it only if it comes alone, or in a prefill as well?",
            ),
        },
    ),
    LAYERS: (
        "NoPE layers in another place are found",
        "What can a query see on layer 0, and what on layer 3? Which of your experiments asks both?",
        {
            RIGHT: ("NoPE elsewhere missed", "Which layers did you look at? Are there others that may be wrong?"),
            WINDOW: (
                "NoPE elsewhere taken for a window",
                "Your query sees a key of another chunk. How far back does it see: one chunk, or to the first key?",
            ),
            DECODE: (
                "NoPE elsewhere taken for decode without chunk",
                "Your query sees far back when it comes alone. And in a prefill?",
            ),
            NORM: (
                "NoPE elsewhere taken for one norm",
                "Your layer has no norm at all. Which kind of layer is that right for?",
            ),
            INDEX: (
                "NoPE elsewhere taken for call index",
                "Which layers have a temperature here? Is it a temperature that makes the difference you see?",
            ),
        },
    ),
    DECODE: (
        "a decode that forgets the chunk is found",
        "The same query, once among others and once alone: must it see the same keys?",
        {
            RIGHT: ("decode without chunk missed", "How many queries did your calls have? Was there one of only one?"),
            WINDOW: (
                "decode without chunk taken for a window",
                "Your query sees a key of another chunk. Does it also if it comes with others?",
            ),
            LAYERS: (
                "decode without chunk taken for NoPE elsewhere",
                "Your query sees far back when it comes alone. And in a prefill?",
            ),
            INDEX: (
                "decode without chunk taken for call index",
                "Prefill and decode differ: on which kind of layer? Which kind has a temperature?",
            ),
        },
    ),
    NORM: (
        "a norm over all heads is found",
        "Make one head of q a hundred times larger, on a local layer. What should that do to any head's weights?",
        {
            RIGHT: (
                "one norm missed",
                "When do one norm for all heads and one for each give the same? How many heads had your q, how large?",
            ),
        },
    ),
    INDEX: (
        "a temperature by the index in the call is found",
        "The last query has index 0 in decode. Which index has it in prefill, and what should both not change?",
        {
            RIGHT: (
                "call index missed",
                "On which layers is there a temperature, and from which position on is it not 1? Do the logits differ?",
            ),
            DECODE: (
                "call index taken for decode without chunk",
                "Prefill and decode differ: on which kind of layer? Does that kind have chunks?",
            ),
        },
    ),
}  # fmt: skip


def judge(inputs: dict, observed: dict):
    yield from bug_hunt.judge(inputs, observed, BUGS, STEPS)
