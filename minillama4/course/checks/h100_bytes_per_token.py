"""Bytes that decoding one token reads: weights in their formats, one expert of many, and the KV cache."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import numpy as np

from ..exercise import Card, Step, as_published, close, runs, same
from ..observe import call
from ._h100_reads import bf16, matrices, read, stored
from .h100_will_it_fit import wrong_caches, wrong_spans

CARD = Card("05", "Bytes per token", difficulty=3, importance=5, minutes=25,
            trains="what decoding is bound by, formats with scales")  # fmt: skip

HINTS = (
    "Go through a layer with one token in hand, and write down each matrix that it is multiplied with. Which of the "
    "experts' matrices are not touched? And what of the embedding?",
    "Count numbers first, part by part, as if all were bf16. Then turn the numbers of a part into bytes in one little "
    "function: the bits of each, and, if its format has groups, a scale for each group. The cache comes last: which "
    "layers read all of it, and which a chunk at most?",
    "stored(part, n) = n * bits // 8, plus n // group * scale_bytes if there are groups. A layer: attention 2 * hidden "
    "* (num_heads + num_kv_heads) * head_dim; dense 3 * hidden * dense_width, or routed and shared 3 * hidden * "
    "expert_width each. Once: head. In 2 bytes: a row of the embedding, routers, 2 norms a layer and a last one.",
)

ANSWERED_BY = (
    "minillama4.budget.count", "minillama4.budget.read_bytes", "minillama4.budget.cached_tokens",
    "minillama4.budget.kv_bytes", "minillama4.roofline.decode_bound",
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    """How the weights of a matrix are stored: each in `bits`, and each `group` of neighbours shares one scale."""

    bits: int
    group: int | None = None  # weights; it divides every row of a matrix. None: no scales
    scale_bytes: int = 4  # of one scale


@dataclass(frozen=True)
class Decoder:
    """The sizes of a model that is built like Llama 4: in a MoE layer a token takes one routed expert, and a shared one
    of the same width."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int  # of queries
    num_kv_heads: int
    head_dim: int
    num_experts: int  # routed ones, in a layer of `moe_layers`
    expert_width: int
    dense_width: int  # of the feed-forward network in all other layers
    moe_layers: tuple[int, ...]
    nope_layers: tuple[int, ...]  # they see the whole context; all others see the chunk that a token is in
    chunk_size: int


PARTS = ("attention", "routed", "shared", "dense", "head")  # the keys of `formats`; the rest is bf16
BF16, INT4 = (dict.fromkeys(PARTS, form) for form in (Format(bits=16), Format(bits=4, group=128)))  # of all parts

SCOUT = Decoder(
    vocab_size=202048, hidden_size=5120, num_layers=48, num_heads=40, num_kv_heads=8, head_dim=128, num_experts=16,
    expert_width=8192, dense_width=16384, moe_layers=tuple(range(48)), nope_layers=tuple(range(3, 48, 4)),
    chunk_size=8192,
)  # fmt: skip
MAVERICK = replace(SCOUT, num_experts=128, moe_layers=tuple(range(1, 48, 2)))
# name -> (model, formats, tokens in the cache, bytes of a number in it, bytes)
KNOWN = {
    "Scout in bf16, nothing cached: 32.28 GB": (SCOUT, BF16, 0, 2, 32_276_828_160),
    "Scout in int4, 131,072 tokens in bf16: 16.23 GB": (SCOUT, INT4, 131_072, 2, 16_230_455_296),
    "Scout as Meta's int4, only experts, nothing cached: 14.53 GB": (
        SCOUT, BF16 | {part: INT4[part] for part in ("routed", "shared")}, 0, 2, 14_534_922_240,
    ),
    "Maverick in int4, 1,048,576 tokens in fp8: 34.98 GB": (MAVERICK, INT4, 1_048_576, 1, 34_977_421_312),
}  # fmt: skip


def draw(rng: random.Random) -> dict:
    """Sizes for which no two known mistakes give the same number, and floats that are cut off are not exact."""
    while True:
        inputs = _drawn(rng)
        model, formats = inputs["model"], inputs["formats"]
        if all(_cut_off(model, formats, depth) for depth in (0, 2, 3)):
            wrong = _wrong_parts(model, BF16, 0, 8), _wrong_formats(model, formats, 0, 8)
            if all(len({number for number, _ in each.values()}) == len(each) for each in wrong):
                return inputs


def _cut_off(model: Decoder, formats: dict[str, Format], depth: int) -> int:
    """Bytes lost by `int` of a float, for each part (depth 0), part of a layer (2) or matrix (3)."""
    numbers = Counter()
    for name, part, rows, columns in matrices(model):
        numbers[part, *name.split(".")[:depth]] += rows * columns
    bytes = {part: formats[part].bits / 8 + formats[part].scale_bytes / formats[part].group for part in PARTS}
    return sum(round(n * bytes[part]) - int(n * bytes[part]) for (part, *_), n in numbers.items())


def _drawn(rng: random.Random) -> dict:
    """Every row is a whole number of groups and of bytes; neither MoE nor NoPE layers have a rhythm."""
    layers, kv_heads, chunk_size = rng.choice((7, 10, 11)), rng.choice((3, 5)), rng.choice((17, 19, 23))
    model = Decoder(
        vocab_size=rng.choice((907, 911, 919, 929)),
        hidden_size=48 * rng.choice((11, 17, 19)),
        num_layers=layers,
        num_heads=kv_heads * rng.randint(2, 4),
        num_kv_heads=kv_heads,
        head_dim=rng.choice((48, 96)),
        num_experts=rng.choice((9, 13)),
        expert_width=48 * rng.choice((1, 2, 3)),
        dense_width=48 * rng.choice((9, 13)),
        moe_layers=tuple(sorted(rng.sample(range(layers), 4))),
        nope_layers=tuple(sorted(rng.sample(range(layers), 3))),
        chunk_size=chunk_size,
    )
    formats = [Format(*each) for each in ((2, 8, 2), (3, 12, 2), (4, 16, 4), (5, 24, 4), (6, 12, 4), (8, 16, 2))]
    return {
        "model": model,
        "formats": dict(zip(PARTS, rng.sample(formats, len(PARTS)), strict=True)),
        "short": chunk_size - rng.randint(2, 3),
        "long": chunk_size * rng.randint(4, 6) + rng.randint(2, chunk_size - 2),
        "bytes": 8,
    }


def observe(function, inputs: dict) -> dict:
    model, formats, size = inputs["model"], inputs["formats"], inputs["bytes"]
    seen = call("bf16", function, model, BF16, 0, size)
    for name, context in (("mixed", 0), ("short", inputs["short"]), ("long", inputs["long"])):
        seen |= call(name, function, model, formats, context, size)
    for name, (known, formats, context, size, _) in KNOWN.items():
        seen |= call(name, function, known, formats, context, size)
    return seen


def judge(inputs: dict, observed: dict):
    model, formats, size = inputs["model"], inputs["formats"], inputs["bytes"]
    yield from _step(
        "bf16", "all in bf16, nothing cached: what one token is multiplied with, and nothing else", observed,
        (model, BF16, 0, size), _wrong_parts,
        "Set sizes to 1 one by one: by how much does your number shrink? Which of them should it not depend on?",
    )  # fmt: skip
    yield from _step(
        "mixed", "each part in its own format, with a scale for each group", observed,
        (model, formats, 0, size), _wrong_formats,
        "Take a matrix of one row and one group: how many bytes is that in each of these formats?",
    )  # fmt: skip
    yield from _step(
        "short", "in less than a chunk, every layer reads a key and a value of every token", observed,
        (model, formats, inputs["short"], size), _wrong_caches,
        "Take the same context twice as long: what should that add, in one layer?",
    )  # fmt: skip
    yield from _step(
        "long", "in a long context, local layers read one chunk at the most, and NoPE layers everything", observed,
        (model, formats, inputs["long"], size), _wrong_spans,
        "For one layer of each kind: which is the earliest key that the new token may see?",
    )  # fmt: skip
    for name, (known, formats, context, size, number) in KNOWN.items():
        yield from as_published(name, observed, number, _given(known, formats, context, size))


def _step(name: str, step: str, observed: dict, arguments: tuple, mistakes: Callable, question: str) -> Iterator[Step]:
    """mistakes: makes them out of the arguments, if they are needed."""
    given, got = _given(*arguments), observed[f"{name}/value"]
    yield from runs(observed, name, (), given, dtype="int")
    want = sum(read(*arguments).values())
    known = {} if close(got, np.array(want), 0) else mistakes(*arguments)
    if got.dtype.kind in "iu":  # a byte of each matrix, of which there are less than a hundred
        asks = "A few bytes are off. Which of your numbers is a float, and what does `int` make of 7.9999?"
        known["floats cut off"] = (got.clip(want - 99, want + 99), asks)
    yield same(step, got, want, given, question, known)


def _given(model: Decoder, formats: dict[str, Format], context: int, size: int) -> str:
    def words(form: Format) -> str:
        return f"{form.bits} bits" + f", group {form.group}, scale_bytes {form.scale_bytes}" * bool(form.group)

    alike = len(set(formats.values())) == 1
    parts = {"all": formats["head"]} if alike else formats
    stored = "; ".join(f"{part} in {words(form)}" for part, form in parts.items())
    sizes = ", ".join(f"{key} {value}" for key, value in vars(model).items())
    return f"{stored}; context {context:,}, cache_bytes {size}; {sizes}"


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong: name -> (what that mistake gives, its question).


def _sum(found: dict[str, int], pattern: str) -> int:
    return sum(number for name, number in found.items() if fnmatch(name, pattern))


def _wrong_parts(model: Decoder, in_bf16: dict[str, Format], *cache: int) -> dict[str, tuple[int, str]]:
    found = read(model, in_bf16, *cache)
    right, row, router = sum(found.values()), found["embedding"], _sum(found, "*.router")
    attention, heads = _sum(found, "*.attention.*"), model.num_heads * model.head_dim
    whole, others = row * (model.vocab_size - 1), (model.num_experts - 1) * _sum(found, "*.routed.*")

    def other(**sizes) -> dict[str, int]:
        return read(replace(model, **sizes), in_bf16, *cache)

    return {
        "another unit": (0, "Is your number in bytes? Dividing a small model by 2**30 leaves what?"),
        "numbers counted, not bytes": (right // 2, "How many bytes is a number in bf16?"),
        "bits": (right * 8, "Is your number in bytes, or in bits?"),
        "whole model": (right + whole + others, "What must lie in memory, and what does one token need of it?"),
        "whole embedding": (right + whole, "A token has one id. How many rows of the embedding does it need?"),
        "no embedding row, or no last norm": (
            right - row, "Where does the first layer's vector come from? And what stands in front of the head?",
        ),
        "no head": (right - found["head"], "What turns the last layer's vector into a number for each word?"),
        "all experts": (right + others, "How many routed experts does one token go through, in one layer?"),
        "one expert a layer": (right - _sum(found, "*.shared.*"), "Which two experts does a MoE layer's token take?"),
        "no router": (right - router, "What decides which expert a token gets, in which shape?"),
        "routers in dense layers": (
            right + router // len(model.moe_layers) * (model.num_layers - len(model.moe_layers)),
            "In which layers is there something to choose from? How many routers is that?",
        ),
        "one row of the router": (
            right - router // model.num_experts * (model.num_experts - 1),
            "The best expert is known when all scores are. Which rows of the router does that take?",
        ),
        "no norms": (right - _sum(found, "*norm"), "How long is a norm's weight, and how many does a layer have?"),
        "one norm a layer": (right - _sum(found, "*.attention_norm"), "Which two parts of a layer begin with a norm?"),
        "kv heads": (
            sum(other(num_kv_heads=model.num_heads).values()),
            "Five query heads of Scout share one key head. How many rows does the key matrix have?",
        ),
        "no output projection": (
            right - _sum(found, "*.o"), "What brings the heads' results back to hidden_size, after the attention?",
        ),
        "hidden_size for all heads": (
            right + model.num_layers * 4 * model.hidden_size * (model.hidden_size - heads),
            "How many rows has the query matrix, one for each number of each head? Is that hidden_size here?",
        ),
        "all heads for hidden_size": (
            right + attention * heads // model.hidden_size - attention,
            "How long is the vector that goes into a layer's query matrix? Is that num_heads * head_dim here?",
        ),
        "all heads for every hidden_size": (
            sum(other(hidden_size=heads).values()), "What does your function do with hidden_size?",
        ),
        "no attention": (right - attention, "Which of your terms has head_dim in it?"),
        "two matrices": (right - _sum(found, "*.up"), "silu(gate(x)) * up(x), then down: how many matrices is that?"),
        **{
            f"two matrices, {name}": (
                right - sum(_sum(found, f"*.{part}.up") for part in parts),
                f"silu(gate(x)) * up(x), then down: how many matrices is that, in {words}?",
            )
            for name, parts, words in (
                ("experts", ("routed", "shared"), "an expert"),
                ("one expert", ("routed",), "each of a token's two experts"),
                ("dense", ("dense",), "a dense network"),
            )
        },
        "no dense layers": (right - _sum(found, "*.dense.*"), "What have the layers that are not in moe_layers?"),
        "experts in every layer": (
            sum(other(moe_layers=range(model.num_layers)).values()),
            "Which layers have experts? What does your function do with moe_layers?",
        ),
        "dense in every layer": (
            right - _sum(found, "*.dense.*") + _sum(other(moe_layers=()), "*.dense.*"),
            "Does a layer with experts have a dense network as well?",
        ),
    }  # fmt: skip


def _wrong_formats(model: Decoder, formats: dict[str, Format], *cache: int) -> dict[str, tuple[int, str]]:
    found = read(model, formats, *cache)
    right, scales = sum(found.values()), _sum(found, "*.scale")
    each = [(formats[part], rows, rows * columns) for _, part, rows, columns in matrices(model)]
    groups = [(form, numbers // form.group) for form, _, numbers in each]

    def other(changed: dict[str, Format]) -> int:
        return sum(read(model, formats | changed, *cache).values())

    def quantised(rows: int, part: str) -> int:
        """Bytes of so many rows of hidden_size in a part's format, beyond those in bf16."""
        both = stored(rows, model.hidden_size, formats[part])
        return sum(tensor.nbytes for tensor in both) - bf16(rows, model.hidden_size).nbytes

    wrong = {
        "bf16 everywhere": (other(BF16), "What does your function do with formats?"),
        "no scales": (right - scales, "A code of 4 bits says how many steps. What says how large a step is?"),
        "one scale a matrix": (
            right - scales + sum(form.scale_bytes for form, _, _ in each),
            "How many weights share one scale, and how many of those groups has a matrix?",
        ),
        "one scale a row": (
            right - scales + sum(form.scale_bytes * rows for form, rows, _ in each),
            "How many weights share one scale, and how many of those groups has a row?",
        ),
        "scales counted, not bytes": (
            right - scales + sum(number for _, number in groups), "How many bytes is one scale?",
        ),
        "four-byte scales": (
            right - scales + sum(4 * number for _, number in groups),
            "How many bytes is one scale? Which field says so?",
        ),
        "a byte for each code": (
            right + sum(numbers * (8 - form.bits) // 8 for form, _, numbers in each),
            "How many codes of 4 bits share a byte?",
        ),
        "bits of a code, bytes of a scale": (
            right - scales + sum(number * form.scale_bytes // 8 for form, number in groups),
            "bits is in bits and scale_bytes is in bytes. Which of them do you divide by 8?",
        ),
        "router in a format": (
            right + sum(quantised(model.num_experts, "routed") for _ in model.moe_layers),
            "The task says what stays in bf16. Are the routers a part of it?",
        ),
        "embedding as the head": (
            right + quantised(1, "head"), "The task says what stays in bf16. Is the embedding a part of it?",
        ),
    }  # fmt: skip
    for part in PARTS:
        question = f"Print which format you take for the numbers of the part {part!r}. Is it formats[{part!r}]?"
        wrong[f"format of {part}"] = (other({part: formats["shared" if part == "routed" else "routed"]}), question)
    return wrong


def _wrong_caches(model: Decoder, formats: dict[str, Format], tokens: int, size: int) -> dict[str, tuple[int, str]]:
    one_head = 2 * tokens * model.num_layers * model.head_dim * size
    wrong = wrong_caches(model, tokens, size) | {
        "query heads": (
            one_head * model.num_heads, "Five query heads of Scout share one key head. How many heads are kept?",
        ),
        "hidden size": (
            one_head // model.head_dim * model.hidden_size, "How long is a key, for all of its heads?",
        ),
    }  # fmt: skip
    return _with_weights(model, formats, size, wrong)


def _wrong_spans(model: Decoder, formats: dict[str, Format], tokens: int, size: int) -> dict[str, tuple[int, str]]:
    return _with_weights(model, formats, size, wrong_spans(model, tokens, size))


def _with_weights(model: Decoder, formats: dict[str, Format], size: int, caches: dict) -> dict[str, tuple[int, str]]:
    weights = sum(read(model, formats, 0, size).values())
    return {mistake: (weights + cache, question) for mistake, (cache, question) in caches.items()}
