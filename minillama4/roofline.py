"""How fast a GPU can run a model at best: what must be read over its bandwidth, what must be computed over its rate.

A step takes at least the longer of the two times (the roofline). Decoding one token reads every active weight for a
single row of work, so bytes bind it; a long prompt uses each weight thousands of times, so FLOPs do. Bounds, not
measurements: nothing here waits for launches, for routing, or for a second GPU.

Assumed: bf16 arithmetic whatever the weights are stored in; even routing (`experts_touched`); local layers with a full
chunk of cache; dequantising is free, and so are activations (but not in `moe_layer_times`).
A matrix product of n parameters is 2n FLOPs a token.
"""

import json
import re
from dataclasses import asdict, dataclass, replace

from .budget import (
    FORMATS,
    Model,
    Shape,
    cached_tokens,
    count,
    experts_touched,
    kv_bytes,
    longest_context,
    pick,
    read_bytes,
    shape,
    weight_bytes,
)


@dataclass(frozen=True)
class Gpu:
    """Bounds use `bandwidth` and `flops`; the data sheet's numbers stand beside them."""

    name: str
    memory: int  # bytes that the driver reports
    bandwidth: float  # bytes/s
    flops: float  # bf16 FLOP/s
    sheet_bandwidth: float
    sheet_flops: float
    note: str
    reserve: float = 3e9  # bytes for the CUDA context and activations


GPUS: dict[str, Gpu] = {
    "h100": Gpu(
        "H100 80 GB", 81_559 * 2**20, 3.35e12, 790e12, 3.35e12, 989e12,
        "bandwidth of the data sheet; FLOP/s measured on an H200, which has the same chip",
    ),
    "h200": Gpu(
        "H200 141 GB", 143_771 * 2**20, 4.3e12, 790e12, 4.8e12, 989e12,
        "bandwidth of a measured copy; FLOP/s of a measured product of 8,192 x 8,192 matrices",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """One step of `tokens` tokens: what it reads and computes, and how long each takes at least (seconds)."""

    tokens: int
    bytes: float
    flops: float
    memory_seconds: float
    compute_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.compute_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def bound_by(self) -> str:
        return "memory" if self.memory_seconds >= self.compute_seconds else "compute"


def decode_bound(
    model: Model,
    dtype: str = "bf16",
    context: int = 0,
    batch: int = 1,
    gpu: str | Gpu = "h100",
    kv_dtype: str = "bf16",
    dense: bool = False,
) -> Bound:
    """One step of decoding: one token more for each of `batch` sequences that have `context` tokens already.

    dense: every expert runs on every token, as in Meta's and Hugging Face's code. ValueError: an unknown name, or a
    number out of range.
    """
    s = _every_expert(model) if dense else shape(model)
    moved = kv_bytes(s, context, batch, kv_dtype) + read_bytes(s, dtype, batch)
    flops = batch * (matrix_flops(s) + 2 * count(s).head + 2 * s.score_width * cached_tokens(s, context))
    return _bound(batch, moved, flops, gpu)


def prefill_bound(
    model: Model,
    dtype: str = "bf16",
    context: int = 8192,
    gpu: str | Gpu = "h100",
    kv_dtype: str = "bf16",
    dense: bool = False,
) -> Bound:
    """A prompt of `context` tokens in one pass, the head for its last token only (left out: 1 token of thousands).

    dense: as in `decode_bound`; and local layers attend to the whole prompt and mask it, as in Hugging Face's code.
    """
    s = _every_expert(model) if dense else shape(model)
    if context < 1:
        raise ValueError(f"context is {context}; a prompt has at least 1 token")
    pairs = attention_pairs(s, context)
    if dense:
        pairs += s.local_layers * (context**2 - _chunked_pairs(context, s.chunk))
    moved = read_bytes(s, dtype, context) + kv_bytes(s, context, dtype=kv_dtype)
    return _bound(context, moved, context * matrix_flops(s) + 2 * s.score_width * pairs, gpu)


@dataclass(frozen=True)
class MoeTimes:
    """Bounds for one MoE layer (seconds): only the chosen experts, or every expert on every token."""

    tokens: int
    touched: float  # distinct routed experts
    sparse_memory: float
    sparse_compute: float
    dense_memory: float
    dense_compute: float
    dense_elementwise: float  # what the dense way also moves: E-fold copies of input, hidden and output activations

    @property
    def sparse(self) -> float:
        return max(self.sparse_memory, self.sparse_compute)

    @property
    def dense(self) -> float:
        return max(self.dense_memory, self.dense_compute)


def moe_layer_times(tokens: int, model: Model = "scout", gpu: str | Gpu = "h200", dtype: str = "bf16") -> MoeTimes:
    """Routed and shared experts of one layer over `tokens` tokens. ValueError: a model without experts, no tokens."""
    s, g, weights = shape(model), _gpu(gpu), pick("dtype", dtype, FORMATS)
    if not s.moe_layers:
        raise ValueError(f"model is {s.name}; it has no layer with experts")
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; it must be at least 1")
    touched = experts_touched(s.experts, tokens, s.per_token)
    routed_bytes, shared_bytes = s.expert * weights.routed / 8, s.shared * s.expert * weights.shared / 8
    # bf16 activations, in passes over [tokens, D]: gathered, read and written by both kinds of expert, and added up.
    activations = 6 * tokens * s.hidden * 2
    # Per expert and token: inputs repeated and scaled, output written and read (6 D); gate and up, their product (8 F).
    elementwise = s.experts * tokens * (6 * s.hidden + 8 * s.expert_width) * 2
    return MoeTimes(
        tokens=tokens,
        touched=touched,
        sparse_memory=(touched * routed_bytes + shared_bytes + activations) / g.bandwidth,
        sparse_compute=2 * tokens * (s.per_token + s.shared) * s.expert / g.flops,
        dense_memory=(s.experts * routed_bytes + shared_bytes) / g.bandwidth,
        dense_compute=2 * tokens * (s.experts + s.shared) * s.expert / g.flops,
        dense_elementwise=elementwise / g.bandwidth,
    )


def _gpu(gpu: str | Gpu) -> Gpu:
    return gpu if isinstance(gpu, Gpu) else pick("GPU", gpu, GPUS)


def _bound(tokens: int, moved: float, flops: float, gpu: str | Gpu) -> Bound:
    g = _gpu(gpu)
    return Bound(tokens, moved, flops, moved / g.bandwidth, flops / g.flops)


def _every_expert(model: Model) -> Shape:
    """The same model, of which each token takes all experts."""
    s = shape(model)
    return replace(s, per_token=s.experts)


def matrix_flops(s: Shape) -> int:
    """FLOPs of one token in all matrices of the layers, forward."""
    c = count(s)
    return 2 * (c.attention + c.router + c.shared + c.dense + c.routed_active)


def attention_pairs(s: Shape, context: int) -> int:
    """Pairs of a query and a key that it may see in a prompt of `context` tokens, summed over the layers."""
    return (s.layers - s.local_layers) * _causal_pairs(context) + s.local_layers * _chunked_pairs(context, s.chunk)


def _causal_pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def _chunked_pairs(tokens: int, chunk: int) -> int:
    """chunk: 0 if there are no local layers."""
    chunks, rest = divmod(tokens, chunk) if chunk else (0, tokens)
    return chunks * _causal_pairs(chunk) + _causal_pairs(rest)


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def parse_tokens(text: str, argument: str = "context") -> int:
    """ "8K" -> 8,192 and "1M" -> 1,048,576; a plain number stays. ValueError: anything else, or less than 1."""
    match = re.fullmatch(r"(\d{1,12})([KM]?)", text.strip().upper())
    number = int(match[1]) * {"": 1, "K": 2**10, "M": 2**20}[match[2]] if match else 0
    if number < 1:
        raise ValueError(f"{argument} is {text!r}; it must be a whole number above 0, such as 8192, 128K or 1M")
    return number


def budget(model: str, dtype: str, context: int, gpu: str, batch: int = 1, kv_dtype: str = "bf16") -> dict:
    """Everything that `minillama4 budget` tells, as plain data. Bytes, tokens and tokens/s; see `Gpu` for what the
    bounds assume. `bound_by` is about decoding. ValueError: as in `decode_bound`."""
    s, g, counts = shape(model), _gpu(gpu), count(model)
    weights, cache = weight_bytes(s, dtype), kv_bytes(s, context, batch, kv_dtype)
    decode = decode_bound(s, dtype, context, batch, g, kv_dtype)
    prefill = prefill_bound(s, dtype, context, g, kv_dtype)
    return {
        "model": model,
        "note": s.note,
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "context": context,
        "batch": batch,
        "gpu": gpu,
        "parameters": counts.total,
        "active_parameters": counts.active,
        "weights_bytes": weights,
        "kv_bytes": cache,
        "fits": weights + cache + g.reserve <= g.memory,
        "longest_context": longest_context(s, (g.memory - g.reserve - weights) / batch, kv_dtype),
        "decode_tokens_per_second_bound": decode.tokens_per_second,
        "prefill_tokens_per_second_bound": prefill.tokens_per_second,
        "bound_by": decode.bound_by,
        "prefill_bound_by": prefill.bound_by,
        "decode_bytes": decode.bytes,
        "assumptions": asdict(g),
    }


def budget_command(model, dtype, context, gpu, batch="1", kv_dtype="bf16", as_json=False) -> str:
    """What `minillama4 budget` prints. ValueError: bad input."""
    b = budget(model, dtype, parse_tokens(context), gpu, parse_tokens(batch, "batch"), kv_dtype)
    if as_json:
        return json.dumps(b, indent=2)
    a = b["assumptions"]
    needed = b["weights_bytes"] + b["kv_bytes"] + a["reserve"]
    if b["fits"]:
        verdict = f"yes; up to {b['longest_context']:,} tokens of context"
    elif b["longest_context"]:
        verdict = f"no; {b['longest_context']:,} tokens of context would"
    else:
        verdict = "no, at no context; the speeds below are of a card with more memory"
    rows = [
        ("model", f"{model}: {b['parameters']:,} parameters, {b['active_parameters']:,} active for a text token"),
        ("weights", f"{_size(b['weights_bytes'])}   {dtype}: {FORMATS[dtype].note}"),
        ("KV cache", f"{_size(b['kv_bytes'])}   {b['context']:,} tokens, batch {b['batch']}, {kv_dtype}"),
        ("needed", f"{_size(needed)}   with {_size(a['reserve'])} for the CUDA context and activations"),
        ("fits", f"{verdict}   ({a['name']}: {_size(a['memory'])})"),
        ("decode", f"at most {b['decode_tokens_per_second_bound']:,.1f} tokens/s, bound by {b['bound_by']}"),
        ("prefill", f"at most {b['prefill_tokens_per_second_bound']:,.0f} tokens/s, bound by {b['prefill_bound_by']}"),
        ("assumed", f"{a['bandwidth'] / 1e12:g} TB/s, {a['flops'] / 1e12:g} TFLOP/s: {a['note']}"),
        ("", f"(data sheet: {a['sheet_bandwidth'] / 1e12:g} TB/s, {a['sheet_flops'] / 1e12:g} TFLOP/s)"),
    ]
    if b["note"]:
        rows.append(("note", b["note"]))
    return "\n".join(f"{name:<10}{text}" for name, text in rows)


def _size(number: float) -> str:
    return f"{number / 1e9:,.2f} GB" if number >= 1e8 else f"{number / 1e6:,.2f} MB"
