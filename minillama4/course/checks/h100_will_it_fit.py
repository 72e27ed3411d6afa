"""Does a model with its KV cache fit on a card, and if so, up to which context, to the token?"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..exercise import Card, Step, runs, same
from ..observe import call

CARD = Card(
    "05",
    "Will it fit?",
    difficulty=3,
    importance=5,
    minutes=25,
    trains="memory of a card, hybrid KV cache, whole-number arithmetic",
)

HINTS = (
    "What is free when weights and reserve are in place? Then draw the cache's bytes over the number of tokens: a "
    "line with one bend. Where is the bend, and how many layers grow on either side of it?",
    "In front of the bend every token costs a key and a value in every layer, behind it in the NoPE layers only. If "
    "more fits than a chunk, take the local layers' full chunks off first, and see how many tokens the rest holds.",
    "per_layer = 2 * num_kv_heads * head_dim * value_bytes; free // (num_layers * per_layer) is the answer as long as "
    "it is less than chunk_size. Else it is (free - local * chunk_size * per_layer) // (nope * per_layer). Never below "
    "0.",
)

ANSWERED_BY = (
    "minillama4.budget.longest_context",
    "minillama4.budget.cached_tokens",
    "minillama4.budget.kv_bytes",
    "minillama4.cache.KVCache",
    "minillama4.cache.LayerCache",
)


@dataclass(frozen=True)
class Gpu:
    memory_mib: int  # as the driver tells it: units of 2**20 bytes
    reserve_bytes: int  # for the driver's own context and for activations


@dataclass(frozen=True)
class Model:
    """A model that is built like Llama 4, as far as memory goes."""

    weight_bytes: int  # all of them, picture encoder and scales included
    num_layers: int
    num_kv_heads: int
    head_dim: int
    nope_layers: tuple[int, ...]  # they keep the whole context, and there is at least one; all others keep a chunk
    chunk_size: int  # tokens


SCOUT = Model(60_522_509_312, 48, 8, 128, tuple(range(3, 48, 4)), 8192)  # in int4
H100, H200 = Gpu(81_559, 3_000_000_000), Gpu(143_771, 3_000_000_000)
# name -> (card, model, bytes of a number in the cache, (left with 131,072 tokens, longest context))
KNOWN = {
    "Scout in int4 on an H100: 422,980 tokens": (H100, SCOUT, 2, (14_347_890_176, 422_980)),
    "its cache in fp8: 870,537 tokens": (H100, SCOUT, 1, (18_173_095_424, 870_537)),
    "Scout in bf16 does not fit on an H200, without any token": (
        H200, replace(SCOUT, weight_bytes=217_283_587_072), 2, (-77_179_177_472, 0),
    ),
}  # fmt: skip
KNOWN_CONTEXT = 131_072


def draw(rng: random.Random) -> dict:
    """Sizes for which no two known mistakes give the same number; the NoPE layers have no rhythm."""
    layers = rng.choice((7, 10, 11))
    model = Model(
        weight_bytes=rng.randint(3_000_000, 4_000_000),
        num_layers=layers,
        num_kv_heads=rng.choice((3, 5)),
        head_dim=rng.choice((14, 22)),
        nope_layers=tuple(sorted(rng.sample(range(layers), 3))),
        chunk_size=rng.randint(101, 140),
    )
    value_bytes, memory_mib, chunk = 8, rng.randint(12, 15), model.chunk_size
    layer = 2 * model.num_kv_heads * model.head_dim * value_bytes  # bytes of a token
    token, later = layers * layer, 3 * layer  # in the first chunk, and after it
    full = token * chunk
    free = {
        "roomy": full + later * rng.randint(3 * chunk, 5 * chunk) + rng.randint(1, later - 1),
        "tight": token * rng.randint(chunk * 4 // 5, chunk - 9) + rng.randint(1, token - 1),  # > full local layers
        "border": full + rng.randint(later, token - 1),  # room for no other whole token of the first chunk
        "exact": full + later * rng.randint(chunk, 2 * chunk),
        "crowded": -rng.randint(token, full),
    }
    free["one byte less"] = free["exact"] - 1
    cards = {name: Gpu(memory_mib, memory_mib * 2**20 - model.weight_bytes - bytes) for name, bytes in free.items()}
    return {
        "model": model,
        "cards": cards,
        "bytes": value_bytes,
        "short": rng.randint(chunk // 3, chunk // 2 - 3),
        "long": 2 * chunk + rng.randint(chunk // 5, chunk // 4),
    }


def observe(function, inputs: dict) -> dict:
    model, cards, size = inputs["model"], inputs["cards"], inputs["bytes"]
    seen = call("short", function, cards["roomy"], model, inputs["short"], size)
    for name, card in cards.items():
        seen |= call(name, function, card, model, inputs["long"], size)
    for name, (card, known, size, _) in KNOWN.items():
        seen |= call(name, function, card, known, KNOWN_CONTEXT, size)
    return seen


# Of "longest", by card: what is right when it comes out, and the question for any other answer.
LONGEST = {
    "roomy": (
        "the longest context: local layers stop growing, NoPE layers do not",
        "Put your number back in as context. How much is left then, and how much with one token more?",
    ),
    "tight": (
        "less than a chunk: there, every layer grows",
        "What does a token more cost while the first chunk is not full, and is that so in your formula?",
    ),
    "border": (
        "just over the border of a chunk",
        "The first chunk is full, and a little is left: too little for all layers. Which layers want any of it?",
    ),
    "exact": (
        "what fits to the last byte fits",
        "With 0 bytes left, does it fit? Which of your comparisons decides that?",
    ),
    "one byte less": (
        "and with a byte less it does not",
        "A byte is missing for the last token. Which of your lines rounds, and which way?",
    ),
    "crowded": (
        "if the weights alone do not fit, no token does",
        "Not even the weights fit. How many tokens can be kept?",
    ),
}


def judge(inputs: dict, observed: dict):
    model, cards, size = inputs["model"], inputs["cards"], inputs["bytes"]
    for name, step, question, mistakes in (
        (
            "short", "what is left in less than a chunk: memory, less weights, reserve and cache",
            "Set sizes to 1 one by one: by how much should your number grow, and by how much does it?",
            _wrong_sums(cards["roomy"], model, inputs["short"], size),
        ),
        (
            "roomy", "in a long context, local layers keep one chunk at the most, and NoPE layers everything",
            "For one layer of each kind: which is the earliest key that a later query may see?",
            _left(cards["roomy"], model, wrong_spans(model, inputs["long"], size)),
        ),
    ):  # fmt: skip
        context = inputs["short" if name == "short" else "long"]
        given = _given(cards["roomy"], model, context, size)
        yield from _pair(observed, name, given)
        want, _ = truth(cards["roomy"], model, context, size)
        yield same(step, observed[f"{name}/value"][0], want, given, question, mistakes)

    for name, (step, question) in LONGEST.items():
        given = _given(cards[name], model, inputs["long"], size)
        yield from _pair(observed, name, given)
        left, longest = truth(cards[name], model, inputs["long"], size)
        mistakes = _wrong_contexts(cards[name], model, inputs["long"], size, longest)
        yield same(step, observed[f"{name}/value"][1], longest, given, question, mistakes)
        yield same(
            "less than nothing left is a negative number", observed[f"{name}/value"][0], left, given,
            "How many bytes are missing here, and how would a caller of your function see that they are?",
            {"never negative": (max(0, left), "How does a caller see how much is missing?")},
        )  # fmt: skip
        if name == "roomy":
            yield same(
                "longest does not depend on context", observed["short/value"][1], longest,
                _given(cards[name], model, inputs["short"], size),
                "With a long context this card's longest came out right. Which line on your way to it asks `context`?",
            )  # fmt: skip

    for name, (card, known, size, numbers) in KNOWN.items():
        given = _given(card, known, KNOWN_CONTEXT, size)
        yield from _pair(observed, name, given)
        yield same(
            name, observed[f"{name}/value"], numbers, given,
            "Small models came out right. Is there a number in your function that belongs to one model only, or a "
            "float, which holds whole numbers only so far?",
        )  # fmt: skip


def _pair(observed: dict, name: str, given: str) -> Iterator[Step]:
    yield from runs(observed, name, (2,), given, dtype="tuple")
    got = observed[f"{name}/value"]
    yield Step(
        "both are whole numbers", got.dtype.kind == "i", given, str(got.tolist()), "two of type int",
        "Which line divides with `/`, or gives back a truth value? What counts bytes, and what counts tokens?",
        "no whole numbers",
    )  # fmt: skip


def _given(card: Gpu, model: Model, context: int, size: int) -> str:
    sizes = ", ".join(f"{key} {value}" for key, value in (vars(card) | vars(model)).items())
    return f"context {context:,}, value_bytes {size}, {sizes}"


def truth(card: Gpu, model: Model, context: int, size: int) -> tuple[int, int]:
    """Token by token: in how many layers it takes new room, and what is left of the card after it."""
    free = card.memory_mib * 1024 * 1024 - card.reserve_bytes - model.weight_bytes
    kept = model.num_kv_heads * model.head_dim * size  # bytes of a key, or of a value
    token = np.arange(max(context, free // kept) + 1)  # more than fit, of however few layers
    layers = np.zeros_like(token)
    for layer in range(model.num_layers):
        layers += 1 if layer in model.nope_layers else token < model.chunk_size  # else in the place of the oldest
    left = free - np.cumsum(layers * (kept + kept))
    return int(left[context - 1]), int((left >= 0).sum())


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong: name -> (what that mistake gives, its question).


def _free(card: Gpu, model: Model) -> int:
    return card.memory_mib * 2**20 - card.reserve_bytes - model.weight_bytes


def _wrong_sums(card: Gpu, model: Model, tokens: int, size: int) -> dict[str, tuple[int, str]]:
    memory, right = card.memory_mib * 2**20, truth(card, model, tokens, size)[0]
    off = "Which three things lie on the card? Which of them did you take off?"
    return {
        "not left but missing": (-right, "Is a positive number what is left, or what is missing?"),
        "what is taken": (memory - right, "Is your number what is left of the card, or what is taken?"),
        "no weights": (right + model.weight_bytes, off),
        "no reserve": (right + card.reserve_bytes, off),
        "memory in MB": (right - memory + card.memory_mib * 10**6, "How many bytes is a MiB?"),
        "memory in KiB": (right - memory + card.memory_mib * 2**10, "How many bytes is a MiB?"),
        "memory in GiB": (right - memory + card.memory_mib * 2**30, "How many bytes is a MiB?"),
        **_left(card, model, wrong_caches(model, tokens, size)),
    }


def wrong_caches(model, tokens: int, size: int) -> dict[str, tuple[int, str]]:
    """Bytes of a cache of less than a chunk. model: a `Model`, or the `Decoder` of h100_bytes_per_token."""
    layers, nope = model.num_layers, len(model.nope_layers)
    right = 2 * tokens * layers * model.num_kv_heads * model.head_dim * size
    return {
        "no cache": (0, "What does your function do with context?"),
        "keys or values": (right // 2, "Attention compares with keys; what does it then add up, weighted?"),
        "one head": (right // model.num_kv_heads, "How many heads have a key of their own?"),
        "no head_dim": (right // model.head_dim, "How many numbers is the key of one head?"),
        "values counted, not bytes": (right // size, "What does your function do with its last argument?"),
        "bf16 by heart": (right // size * 2, f"A cached number takes {size} bytes here. How many in your function?"),
        "one layer": (right // layers, "How many layers have a cache?"),
        "one token": (right // tokens, "How many tokens are in the cache?"),
        "NoPE layers only": (right // layers * nope, "Have local layers no cache?"),
        "local layers only": (right // layers * (layers - nope), "No rotation in a NoPE layer. No keys, either?"),
        "always a whole chunk": (
            right // layers // tokens * (nope * tokens + (layers - nope) * model.chunk_size),
            "A chunk has room for more tokens than there are yet. How many are there?",
        ),
    }  # fmt: skip


def wrong_spans(model, tokens: int, size: int) -> dict[str, tuple[int, str]]:
    """Bytes of a cache of several chunks, for models as in `wrong_caches`."""
    layers, nope, chunk = model.num_layers, len(model.nope_layers), model.chunk_size

    def kept(by_nope: int, by_local: int, nope: int = nope) -> int:
        return 2 * (nope * by_nope + (layers - nope) * by_local) * model.num_kv_heads * model.head_dim * size

    return {
        "no cap": (kept(tokens, tokens), "May a query of a local layer see the chunk before its own?"),
        "a chunk everywhere": (kept(chunk, chunk), "Which layers carry information from one chunk to another?"),
        "kinds swapped": (kept(chunk, tokens), "Which kind sees the whole context: rotary layers, or NoPE layers?"),
        "what the last chunk holds": (
            kept(tokens, tokens % chunk), "Yours falls when a chunk begins. How large was the one before, at its end?",
        ),
        "two chunks": (kept(tokens, 2 * chunk), "Does a query of a local layer look into the chunk before its own?"),
        "one token less": (
            kept(tokens, chunk - 1), "How many keys does the last query of a chunk see, its own included?",
        ),
        "one token more": (kept(tokens, chunk + 1), "How many keys does the last query of a chunk see?"),
        "every fourth layer": (
            kept(tokens, chunk, layers // 4), "Which layers are NoPE layers here? Does yours ask nope_layers?",
        ),
    }  # fmt: skip


def _left(card: Gpu, model: Model, caches: dict[str, tuple[int, str]]) -> dict[str, tuple[int, str]]:
    return {mistake: (_free(card, model) - cache, question) for mistake, (cache, question) in caches.items()}


def _wrong_contexts(card: Gpu, model: Model, context: int, size: int, longest: int) -> dict[str, tuple[int, str]]:
    free = _free(card, model)
    layers, nope, chunk = model.num_layers, len(model.nope_layers), model.chunk_size
    local, layer = layers - nope, 2 * model.num_kv_heads * model.head_dim * size

    def bent(free: int) -> int:
        return (free - local * chunk * layer) // (nope * layer)

    straight, below = free // (layers * layer), "Can there be less than no token?"
    negative = {"negative context": (straight, below), "negative context, local layers full": (bent(free), below)}
    return (negative if free < 0 else {}) | {
        "stops at the border": (min(longest, chunk), "The chunk is full: which layers still grow?"),
        "no cap": (
            straight, "What does a token cost once the first chunk is full: a key and a value in how many layers?",
        ),
        "local layers full at once": (
            max(0, bent(free)), "You take off a full chunk for each local layer. What if fewer tokens fit?",
        ),
        "NoPE layers only": (
            max(0, free // (nope * layer)), "Do local layers keep nothing? What comes off before you divide?",
        ),
        "local layers only": (max(0, free // (local * layer)), "Which layers grow for ever?"),
        "tokens more": (longest - context, "Is longest how many tokens more fit, or how many in all?"),
        "bytes, not tokens": (free, "Is your number in bytes, or in tokens?"),
        "one token too few": (longest - 1, "With 0 bytes left, does it fit? Do you round down, and only once?"),
        "one token too many": (longest + 1, "Put your number back in as context: how much is left?"),
        "whole chunks": (longest // chunk * chunk, "Do tokens come in chunks only?"),
        "weights are not there": (bent(free + model.weight_bytes), "Is all that you divide free?"),
        "reserve is not there": (bent(free + card.reserve_bytes), "Is all that you divide free?"),
    }  # fmt: skip
