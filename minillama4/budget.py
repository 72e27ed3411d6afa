"""What a model weighs: parameters, weight bytes and KV cache, by arithmetic on its sizes. Speeds are in `roofline.py`.

One function counts every family, since a decoder is the same sum everywhere: two embedding matrices, attention and
norms in each layer, and in each layer either a dense feed-forward network or a router with experts. A `Shape` holds
those sizes; a `Llama4Config` turns into one, and `OTHERS` lists the models that Llama 4 is compared with.

Letters: D hidden size, F width of a SwiGLU network, which has three D x F matrices. GB is 10^9 bytes, GiB is 2^30.
Sources: the released configs and, for the totals, the models that Hugging Face builds from them (tests compare both).
"""

import math
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches

from .config import PRESETS, Llama4Config, VisionConfig


@dataclass(frozen=True)
class Shape:
    """The sizes that parameters, bytes and FLOPs follow from. Embedding and head are two matrices: no model here ties
    them. ValueError: sizes that contradict each other."""

    name: str
    layers: int
    hidden: int  # D
    vocab: int
    attention: int  # parameters of one layer's attention matrices
    norms: int  # parameters of one layer's norms
    kv_values: int  # numbers that one token leaves in the cache of one layer
    score_width: int  # heads x (channels of a key + of a value): a query and a key cost 2 FLOPs for each
    dense_width: int = 0  # F of a layer without experts
    moe_layers: int = 0  # the other layers are dense
    experts: int = 0  # routed experts of a MoE layer
    per_token: int = 1  # routed experts that a token takes
    shared: int = 0  # experts of a MoE layer that every token takes
    expert_width: int = 0  # F of an expert, routed or shared
    router_bias: int = 0  # parameters of a router beside its D x experts matrix
    local_layers: int = 0  # layers that attend inside a chunk
    chunk: int = 0  # tokens of a chunk
    vision: int = 0  # parameters of the encoder with its adapter
    projector: int = 0
    note: str = ""

    def __post_init__(self):
        for field in fields(self):
            least = 1 if field.name in ("layers", "hidden", "vocab") else 0
            if field.type is int and getattr(self, field.name) < least:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be at least {least}")
        for name in ("moe_layers", "local_layers"):
            if getattr(self, name) > self.layers:
                raise ValueError(f"{name} is {getattr(self, name)}; there are {self.layers} layers")
        if self.local_layers and not self.chunk:
            raise ValueError(f"chunk is 0; {self.local_layers} local layers need at least 1 token")
        if self.moe_layers and not 1 <= self.per_token <= self.experts:
            raise ValueError(
                f"per_token is {self.per_token}; with {self.experts} experts it must be 1 to {self.experts}"
            )

    @property
    def expert(self) -> int:
        """Parameters of one expert."""
        return 3 * self.hidden * self.expert_width


Model = str | Llama4Config | Shape  # a preset's name or a key of `OTHERS`; every function here takes any of the three


def grouped_query(
    name: str, *, layers: int, hidden: int, vocab: int, heads: int, kv_heads: int, head_dim: int = 128, **sizes
) -> Shape:
    """A shape with grouped-query attention and two norms a layer; `sizes` are the other fields of `Shape`."""
    return Shape(
        name=name,
        layers=layers,
        hidden=hidden,
        vocab=vocab,
        attention=2 * hidden * (heads + kv_heads) * head_dim,  # q and o, k and v
        norms=2 * hidden,
        kv_values=2 * kv_heads * head_dim,
        score_width=2 * heads * head_dim,
        **sizes,
    )


def _llama(name: str, layers: int, hidden: int, vocab: int, heads: int, kv_heads: int, dense_width: int) -> Shape:
    return grouped_query(
        name, layers=layers, hidden=hidden, vocab=vocab, heads=heads, kv_heads=kv_heads, dense_width=dense_width
    )


OTHERS: dict[str, Shape] = {
    "llama-2-7b": _llama("Llama 2 7B", 32, 4096, 32_000, 32, 32, 11_008),
    "llama-3.1-8b": _llama("Llama 3.1 8B", 32, 4096, 128_256, 32, 8, 14_336),
    "llama-3.1-70b": _llama("Llama 3.1 70B", 80, 8192, 128_256, 64, 8, 28_672),
    "llama-3.1-405b": _llama("Llama 3.1 405B", 126, 16_384, 128_256, 128, 8, 53_248),
    "mixtral-8x7b": grouped_query(
        "Mixtral 8x7B",
        layers=32,
        hidden=4096,
        vocab=32_000,
        heads=32,
        kv_heads=8,
        moe_layers=32,
        experts=8,
        per_token=2,
        expert_width=14_336,
    ),
    # Latent attention: queries pass through 1,536 channels, keys and values through 512 that are cached, beside one
    # rotary key of 64 for all 128 heads. A head compares 128 + 64 channels and returns 128.
    "deepseek-v3": Shape(
        "DeepSeek-V3",
        layers=61,
        hidden=7168,
        vocab=129_280,
        attention=7168 * 1536 + 1536 * 128 * 192 + 7168 * (512 + 64) + 512 * 128 * (128 + 128) + 128 * 128 * 7168,
        norms=2 * 7168 + 1536 + 512,
        kv_values=512 + 64,
        score_width=128 * (192 + 128),
        dense_width=18_432,
        moe_layers=58,  # the first three layers are dense
        experts=256,
        per_token=8,
        shared=1,
        expert_width=2048,
        router_bias=256,  # it balances the load, and is in the checkpoint
        note="without the layer for predicting a second token, which the checkpoint has as well",
    ),
}


def shape(model: Model) -> Shape:
    """Sizes of a model: a preset's name, a key of `OTHERS`, a config, or a shape already. ValueError: no such name."""
    name, config = (model, pick("model", model, PRESETS | OTHERS)) if isinstance(model, str) else ("Llama 4", model)
    if isinstance(config, Shape):
        return config
    text, vision = config.text, config.vision
    return grouped_query(
        name,
        layers=text.num_layers,
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        heads=text.num_heads,
        kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        dense_width=text.dense_width,
        moe_layers=len(set(text.moe_layers)),
        experts=text.num_experts,
        shared=1,
        expert_width=text.expert_width,
        local_layers=sum(map(text.is_local, range(text.num_layers))),
        chunk=text.chunk_size or 0,
        vision=_vision(vision) if vision else 0,
        projector=_vision_channels(vision) * text.hidden_size if vision else 0,
        note=config.note,
    )


def _vision_channels(vision: VisionConfig) -> int:
    """What one image token has before the projector."""
    return vision.adapter_width if vision.encoder == "vit" else 3 * vision.patch_size**2


def _vision(vision: VisionConfig) -> int:
    """Parameters of the vision transformer with its adapter. Unlike the text model, it has biases and LayerNorms."""
    if vision.encoder == "linear":
        return 0
    width, adapter = vision.hidden_size, vision.adapter_width
    layer_norm = 2 * width
    block = 4 * (width + 1) * width + 2 * layer_norm + (width + 1) * vision.mlp_width + (vision.mlp_width + 1) * width
    patches = 3 * vision.patch_size**2 * width + width + (vision.patches_per_side**2 + 1) * width  # class, positions
    return patches + 2 * layer_norm + vision.num_layers * block + (width * vision.shuffle**2 + adapter) * adapter


# ----------------------------------------------------------------------------------------------------------------------
# Parameters.


@dataclass(frozen=True)
class Counts:
    """Parameters by component, summed over the layers. `norms` includes the final one, `dense` has no experts."""

    embedding: int
    head: int
    attention: int
    norms: int
    routed: int
    shared: int
    router: int
    dense: int
    vision: int
    projector: int
    routed_active: int  # the part of `routed` that one token takes

    def parts(self) -> dict[str, int]:
        """The components, which add up to `total`."""
        return {name: number for name, number in vars(self).items() if name != "routed_active"}

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    @property
    def text_total(self) -> int:
        return self.total - self.vision - self.projector

    @property
    def active(self) -> int:
        """What a text token takes, with both embedding matrices: the "17B" of the models' names."""
        return self.text_total - self.routed + self.routed_active

    @property
    def active_read(self) -> int:
        """The same without the embedding, of which a token takes one row: what decoding one token reads."""
        return self.active - self.embedding


def count(model: Model) -> Counts:
    """Parameters of a model, to the last one. Takes what `shape` takes."""
    s = shape(model)
    return Counts(
        embedding=s.vocab * s.hidden,
        head=s.vocab * s.hidden,
        attention=s.layers * s.attention,
        norms=s.layers * s.norms + s.hidden,
        routed=s.moe_layers * s.experts * s.expert,
        shared=s.moe_layers * s.shared * s.expert,
        router=s.moe_layers * (s.hidden * s.experts + s.router_bias),
        dense=(s.layers - s.moe_layers) * 3 * s.hidden * s.dense_width,
        vision=s.vision,
        projector=s.projector,
        routed_active=s.moe_layers * s.per_token * s.expert,
    )


def experts_touched(experts: int, tokens: int, per_token: int = 1) -> float:
    """Distinct experts that a batch of tokens takes, on average, if each token takes any `per_token` of them.

    A token leaves a given expert out with probability 1 - per_token / experts; all of them do with that to the power
    of tokens. Real routers are less even, so they touch fewer. ValueError: counts that make no sense.
    """
    if not 1 <= per_token <= experts:
        raise ValueError(f"per_token is {per_token}; with {experts} experts it must be 1 to {experts}")
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}; it must be at least 0")
    return experts * (1 - (1 - per_token / experts) ** tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Bytes.

INT4 = 4 + 32 / 128  # bits: each group of 128 weights shares one fp32 scale, or a scale and a zero of 16 bits


@dataclass(frozen=True)
class Format:
    """Bits per parameter of what may be quantised; embedding, norms, routers and vision stay at 16 everywhere."""

    note: str
    attention: float = 16
    routed: float = 16
    shared: float = 16
    dense: float = 16
    head: float = 16

    def bytes(self, counts: Counts) -> float:
        return sum(number * getattr(self, name, 16) for name, number in counts.parts().items()) / 8


_FFN = dict(routed=INT4, shared=INT4, dense=INT4)
FORMATS: dict[str, Format] = {
    "bf16": Format("as released"),
    "fp8": Format("all matrices but embedding and routers", 8, 8, 8, 8, 8),
    "fp8-mixed": Format("routed experts; Meta's own leaves out the first and the last layer as well", routed=8),
    "int4-meta": Format("routed and shared experts, as Meta's code does it", routed=INT4, shared=INT4),
    "int4-int8": Format("feed-forward networks; attention and head are int8", attention=8, head=8, **_FFN),
    "int4-head16": Format("attention and feed-forward networks", attention=INT4, **_FFN),
    "int4": Format("all matrices but embedding and routers", attention=INT4, head=INT4, **_FFN),
}
KV_BYTES = {"bf16": 2, "fp8": 1}  # of one number in the cache


def weight_bytes(model: Model, dtype: str = "bf16") -> int:
    """Bytes of all weights, vision included, in a format of `FORMATS`."""
    return math.ceil(pick("dtype", dtype, FORMATS).bytes(count(model)))


def read_bytes(model: Model, dtype: str = "bf16", tokens: int = 1) -> float:
    """Weight bytes that one step over so many text tokens reads: of the routed experts, those that are touched.

    Not the vision path, and not the embedding: a row a token is nothing beside the rest.
    """
    s, counts = shape(model), count(model)
    touched = experts_touched(s.experts, tokens, s.per_token) / s.experts if s.moe_layers else 0
    read = replace(counts, embedding=0, vision=0, projector=0, routed=counts.routed * touched)
    return pick("dtype", dtype, FORMATS).bytes(read)


def cached_tokens(model: Model, context: int) -> int:
    """Tokens in the cache, summed over the layers: all of them in a global layer, at most a chunk in a local one."""
    s = shape(model)
    if context < 0:
        raise ValueError(f"context is {context}; it must be at least 0 tokens")
    return (s.layers - s.local_layers) * context + s.local_layers * min(context, s.chunk)


def kv_bytes(model: Model, context: int, batch: int = 1, dtype: str = "bf16") -> int:
    """Bytes of the KV cache of `batch` sequences of `context` tokens. Local layers count a full chunk, their worst."""
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1 sequence")
    return batch * cached_tokens(model, context) * shape(model).kv_values * pick("KV dtype", dtype, KV_BYTES)


def longest_context(model: Model, free_bytes: float, dtype: str = "bf16") -> int:
    """Tokens of one sequence whose KV cache fits in `free_bytes`; 0 if none does. ValueError: any number does."""
    s = shape(model)
    most = int(max(free_bytes, 0) // (s.kv_values * pick("KV dtype", dtype, KV_BYTES)))  # tokens, over all layers
    if not s.local_layers or most <= s.layers * s.chunk:
        return most // s.layers
    if s.local_layers == s.layers:
        raise ValueError(
            f"local_layers is {s.local_layers} of {s.layers}; without a global one the cache stops growing"
        )
    return (most - s.local_layers * s.chunk) // (s.layers - s.local_layers)  # the local layers are full


def pick(what: str, name: str, table: dict):
    """table[name]. ValueError: no such name, with the nearest and all there are."""
    if name in table:
        return table[name]
    near = get_close_matches(str(name).lower(), table, n=2, cutoff=0.4)
    guess = f" did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"unknown {what} {name!r};{guess} There are {', '.join(table)}")
