"""iRoPE: three layers that see one chunk through rotary embeddings, then one that sees everything without positions.

Shapes: q [batch, tokens, heads, dim], k and v [batch, tokens, kv_heads, dim]; `heads / kv_heads` queries share one key.
Order in a layer: project -> rotate -> norm (both on rotary layers only) -> temperature (NoPE layers only) -> attend.
Source: Meta's `models/llama4/model.py` and the Hugging Face port, which agree on everything here except that Meta's
one-token decode forgets the chunk; ours keeps it, so that decode equals prefill.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import LayerCache
from .config import TextConfig

# ---------------------------------------------------------------------------------------------------------------------
# Positions


@lru_cache(maxsize=16)
def inverse_frequencies(config: TextConfig, device: str = "cpu") -> Tensor:
    """Radians per token of each rotary pair: [dim / 2] float64, from fast to slow, after `rope_scaling`.

    Float64, because an angle is position times frequency and a float32 product is off by half a radian at 10M tokens.
    """
    with torch.inference_mode(False):  # the cache outlives the caller's mode, and training must be able to use it
        pair = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)
        frequency = config.rope_theta ** (-pair / config.head_dim)
        scaling = config.rope_scaling
        if scaling is None:
            return frequency
        turns = scaling.original_positions * frequency / (2 * math.pi)  # full turns inside the original context
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        # How much of the original frequency is kept: 1 for fast pairs, 0 for slow ones. Scout has low == high, where
        # the ramp has no width and only the comparison is defined.
        keep = (turns >= low).double() if low == high else ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (keep + (1 - keep) / scaling.factor)


def rotation(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Unit complex numbers that turn each pair to its position: [tokens] -> [tokens, 1, dim / 2] complex64."""
    angle = positions.double()[:, None, None] * frequencies  # [tokens, 1, dim / 2]
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the *adjacent* channels (0, 1), (2, 3), ... of each head, in float32.

    x: [batch, tokens, heads, dim], turn: [tokens, 1, dim / 2] from `rotation`. Pairing channel i with i + dim / 2, as
    Llama 1-3 do on the Hub, gives fluent nonsense with these weights.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [batch, tokens, heads, dim / 2]
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)


def temperature(positions: Tensor, config: TextConfig) -> Tensor:
    """Factor on each query of a NoPE layer: [tokens] -> [tokens] float32, `1 + a ln(1 + floor((p + 1) / floor_scale))`.

    Softmax over n keys flattens as n grows; larger logits counter that (arXiv 2501.19399). `positions` are absolute:
    an index into the current call would give another answer in decode than in prefill.
    """
    return 1 + config.temperature_scale * torch.log1p(torch.floor((positions.float() + 1) / config.floor_scale))


def angles(positions: Tensor, config: TextConfig) -> tuple[Tensor, Tensor | None]:
    """What all layers share at these positions [tokens]: rotations [tokens, 1, dim / 2], and temperatures or None."""
    inside = positions if config.chunk_size is None else positions % config.chunk_size
    turn = rotation(inside, inverse_frequencies(config, str(positions.device)))  # the chunk's start cancels in q.k
    return turn, temperature(positions, config) if config.temperature_tuning else None


# ---------------------------------------------------------------------------------------------------------------------
# Attention without a mask. A causal square, a rectangle that is seen whole, and sums of the two are enough.


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query sees every key: [batch, queries, heads, dim] -> the same shape.

    All heads of a group read the same keys, so they are laid along the query axis: one product a key head.
    """
    batch, queries, heads, dim = q.shape
    groups = k.shape[2]
    q = q.view(batch, queries, groups, -1, dim).transpose(1, 2).flatten(2, 3)  # [batch, kv_heads, queries * group, dim]
    out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))
    return out.view(batch, groups, queries, -1, dim).transpose(1, 2).flatten(2, 3)  # [batch, queries, heads, dim]


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query i sees keys 0..i: [batch, tokens, heads, dim] -> the same shape."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [batch, heads, tokens, dim]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> Tensor:
    """Query i sees the keys j <= i of its own chunk, `i // chunk_size == j // chunk_size`; shapes as causal attention.

    Not a sliding window: the first token of a chunk sees only itself. A chunk is a batch row, so the cost grows with
    tokens x chunk and no mask exists.
    """
    tokens = q.shape[1]
    whole = tokens // chunk_size * chunk_size
    parts = []
    if whole:
        rows = (x[:, :whole].unflatten(1, (-1, chunk_size)).flatten(0, 1) for x in (q, k, v))
        out = causal_attention(*rows)  # [batch * chunks, chunk, heads, dim]
        parts.append(out.unflatten(0, (len(q), -1)).flatten(1, 2))  # [batch, whole, heads, dim]
    if whole < tokens:
        parts.append(causal_attention(q[:, whole:], k[:, whole:], v[:, whole:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def continued_attention(q: Tensor, k_past: Tensor, v_past: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A piece on top of a cache: each query sees all of the past, and the piece itself causally.

    q [batch, tokens, heads, dim] over [batch, past, kv_heads, dim] and [batch, tokens, kv_heads, dim].
    """
    q, k_past, v_past, k, v = (x.transpose(1, 2) for x in (q, k_past, v_past, k, v))  # [batch, heads, tokens, dim]
    if q.device.type == "cpu":
        return _PastAndSelf.apply(q, k_past, v_past, k, v).transpose(1, 2)
    # Other devices know this triangle by name ("aligned to the lower right") and build no mask for it either. Imported
    # here, because it takes torch's compiler along, which would double the time of `import minillama4`.
    from torch.nn.attention.bias import causal_lower_right

    group = q.shape[1] // k.shape[1]
    k = torch.cat([k_past, k], dim=2).repeat_interleave(group, dim=1)
    v = torch.cat([v_past, v], dim=2).repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2])).transpose(1, 2)


class _PastAndSelf(torch.autograd.Function):
    """Attention over two key sets, each computed alone and merged by its log-sum-exp.

    softmax over both sets = the two softmaxes, weighted by exp(lse_set - lse_both). The backward pass needs no such
    weights: given the merged output and the merged lse, each half's ordinary flash backward is already exact, since a
    probability is exp(logit - lse) whichever half its key is in.
    """

    @staticmethod
    def forward(ctx, q, k_past, v_past, k, v):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        past, lse_past = flash(q, k_past, v_past, 0.0, False)  # [batch, heads, tokens, dim], [batch, heads, tokens]
        self_, lse_self = flash(q, k, v, 0.0, True)
        lse = torch.logaddexp(lse_past, lse_self)
        weight_past, weight_self = (torch.exp(part - lse)[..., None].to(q.dtype) for part in (lse_past, lse_self))
        out = past * weight_past + self_ * weight_self
        ctx.save_for_backward(q, k_past, v_past, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k_past, v_past, k, v, out, lse = ctx.saved_tensors
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        group = q.shape[1] // k.shape[1]
        grads = []
        for keys, values, causal in ((k_past, v_past, False), (k, v, True)):
            keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))  # this kernel wants equal heads
            dq, dk, dv = flash_backward(grad.contiguous(), q, keys, values, out, lse, 0.0, causal)
            grads.append((dq, *(d.unflatten(1, (-1, group)).sum(2) for d in (dk, dv))))
        (dq_past, dk_past, dv_past), (dq_self, dk, dv) = grads
        return dq_past + dq_self, dk_past, dv_past, dk, dv


# ---------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One layer's attention; `layer` decides whether it is rotary and local, or NoPE and global."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.rotary = not config.is_nope(layer)
        self.chunk_size = config.chunk_size if config.is_local(layer) else None
        hidden, heads, kv_heads, dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(hidden, heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, hidden, bias=False)
        self.probe = None  # set by `trace`: called with the very q and k that are about to be compared

    def forward(
        self, x: Tensor, turn: Tensor, scale: Tensor | None, cache: LayerCache | None, start: int, queries: int
    ) -> Tensor:
        """[batch, tokens, hidden] -> [batch, queries, hidden], the last `queries` tokens' outputs.

        turn: [tokens, 1, dim / 2] rotations; scale: [tokens] temperatures or None; start: position of the first token.
        """
        config, tokens = self.config, x.shape[1]
        new = slice(tokens - queries, tokens)  # the tokens whose outputs are wanted
        q = self.q_proj(x[:, new]).unflatten(-1, (-1, config.head_dim))  # [batch, queries, heads, dim]
        k = self.k_proj(x).unflatten(-1, (-1, config.head_dim))  # [batch, tokens, kv_heads, dim]
        v = self.v_proj(x).unflatten(-1, (-1, config.head_dim))
        if self.rotary and queries == tokens:  # the same is done to q and k: do it once
            q, k = self.turned(torch.cat([q, k], dim=2), turn).split([config.num_heads, config.num_kv_heads], dim=2)
        elif self.rotary:
            q, k = self.turned(q, turn[new]), self.turned(k, turn)
        elif scale is not None:
            q = (q * scale[new, None, None]).type_as(q)

        if self.probe is not None:
            past = cache.read(start) if cache is not None else None
            self.probe(q, k if past is None else torch.cat([past[0], k], dim=1), start + tokens)
        if queries > 1:
            out = self.attend(q, k, v, cache.read(start) if cache is not None else None, start)
        if cache is not None:
            cache.write(k, v, start)  # only now: a piece that crosses a border overwrites the chunk it began in
        if queries == 0:
            return x[:, :0]
        if queries == 1:
            out = full_attention(q, *self.visible_to_last(k, v, cache, start))
        return self.o_proj(out.flatten(-2))

    def turned(self, x: Tensor, turn: Tensor) -> Tensor:
        """Rotated, then with RMS 1 over each head's channels, so that |q| = |k| = sqrt(dim); no weight."""
        x = rotate(x, turn)
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.config.norm_eps).type_as(x) if self.config.qk_norm else x

    def visible_to_last(self, k: Tensor, v: Tensor, cache: LayerCache | None, start: int) -> tuple[Tensor, Tensor]:
        """The keys and values that the last token may see; there is no mask to make, because it sees all of them."""
        last = start + k.shape[1] - 1
        if cache is not None:
            return cache.read_through(last)
        first = 0 if self.chunk_size is None else last // self.chunk_size * self.chunk_size
        return k[:, first:], v[:, first:]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None, start: int) -> Tensor:
        """All tokens of the piece as queries, [batch, tokens, heads, dim], over the piece and its past."""
        tokens, chunk = k.shape[1], self.chunk_size
        if chunk is None:
            return causal_attention(q, k, v) if past is None else continued_attention(q, *past, k, v)
        if past is None:
            return chunked_attention(q, k, v, chunk)
        # Finish the chunk that the past began; what follows starts at a border and needs no past.
        head = min(chunk - start % chunk, tokens)
        out = continued_attention(q[:, :head], *past, k[:, :head], v[:, :head])
        if head == tokens:
            return out
        return torch.cat([out, chunked_attention(q[:, head:], k[:, head:], v[:, head:], chunk)], dim=1)
