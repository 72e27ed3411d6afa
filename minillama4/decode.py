"""The next token of one sequence on a CPU: the model of `model.py` as one flat loop over vectors.

A step of a small model is a hundred products of one row, and calling modules and reshaping for them takes longer than
the products. Here whatever stays the same from token to token is looked up once, and a vector is a vector. `model.py`
remains the definition: the step must equal it, and whoever watches or replaces a part of the model gets the model.

Shapes: D hidden size, F expert width, E experts; one token's x is [D].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, angles
from .cache import KVCache, LayerCache
from .model import Block, Llama4, RMSNorm
from .moe import Experts, FeedForward, MoE

LARGE = 1 << 16  # numbers in a matrix: from here on each half of it is worth a thread
BLOCK = 256  # positions whose angles are computed together
PARTS = {nn.Embedding, nn.Linear, nn.ModuleList, RMSNorm, Block, Attention, FeedForward, Experts, MoE}


def is_plain(model: Llama4) -> bool:
    """Whether `Step` may stand for the model: float32 on a CPU, and no trace, hook, bias or other class in any part."""
    parts = [p for part in (model.embed_tokens, model.layers, model.norm, model.lm_head) for p in part.modules()]
    weights = [weight for part in parts for weight in part.parameters(recurse=False)]
    return (
        type(model) is Llama4
        and all(type(part) in PARTS for part in parts)
        and all(getattr(part, extra, None) is None for part in parts for extra in ("probe", "bias"))
        and not any(p._forward_hooks or p._forward_pre_hooks or "forward" in vars(p) for p in (model, *parts))
        and all(type(w) is nn.Parameter and w.dtype == torch.float32 and w.device.type == "cpu" for w in weights)
    )


class Step:
    """`Step(model, cache)(token)` is `model(tensor([[token]]), cache=cache, logits="last")[0, 0]`: int -> [vocab].

    It reads the weights where they are: make a new one after they were replaced. ValueError: a full cache.
    """

    def __init__(self, model: Llama4, cache: KVCache):
        self.text, self.cache = model.config.text, cache
        self.embedding, self.norm = model.embed_tokens.weight.detach(), model.norm.weight.detach()
        self.head = halved(model.lm_head.weight.detach())
        self.layers = [Layer(block) for block in model.layers]
        self.block = range(0)  # the positions that `turns` and `scales` are of

    def _look_up(self, block: range):
        """Rotations [1, dim / 2] and temperatures of some positions, which cost no more together than one alone."""
        turns, scales = angles(torch.arange(block.start, block.stop), self.text)
        self.turns, self.scales = turns.unbind(), [1.0] * len(block) if scales is None else scales.tolist()
        self.block = block

    @torch.inference_mode()
    def __call__(self, token: int) -> Tensor:
        text, position = self.text, self.cache.length
        self.cache.check_room(1, 1)
        if position not in self.block:
            self._look_up(range(position, position + BLOCK))
        turn, scale = self.turns[position - self.block.start], self.scales[position - self.block.start]
        x = self.embedding[token]
        for layer, cache in zip(self.layers, self.cache.layers, strict=True):
            x = layer.feed_forward(layer.attention(x, turn, scale, cache, position))
        self.cache.length += 1
        return product(self.head, normed(x, self.norm, text.norm_eps))


class Layer:
    """The weights of one `Block`, and its two halves for one token."""

    def __init__(self, block: Block):
        attention, moe = block.self_attn, block.feed_forward
        self.config, self.rotary, self.turned = attention.config, attention.rotary, attention.turned
        self.eps = attention.config.norm_eps
        weights = {name: weight.detach() for name, weight in block.named_parameters()}
        self.attention_norm = weights["input_layernorm.weight"]
        self.norm = weights["post_attention_layernorm.weight"]
        self.q, self.k, self.v, self.o = (halved(weights[f"self_attn.{name}_proj.weight"]) for name in "qkvo")
        dense = "feed_forward.shared_expert" if isinstance(moe, MoE) else "feed_forward"
        self.gate, self.up, self.down = (halved(weights[f"{dense}.{n}_proj.weight"]) for n in ("gate", "up", "down"))
        self.router = weights.get("feed_forward.router.weight")
        if self.router is not None:
            self.experts_gate_up = halved(weights["feed_forward.experts.gate_up_proj"]).unbind()
            self.experts_down = halved(weights["feed_forward.experts.down_proj"]).unbind()

    def attention(self, x: Tensor, turn: Tensor, scale: float, cache: LayerCache, position: int) -> Tensor:
        """x plus what it attends to: [D] -> [D]."""
        heads, dim = self.config.num_heads, self.config.head_dim
        y = normed(x, self.attention_norm, self.eps)
        q, k, v = product(self.q, y), product(self.k, y), product(self.v, y)
        if self.rotary:
            both = self.turned(torch.cat([q, k]).view(-1, dim), turn)  # [heads + kv_heads, dim]
            q, k = both[:heads], both[heads:]
        else:
            q = q * scale
        seen_k, seen_v = cache.read_through(position)
        seen_k[0, -1], seen_v[0, -1] = k.view(-1, dim), v.view(-1, dim)  # this token's own rows of the cache
        k, v = seen_k.transpose(1, 2), seen_v.transpose(1, 2)  # [1, kv_heads, seen, dim]
        q = q.view(1, k.shape[1], -1, dim)  # the queries of a group side by side: they read the same keys
        return x + product(self.o, F.scaled_dot_product_attention(q, k, v).flatten())

    def feed_forward(self, x: Tensor) -> Tensor:
        """x plus its shared expert (or dense layer) and its routed one: [D] -> [D]."""
        y = normed(x, self.norm, self.eps)
        x = x + product(self.down, F.silu(product(self.gate, y)) * product(self.up, y))
        if self.router is None:
            return x
        logits_E = self.router.mv(y)
        expert = int(logits_E.argmax())
        gate_F, up_F = expert_product(y * logits_E[expert].sigmoid(), self.experts_gate_up[expert]).chunk(2)
        return x + expert_product(F.silu(gate_F) * up_F, self.experts_down[expert])


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`RMSNorm` of one vector; its mean square is a number of Python."""
    return x * weight * (float(x.dot(x)) / len(x) + eps) ** -0.5


def halved(weight: Tensor) -> Tensor:
    """Each large matrix [..., N, K] as its upper and its lower half [..., 2, N / 2, K], others as they are.

    PyTorch multiplies a matrix with a vector on one core, which reads memory at half the speed of two; a batch of two
    products has both.
    """
    rows, columns = weight.shape[-2:]
    return weight.unflatten(-2, (2, -1)) if rows * columns >= LARGE and rows % 2 == 0 else weight


def product(weight: Tensor, x: Tensor) -> Tensor:
    """weight @ x, [outputs, inputs] `halved` and [inputs] -> [outputs]: each half gives half of the outputs."""
    if weight.ndim == 2:
        return weight.mv(x)
    return torch.bmm(weight, x.expand(2, 1, -1).mT).flatten()  # strided like this, MKL takes its fast path


def expert_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight, [inputs] and [inputs, outputs] `halved` -> [outputs]: each half takes half of the inputs."""
    if weight.ndim == 2:
        return weight.T.mv(x)
    return torch.bmm(x.view(2, 1, -1), weight).sum(0)[0]
