"""What the kernels compute, in plain PyTorch: the same functions with the same arguments, on any device.

The differences: vectors are in the order of their channels (`order` does nothing), and an expert's index is asked for.
Shapes: K inputs and N outputs of a product, G = K / 128 groups, F expert width, E experts; x is one token, in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import full_attention
from .int4 import dequantise, int4_linear


def order(x: Tensor) -> Tensor:
    """[..., K] -> the same in float32: a plain product takes channels as they come."""
    return x.float()


def norm_product(x: Tensor, norm: Tensor, eps: float, packed: Tensor, scale: Tensor, inputs: int) -> Tensor:
    """RMSNorm and product: x [K] -> [N]."""
    return int4_linear(F.rms_norm(x, (inputs,), norm, eps), packed, scale)


def add_product(
    x: Tensor, y: Tensor, packed: Tensor, scale: Tensor, logits: Tensor | None = None, routed: tuple | None = None
) -> Tensor:
    """x [N] plus the product with y [1, K]; or plus two of them with y [2, K], the chosen expert's first."""
    if routed is None:
        return x + int4_linear(y[0], packed, scale)
    expert = int(logits.argmax())
    return x + int4_linear(y[0], routed[0][expert], routed[1][expert]) + int4_linear(y[1], packed, scale)


def norm_router(x: Tensor, norm: Tensor, eps: float, router: Tensor | None, inputs: int) -> tuple[Tensor, Tensor]:
    """RMSNorm and the router: x [K] -> (normed [K], logits [E]); router [E, K], None if dense."""
    y = F.rms_norm(x, (inputs,), norm, eps)
    return y, y.new_empty(0) if router is None else router @ y


def gate_up(
    y: Tensor, packed: Tensor, scale: Tensor, logits: Tensor | None = None, routed: tuple | None = None
) -> Tensor:
    """silu(gate(y)) up(y): y [K] -> [1, F], or [2, F] with the chosen expert first, whose input its score scales."""
    inputs = [(y, packed, scale)]
    if routed is not None:
        expert = int(logits.argmax())
        inputs.insert(0, (y * logits[expert].sigmoid(), routed[0][expert], routed[1][expert]))
    halves = [int4_linear(*each).chunk(2) for each in inputs]
    return torch.stack([F.silu(gate) * up for gate, up in halves])


def expand(packed: Tensor, scale: Tensor, out: Tensor):
    """The weights [N, K] of one packed matrix into `out`."""
    out.copy_(dequantise(packed, scale, out.shape[1], out.dtype))


def turn_and_store(
    qkv: Tensor, position: Tensor, turns: Tensor | None, k_cache: Tensor, v_cache: Tensor, heads: int,
    eps: float | None, temperature: tuple[float, int] | None,
) -> Tensor:  # fmt: skip
    """One token's query, key and value, made ready: qkv [(heads + 2 kv_heads) dim] -> query [heads, dim].

    turns: [rows, dim / 2, 2] cosines and sines, of which the token takes row `position % rows`; None on NoPE layers.
    eps: of the norm over each head's channels after turning; None without. temperature: (a, floor_scale) or None.
    Key and value go into row `position % capacity` of the caches [capacity, kv_heads, dim].
    """
    capacity, kv_heads, dim = k_cache.shape
    q, k, v = qkv.view(-1, dim).split([heads, kv_heads, kv_heads])
    if turns is not None:
        cos, sin = turns[position % len(turns)].unbind(-1)  # [1, dim / 2]
        q, k = (_turn(x, cos, sin) for x in (q, k))
        if eps is not None:
            q, k = (F.rms_norm(x, (dim,), eps=eps) for x in (q, k))
    elif temperature is not None:
        q = q * (1 + temperature[0] * torch.log1p(torch.floor((position.float() + 1) / temperature[1])))
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache.index_copy_(0, position % capacity, new[None].to(cache.dtype))
    return q.to(k_cache.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[:, ::2], x[:, 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(1)


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, chunk: int | None) -> Tensor:
    """What the token at `position` sees: q [heads, dim], caches [capacity, kv_heads, dim] -> [1, heads dim]."""
    seen = int(position) + 1 if chunk is None else int(position) % chunk + 1
    out = full_attention(q[None, None], k_cache[None, :seen], v_cache[None, :seen])  # [1, 1, heads, dim]
    return out.flatten(1).float()
