"""Greedy decoding of one sequence from an int4 model, one token a step, all of it on the device.

    embed -> [ norm+QKV -> turn and store -> attend -> output -> norm+router -> gate and up -> down ] x layers -> head

Eight kernels a layer (attention is two), and one CUDA graph for the whole step, because nothing in it asks the host:
which expert was chosen, which position this is and which token comes next are numbers on the device. The same step
runs on `plain.py`, in which case it runs anywhere, only slower.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import inverse_frequencies, rotation
from ..model import Block, Llama4
from . import attention, kernels, plain
from .int4 import Int4Matrix
from .prefill import prefill


@dataclass(frozen=True)
class Ops:
    """What a step is made of; arguments and results are those in `plain.py`."""

    order: Callable
    norm_product: Callable
    turn_and_store: Callable
    attend: Callable
    add_product: Callable
    norm_router: Callable
    gate_up: Callable


PLAIN = Ops(*(getattr(plain, name) for name in Ops.__dataclass_fields__))
FAST = Ops(*(getattr(attention if hasattr(attention, name) else kernels, name) for name in Ops.__dataclass_fields__))


class Layer:
    """The tensors of one block, as the step's functions take them. Packed weights are shared with the block."""

    def __init__(self, block: Block, ops: Ops, turns: Tensor | None, temperature: tuple[float, int] | None):
        attn, moe = block.self_attn, block.feed_forward
        self.attention_norm = ops.order(block.input_layernorm.weight)
        self.norm = ops.order(block.post_attention_layernorm.weight)
        self.qkv = fuse(attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight)
        self.output = _pair(attn.o_proj.weight)
        self.chunk = attn.chunk_size
        self.turns = turns if attn.rotary else None
        self.qk_eps = attn.config.norm_eps if attn.rotary and attn.config.qk_norm else None
        self.temperature = None if attn.rotary else temperature
        routed = hasattr(moe, "router")
        dense = moe.shared_expert if routed else moe
        self.router = ops.order(moe.router.weight) if routed else None
        self.gate_up = fuse(dense.gate_proj.weight, dense.up_proj.weight)
        self.down = _pair(dense.down_proj.weight)
        self.routed_gate_up = _pair(moe.experts.gate_up_proj) if routed else None
        self.routed_down = _pair(moe.experts.down_proj) if routed else None


def _pair(matrix: Int4Matrix) -> tuple[Tensor, Tensor]:
    return matrix.packed, matrix.scale


def fuse(*matrices: Int4Matrix) -> tuple[Tensor, Tensor]:
    """Matrices with the same inputs as one, (packed, scale), of which they become parts: nothing is stored twice."""
    whole = tuple(torch.cat([getattr(m, part) for m in matrices]) for part in ("packed", "scale"))
    rows = [len(m.packed) for m in matrices]
    for part, tensor in zip(("packed", "scale"), whole, strict=True):
        for matrix, piece in zip(matrices, tensor.split(rows), strict=True):
            setattr(matrix, part, piece)
    return whole


class Decoder:
    """One sequence of up to `max_tokens` tokens. ValueError: a model that is not int4, or sizes kernels cannot do."""

    def __init__(self, model: Llama4, max_tokens: int, ops: Ops | None = None):
        if not isinstance(model.lm_head.weight, Int4Matrix):
            raise ValueError("the model is not int4; load it with quantize='int4'")
        text, device = model.config.text, model.lm_head.weight.device
        if text.head_dim & (text.head_dim - 1):
            raise ValueError(f"head_dim is {text.head_dim}; a kernel needs a power of 2")
        self.model, self.text = model, text
        self.ops = ops or (FAST if device.type == "cuda" else PLAIN)
        self.cache = model.new_cache(1, max_tokens)
        self.token = torch.zeros(1, dtype=torch.int64, device=device)  # what the next step reads
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # where it stands
        self.tokens = torch.zeros(max_tokens + 1, dtype=torch.int64, device=device)  # all so far, by position
        self.logits: Tensor | None = None  # [vocab] of the last step
        self.router_logits: list[Tensor] = []  # [E] of each MoE layer, of the last step
        self.graph: torch.cuda.CUDAGraph | None = None
        turn = rotation(
            torch.arange(min(text.chunk_size or max_tokens, max_tokens), device=device),
            inverse_frequencies(text, str(device)),
        )
        turns = torch.view_as_real(turn[:, 0]).contiguous()  # [positions, dim / 2, 2]: a chunk of them is all
        temperature = (text.temperature_scale, text.floor_scale) if text.temperature_tuning else None
        self.layers = [Layer(block, self.ops, turns, temperature) for block in model.layers]
        self.norm = self.ops.order(model.norm.weight)
        self.head = _pair(model.lm_head.weight)

    @torch.no_grad()
    def step(self):
        """Read `token` at `position`; the next one stands in `token`, in `tokens`, and its logits in `logits`."""
        ops, text, eps, position = self.ops, self.text, self.text.norm_eps, self.position
        self.router_logits = []
        x = ops.order(self.model.embed_tokens.weight.index_select(0, self.token)[0])
        for layer, cache in zip(self.layers, self.cache.layers, strict=True):
            qkv = ops.norm_product(x, layer.attention_norm, eps, *layer.qkv, text.hidden_size)
            q = ops.turn_and_store(
                qkv, position, layer.turns, cache.k[0], cache.v[0], text.num_heads, layer.qk_eps, layer.temperature
            )
            x = ops.add_product(x, ops.attend(q, cache.k[0], cache.v[0], position, layer.chunk), *layer.output)
            y, logits = ops.norm_router(x, layer.norm, eps, layer.router, text.hidden_size)
            if layer.router is None:
                x = ops.add_product(x, ops.gate_up(y, *layer.gate_up), *layer.down)
            else:
                self.router_logits.append(logits)
                h = ops.gate_up(y, *layer.gate_up, logits, layer.routed_gate_up)
                x = ops.add_product(x, h, *layer.down, logits, layer.routed_down)
        self.logits = ops.norm_product(x, self.norm, eps, *self.head, text.hidden_size)
        self.token.copy_(self.logits.argmax(-1, keepdim=True))
        self.position.add_(1)
        self.tokens.index_copy_(0, self.position, self.token)

    def capture(self):
        """Record the step as one CUDA graph, which then starts with a single call."""
        token, position = self.token.clone(), self.position.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles the kernels; what it writes is written again
                self.step()
                self.start(token, position)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def start(self, token: Tensor, position: Tensor | int):
        """Stand before `token` [1] at `position`; the cache must hold what comes before."""
        self.token.copy_(token)
        self.position.copy_(position) if isinstance(position, Tensor) else self.position.fill_(position)
        self.tokens.index_copy_(0, self.position, self.token)

    def advance(self):
        """One step: the graph on a GPU, else the functions one by one."""
        if self.token.is_cuda and self.graph is None:
            self.capture()
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def generate(self, prompt: Tensor, max_new_tokens: int = 64) -> Tensor:
        """Greedy tokens [1, new] after a prompt [1, tokens]; the host waits once, at the end.

        ValueError: as in `prefill`, and no room for the new tokens.
        """
        length = prompt.shape[-1]
        if max_new_tokens < 1 or length + max_new_tokens > self.cache.max_tokens:
            raise ValueError(
                f"{length} tokens and {max_new_tokens} new ones; there must be at least 1 new one, and "
                f"{self.cache.max_tokens} in all"
            )
        self.cache.length = 0
        logits = prefill(self.model, prompt, self.cache)
        self.tokens[:length] = prompt[0]
        self.start(logits.argmax(-1), length)
        for _ in range(max_new_tokens - 1):
            self.advance()
        self.cache.length = length + max_new_tokens - 1
        return self.tokens[None, length : length + max_new_tokens].clone()
