"""One token with a cache: it must see what it would have seen in prefill, which Meta's own code gets wrong."""

import random
from collections.abc import Iterable

import numpy as np
import torch

from ..exercise import Card, normal, runs, same
from ..observe import call

CARD = Card("02", "Decode step", difficulty=2, importance=5, minutes=15, trains="KV cache, chunks, off by one")

HINTS = (
    "With chunks of 4, write down which positions see which: 6 sees 4, 5 and 6; 7 sees one more; what does 8 see? A "
    "layer without chunks sees all from 0 on. In both kinds, nothing after the position itself.",
    "The chunk of a position starts at position // chunk_size * chunk_size. So what is visible is one slice of the "
    "cache, and with a single query there is nothing left to mask in it.",
    "Slice keys and values from that start up to and with position. Softmax over the keys of q @ k.mT / sqrt(dim), and "
    "these weights times the values.",
)

ANSWERED_BY = (
    "minillama4.attention.full_attention",
    "minillama4.attention.causal_attention",
    "minillama4.attention.chunked_attention",
    "minillama4.cache.LayerCache",
)

CHUNKS = 4


def draw(rng: random.Random) -> dict:
    batch, heads = rng.sample((2, 3), 2)
    size, dim = rng.randint(7, 9), rng.choice((4, 6))
    capacity = CHUNKS * size + rng.randint(2, 3)
    return {
        "q": normal(rng, batch, heads, capacity, dim),  # one for each position
        "k": normal(rng, batch, heads, capacity, dim),
        "v": normal(rng, batch, heads, capacity, dim),
        "chunk_size": size,
        "inside": 2 * size + rng.randint(2, size - 3),  # neither next to a border nor in the middle of two
        "border": rng.randint(1, CHUNKS - 1) * size,
    }


def observe(function, inputs: dict) -> dict:
    q, k, v, size = inputs["q"], inputs["k"], inputs["v"], inputs["chunk_size"]
    capacity, inside, border = q.shape[2], inputs["inside"], inputs["border"]

    def step(name: str, position: int, chunk_size: int | None, k=k, v=v) -> dict:
        return call(name, function, q[:, :, position : position + 1], k, v, position, chunk_size)

    def every(q, k, v, chunk_size):
        steps = [function(q[:, :, i : i + 1], k, v, i, chunk_size) for i in range(capacity)]
        return torch.cat(steps, dim=2)

    return (
        step("full", capacity - 1, None)
        | step("room", inside, None)
        | step("inside", inside, size)
        | step("border", border, size)
        | step("last", border - 1, size)
        | call("every", every, q, k, v, size)
        | step("unwritten", inside, None, *poisoned(inputs, range(inside + 1)))
        | step("poisoned", inside, size, *poisoned(inputs, visible(inside, size)))
    )


def poisoned(inputs: dict, kept: range) -> list[torch.Tensor]:
    """k and v with NaN in all but these positions: whatever multiplies it shows."""
    spoilt = torch.tensor([i not in kept for i in range(inputs["k"].shape[2])])[:, None]
    return [inputs[name].masked_fill(spoilt, float("nan")) for name in ("k", "v")]


def judge(inputs: dict, observed: dict):
    q, v, size = inputs["q"], inputs["v"], inputs["chunk_size"]
    batch, heads, capacity, dim = q.shape
    inside, border, last = inputs["inside"], inputs["border"], capacity - 1
    caches = f"caches [batch, heads, capacity, dim] = {list(q.shape)}"
    shape = [batch, heads, 1, dim]

    given = f"q {shape}, {caches}, position {last}, chunk_size None"
    yield from runs(observed, "full", shape, given)
    scores = torch.einsum("bhd,bhsd->bhs", q[:, :, last].double(), inputs["k"].double()) * dim**-0.5
    over_heads = torch.einsum("bhs,bhsd->bhd", scores.softmax(1), v.double())[:, :, None]
    yield same(
        "without chunks the last position sees all keys",
        observed["full/value"], attention(inputs, last, range(capacity)), given,
        "How many scores are there for one query, and what do the weights made of them add up to?",
        {
            "no scale": (
                attention(inputs, last, range(capacity), scale=1),
                "A score is a sum over dim. How large is it for a large dim, in yours?",
            ),
            "scale 1 / dim": (
                attention(inputs, last, range(capacity), scale=1 / dim),
                "A sum of dim random products grows like which power of dim?",
            ),
            "without itself": (
                attention(inputs, last, range(last)),
                f"Key {last} is in the cache already. Is the end of a slice in it or not?",
            ),
            "without the first key": (attention(inputs, last, range(1, capacity)), "At which position do keys start?"),
            "mean of the values": (
                attention(inputs, last, range(capacity), scale=0),
                "All keys weigh the same in yours. Where do the scores come in?",
            ),
            "own value": (v[:, :, last:], "The token sees itself alone in yours. Which others may it see?"),
            "only the first key": (
                v[:, :, :1], "The token sees key 0 alone in yours. What does `is_causal` make of one query?",
            ),
            "softmax over queries": (
                v.double().sum(2, keepdim=True), "There is one query. What is a softmax over an axis of size 1?",
            ),
            "softmax over heads": (over_heads, "Over which axis do the weights of one query add up to 1?"),
        },
    )  # fmt: skip

    given = f"q {shape}, {caches}, position {inside}, chunk_size None"
    yield same(
        "nothing after its position is seen",
        observed["room/value"], attention(inputs, inside, range(inside + 1)), given,
        f"Which entries of the caches may a query at position {inside} see? The others are left from earlier.",
        {
            "whole cache": (
                attention(inputs, inside, range(capacity)),
                f"The caches have room for {capacity} tokens. How many are there when position {inside} is computed?",
            ),
            "one too many": (
                attention(inputs, inside, range(inside + 2)), "Which is the last position in your slice?",
            ),
        },
    )  # fmt: skip

    given = f"q {shape}, {caches}, position {inside}, chunk_size {size}"
    seen, start = visible(inside, size), inside - inside % size
    yield same(
        "a local layer sees its own chunk", observed["inside/value"], attention(inputs, inside, seen), given,
        f"With chunks of {size}, in which chunk is position {inside}, and which positions of that chunk does it see?",
        {
            "chunk forgotten": (
                attention(inputs, inside, range(inside + 1)),
                "In prefill this query sees its own chunk alone. Which keys does it see in your step?",
            ),
            "sliding window": (
                attention(inputs, inside, range(inside - size + 1, inside + 1)),
                f"You show it the last {size} keys. In which chunk is the first of them?",
            ),
            "sliding window, one too many": (
                attention(inputs, inside, range(inside - size, inside + 1)),
                f"You show it {size + 1} keys. In which chunk is the first of them?",
            ),
            "sees later ones": (
                attention(inputs, inside, range(start, start + size)),
                "You show it its whole chunk. Are all tokens of that chunk there yet?",
            ),
            "one key too few": (
                attention(inputs, inside, seen[1:]),
                f"Count the positions from {start} up to and with {inside}. How many keys do you show?",
            ),
            "one key too many": (
                attention(inputs, inside, range(start - 1, inside + 1)),
                f"Which is the first position of its chunk: {start}, or the one before?",
            ),
            "without itself": (attention(inputs, inside, seen[:-1]), "Does the query see its own key?"),
            "only itself": (v[:, :, inside : inside + 1], "Which earlier tokens are in its chunk?"),
            "slots of a ring": (
                attention(inputs, inside, range(len(seen))),
                "You read the first entries. That suits a cache that is overwritten in each chunk: is this one?",
            ),
            "number of the chunk": (
                attention(inputs, inside, range(inside // size, inside + 1)),
                "Your slice starts at the number of the chunk. At which position does that chunk start?",
            ),
            "chunk before": (
                attention(inputs, inside, range(start - size, inside + 1)),
                "How many chunks does it see in yours?",
            ),
        },
    )  # fmt: skip

    given = f"q {shape}, {caches}, position {border}, chunk_size {size}"
    yield same(
        "the first token of a chunk sees only itself", observed["border/value"], v[:, :, border : border + 1], given,
        f"Position {border} begins a chunk. Which keys does it see, and what is a softmax of one score?",
        {
            "chunk before": (
                attention(inputs, border, range(border - size, border + 1)),
                f"In which chunk is position {border}: in that of {border - 1}, or in that of {border + 1}?",
            ),
            "sliding window": (
                attention(inputs, border, range(border - size + 1, border + 1)),
                f"In which chunk is position {border}, and in which are the {size - 1} keys before it?",
            ),
            "sees nothing": (
                torch.zeros(shape), f"How many keys are in your slice for position {border}?",
            ),
        },
    )  # fmt: skip

    given = f"q {shape}, {caches}, position {border - 1}, chunk_size {size}"
    yield same(
        "the last token of a chunk sees all of it", observed["last/value"],
        attention(inputs, border - 1, range(border - size, border)), given,
        f"Position {border - 1} ends a chunk. At which position does that chunk start, and at which does your slice?",
        {
            "sees nothing": (
                torch.zeros(shape), f"Your slice is empty here. In which chunk is position {border - 1} in yours?",
            ),
            "only itself": (
                v[:, :, border - 1 : border], f"In which chunk is position {border - 1}: in that of {border}?",
            ),
        },
    )  # fmt: skip

    given = f"{caches}, every position from 0 to {last}, chunk_size {size}"
    yield from runs(observed, "every", q.shape, given)
    prefill = torch.cat([attention(inputs, i, visible(i, size)) for i in range(capacity)], dim=2)
    yield same(
        "token by token it gives what prefill gives", observed["every/value"], prefill, given,
        "Take the first position that differs, and write down which keys it may see. Which does it see in yours?",
    )  # fmt: skip

    asks = "A hidden key has weight 0, and 0 times NaN is NaN. Why are keys that nobody sees multiplied at all?"
    for name, chunk_size in (("unwritten", None), ("poisoned", size)):
        seen = visible(inside, chunk_size)
        given = f"position {inside}, chunk_size {chunk_size}, with NaN in the caches but for {seen[0]} to {inside}"
        yield from runs(observed, name, shape, given)
        got, want = observed[f"{name}/value"], attention(inputs, inside, seen)
        spoilt = want.masked_fill(torch.from_numpy(np.isnan(got)), float("nan"))
        what = "room that is not written yet" if chunk_size is None else "other chunks"
        yield same(
            f"{what}: not touched", got, want, given, "Which entries of the caches does your step read?",
            {"masked": (spoilt, asks)},
        )  # fmt: skip


def visible(position: int, chunk_size: int | None) -> range:
    """What prefill shows this query: found pair by pair."""
    chunk_size = chunk_size or position + 1
    keys = [i for i in range(position + 1) if i // chunk_size == position // chunk_size]
    return range(keys[0], keys[-1] + 1)


def attention(inputs: dict, position: int, keys: Iterable[int], scale: float | None = None) -> torch.Tensor:
    """The query at `position` over these keys, in float64: [batch, heads, 1, dim]."""
    keys = list(keys)
    q, k, v = inputs["q"][:, :, position].double(), inputs["k"][:, :, keys].double(), inputs["v"][:, :, keys].double()
    weights = torch.exp(torch.einsum("bhd,bhsd->bhs", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale))
    return torch.einsum("bhs,bhsd->bhd", weights / weights.sum(-1, keepdim=True), v)[:, :, None]
