"""Answers to `h100-bytes-per-token`."""

from dataclasses import replace

from bank import right, wrong

from minillama4.course.checks.h100_bytes_per_token import Format

BF16 = Format(bits=16)


def bits_of(format):
    """Bits of a weight, with its part of a scale."""
    return format.bits + (8 * format.scale_bytes / format.group if format.group else 0)


@right
def layer_by_layer(model, formats, context, cache_bytes):
    bits = 0
    vector = model.hidden_size
    for layer in range(model.num_layers):
        for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads):
            bits += vector * heads * model.head_dim * bits_of(formats["attention"])
        if layer in model.moe_layers:
            bits += 16 * vector * model.num_experts
            bits += 3 * vector * model.expert_width * (bits_of(formats["routed"]) + bits_of(formats["shared"]))
        else:
            bits += 3 * vector * model.dense_width * bits_of(formats["dense"])
        bits += 16 * vector + 16 * vector
        seen = context
        if layer not in model.nope_layers and seen > model.chunk_size:
            seen = model.chunk_size
        bits += 8 * cache_bytes * seen * (model.num_kv_heads + model.num_kv_heads) * model.head_dim
    bits += 16 * vector + model.vocab_size * vector * bits_of(formats["head"]) + 16 * vector
    return round(bits / 8)


def formula(
    model, formats, context, cache_bytes, *, stored=None, rows=1, head=1, routed=1, shared=1, router=None, norms=2,
    last_norm=1, projections=4, kv_heads=None, attention=1, matrices=3, moe=None, dense=None, router_in=BF16,
    row_in=BF16, q_width=None, attention_in=None, routers=None,
    vectors=2, cached_heads=None, dim=None, cached_layers=None, nope=None, kept=None, seen=None,
):  # fmt: skip
    """The right number, but for what is given. kept: what a local layer reads, of `tokens` in chunks of some size."""

    def of(format, numbers, rows):
        if stored is not None:
            return stored(format, numbers, rows)
        return numbers * format.bits // 8 + (numbers // format.group * format.scale_bytes if format.group else 0)

    hidden, layers = model.hidden_size, model.num_layers
    moe = len(model.moe_layers) if moe is None else moe
    dense = layers - moe if dense is None else dense
    kv_heads = model.num_kv_heads if kv_heads is None else kv_heads
    total = 2 * rows * hidden if row_in is BF16 else of(row_in, rows * hidden, rows)
    if attention:
        vector = attention_in or hidden
        queries, keys = q_width or model.num_heads * model.head_dim, kv_heads * model.head_dim
        for width in (queries, keys, keys):
            total += layers * of(formats["attention"], vector * width, width)
        if projections == 4:
            total += layers * of(formats["attention"], vector * queries, vector)
    for part, count, width in (
        ("routed", moe * routed, model.expert_width),
        ("shared", moe * shared, model.expert_width),
        ("dense", dense, model.dense_width),
    ):
        three = matrices.get(part, 3) if isinstance(matrices, dict) else matrices
        total += count * (three - 1) * of(formats[part], hidden * width, width)
        total += count * of(formats[part], hidden * width, hidden)
    router = model.num_experts if router is None else router
    total += (routers or moe) * (2 * router * hidden if router_in is BF16 else of(router_in, router * hidden, router))
    total += 2 * hidden * (norms * layers + last_norm)
    total += head * of(formats["head"], model.vocab_size * hidden, model.vocab_size)

    cached_heads = model.num_kv_heads if cached_heads is None else cached_heads
    dim = model.head_dim if dim is None else dim
    nope = len(model.nope_layers) if nope is None else nope
    local = layers - nope
    by_nope, by_local = (seen or (lambda tokens: tokens))(context), (kept or min)(context, model.chunk_size)
    tokens = nope * by_nope + local * by_local
    if cached_layers is not None:
        tokens = cached_layers(nope, local) * context if context <= model.chunk_size else tokens
    return total + vectors * tokens * cached_heads * dim * cache_bytes


def other(name, **changes):
    """An answer that is right but for these."""
    return wrong(name)(lambda *given: formula(*given, **changes))


def by_sizes(name, change):
    """An answer that is right but for changes that depend on the model's sizes."""
    return wrong(name)(lambda model, *given: formula(model, *given, **change(model)))


def by_formats(name, change):
    """An answer that is right for other formats."""
    return wrong(name)(lambda model, formats, *given: formula(model, change(formats), *given))


@wrong("not written")
def stub(model, formats, context, cache_bytes):
    raise NotImplementedError()


@wrong("raises")
def as_a_dict(model, formats, context, cache_bytes):
    return model["hidden_size"] * cache_bytes


@wrong("raises")
def always_a_group(model, formats, context, cache_bytes):
    return model.vocab_size * model.hidden_size // formats["head"].group


@wrong("type")
def divided_at_the_end(model, formats, context, cache_bytes):
    return formula(model, formats, context, cache_bytes) * 8 / 8


@wrong("type")
def in_words(model, formats, context, cache_bytes):
    return f"{formula(model, formats, context, cache_bytes)} bytes"


@wrong("another unit")
def in_whole_gb(model, formats, context, cache_bytes):
    return formula(model, formats, context, cache_bytes) // 10**9


@wrong("changes its input")
def takes_a_part_out(model, formats, context, cache_bytes):
    head = formats.pop("head")
    return formula(model, formats | {"head": head}, context, cache_bytes)


@wrong("all in bf16, nothing cached: what one token is multiplied with, and nothing else")
def hidden_size_alone(model, formats, context, cache_bytes):
    return model.hidden_size


@wrong("bits")
def bits(model, formats, context, cache_bytes):
    return 8 * formula(model, formats, context, cache_bytes)


@wrong("numbers counted, not bytes")
def parameters(model, formats, context, cache_bytes):
    return formula(model, formats, context, cache_bytes) // 2


whole_model = by_sizes("whole model", lambda m: dict(rows=m.vocab_size, routed=m.num_experts))
whole_embedding = by_sizes("whole embedding", lambda m: dict(rows=m.vocab_size))
no_row = other("no embedding row, or no last norm", rows=0)
no_head = other("no head", head=0)
all_experts = by_sizes("all experts", lambda m: dict(routed=m.num_experts))
no_routed = other("one expert a layer", routed=0)
no_shared = other("one expert a layer", shared=0)
no_router = other("no router", router=0)
one_row_of_it = other("one row of the router", router=1)
no_norms = other("no norms", norms=0, last_norm=0)
one_norm = other("one norm a layer", norms=1)
no_last_norm = other("no embedding row, or no last norm", last_norm=0)
query_heads_everywhere = by_sizes("kv heads", lambda m: dict(kv_heads=m.num_heads))
no_output = other("no output projection", projections=3)
q_and_o_square = by_sizes("hidden_size for all heads", lambda m: dict(q_width=m.hidden_size))
heads_for_hidden = by_sizes("all heads for hidden_size", lambda m: dict(attention_in=m.num_heads * m.head_dim))
no_attention = other("no attention", attention=0)
gate_and_up_in_one = other("two matrices", matrices=2)
two_in_experts = other("two matrices, experts", matrices={"routed": 2, "shared": 2})
two_in_routed = other("two matrices, one expert", matrices={"routed": 2})
two_in_shared = other("two matrices, one expert", matrices={"shared": 2})
two_in_dense = other("two matrices, dense", matrices={"dense": 2})
routers_everywhere = by_sizes("routers in dense layers", lambda m: dict(routers=m.num_layers))
no_dense = other("no dense layers", dense=0)
all_moe = by_sizes("experts in every layer", lambda m: dict(moe=m.num_layers))
dense_beside_experts = by_sizes("dense in every layer", lambda m: dict(dense=m.num_layers))


def codes(format, numbers):
    return numbers * format.bits // 8


def scales(format, numbers):
    return numbers // format.group if format.group else 0


no_scales = other("no scales", stored=lambda f, n, rows: codes(f, n))
one_scale = other("one scale a matrix", stored=lambda f, n, rows: codes(f, n) + (f.scale_bytes if f.group else 0))
one_scale_a_row = other(
    "one scale a row", stored=lambda f, n, rows: codes(f, n) + (f.scale_bytes * rows if f.group else 0)
)
number_of_scales = other("scales counted, not bytes", stored=lambda f, n, rows: codes(f, n) + scales(f, n))
four_bytes = other("four-byte scales", stored=lambda f, n, rows: codes(f, n) + 4 * scales(f, n))
two_bytes = other(
    "each part in its own format, with a scale for each group",
    stored=lambda f, n, rows: codes(f, n) + 2 * scales(f, n),
)
a_byte_each = other(
    "a byte for each code",
    stored=lambda f, n, rows: n * max(f.bits, 8) // 8 + scales(f, n) * f.scale_bytes,
)
all_by_8 = other(
    "bits of a code, bytes of a scale", stored=lambda f, n, rows: codes(f, n) + scales(f, n) * f.scale_bytes // 8
)
no_formats = by_formats("bf16 everywhere", lambda formats: dict.fromkeys(formats, BF16))
one_format_for_experts = by_formats("format of shared", lambda formats: formats | {"shared": formats["routed"]})
shared_for_both = by_formats("format of routed", lambda formats: formats | {"routed": formats["shared"]})
attention_as_experts = by_formats("format of attention", lambda formats: formats | {"attention": formats["routed"]})
dense_as_experts = by_formats("format of dense", lambda formats: formats | {"dense": formats["routed"]})
head_as_experts = by_formats("format of head", lambda formats: formats | {"head": formats["routed"]})


@wrong("each part in its own format, with a scale for each group")
def always_four_bits(model, formats, context, cache_bytes):
    coarse = {part: replace(f, bits=4) if f.group else f for part, f in formats.items()}
    return formula(model, coarse, context, cache_bytes)


@wrong("all heads for every hidden_size")
def no_hidden_size(model, formats, context, cache_bytes):
    return formula(replace(model, hidden_size=model.num_heads * model.head_dim), formats, context, cache_bytes)


@wrong("raises")
def a_table_of_bytes(model, formats, context, cache_bytes):
    """Right for the formats that one knows."""

    def stored(format, numbers, rows):
        return int(numbers * {2: 0.25, 4: 0.5, 8: 1, 16: 2}[format.bits]) + scales(format, numbers) * format.scale_bytes

    return formula(model, formats, context, cache_bytes, stored=stored)


def lost(format, numbers):
    """Bytes that `int` of a float loses."""
    return round(numbers * bits_of(format) / 8) - int(numbers * bits_of(format) / 8)


def all_parts(model):
    """Part -> (how many layers have it, its numbers in one)."""
    hidden, moe = model.hidden_size, len(model.moe_layers)
    return {
        "attention": (model.num_layers, 2 * hidden * (model.num_heads + model.num_kv_heads) * model.head_dim),
        "routed": (moe, 3 * hidden * model.expert_width),
        "shared": (moe, 3 * hidden * model.expert_width),
        "dense": (model.num_layers - moe, 3 * hidden * model.dense_width),
        "head": (1, hidden * model.vocab_size),
    }


float_a_matrix = other("floats cut off", stored=lambda f, n, rows: int(n * bits_of(f) / 8))


@wrong("floats cut off")
def float_a_layer(model, formats, context, cache_bytes):
    off = sum(count * lost(formats[part], numbers) for part, (count, numbers) in all_parts(model).items())
    return formula(model, formats, context, cache_bytes) - off


@wrong("floats cut off")
def float_a_part(model, formats, context, cache_bytes):
    off = sum(lost(formats[part], count * numbers) for part, (count, numbers) in all_parts(model).items())
    return formula(model, formats, context, cache_bytes) - off


@wrong("router in a format")
def router_as_its_experts(model, formats, context, cache_bytes):
    return formula(model, formats, context, cache_bytes, router_in=formats["routed"])


@wrong("embedding as the head")
def row_as_the_head(model, formats, context, cache_bytes):
    return formula(model, formats, context, cache_bytes, row_in=formats["head"])


no_cache = other("no cache", vectors=0)
keys_only = other("keys or values", vectors=1)
query_heads = by_sizes("query heads", lambda m: dict(cached_heads=m.num_heads))
one_head = other("one head", cached_heads=1)
no_dim = other("no head_dim", dim=1)
hidden_size = by_sizes("hidden size", lambda m: dict(cached_heads=1, dim=m.hidden_size))
last_token = other("one token", seen=lambda tokens: min(tokens, 1), kept=lambda tokens, _: min(tokens, 1))
one_layer = other("one layer", cached_layers=lambda nope, local: 1)
nope_only = other("NoPE layers only", kept=lambda tokens, chunk: 0)
local_only = other("local layers only", seen=lambda tokens: 0)
whole_chunk = other("always a whole chunk", kept=lambda tokens, chunk: chunk if tokens else 0)


@wrong("values counted, not bytes")
def cached_numbers(model, formats, context, cache_bytes):
    return formula(model, formats, context, 1)


@wrong("bf16 by heart")
def cached_in_bf16(model, formats, context, cache_bytes):
    return formula(model, formats, context, 2)


no_cap = other("no cap", kept=lambda tokens, chunk: tokens)
all_local = other("a chunk everywhere", nope=0)
rest = other("what the last chunk holds", kept=lambda tokens, chunk: tokens % chunk)
two_chunks = other("two chunks", kept=lambda tokens, chunk: min(tokens, 2 * chunk))
one_less = other("one token less", kept=lambda tokens, chunk: min(tokens, chunk - 1))
one_more = other("one token more", kept=lambda tokens, chunk: min(tokens, chunk + 1))
with_a_rhythm = by_sizes("every fourth layer", lambda m: dict(nope=m.num_layers // 4))


@wrong("kinds swapped")
def kinds_swapped(model, formats, context, cache_bytes):
    capped = min(context, model.chunk_size)
    return formula(model, formats, context, cache_bytes, seen=lambda tokens: capped, kept=lambda tokens, chunk: context)


@wrong("Scout in int4, 131,072 tokens in bf16: 16.23 GB")
def chunks_of_4096_at_most(model, formats, context, cache_bytes):
    return formula(model, formats, context, cache_bytes, kept=lambda tokens, chunk: min(tokens, chunk, 4096))


EQUIVALENT = {
    "dict[str, Format]  ->  dict": "it is an annotation and changes no value",
    "min(context, model.chunk_size)  ->  min(model.chunk_size, context)": "the smaller of two is the same in any order",
}
