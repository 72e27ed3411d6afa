"""Answers to `fusion-patchify`."""

import torch
import torch.nn.functional as F
from bank import right, wrong

from minillama4.config import VisionConfig
from minillama4.vision import LinearPatches, patchify


def _split(pixels, patch_size):
    """[tiles, channel, patch row, row in the patch, patch column, column in the patch]"""
    side = pixels.shape[-1]
    return pixels.unflatten(3, (side // patch_size, -1)).unflatten(2, (side // patch_size, -1))


def _joined(axes):
    """Six axes, of which the first three make the place: [tiles, patches, numbers]."""
    return axes.flatten(3).flatten(1, 2)


@right
def by_windows(pixels, patch_size):
    """`Tensor.unfold` takes windows of one axis: it adds an axis, and does not lay out patches."""
    x = pixels.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return x.movedim(1, 3).flatten(3).flatten(1, 2)


@right
def by_an_index(pixels, patch_size):
    side = pixels.shape[-1]
    channel, start = torch.arange(3) * side**2, torch.arange(0, side, patch_size)
    row, inside = start[:, None, None, None, None] * side, torch.arange(patch_size)
    place = channel[:, None, None] + inside[:, None] * side + inside  # [channel, row, column]
    return pixels.flatten(1)[:, (row + start[:, None, None, None] + place).flatten()].view(
        len(pixels), len(start) ** 2, -1
    )


@right
def by_splitting_and_stacking(pixels, patch_size):
    x = torch.stack(pixels.split(patch_size, dim=2), dim=1)  # [tiles, patch row, 3, patch, side]
    x = torch.stack(x.split(patch_size, dim=4), dim=2)
    return _joined(x)


@wrong("not written")
def stub(pixels, patch_size):
    raise NotImplementedError()


@wrong("raises")
def joined_by_a_view(pixels, patch_size):
    x = _split(pixels, patch_size).permute(0, 2, 4, 5, 3, 1)
    return x.view(len(pixels), -1, 3 * patch_size**2)


@wrong("shape")
def rows_and_columns_kept(pixels, patch_size):
    return _split(pixels, patch_size).permute(0, 2, 4, 1, 3, 5).flatten(3)


@wrong("shape")
def one_batch_of_patches(pixels, patch_size):
    return _split(pixels, patch_size).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)


@wrong("shape")
def unfold_without_a_transpose(pixels, patch_size):
    return F.unfold(pixels, patch_size, stride=patch_size)


@wrong("shape")
def patches_that_overlap(pixels, patch_size):
    """The windows of `Tensor.unfold` with a step of 1: right for one patch a tile."""
    return pixels.unfold(2, patch_size, 1).unfold(3, patch_size, 1).movedim(1, 3).flatten(3).flatten(1, 2)


@wrong("type")
def made_double(pixels, patch_size):
    return _joined(_split(pixels, patch_size).permute(0, 2, 4, 1, 3, 5)).double()


@wrong("changes its input")
def normalised_in_place(pixels, patch_size):
    patches = _joined(_split(pixels, patch_size).permute(0, 2, 4, 1, 3, 5))
    pixels /= 255
    return patches


@wrong("inside a patch: channel, row, column")
def zeros_of_the_right_shape(pixels, patch_size):
    return torch.zeros_like(_joined(_split(pixels, patch_size).permute(0, 2, 4, 1, 3, 5)))


@wrong("inside a patch: channel, row, column")
def row_channel_column(pixels, patch_size):
    return _joined(_split(pixels, patch_size).permute(0, 2, 4, 3, 1, 5))


@wrong("channel last")
def channel_last(pixels, patch_size):
    return _joined(_split(pixels, patch_size).permute(0, 2, 4, 3, 5, 1))


@wrong("columns before rows")
def columns_before_rows(pixels, patch_size):
    return _joined(_split(pixels, patch_size).permute(0, 2, 4, 1, 5, 3))


@wrong("inside out")
def inside_out(pixels, patch_size):
    return _joined(_split(pixels, patch_size).permute(0, 2, 4, 5, 3, 1))


@wrong("tiles mixed")
def channels_of_all_tiles_first(pixels, patch_size):
    x = _split(pixels, patch_size).permute(1, 0, 2, 4, 3, 5)
    return x.reshape(len(pixels), -1, 3 * patch_size**2)


@wrong("column by column")
def column_by_column(pixels, patch_size):
    return _joined(_split(pixels, patch_size).permute(0, 4, 2, 1, 3, 5))


@wrong("view without permute")
def plain_view(pixels, patch_size):
    return pixels.reshape(len(pixels), -1, 3 * patch_size**2)


@wrong("view without permute")
def patches_of_one_channel_each(pixels, patch_size):
    return _split(pixels, patch_size).permute(0, 1, 2, 4, 3, 5).reshape(len(pixels), -1, 3 * patch_size**2)


@wrong("view without permute")
def unfold_reshaped(pixels, patch_size):
    """`unfold` gives [tiles, numbers, patches]: a reshape is no transpose."""
    return F.unfold(pixels, patch_size, stride=patch_size).reshape(len(pixels), -1, 3 * patch_size**2)


@wrong("channel not moved past the columns")
def channel_before_patch_column(pixels, patch_size):
    return _split(pixels, patch_size).permute(0, 2, 1, 4, 3, 5).reshape(len(pixels), -1, 3 * patch_size**2)


@wrong("scattered pixels")
def split_the_wrong_way_round(pixels, patch_size):
    tiles, channels, side, _ = pixels.shape
    x = pixels.view(tiles, channels, patch_size, side // patch_size, patch_size, side // patch_size)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(tiles, -1, channels * patch_size**2)


@wrong("consecutive pixels")
def pixels_as_they_follow(pixels, patch_size):
    x = pixels.flatten(2).unflatten(2, (-1, patch_size**2))  # [tiles, 3, patches, patch * patch]
    return x.transpose(1, 2).flatten(2)


@wrong("a patch is a square of neighbours")
def rows_split_the_wrong_way_round(pixels, patch_size):
    tiles, channels, side, _ = pixels.shape
    x = pixels.view(tiles, channels, patch_size, side // patch_size, side // patch_size, patch_size)
    return x.permute(0, 3, 4, 1, 2, 5).reshape(tiles, -1, channels * patch_size**2)


@wrong("for any size")
def small_pictures_only(pixels, patch_size):
    patches = _joined(_split(pixels, patch_size).permute(0, 2, 4, 1, 3, 5))
    return patches if pixels.shape[-1] < 12 else patches.flip(1)


@wrong("the gradient reaches the pixels")
def in_numpy(pixels, patch_size):
    array = pixels.detach().numpy()
    starts = range(0, array.shape[2], patch_size)
    patches = [array[:, :, y : y + patch_size, x : x + patch_size] for y in starts for x in starts]
    return torch.stack([torch.tensor(patch).flatten(1) for patch in patches], dim=1)


@wrong("no loop over tiles")
def tile_by_tile(pixels, patch_size):
    return torch.stack([_joined(_split(tile[None], patch_size).permute(0, 2, 4, 1, 3, 5))[0] for tile in pixels])


@wrong("no loop over patches")
def patch_by_patch(pixels, patch_size):
    starts = range(0, pixels.shape[2], patch_size)
    patches = [pixels[:, :, y : y + patch_size, x : x + patch_size] for y in starts for x in starts]
    return torch.stack(patches, dim=1).flatten(2)


@wrong("no loop over patches")
def row_by_row(pixels, patch_size):
    rows = [_joined(_split_columns(strip, patch_size)) for strip in pixels.split(patch_size, dim=2)]
    return torch.cat(rows, dim=1)


def _split_columns(strip, patch_size):
    """[tiles, 3, patch, side] -> [tiles, 1, patch column, 3, patch, patch]"""
    return strip.unflatten(3, (-1, patch_size)).permute(0, 3, 1, 2, 4)[:, None]


@wrong("no loop over pixels of a patch")
def pixel_by_pixel(pixels, patch_size):
    """Each slice holds one pixel of every patch at once; 196 slices for Llama 4."""
    inside = range(patch_size)
    return (
        torch.stack([pixels[:, :, i::patch_size, j::patch_size] for i in inside for j in inside], dim=2)
        .permute(0, 3, 4, 1, 2)
        .flatten(3)
        .flatten(1, 2)
    )


@wrong("borrowed")
def from_the_package(pixels, patch_size):
    return patchify(pixels, patch_size)


@wrong("borrowed")
def from_a_module_of_the_package(pixels, patch_size):
    return LinearPatches(VisionConfig(pixels.shape[-1], patch_size, encoder="linear"))(pixels)


@wrong("borrowed")
def by_unfold(pixels, patch_size):
    return torch.nn.Unfold(patch_size, stride=patch_size)(pixels).mT


@wrong("borrowed")
def by_pixel_unshuffle(pixels, patch_size):
    return F.pixel_unshuffle(pixels, patch_size).flatten(2).mT


EQUIVALENT = {}
