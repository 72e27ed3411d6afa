"""Bytes that decoding one token reads: weights in their formats, one expert of many, and the KV cache."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import numpy as np
import torch

from ..exercise import Card, Step, as_published, close, runs, same
from ..observe import call
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
    """Sizes for which no two known mistakes give the same number; neither MoE nor NoPE layers have a rhythm."""
    layers, kv_heads, chunk_size = rng.choice((7, 10, 11)), rng.choice((3, 5)), rng.choice((17, 19, 23))
    model = Decoder(
        vocab_size=rng.choice((907, 911, 919, 929)),
        hidden_size=16 * rng.choice((11, 13, 17)),
        num_layers=layers,
        num_heads=kv_heads * rng.randint(2, 4),
        num_kv_heads=kv_heads,
        head_dim=rng.choice((32, 48)),
        num_experts=rng.choice((9, 13)),
        expert_width=16 * rng.choice((3, 4, 9)),
        dense_width=16 * rng.choice((17, 19, 23)),
        moe_layers=tuple(sorted(rng.sample(range(layers), 4))),
        nope_layers=tuple(sorted(rng.sample(range(layers), 3))),
        chunk_size=chunk_size,
    )
    formats = [Format(4, 16, 4), Format(4, 16, 2), Format(8, 16, 2), Format(8, 8, 4), Format(2, 8, 2)]
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
# What is right: every tensor as it lies in memory (but for its values), and of each what a step indexes.


def read(model: Decoder, formats: dict[str, Format], context: int, size: int) -> dict[str, int]:
    """Name -> bytes that are read. Scales end in ".scale", and the cache of a layer in ".keys" and ".values"."""
    found = {"embedding": _bf16(model.vocab_size, model.hidden_size)[0].nbytes}
    for name, part, rows, columns in _matrices(model):
        packed, scales = _stored(rows, columns, formats[part])
        found[name] = packed.nbytes
        if scales is not None:
            found[f"{name}.scale"] = scales.nbytes
    for layer in range(model.num_layers):
        if layer in model.moe_layers:
            found[f"{layer}.router"] = _bf16(model.num_experts, model.hidden_size).nbytes
        for norm in ("attention_norm", "feed_forward_norm"):
            found[f"{layer}.{norm}"] = _bf16(model.hidden_size).nbytes
        cache = torch.empty(context, model.num_kv_heads, model.head_dim, size, dtype=torch.uint8, device="meta")
        seen = cache if layer in model.nope_layers else cache[: model.chunk_size]
        found |= {f"{layer}.keys": seen.nbytes, f"{layer}.values": seen.nbytes}
    return found | {"last_norm": _bf16(model.hidden_size).nbytes}


def _matrices(model: Decoder) -> Iterator[tuple[str, str, int, int]]:
    """(name, part, rows, columns) of what is multiplied, and may be quantised."""
    hidden = model.hidden_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    moe, dense = {"routed": model.expert_width, "shared": model.expert_width}, {"dense": model.dense_width}
    for layer in range(model.num_layers):
        for name, rows, columns in (
            ("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden), ("o", hidden, queries),
        ):  # fmt: skip
            yield f"{layer}.attention.{name}", "attention", rows, columns
        for part, width in (moe if layer in model.moe_layers else dense).items():
            for name, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
                yield f"{layer}.{part}.{name}", part, rows, columns
    yield "head", "head", model.vocab_size, hidden


def _stored(rows: int, columns: int, format: Format) -> tuple[torch.Tensor, torch.Tensor | None]:
    packed = torch.empty(rows, columns * format.bits // 8, dtype=torch.uint8, device="meta")
    if format.group is None:
        return packed, None
    dtype = {2: torch.float16, 4: torch.float32}[format.scale_bytes]
    return packed, torch.empty(rows, columns // format.group, dtype=dtype, device="meta")


def _bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong: name -> (what that mistake gives, its question).


def _sum(found: dict[str, int], pattern: str) -> int:
    return sum(number for name, number in found.items() if fnmatch(name, pattern))


def _wrong_parts(model: Decoder, bf16: dict[str, Format], *cache: int) -> dict[str, tuple[int, str]]:
    found = read(model, bf16, *cache)
    right, row, router = sum(found.values()), found["embedding"], _sum(found, "*.router")
    whole, others = row * (model.vocab_size - 1), (model.num_experts - 1) * _sum(found, "*.routed.*")

    def other(**sizes) -> dict[str, int]:
        return read(replace(model, **sizes), bf16, *cache)

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
        "no attention": (right - _sum(found, "*.attention.*"), "Which of your terms has head_dim in it?"),
        "two matrices": (right - _sum(found, "*.up"), "silu(gate(x)) * up(x), then down: how many matrices is that?"),
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
    matrices = [(formats[part], rows, rows * columns) for _, part, rows, columns in _matrices(model)]
    groups = [(form, numbers // form.group) for form, _, numbers in matrices]

    def other(changed: dict[str, Format]) -> int:
        return sum(read(model, formats | changed, *cache).values())

    def quantised(rows: int, part: str) -> int:
        """Bytes of so many rows of hidden_size in a part's format, beyond those in bf16."""
        stored = _stored(rows, model.hidden_size, formats[part])
        return sum(tensor.nbytes for tensor in stored) - _bf16(rows, model.hidden_size).nbytes

    wrong = {
        "bf16 everywhere": (other(BF16), "What does your function do with formats?"),
        "no scales": (right - scales, "A code of 4 bits says how many steps. What says how large a step is?"),
        "one scale a matrix": (
            right - scales + sum(form.scale_bytes for form, _, _ in matrices),
            "How many weights share one scale, and how many of those groups has a matrix?",
        ),
        "one scale a row": (
            right - scales + sum(form.scale_bytes * rows for form, rows, _ in matrices),
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
            right + sum(numbers * (8 - form.bits) // 8 for form, _, numbers in matrices),
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
