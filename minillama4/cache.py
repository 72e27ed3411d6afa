"""The KV cache: local layers keep at most one chunk, global layers keep everything.

Shapes: keys and values [batch, capacity, kv_heads, dim]. Memory of Scout at 10M tokens in bf16: 480 GiB in its 12 NoPE
layers and 1.1 GiB in its 36 local ones; with full caches everywhere it would be 1,920 GiB.
"""

import torch
from torch import Tensor

from .config import TextConfig


class LayerCache:
    """Keys and values of one layer. `chunk_size` tokens at most if it is local, else `max_tokens`."""

    def __init__(self, config: TextConfig, layer: int, batch_size: int, max_tokens: int, device, dtype):
        self.chunk_size = config.chunk_size if config.is_local(layer) else None
        capacity = max_tokens if self.chunk_size is None else min(self.chunk_size, max_tokens)
        shape = (batch_size, capacity, config.num_kv_heads, config.head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)  # pages are touched only when written
        self.v = torch.empty(shape, device=device, dtype=dtype)

    def read(self, start: int) -> tuple[Tensor, Tensor] | None:
        """What a query at position `start` may see of what came before: two [batch, past, kv_heads, dim], or None."""
        past = start if self.chunk_size is None else start % self.chunk_size
        return (self.k[:, :past], self.v[:, :past]) if past else None

    def read_through(self, position: int) -> tuple[Tensor, Tensor]:
        """What the query at `position` sees once it is written, itself included: two [batch, seen, kv_heads, dim]."""
        held = position + 1 if self.chunk_size is None else position % self.chunk_size + 1
        return self.k[:, :held], self.v[:, :held]

    def write(self, k: Tensor, v: Tensor, start: int):
        """Keep tokens `start`, `start + 1`, ...: k and v [batch, tokens, kv_heads, dim].

        A local layer keeps only the chunk of the last token. Gradients stop here: a cache holds values, not history.
        """
        if self.chunk_size is not None:
            end = start + k.shape[1]
            first = max(start, (end - 1) // self.chunk_size * self.chunk_size)  # the last token's chunk begins here
            k, v, start = k[:, first - start :], v[:, first - start :], first % self.chunk_size
        self.k.narrow(1, start, k.shape[1]).copy_(k.detach())
        self.v.narrow(1, start, v.shape[1]).copy_(v.detach())


class KVCache:
    """The caches of all layers, and how many tokens they hold. Made by `model.new_cache`."""

    def __init__(self, config: TextConfig, batch_size: int, max_tokens: int, device="cpu", dtype=torch.float32):
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"{name} is {value}; a cache needs at least 1")
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.length = 0  # tokens held so far, which is also the position of the next one
        self.layers = [
            LayerCache(config, layer, batch_size, max_tokens, device, dtype) for layer in range(config.num_layers)
        ]
        self.pending_images: Tensor | None = None  # [vectors, hidden]: encoded, but their tokens have not come yet

    def check_room(self, batch_size: int, tokens: int):
        """ValueError unless `tokens` more tokens of `batch_size` rows fit."""
        if batch_size != self.batch_size:
            raise ValueError(f"input_ids has {batch_size} rows, the cache was made for batch_size={self.batch_size}")
        if self.length + tokens > self.max_tokens:
            raise ValueError(
                f"the cache holds {self.length} of max_tokens={self.max_tokens} tokens; {tokens} more do not fit"
            )

    @property
    def nbytes(self) -> int:
        """Bytes reserved for keys and values."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)
