"""One config: every number that makes one Llama 4 differ from another, each with its meaning and unit.

Sources of the released values: Meta's reference code and model card, and public dumps of the released `config.json`.
Layers are counted from 0, as in the checkpoints. "Width" is the inner size of a feed-forward network.
"""

from dataclasses import dataclass, replace
from difflib import get_close_matches


@dataclass(frozen=True)
class RopeScaling:
    """Slow rotary pairs turn `factor` times slower, so that longer contexts stay inside trained angles.

    A pair whose wavelength (in tokens) is above `original_positions / low_frequency_factor` is divided by `factor`;
    below `original_positions / high_frequency_factor` it is left alone; between the two it is blended. Scout's two
    factors are equal, so nothing is blended: pairs 0-34 stay, pairs 35-63 are divided by 16.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int


@dataclass(frozen=True)
class TextConfig:
    """The decoder: attention (iRoPE) and feed-forward (dense or mixture of experts) in every layer."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int  # key/value heads; num_heads / num_kv_heads queries share one
    head_dim: int
    num_experts: int  # routed experts of a MoE layer; each token gets one of them, and the shared expert
    expert_width: int  # of a routed and of the shared expert ("intermediate_size" on the Hub)
    dense_width: int  # of the feed-forward of a layer without experts ("intermediate_size_mlp" on the Hub)
    moe_layers: tuple[int, ...]
    nope_layers: tuple[int, ...]  # no rotary embedding, and attention over the whole context
    chunk_size: int | None  # tokens; the other layers attend inside a chunk. None: over the whole context
    max_positions: int  # tokens the released model is meant for; nothing here is limited by it
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = True  # on rotary layers only, without a learned weight
    temperature_tuning: bool = True  # on NoPE layers only
    temperature_scale: float = 0.1  # a in 1 + a ln(1 + floor((position + 1) / floor_scale))
    floor_scale: int = 8192  # tokens
    norm_eps: float = 1e-5

    def __post_init__(self):
        _positive(self, "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        _positive(self, "max_positions", "floor_scale")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary pairs need an even number")
        if self.chunk_size is not None:
            _positive(self, "chunk_size")
        for name in ("moe_layers", "nope_layers"):
            layers = getattr(self, name)
            if any(not 0 <= layer < self.num_layers for layer in layers):
                raise ValueError(f"{name} is {list(layers)}; layers run from 0 to {self.num_layers - 1}")
        if self.moe_layers:
            _positive(self, "num_experts", "expert_width")
        if len(set(self.moe_layers)) < self.num_layers:
            _positive(self, "dense_width")

    def is_nope(self, layer: int) -> bool:
        return layer in self.nope_layers

    def is_local(self, layer: int) -> bool:
        """Does this layer attend inside a chunk only?"""
        return self.chunk_size is not None and layer not in self.nope_layers

    def is_moe(self, layer: int) -> bool:
        return layer in self.moe_layers


@dataclass(frozen=True)
class VisionConfig:
    """From a tile of pixels to vectors that sit among the text embeddings.

    `encoder` "vit" is the released path: vision transformer, pixel shuffle, adapter, projector. "linear" is the
    encoder-free one: each patch becomes a token by one linear map, and every field below `max_tiles` is unused.
    """

    tile_size: int  # pixels a side; a tile is square
    patch_size: int  # pixels a side
    max_tiles: int = 16  # grid tiles of one picture; the global tile comes on top
    hidden_size: int = 0
    num_layers: int = 0
    num_heads: int = 0
    mlp_width: int = 0
    adapter_width: int = 0  # output of both adapter layers, and the projector's input
    pixel_shuffle_ratio: float = 0.5  # 0.5: a square of 2x2 patches becomes one token
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    encoder: str = "vit"

    def __post_init__(self):
        _positive(self, "tile_size", "patch_size", "max_tiles")
        if self.tile_size % self.patch_size:
            raise ValueError(f"tile_size is {self.tile_size}; it must be a multiple of patch_size ({self.patch_size})")
        if self.encoder not in ("vit", "linear"):
            raise ValueError(f"encoder is {self.encoder!r}; it must be 'vit' or 'linear'")
        if self.encoder == "vit":
            _positive(self, "hidden_size", "num_layers", "num_heads", "mlp_width", "adapter_width")
            if self.hidden_size % (4 * self.num_heads):
                raise ValueError(
                    f"hidden_size is {self.hidden_size}; heads of {self.hidden_size / self.num_heads:g} "
                    "channels cannot hold rotary pairs for both x and y (a multiple of 4 is needed)"
                )
            if self.patches_per_side % self.shuffle:
                raise ValueError(f"{self.patches_per_side} patches a side cannot be merged in blocks of {self.shuffle}")

    @property
    def patches_per_side(self) -> int:
        return self.tile_size // self.patch_size

    @property
    def shuffle(self) -> int:
        """Patches a side that pixel shuffle merges into one token."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def tokens_per_tile(self) -> int:
        side = self.patches_per_side if self.encoder == "linear" else self.patches_per_side // self.shuffle
        return side * side


@dataclass(frozen=True)
class Llama4Config:
    """A whole model: text, and vision or None, with the token ids that the model itself needs."""

    text: TextConfig
    vision: VisionConfig | None
    bos_token: int
    stop_tokens: tuple[int, ...]
    pad_token: int
    patch_token: int  # where a projected patch is written over the embedding ("image_token_index" on the Hub)
    note: str = ""  # what a reader must know about where the numbers come from

    @classmethod
    def preset(cls, name: str) -> "Llama4Config":
        """The config called `name`: a key of `PRESETS`."""
        if name not in PRESETS:
            near = get_close_matches(str(name), PRESETS, n=3, cutoff=0.4)
            raise ValueError(
                f"unknown preset {name!r}; "
                + (f"did you mean {' or '.join(near)}?" if near else "")
                + f" There are {', '.join(PRESETS)}"
            )
        return PRESETS[name]


def every(step: int, num_layers: int) -> tuple[int, ...]:
    """Layers with `(layer + 1) % step == 0`: the last of each group of `step`."""
    return tuple(range(step - 1, num_layers, step))


def _positive(config, *names: str):
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be above 0")


# ----------------------------------------------------------------------------------------------------------------------
# Presets, as plain data.

_RELEASED_VISION = VisionConfig(
    tile_size=336,
    patch_size=14,
    max_tiles=16,
    hidden_size=1408,
    num_layers=34,
    num_heads=16,
    mlp_width=5632,
    adapter_width=4096,
)

_RELEASED_TOKENS = dict(bos_token=200000, stop_tokens=(200001, 200007, 200008), pad_token=200018, patch_token=200092)

_SCOUT_TEXT = TextConfig(
    vocab_size=202048,
    hidden_size=5120,
    num_layers=48,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    num_experts=16,
    expert_width=8192,
    dense_width=16384,
    moe_layers=every(1, 48),
    nope_layers=every(4, 48),
    chunk_size=8192,
    max_positions=10_485_760,
    rope_scaling=RopeScaling(factor=16, low_frequency_factor=1, high_frequency_factor=1, original_positions=8192),
)

_MAVERICK_TEXT = replace(
    _SCOUT_TEXT,
    num_experts=128,
    moe_layers=every(2, 48),
    max_positions=1_048_576,
    rope_scaling=None,
    qk_norm=False,
)

# The mini models keep every mechanism and shrink every number, so that one question about one picture already crosses
# chunk borders and passes `floor_scale`. Frozen: the shipped weights were trained with exactly these.
_MINI_VISION = VisionConfig(
    tile_size=48,
    patch_size=6,
    max_tiles=3,
    hidden_size=96,
    num_layers=3,
    num_heads=4,
    mlp_width=384,
    adapter_width=192,
)

_MINI_TOKENS = dict(bos_token=1000, stop_tokens=(1001, 1007, 1008), pad_token=1018, patch_token=1015)

_MINI_SCOUT_TEXT = TextConfig(
    vocab_size=1024,
    hidden_size=128,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    num_experts=8,
    expert_width=112,
    dense_width=256,
    moe_layers=every(1, 8),
    nope_layers=every(4, 8),
    chunk_size=32,
    max_positions=10_485_760,
    rope_theta=10_000.0,
    rope_scaling=RopeScaling(factor=16, low_frequency_factor=1, high_frequency_factor=1, original_positions=32),
    floor_scale=32,
)

_MINI_MAVERICK_TEXT = replace(
    _MINI_SCOUT_TEXT,
    num_experts=16,
    moe_layers=every(2, 8),
    max_positions=1_048_576,
    rope_scaling=None,
    qk_norm=False,
)


def behemoth_estimate(hidden_size: int = 16_384, active: float = 288e9, total: float = 2e12) -> Llama4Config:
    """A config with Behemoth's two published sizes and 16 experts; its shape is unpublished, and many shapes fit.

    Assumed: built like Scout, with experts in every layer, 8 key/value heads of 128, and this hidden size. Then
    total - active = 15 experts in every layer, which gives layers x width; and what remains of `active` beside two
    experts a layer is attention and embeddings, which gives the layers (a multiple of 4, for the NoPE rhythm).
    """
    routed = (total - active) / 15  # parameters of one expert, summed over the layers
    embeddings = 2 * _SCOUT_TEXT.vocab_size * hidden_size
    attention = 2 * hidden_size**2 + 2 * hidden_size * 8 * 128  # of one layer: q and o, k and v
    layers = 4 * round((active - 2 * routed - embeddings) / attention / 4)
    text = replace(
        _SCOUT_TEXT,
        hidden_size=hidden_size,
        num_layers=layers,
        num_heads=hidden_size // 128,
        expert_width=128 * round(routed / (3 * hidden_size * layers) / 128),
        dense_width=0,
        moe_layers=every(1, layers),
        nope_layers=every(4, layers),
        max_positions=262_144,
    )
    note = (
        f"an estimate: solved from two published numbers ({active / 1e9:.0f}B active, nearly {total / 1e12:.0f}T "
        f"total, 16 experts) for an assumed hidden size of {hidden_size}; Meta published no shape"
    )
    return Llama4Config(text, _RELEASED_VISION, **_RELEASED_TOKENS, note=note)


PRESETS: dict[str, Llama4Config] = {
    "scout": Llama4Config(_SCOUT_TEXT, _RELEASED_VISION, **_RELEASED_TOKENS),
    "maverick": Llama4Config(_MAVERICK_TEXT, _RELEASED_VISION, **_RELEASED_TOKENS),
    "behemoth-estimate": behemoth_estimate(),
    "mini-scout": Llama4Config(_MINI_SCOUT_TEXT, _MINI_VISION, **_MINI_TOKENS),
    "mini-maverick": Llama4Config(_MINI_MAVERICK_TEXT, _MINI_VISION, **_MINI_TOKENS),
}
