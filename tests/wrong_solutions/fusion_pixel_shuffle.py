"""Answers to `fusion-pixel-shuffle`."""

import torch
import torch.nn.functional as F
from bank import right, wrong

from minillama4.vision import pixel_shuffle


def _split(x, block):
    """[tiles, cell row, row in the cell, cell column, column in the cell, C]"""
    rows = int(x.shape[1] ** 0.5)
    return x.unflatten(1, (rows // block, block, rows // block, block))


def _joined(axes):
    """Six axes, of which the last three make a token."""
    return axes.flatten(3).flatten(1, 2)


@right
def by_slices(x, block):
    rows = int(x.shape[1] ** 0.5)
    grid = x.unflatten(1, (rows, rows))
    places = [grid[:, a::block, b::block] for a in range(block) for b in range(block)]
    return torch.cat(places, dim=-1).flatten(1, 2)


@right
def half_by_half(x, block):
    """As Hugging Face's port: columns into channels, turned, rows into channels, and turned back."""
    rows, width = int(x.shape[1] ** 0.5), block * x.shape[2]
    x = x.reshape(len(x), rows, rows // block, width).transpose(1, 2)
    x = x.reshape(len(x), rows // block, rows // block, block * width)
    return x.transpose(1, 2).flatten(1, 2)


@right
def by_pixel_unshuffle(x, block):
    """Torch's own lays out channel by channel; so its result has to be turned."""
    rows = int(x.shape[1] ** 0.5)
    y = F.pixel_unshuffle(x.mT.unflatten(2, (rows, rows)), block)  # [tiles, C * block * block, cells, cells]
    return y.flatten(2).mT.unflatten(2, (-1, block * block)).mT.flatten(2)


@wrong("not written")
def stub(x, block):
    raise NotImplementedError()


@wrong("raises")
def root_not_whole(x, block):
    rows = x.shape[1] ** 0.5
    return x.view(len(x), rows // block, block, rows // block, block, -1)


@wrong("raises")
def joined_by_a_view(x, block):
    return _split(x, block).permute(0, 1, 3, 4, 2, 5).view(len(x), -1, block * block * x.shape[2])


@wrong("shape")
def still_a_grid(x, block):
    return _split(x, block).permute(0, 1, 3, 2, 4, 5).flatten(3)


@wrong("shape")
def mean_of_the_square(x, block):
    """Average pooling: as many tokens, and three quarters of the numbers are gone."""
    return _split(x, block).mean(dim=(2, 4)).flatten(1, 2)


@wrong("shape")
def always_two(x, block):
    return _joined(_split(x, 2).permute(0, 1, 3, 2, 4, 5))


@wrong("type")
def only_the_shape(x, block):
    return _joined(_split(x, block).permute(0, 1, 3, 2, 4, 5)).shape


@wrong("changes its input")
def scaled_in_place(x, block):
    x /= block
    return _joined(_split(x, block).permute(0, 1, 3, 2, 4, 5))


@wrong("inside a token: row by row, and all channels of a patch together")
def zeros_of_the_right_shape(x, block):
    return torch.zeros_like(x).reshape(len(x), -1, block * block * x.shape[2])


@wrong("inside a token: row by row, and all channels of a patch together")
def channel_between_row_and_column(x, block):
    return _joined(_split(x, block).permute(0, 1, 3, 2, 5, 4))


@wrong("column by column inside")
def columns_first_inside(x, block):
    return _joined(_split(x, block).permute(0, 1, 3, 4, 2, 5))


@wrong("channels interleaved")
def as_pixel_unshuffle(x, block):
    """What `torch.nn.PixelUnshuffle` does: the place in the square is the fast axis."""
    rows = int(x.shape[1] ** 0.5)
    return F.pixel_unshuffle(x.mT.unflatten(2, (rows, rows)), block).flatten(2).mT


@wrong("channels interleaved")
def channels_first_inside(x, block):
    return _joined(_split(x, block).permute(0, 1, 3, 5, 2, 4))


@wrong("tiles mixed")
def tiles_not_first(x, block):
    return x.transpose(0, 1).reshape(len(x), -1, block * block * x.shape[2])


@wrong("reading order")
def patches_that_follow_each_other(x, block):
    return x.reshape(len(x), -1, block * block * x.shape[2])


@wrong("reading order")
def half_by_half_without_turning(x, block):
    """Hugging Face's steps without their two permutes."""
    rows, width = int(x.shape[1] ** 0.5), block * x.shape[2]
    x = x.reshape(len(x), rows, rows // block, width)
    return x.reshape(len(x), (rows // block) ** 2, block * width)


@wrong("tokens column by column")
def not_turned_back(x, block):
    """InternVL's "v1": the last permute was forgotten, and the picture is transposed."""
    rows, width = int(x.shape[1] ** 0.5), block * x.shape[2]
    x = x.reshape(len(x), rows, rows // block, width).transpose(1, 2)
    return x.reshape(len(x), (rows // block) ** 2, block * width)


@wrong("far apart")
def split_the_wrong_way_round(x, block):
    cells = int(x.shape[1] ** 0.5) // block
    return x.unflatten(1, (block, cells, block, cells)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


@wrong("block 2: a token is a square of neighbours")
def patches_of_one_row(x, block):
    """Right for one token a tile, and else block * block neighbours of the same row, or of the next."""
    cells = int(x.shape[1] ** 0.5) // block
    return x.unflatten(1, (block * block, cells * cells)).transpose(1, 2).flatten(2)


@wrong("reading order")
def block_2_by_heart(x, block):
    """Right for 2, where the four places are written down; nothing is merged for any other block."""
    rows = int(x.shape[1] ** 0.5)
    if block != 2:
        return x.reshape(len(x), -1, block * block * x.shape[2])
    grid = x.unflatten(1, (rows, rows))
    even, odd = grid[:, 0::2], grid[:, 1::2]
    return torch.cat([even[:, :, 0::2], even[:, :, 1::2], odd[:, :, 0::2], odd[:, :, 1::2]], dim=-1).flatten(1, 2)


@wrong("for any block")
def up_to_three(x, block):
    if block > 3:
        return x.reshape(len(x), -1, block * block * x.shape[2])
    return _joined(_split(x, block).permute(0, 1, 3, 2, 4, 5))


@wrong("x without gradient")
def detached(x, block):
    return _joined(_split(x.detach(), block).permute(0, 1, 3, 2, 4, 5)) + 0 * x.sum()


@wrong("the gradient reaches x")
def in_numpy(x, block):
    array = x.detach().numpy()
    rows = int(len(array[0]) ** 0.5)
    array = array.reshape(len(x), rows // block, block, rows // block, block, -1).transpose(0, 1, 3, 2, 4, 5)
    return torch.tensor(array.reshape(len(x), (rows // block) ** 2, -1))


@wrong("borrowed")
def from_the_package(x, block):
    return pixel_shuffle(x, block)


EQUIVALENT = {
    "x.view(tiles, cells, block, cells, block, channels)  ->  x.view(cells, tiles, block, cells, block, channels)": (
        "neither axis moves, and the last reshape takes both as they lie"
    ),
}
