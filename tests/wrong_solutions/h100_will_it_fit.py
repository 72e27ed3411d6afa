"""Answers to `h100-will-it-fit`."""

from bank import right, wrong


@right
def by_bisection(gpu, model, context, value_bytes):
    """The longest context is looked for with what is left, which falls with each token."""

    def left(tokens):
        taken = model.weight_bytes + gpu.reserve_bytes
        for layer in range(model.num_layers):
            kept = tokens if layer in model.nope_layers or tokens < model.chunk_size else model.chunk_size
            for _ in ("keys", "values"):
                taken += kept * model.num_kv_heads * model.head_dim * value_bytes
        return (gpu.memory_mib << 20) - taken

    low, high = 0, 1
    while left(high) >= 0:
        high *= 2
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if left(middle) >= 0 else (low, middle)
    return left(context), low


def formula(
    gpu, model, context, size, *, mib=2**20, weights=1, reserve=1, vectors=2, heads=None, dim=None, nope=None,
    layers=None, kept=min, longest=None,
):  # fmt: skip
    """The right numbers, but for what is given. kept: of `tokens` in chunks of some size, what a local layer keeps.

    longest: of (free bytes, bytes of a token in a layer, NoPE layers, local layers, tokens of a chunk).
    """
    heads = model.num_kv_heads if heads is None else heads
    dim = model.head_dim if dim is None else dim
    nope = len(model.nope_layers) if nope is None else nope
    layers = model.num_layers if layers is None else layers
    local, layer, chunk = layers - nope, vectors * heads * dim * size, model.chunk_size
    free = gpu.memory_mib * mib - weights * model.weight_bytes - reserve * gpu.reserve_bytes
    left = free - layer * (nope * context + local * kept(context, chunk))
    return left, (longest or bent)(free, layer, nope, local, chunk)


def bent(free, layer, nope, local, chunk):
    tokens = straight(free, layer, nope, local, chunk)
    return tokens if tokens < chunk else (free - local * chunk * layer) // (nope * layer)


def full_first(free, layer, nope, local, chunk):
    return (free - local * chunk * layer) // (nope * layer)


def straight(free, layer, nope, local, chunk):
    return max(0, free // ((nope + local) * layer))


def other(name, **changes):
    """An answer that is right but for these."""
    return wrong(name)(lambda *given: formula(*given, **changes))


def by_sizes(name, change):
    """An answer that is right but for changes that depend on the model's sizes."""
    return wrong(name)(lambda gpu, model, *given: formula(gpu, model, *given, **change(model)))


@wrong("not written")
def stub(gpu, model, context, value_bytes):
    raise NotImplementedError()


@wrong("raises")
def memory_in_bytes(gpu, model, context, value_bytes):
    return gpu.memory_bytes - model.weight_bytes, 0


@wrong("type")
def what_is_left_alone(gpu, model, context, value_bytes):
    return formula(gpu, model, context, value_bytes)[0]


@wrong("type")
def a_list(gpu, model, context, value_bytes):
    return list(formula(gpu, model, context, value_bytes))


@wrong("shape")
def context_as_well(gpu, model, context, value_bytes):
    return *formula(gpu, model, context, value_bytes), context


@wrong("no whole numbers")
def in_gib(gpu, model, context, value_bytes):
    left, longest = formula(gpu, model, context, value_bytes)
    return left / 2**30, longest


@wrong("no whole numbers")
def never_rounded(gpu, model, context, value_bytes):
    return formula(gpu, model, context, value_bytes, longest=lambda free, layer, nope, *_: free / (nope * layer))


@wrong("what is left in less than a chunk: memory, less weights, reserve and cache")
def nothing_taken(gpu, model, context, value_bytes):
    return gpu.memory_mib * 2**20, 0


@wrong("not left but missing")
def missing(gpu, model, context, value_bytes):
    left, longest = formula(gpu, model, context, value_bytes)
    return -left, longest


@wrong("what is taken")
def taken(gpu, model, context, value_bytes):
    left, longest = formula(gpu, model, context, value_bytes)
    return gpu.memory_mib * 2**20 - left, longest


@wrong("values counted, not bytes")
def counts_values(gpu, model, context, value_bytes):
    return formula(gpu, model, context, 1)


@wrong("bf16 by heart")
def two_bytes(gpu, model, context, value_bytes):
    return formula(gpu, model, context, 2)


@wrong("one token")
def a_single_token(gpu, model, context, value_bytes):
    return formula(gpu, model, 1, value_bytes)


@wrong("never negative")
def zero_at_least(gpu, model, context, value_bytes):
    left, longest = formula(gpu, model, context, value_bytes)
    return max(0, left), longest


no_weights = other("no weights", weights=0)
no_reserve = other("no reserve", reserve=0)
no_cache = other("no cache", vectors=0, longest=lambda *_: 0)
mega = other("memory in MB", mib=10**6)
kibi = other("memory in KiB", mib=2**10)
gibi = other("memory in GiB", mib=2**30)
keys_only = other("keys or values", vectors=1)
one_head = other("one head", heads=1)
no_dim = other("no head_dim", dim=1)
one_layer = other("one layer", layers=1, nope=1)
nope_layers_only = by_sizes("NoPE layers only", lambda m: dict(layers=len(m.nope_layers)))
local_layers_only = by_sizes(
    "local layers only", lambda m: dict(nope=0, layers=m.num_layers - len(m.nope_layers), longest=lambda *_: 0)
)
whole_chunk_at_once = other("always a whole chunk", kept=lambda tokens, chunk: chunk)

no_cap = other("no cap", kept=lambda tokens, chunk: tokens)
all_local = other("a chunk everywhere", nope=0, longest=lambda *_: 0)
last_chunk = other("what the last chunk holds", kept=lambda tokens, chunk: tokens % chunk)
two_chunks = other("two chunks", kept=lambda tokens, chunk: min(tokens, 2 * chunk))
chunk_less_one = other("one token less", kept=lambda tokens, chunk: min(tokens, chunk - 1))
chunk_and_one = other("one token more", kept=lambda tokens, chunk: min(tokens, chunk + 1))
with_a_rhythm = by_sizes("every fourth layer", lambda m: dict(nope=m.num_layers // 4))


@wrong("kinds swapped")
def kinds_swapped(gpu, model, context, value_bytes):
    return formula(gpu, model, context, value_bytes, nope=model.num_layers - len(model.nope_layers))


# What is left is right, and the longest context is not.
all_layers_grow = other("no cap", longest=straight)
nope_layers_grow = other("NoPE layers only", longest=lambda free, layer, nope, *_: max(0, free // (nope * layer)))
local_layers_grow = other(
    "local layers only", longest=lambda free, layer, nope, local, chunk: max(0, free // (local * layer))
)
straight_off = other(
    "local layers full at once",
    longest=lambda free, layer, nope, local, chunk: max(0, (free - local * chunk * layer) // (nope * layer)),
)
unchecked = other(
    "negative context",
    longest=lambda free, layer, nope, local, chunk: (
        bent(free, layer, nope, local, chunk) if free > 0 else free // ((nope + local) * layer)
    ),
)
unchecked_and_full = other(
    "negative context, local layers full",
    longest=lambda free, layer, nope, local, chunk: (
        bent(free, layer, nope, local, chunk) if free > 0 else (free - local * chunk * layer) // (nope * layer)
    ),
)
in_bytes = other("bytes, not tokens", longest=lambda free, *_: free)
in_chunks = other(
    "whole chunks",
    longest=lambda free, layer, nope, local, chunk: bent(free, layer, nope, local, chunk) // chunk * chunk,
)


@wrong("stops at the border")
def more_than_a_chunk(gpu, model, context, value_bytes):
    """Asks whether more than a chunk fits everywhere, where the question is whether a chunk does."""

    def longest(free, layer, nope, local, chunk):
        tokens = straight(free, layer, nope, local, chunk)
        return (free - local * chunk * layer) // (nope * layer) if tokens > chunk else tokens

    return formula(gpu, model, context, value_bytes, longest=longest)


@wrong("longest does not depend on context")
def asks_whether_context_is_more_than_a_chunk(gpu, model, context, value_bytes):
    longest = {True: lambda *given: max(0, full_first(*given)), False: straight}[context > model.chunk_size]
    return formula(gpu, model, context, value_bytes, longest=longest)


@wrong("longest does not depend on context")
def takes_off_what_local_layers_hold_at_context(gpu, model, context, value_bytes):
    def longest(free, layer, nope, local, chunk):
        return max(0, (free - local * min(context, chunk) * layer) // (nope * layer))

    return formula(gpu, model, context, value_bytes, longest=longest)


@wrong("tokens more")
def how_many_more(gpu, model, context, value_bytes):
    left, longest = formula(gpu, model, context, value_bytes)
    return left, longest - context


@wrong("tokens more")
def left_over_a_token(gpu, model, context, value_bytes):
    left, _ = formula(gpu, model, context, value_bytes)
    layer = 2 * model.num_kv_heads * model.head_dim * value_bytes
    return left, max(0, left // (len(model.nope_layers) * layer))


@wrong("one token too few")
def a_byte_must_be_left(gpu, model, context, value_bytes):
    return formula(
        gpu, model, context, value_bytes,
        longest=lambda free, layer, nope, local, chunk: max(0, bent(free - 1, layer, nope, local, chunk)),
    )  # fmt: skip


@wrong("one token too many")
def rounds_up(gpu, model, context, value_bytes):
    left, longest = formula(gpu, model, context, value_bytes)
    return left, longest + 1


@wrong("one token too many")
def rounds_to_the_nearest(gpu, model, context, value_bytes):
    def longest(free, layer, nope, local, chunk):
        tokens = straight(free, layer, nope, local, chunk)
        return tokens if tokens < chunk else round((free - local * chunk * layer) / (nope * layer))

    return formula(gpu, model, context, value_bytes, longest=longest)


@wrong("weights are not there")
def longest_without_weights(gpu, model, context, value_bytes):
    left, _ = formula(gpu, model, context, value_bytes)
    return left, formula(gpu, model, context, value_bytes, weights=0)[1]


@wrong("reserve is not there")
def longest_without_reserve(gpu, model, context, value_bytes):
    left, _ = formula(gpu, model, context, value_bytes)
    return left, formula(gpu, model, context, value_bytes, reserve=0)[1]


@wrong("Scout in int4 on an H100: 422,980 tokens")
def at_most_262144(gpu, model, context, value_bytes):
    left, longest = formula(gpu, model, context, value_bytes)
    return left, min(longest, 262_144)


EQUIVALENT = {
    "tuple[int, int]  ->  tuple": "it is an annotation and changes no value",
    "min(context, chunk)  ->  min(chunk, context)": "the smaller of two is the same in any order",
    "max(0, free // (model.num_layers * per_layer))  ->  max(free // (model.num_layers * per_layer), 0)": (
        "the larger of two is the same in any order"
    ),
}
