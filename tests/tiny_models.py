"""Tiny models that hold every mechanism of Llama 4 at once, so that a test on them sees each mechanism break.

Both have rotary and NoPE layers, dense and MoE layers, in all four combinations; 67 tokens cross six borders of a chunk
and seven steps of the temperature; three queries share a key; RoPE is scaled; two pictures have one tile and three.
All sizes differ, and the weights are large enough that each mechanism moves the logits (`parity/test_sensitivity.py`).
"""

from dataclasses import replace

import torch
from torch import Tensor

from minillama4 import Llama4, Llama4Config, RopeScaling, TextConfig, VisionConfig

TOLERANCE = 2e-5  # relative error, fp32

VISION = VisionConfig(
    tile_size=24, patch_size=4, hidden_size=56, num_layers=2, num_heads=2, mlp_width=224, adapter_width=36
)
TOKENS_PER_TILE = 9

SCOUT_LIKE = Llama4Config(
    TextConfig(
        vocab_size=131,
        hidden_size=40,
        num_layers=6,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        num_experts=5,
        expert_width=20,
        dense_width=52,
        moe_layers=(1, 3, 5),
        nope_layers=(2, 5),
        chunk_size=11,
        max_positions=4096,
        rope_theta=10_000.0,
        rope_scaling=RopeScaling(
            factor=16, low_frequency_factor=1, high_frequency_factor=1, original_positions=32
        ),  # pairs 0-1 stay, 2-7 are divided
        qk_norm=True,
        floor_scale=9,
    ),
    VISION,
    bos_token=3,
    stop_tokens=(4, 5),
    pad_token=6,
    patch_token=127,
)

# No QK norm; its last layer is local instead of NoPE; RoPE scaling has a blended band (pair 1).
MAVERICK_LIKE = replace(
    SCOUT_LIKE,
    text=replace(
        SCOUT_LIKE.text,
        num_experts=7,
        nope_layers=(0, 3),
        qk_norm=False,
        rope_scaling=RopeScaling(factor=8, low_frequency_factor=1, high_frequency_factor=4, original_positions=32),
    ),
)

CONFIGS = {"scout-like": SCOUT_LIKE, "maverick-like": MAVERICK_LIKE}


def text_only(config: Llama4Config) -> Llama4Config:
    """Without vision; a text-only folder has no field for the patch token, which then has its released id."""
    return replace(config, vision=None, patch_token=200092)


def with_text(config: Llama4Config, **changes) -> Llama4Config:
    return replace(config, text=replace(config.text, **changes))


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights N(0, 0.3), and norm weights 1 +- 0.2."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if "norm" in name and name.endswith("weight"):
            parameter.mul_(2 / 3).add_(1)
    return model.eval()


def build(config: Llama4Config, seed: int = 0) -> Llama4:
    return randomise(Llama4(config), seed)


def rebuilt(model: Llama4, **text_changes) -> Llama4:
    """The same weights under another text config."""
    other = Llama4(with_text(model.config, **text_changes))
    other.load_state_dict(model.state_dict())
    return other.eval()


def words(count: int, rows: int = 1, seed: int = 0) -> Tensor:
    """[rows, count] int64 without special tokens (7 to 119)."""
    return torch.randint(7, 120, (rows, count), generator=torch.Generator().manual_seed(seed))


def picture(grid_tiles: int) -> list[int]:
    """The tokens of a picture of one row of tiles; ids 120 to 124 are the separators, 127 the patch."""
    start, end, image, x_separator, y_separator, patches = 120, 121, 122, 123, 124, [127] * TOKENS_PER_TILE
    grid = []
    if grid_tiles > 1:
        grid = [*patches, *([x_separator, *patches] * (grid_tiles - 1)), y_separator]
    return [start, *grid, image, *patches, end]


def picture_prompt(rows: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(input_ids [rows, 67], pixel_values [4 * rows, 3, 24, 24]): two pictures a row, of one and of three tiles.

    Odd rows have the larger picture first, so that the rows of a batch have their patches in different places.
    """
    layouts = [(5, 1, 4, 2, 14), (8, 2, 3, 1, 12)]
    ids = []
    for row in range(rows):
        before, first, between, second, after = layouts[row % 2]
        text = words(before + between + after, seed=seed + row)[0].tolist()
        middle = before + between
        ids.append([*text[:before], *picture(first), *text[before:middle], *picture(second), *text[middle:]])
    pixels = torch.rand(4 * rows, 3, 24, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.tensor(ids), pixels


def relative_error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


def assert_same(got: Tensor, wanted: Tensor, tolerance: float = TOLERANCE):
    """The parity bound; `pytest -rP` shows what was measured."""
    assert got.shape == wanted.shape, f"{list(got.shape)} is not {list(wanted.shape)}"
    error = relative_error(got, wanted)
    print(f"relative error {error:.1e}")
    assert error < tolerance, f"relative error {error:.1e}, allowed {tolerance:.0e}"


@torch.no_grad()
def in_pieces(model: Llama4, input_ids: Tensor, sizes: list[int], pixel_values: Tensor | None = None) -> Tensor:
    """Logits of all tokens, fed on a cache in pieces of these sizes; pictures come with the first piece."""
    assert sum(sizes) == input_ids.shape[1], "the pieces must cover the prompt"
    cache = model.new_cache(len(input_ids), input_ids.shape[1])
    logits = []
    for piece in input_ids.split(sizes, dim=1):
        logits.append(model(piece, pixel_values, cache))
        pixel_values = None
    return torch.cat(logits, dim=1)
