"""A long prompt through an int4 model: dense products in the model's own type, one matrix after another.

With thousands of tokens a product is bound by FLOPs, and int4 cannot help. So each matrix is written out (a quarter is
read, four quarters are written) while the one before it is at work: the price is memory for two, 0.7 GB for Scout.
Experts take their tokens one after another; those that no token chose stay packed. Chunks are batch rows, and no mask
exists, because attention is the model's own.

Shapes: x [1, tokens, D]; T tokens, D hidden size, E experts.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import inverse_frequencies, rotation, temperature
from ..cache import KVCache
from ..model import Block, Llama4
from ..moe import FeedForward, MoE
from . import kernels, plain

PIECE = 8192  # prompt tokens at a time: one chunk of Scout, so that local layers never look back into their cache


def expanded(matrices: Iterable[tuple[Tensor, Tensor, int]], dtype: torch.dtype) -> Iterator[Tensor]:
    """Each (packed, scale, inputs) as a matrix [N, K], one after another. The caller may use it until the next one.

    On a GPU a second stream writes the next one meanwhile. There are two buffers: the next one's is free as soon as
    the products with the last one, which lie before this one's in the caller's stream, are done.
    """
    matrices = list(matrices)
    device = matrices[0][0].device
    size = max(len(packed) * inputs for packed, _, inputs in matrices)
    buffers = [torch.empty(size, dtype=dtype, device=device) for _ in matrices[:2]]
    views = [buffers[i % 2][: len(packed) * inputs].view(-1, inputs) for i, (packed, _, inputs) in enumerate(matrices)]
    if device.type != "cuda":
        for (packed, scale, _), view in zip(matrices, views, strict=True):
            plain.expand(packed, scale, view)
            yield view
        return
    main, second = torch.cuda.current_stream(device), _second_stream(device)
    for buffer in buffers:
        buffer.record_stream(second)  # so that nobody gets this memory while the second stream still writes to it

    def begin(i: int) -> torch.cuda.Event:
        second.wait_stream(main)  # all products that have been asked for up to now
        with torch.cuda.stream(second):
            kernels.expand(*matrices[i][:2], views[i])
            return second.record_event()

    ready = begin(0)
    for i, view in enumerate(views):
        main.wait_event(ready)
        if i + 1 < len(views):
            ready = begin(i + 1)
        yield view


_streams: dict[torch.device, "torch.cuda.Stream"] = {}


def _second_stream(device: torch.device) -> "torch.cuda.Stream":
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _matrix(weight) -> tuple[Tensor, Tensor, int]:
    """An `Int4Matrix` as `expanded` takes it."""
    return weight.packed, weight.scale, weight.shape[-1]


def attention(block: Block, x: Tensor, turn: Tensor, scale: Tensor | None, cache, start: int) -> Tensor:
    """[1, tokens, D] -> the same; as `Attention.forward` with all queries."""
    attn, dim = block.self_attn, block.self_attn.config.head_dim
    projections = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)
    weights = expanded((_matrix(p.weight) for p in projections), x.dtype)
    q, k, v = (F.linear(x, next(weights)).unflatten(-1, (-1, dim)) for _ in range(3))  # [1, tokens, heads, dim]
    if attn.rotary:
        q, k = attn.turned(q, turn), attn.turned(k, turn)
    elif scale is not None:
        q = (q * scale[:, None, None]).type_as(q)
    with fast_attention(x.device):
        out = attn.attend(q, k, v, cache.read(start), start)
    cache.write(k, v, start)
    return F.linear(out.flatten(-2), next(weights))


def fast_attention(device: torch.device):
    """On Hopper, cuDNN's attention is faster than the flash attention that PyTorch would take."""
    if device.type != "cuda":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel  # takes torch's compiler along, so not at import

    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    return sdpa_kernel([*backends, SDPBackend.MATH], set_priority=True)


def feed_forward(x_TD: Tensor, dense: FeedForward) -> Tensor:
    """A dense layer, or the shared expert: [T, D] -> [T, D]."""
    weights = expanded((_matrix(p.weight) for p in (dense.gate_proj, dense.up_proj, dense.down_proj)), x_TD.dtype)
    gate = F.linear(x_TD, next(weights))
    return F.linear(F.silu(gate) * F.linear(x_TD, next(weights)), next(weights))


def mixture(x_TD: Tensor, moe: MoE) -> Tensor:
    """[T, D] -> [T, D]: the chosen experts one after another, each over its own tokens."""
    logit_T, expert_T = moe.router(x_TD).max(dim=-1)
    order_T = expert_T.argsort(stable=True)
    counts_E = torch.bincount(expert_T, minlength=len(moe.experts.down_proj.packed)).tolist()  # waits for the router
    chosen = [expert for expert, count in enumerate(counts_E) if count]
    pair = (moe.experts.gate_up_proj, moe.experts.down_proj)
    weights = expanded(((m.packed[e], m.scale[e], m.shape[-1]) for e in chosen for m in pair), x_TD.dtype)
    scaled_TD = (x_TD * logit_T.float().sigmoid().type_as(x_TD)[:, None])[order_T]
    routed = []
    for piece in scaled_TD.split([counts_E[expert] for expert in chosen]):
        gate, up = F.linear(piece, next(weights)).chunk(2, dim=-1)
        routed.append(F.linear(F.silu(gate) * up, next(weights)))
    routed_TD = torch.empty_like(x_TD).index_copy(0, order_T, torch.cat(routed))  # back to token order
    return routed_TD + feed_forward(x_TD, moe.shared_expert)


@torch.no_grad()
def prefill(model: Llama4, input_ids: Tensor, cache: KVCache, piece: int = PIECE) -> Tensor:
    """Feed a prompt [1, tokens] to an int4 model; logits [1, vocab] after its last token. Fills the cache.

    ValueError: a prompt of several rows, ids out of range, a cache too short.
    """
    text = model.config.text
    if input_ids.ndim != 2 or len(input_ids) != 1 or not input_ids.numel():
        raise ValueError(f"input_ids is {list(input_ids.shape)}; it must be [1, 1 or more tokens]")
    lowest, highest = (int(id) for id in input_ids.aminmax())
    if lowest < 0 or highest >= text.vocab_size:
        raise ValueError(f"input_ids holds {lowest} to {highest}; ids run from 0 to {text.vocab_size - 1}")
    cache.check_room(*input_ids.shape)
    for ids in input_ids.split(piece, dim=1):
        x = _layers(model, model.embed_tokens(ids), cache)
    return model.lm_head(model.norm(x))[:, -1]


def _layers(model: Llama4, x: Tensor, cache: KVCache) -> Tensor:
    """[1, tokens, D] -> [1, 1, D]: a piece of a prompt through all layers; of the last one, only the last token."""
    text, start, tokens = model.config.text, cache.length, x.shape[1]
    positions = torch.arange(start, start + tokens, device=x.device)
    inside = positions if text.chunk_size is None else positions % text.chunk_size
    turn = rotation(inside, inverse_frequencies(text, str(x.device)))
    scale = temperature(positions, text) if text.temperature_tuning else None
    for layer, block in enumerate(model.layers):
        x = x + attention(block, block.input_layernorm(x), turn, scale, cache.layers[layer], start)
        if layer == text.num_layers - 1:
            x = x[:, -1:]
        y_TD = block.post_attention_layernorm(x)[0]
        x = x + (mixture if text.is_moe(layer) else feed_forward)(y_TD, block.feed_forward)[None]
    cache.length += tokens
    return x
