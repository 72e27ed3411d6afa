"""Vision, step by step: the order of patches, the class token, two-dimensional rotation, pixel shuffle, both paths."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    SCOUT_LIKE,
    VISION,
    assert_same,
    build,
    in_pieces,
    picture_prompt,
    randomise,
    relative_error,
    words,
)

from minillama4 import Llama4, Llama4Config, save_checkpoint
from minillama4.config import VisionConfig
from minillama4.fusion import merge_image_embeddings
from minillama4.vision import VisionEncoder, VisionMLP, patch_rotation, patchify, pixel_shuffle

RELEASED = Llama4Config.preset("scout").vision


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    return randomise(VisionEncoder(VISION))


def tiles(count, seed=0):
    return torch.rand(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Pixels -> patches -> tokens


def test_patches_run_row_by_row_and_hold_channel_row_column():
    """A 4 x 4 picture in patches of 2; each pixel's value spells its channel, row and column."""
    channel, row, column = torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(4), indexing="ij")
    patches = patchify((100 * channel + 10 * row + column)[None], 2)
    assert patches.shape == (1, 4, 12)
    assert patches[0, 0].tolist() == [0, 1, 10, 11, 100, 101, 110, 111, 200, 201, 210, 211]
    assert patches[0, :, 0].tolist() == [0, 2, 20, 22], "top left, top right, bottom left, bottom right"


def test_patches_are_in_the_order_of_torch_unfold():
    pixels = tiles(2)
    assert torch.equal(patchify(pixels, 4), F.unfold(pixels, 4, stride=4).transpose(1, 2))


def test_pixel_shuffle_concatenates_each_square_of_patches_row_by_row():
    """4 x 4 patches, worked by hand: patch number n has the channels (n, -n)."""
    n = torch.arange(16.0)
    got = pixel_shuffle(torch.stack([n, -n], dim=1)[None], 2)
    assert got.shape == (1, 4, 8)
    assert got[0, :, ::2].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(got[0, :, 1::2], -got[0, :, ::2]), "the channels of a patch stay together"


def test_a_tile_of_the_released_size_becomes_576_patches_and_144_tokens():
    assert (RELEASED.patches_per_side, RELEASED.tokens_per_tile) == (24, 144)
    assert patchify(torch.zeros(1, 3, 336, 336), 14).shape == (1, 576, 588)
    assert pixel_shuffle(torch.zeros(1, 576, 1408), RELEASED.shuffle).shape == (1, 144, 5632)


# ----------------------------------------------------------------------------------------------------------------------
# The class token and the rotation


def test_the_class_token_is_last_in_the_sequence_and_in_the_position_table(encoder):
    """With blocks that do nothing, its embedding and the table's last row reach no output; all other rows do."""
    plain = randomise(VisionEncoder(replace(VISION, num_layers=1)))
    plain.model["layers"] = torch.nn.ModuleList()
    plain.layernorm_pre = torch.nn.Identity()
    out = plain(tiles(1)).square().sum()
    table, cls = torch.autograd.grad(
        out, [plain.positional_embedding_vlm, plain.class_embedding], allow_unused=True, materialize_grads=True
    )
    assert cls.abs().sum() == 0
    assert table.abs().sum(1).nonzero().flatten().tolist() == list(range(36))
    (through_attention,) = torch.autograd.grad(encoder(tiles(1)).square().sum(), encoder.class_embedding)
    assert through_attention.abs().sum() > 0, "in attention it takes part like any patch"


def test_patch_1_changes_pairs_0_to_21_only_and_patch_24_pairs_22_to_43_only():
    """One step to the right turns the first 22 of 44 pairs, one step down the last 22; the class token turns none."""
    turn = patch_rotation(RELEASED)
    assert turn.shape == (577, 1, 44) and turn.dtype == torch.complex64

    def changed(patch):
        return (turn[patch] != turn[0]).flatten().nonzero().flatten().tolist()

    assert changed(1) == list(range(22))
    assert changed(24) == list(range(22, 44))
    assert changed(25) == list(range(44))
    assert torch.equal(turn[576], torch.ones(1, 44, dtype=torch.complex64))


def test_angles_are_column_plus_1_and_row_plus_1_times_the_frequency():
    turn = patch_rotation(RELEASED)[:, 0]
    for patch in (0, 1, 23, 24, 300, 575):
        row, column = divmod(patch, 24)
        for pair in (0, 1, 10, 21):
            frequency = 10_000 ** (-2 * pair / 44)
            for got, steps in ((turn[patch, pair], column + 1), (turn[patch, 22 + pair], row + 1)):
                wanted = complex(math.cos(steps * frequency), math.sin(steps * frequency))
                assert abs(complex(got) - wanted) < 1e-6


def test_every_patch_sees_the_whole_tile_and_no_tile_sees_another(encoder):
    pixels = tiles(3).requires_grad_()
    out = encoder(pixels)
    assert out.shape == (3, 9, 36)
    (grad,) = torch.autograd.grad(out[1, 0].sum(), pixels)
    assert (patchify(grad, 4)[1].abs().sum(1) > 0).all()
    assert grad[0].abs().sum() == grad[2].abs().sum() == 0
    torch.testing.assert_close(out, torch.cat([encoder(pixels[i : i + 1]) for i in range(3)]))


def test_the_adapter_has_a_gelu_after_both_layers_and_the_block_only_after_the_first():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    adapter, block = VisionMLP(8, 12, 6, bias=False, last_activation=True), VisionMLP(8, 12, 8)
    wanted = F.gelu(F.linear(F.gelu(F.linear(x, adapter.fc1.weight)), adapter.fc2.weight))
    torch.testing.assert_close(adapter(x), wanted)
    torch.testing.assert_close(block(x), block.fc2(F.gelu(block.fc1(x))))
    assert adapter.fc1.bias is None and block.fc1.bias is not None


# ----------------------------------------------------------------------------------------------------------------------
# Fusion


def test_picture_vectors_overwrite_patch_tokens_in_order_and_nothing_else():
    ids, _ = picture_prompt(rows=2)
    words_in = torch.randn(2, 67, 40, generator=torch.Generator().manual_seed(0))
    vectors = torch.arange(72.0)[:, None].expand(-1, 40)
    merged = merge_image_embeddings(words_in, ids, vectors.view(8, 9, 40), 127)
    here = ids == 127
    assert torch.equal(merged[here][:, 0], torch.arange(72.0)), "row after row"
    assert torch.equal(merged[~here], words_in[~here]), "separators and <|image|> keep their embeddings"


@pytest.mark.parametrize("wrong", [0, 3, 5])
def test_tiles_that_do_not_match_the_patch_tokens_are_refused_with_both_counts(wrong):
    """Never a silent truncation, in one pass or on a cache."""
    model = build(SCOUT_LIKE)
    ids, _ = picture_prompt()
    pixels = tiles(wrong) if wrong else None
    with pytest.raises(ValueError, match=f"36 patch tokens .* {9 * wrong} vectors"):
        model(ids, pixels)
    if wrong < 4:
        with pytest.raises(ValueError, match="patch tokens"):
            model(ids, pixels, model.new_cache(1, 67))


@pytest.mark.parametrize("shape", [(4, 3, 24, 23), (4, 1, 24, 24), (3, 24, 24)], ids=str)
def test_pixels_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"pixel_values is .* must be \[tiles, 3, 24, 24\]"):
        build(SCOUT_LIKE)(picture_prompt()[0], torch.zeros(shape))


def test_pixels_for_a_text_only_model_are_refused():
    with pytest.raises(ValueError, match="no vision"):
        build(replace(SCOUT_LIKE, vision=None))(words(5), tiles(1))


# ----------------------------------------------------------------------------------------------------------------------
# The encoder-free path: a patch becomes a token by one linear map


@pytest.fixture(scope="module")
def linear() -> Llama4:
    """Tiles of 24 pixels in patches of 8: nine tokens a tile, as many as the released path makes of them here."""
    return build(replace(SCOUT_LIKE, vision=VisionConfig(tile_size=24, patch_size=8, encoder="linear")))


def test_the_encoder_free_path_is_one_linear_map_per_patch(linear):
    vision = [name for name, _ in linear.named_parameters() if "vision" in name or "projector" in name]
    assert vision == ["multi_modal_projector.linear_1.weight"]
    pixels = tiles(2)
    wanted = F.unfold(pixels, 8, stride=8).transpose(1, 2) @ linear.multi_modal_projector["linear_1"].weight.T
    torch.testing.assert_close(linear.encode_images(pixels), wanted)


def test_the_encoder_free_path_works_end_to_end(linear):
    """Through every layer, in one pass and in pieces on a cache, with gradients from the logits to the pixels."""
    ids, pixels = picture_prompt()
    logits = linear(ids, pixels.requires_grad_())
    assert_same(in_pieces(linear, ids, [9, 20, 1, 37], pixels), logits)
    logits[:, -1].square().sum().backward()
    assert (patchify(pixels.grad, 8).abs().sum(-1) > 0).all()
    assert relative_error(linear(ids, -pixels), logits) > 0.1


def test_saving_an_encoder_free_model_is_refused_and_writes_nothing(linear, tmp_path):
    with pytest.raises(ValueError, match="encoder-free.*Hugging Face has no model") as error:
        save_checkpoint(linear, tmp_path / "new")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
