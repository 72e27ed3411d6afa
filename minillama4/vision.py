"""From tiles of pixels to vectors that can sit among the text embeddings.

Shapes: `tiles` of all pictures together, each side x side pixels, cut into rows x rows patches; C channels of the
encoder, D hidden size of the decoder. Tiles never see each other here: only the decoder joins them.
Source: Meta's `models/llama4/vision/` and the Hugging Face port. Scout: 336 pixels, 24 x 24 patches, 144 tokens a tile.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import rotate
from .config import VisionConfig


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """[tiles, 3, side, side] -> [tiles, rows * rows, 3 * patch * patch]: row by row; inside, channel, row, column."""
    tiles, channels, side, _ = pixels.shape
    rows, p = side // patch_size, patch_size
    x = pixels.view(tiles, channels, rows, p, rows, p)
    x = x.permute(0, 2, 4, 1, 3, 5)  # [tiles, row, column, channel, row in patch, column in patch]
    return x.reshape(tiles, rows * rows, channels * p * p)


def pixel_shuffle(x: Tensor, block: int) -> Tensor:
    """Merge each block x block square of patches: [tiles, rows * rows, C] -> [tiles, (rows / block)^2, block^2 * C].

    With block 2, output cell (i, j) holds the patches (2i, 2j), (2i, 2j+1), (2i+1, 2j), (2i+1, 2j+1) in that order.
    """
    tiles, patches, channels = x.shape
    cells = round(patches**0.5) // block
    x = x.view(tiles, cells, block, cells, block, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(tiles, cells * cells, block * block * channels)


@lru_cache(maxsize=16)
def patch_rotation(config: VisionConfig, device: str = "cpu") -> Tensor:
    """2-D rotary angles as unit complex numbers: [patches + 1, 1, head_dim / 2].

    The first half of the pairs turns with the column + 1 (x), the second half with the row + 1 (y); the class token,
    which is last, does not turn.
    """
    with torch.inference_mode(False):
        rows, dim = config.patches_per_side, config.hidden_size // config.num_heads
        frequency = config.rope_theta ** (-torch.arange(0, dim // 2, 2, dtype=torch.float64) / (dim // 2))
        patch = torch.arange(rows * rows)
        x_angle = (patch % rows + 1)[:, None] * frequency  # [patches, head_dim / 4]
        y_angle = (patch // rows + 1)[:, None] * frequency
        angle = F.pad(torch.cat([x_angle, y_angle], dim=1), (0, 0, 0, 1))  # the class token's row of zeros
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None].to(device)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """[tiles, patches + 1, C] -> the same; every patch sees its whole tile."""
        heads = (-1, x.shape[-1] // self.num_heads)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, turn), rotate(k, turn)
        out = F.scaled_dot_product_attention(
            *(y.transpose(1, 2) for y in (q, k, v))
        )  # [tiles, heads, patches + 1, dim]
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class VisionMLP(nn.Module):
    """Two layers; the adapter (`last_activation`) has no biases and a GELU after both."""

    def __init__(self, inputs: int, width: int, outputs: int, bias: bool = True, last_activation: bool = False):
        super().__init__()
        self.fc1 = nn.Linear(inputs, width, bias=bias)
        self.fc2 = nn.Linear(width, outputs, bias=bias)
        self.last_activation = last_activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(x)))
        return F.gelu(x) if self.last_activation else x


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = VisionAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = VisionMLP(config.hidden_size, config.mlp_width, config.hidden_size)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn)
        return x + self.mlp(self.post_attention_layernorm(x))


class VisionEncoder(nn.Module):
    """The released path up to the adapter: patches -> transformer -> pixel shuffle -> two-layer adapter."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embedding = nn.ModuleDict({"linear": nn.Linear(3 * config.patch_size**2, width, bias=False)})
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding_vlm = nn.Parameter(torch.empty(config.patches_per_side**2 + 1, width))  # class last
        self.layernorm_pre = nn.LayerNorm(width, eps=config.norm_eps)
        self.layernorm_post = nn.LayerNorm(width, eps=config.norm_eps)
        self.model = nn.ModuleDict({"layers": nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))})
        adapter = VisionMLP(width * config.shuffle**2, config.adapter_width, config.adapter_width, False, True)
        self.vision_adapter = nn.ModuleDict({"mlp": adapter})

    def forward(self, pixels: Tensor) -> Tensor:
        """[tiles, 3, side, side] in -1..1 -> [tiles, tokens_per_tile, adapter_width]."""
        x = self.patch_embedding["linear"](patchify(pixels, self.config.patch_size))  # [tiles, patches, C]
        x = torch.cat([x, self.class_embedding.expand(len(x), 1, -1)], dim=1)  # the class token comes LAST
        x = self.layernorm_pre(x + self.positional_embedding_vlm)
        turn = patch_rotation(self.config, str(x.device))
        for block in self.model["layers"]:
            x = block(x, turn)
        x = self.layernorm_post(x)[:, :-1]  # the class token has done its work
        return self.vision_adapter["mlp"](pixel_shuffle(x, self.config.shuffle))


class LinearPatches(nn.Module):
    """The encoder-free path of h = Transformer([e_img..., e_txt...]): the patches as they are."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_size = config.patch_size

    def forward(self, pixels: Tensor) -> Tensor:
        """[tiles, 3, side, side] -> [tiles, tokens_per_tile, 3 * patch * patch]; the projector does the rest."""
        return patchify(pixels, self.patch_size)


def build_vision(config: VisionConfig, hidden_size: int) -> tuple[nn.Module, nn.Module]:
    """(vision_model, multi_modal_projector): together they turn tiles into [tiles, tokens_per_tile, hidden_size]."""
    if config.encoder == "linear":
        model, width = LinearPatches(config), 3 * config.patch_size**2
    else:
        model, width = VisionEncoder(config), config.adapter_width
    return model, nn.ModuleDict({"linear_1": nn.Linear(width, hidden_size, bias=False)})
