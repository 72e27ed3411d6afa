"""Look inside a forward pass: which expert each token took, and what each query attended to.

`with trace(model, attention=[3], router=True) as t: model(ids)` fills `t.router[layer]` and `t.attention[layer]`.
The routes are the very tensors that the pass used. The attention probabilities are computed from the very queries and
keys it compared, since fused attention never holds them; tests hold the two equal. Off, a trace costs one `is None`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Attention
from .model import Llama4


@dataclass
class Routes:
    """One layer's router over all traced tokens; several forward calls with a cache are joined along the tokens."""

    expert: Tensor  # [batch, tokens] int64
    score: Tensor  # [batch, tokens], the sigmoid that scaled the expert's input
    logits: Tensor  # [batch, tokens, experts], still in the autograd graph if there is one


@dataclass
class Trace:
    """What `trace` saw: layer -> routes, and layer -> probabilities [batch, heads, queries, keys]."""

    router: dict[int, Routes] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)

    def add_routes(self, layer: int, shape: torch.Size, logits_TE: Tensor, expert_T: Tensor, score_T: Tensor):
        new = Routes(expert_T.view(shape), score_T.view(shape), logits_TE.view(*shape, -1))
        old = self.router.get(layer)
        if old is not None:
            new = Routes(*(torch.cat([getattr(old, n), getattr(new, n)], dim=1) for n in ("expert", "score", "logits")))
        self.router[layer] = new

    def add_attention(self, layer: int, probabilities: Tensor):
        old = self.attention.get(layer)
        if old is not None:  # earlier queries could not see the keys that came later
            old = F.pad(old, (0, probabilities.shape[-1] - old.shape[-1]))
            probabilities = torch.cat([old, probabilities], dim=2)
        self.attention[layer] = probabilities


@contextmanager
def trace(model: Llama4, attention: Iterable[int] = (), router: bool = False) -> Iterator[Trace]:
    """Record forward passes of `model` inside the block.

    attention: the layers whose probabilities to keep (memory: heads x queries x keys each). router: keep the routes of
    all MoE layers. ValueError: a layer that the model does not have, or a trace that is already running on the model.
    """
    layers = model.config.text.num_layers
    attention = sorted(set(attention))
    if any(not 0 <= layer < layers for layer in attention):
        raise ValueError(f"attention={attention}; the model's layers run from 0 to {layers - 1}")
    probed = [model.layers[layer].self_attn for layer in attention]
    if router:
        probed += [model.layers[layer].feed_forward for layer in model.config.text.moe_layers]
    if any(module.probe is not None for module in probed):
        raise ValueError("this model is already being traced; end the outer `with trace(...)` first")
    seen = Trace()
    try:
        for layer, block in enumerate(model.layers):
            if block.self_attn in probed:
                block.self_attn.probe = _attention_probe(seen, layer, block.self_attn)
            if block.feed_forward in probed:
                block.feed_forward.probe = lambda *args, layer=layer: seen.add_routes(layer, *args)
        yield seen
    finally:
        for module in probed:
            module.probe = None


def _attention_probe(seen: Trace, layer: int, module: Attention):
    def probe(q: Tensor, k: Tensor, end: int):
        if q.shape[1]:
            seen.add_attention(layer, attention_probabilities(q, k, end, module.chunk_size))

    return probe


def attention_probabilities(q: Tensor, k: Tensor, end: int, chunk_size: int | None) -> Tensor:
    """softmax(q.k / sqrt(dim)) with everything a query may not see at 0: [batch, heads, queries, end].

    q [batch, queries, heads, dim] are the last queries and k [batch, keys, kv_heads, dim] the last keys before
    position `end`; columns are absolute positions.
    """
    queries, keys = q.shape[1], k.shape[1]
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    query = torch.arange(end - queries, end, device=q.device)[:, None]
    key = torch.arange(end - keys, end, device=q.device)
    sees = key <= query
    if chunk_size is not None:
        sees &= key // chunk_size == query // chunk_size
    probabilities = logits.masked_fill(~sees, float("-inf")).softmax(-1)
    return F.pad(probabilities, (end - keys, 0))
