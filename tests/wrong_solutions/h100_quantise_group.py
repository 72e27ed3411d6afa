"""Answers to `h100-quantise-group`."""

import numpy as np
import torch
import torch.nn.functional as F
from bank import right, wrong

from minillama4.cuda.int4 import dequantise, quantise


def _largest(weight, group):
    """[outputs, G]: of each group, with its sign."""
    lowest, highest = weight.unflatten(1, (-1, group)).aminmax(dim=2)
    return torch.where(highest > -lowest, highest, lowest)


def _each(scale, group):
    """[outputs, inputs]: the scale of every weight."""
    return scale.repeat_interleave(group, dim=1)


def _code(weight, scale):
    """Right for any scale [outputs, inputs]: nearest, cut off, and no NaN."""
    return (weight / torch.where(scale == 0, 1, scale)).round().clamp(-8, 7).add(8).to(torch.uint8)


def _with(weight, group, scale=None, code=None, back=None):
    """All right but for what is given: scale(largest), code(weight, scale of each), back(code, scale of each)."""
    scales = (scale or (lambda largest: largest / -8))(_largest(weight, group))
    codes = (code or _code)(weight, _each(scales, group))
    return codes, scales, (back or (lambda code, scale: (code.float() - 8) * scale))(codes, _each(scales, group))


def _of(scale):
    """An answer that is right but for its scale(weight, group) [outputs, G]."""

    def answer(weight, group):
        return _with(weight, group, scale=lambda _: scale(weight, group))

    return answer


@right
def by_lowest_and_highest(weight, group):
    return _with(weight, group)


@right
def group_by_group(weight, group):
    """Each alone, by multiplying with the inverse; halves go up. The scale of zeros is 1 here: nobody will see it."""
    codes, scales, back = [], [], []
    for values in weight.split(group, dim=1):
        largest = values.take_along_dim(values.abs().argmax(dim=1, keepdim=True), dim=1)
        scale = torch.where(largest == 0, 1.0, largest * -0.125)
        step = torch.minimum((values * (1 / scale) + 0.5).floor(), torch.tensor(7.0))
        codes.append((step + 8).byte())
        scales.append(scale)
        back.append(step * scale)
    return tuple(torch.cat(parts, dim=1) for parts in (codes, scales, back))


@right
def in_numpy(weight, group):
    x = weight.numpy().astype(np.float64).reshape(len(weight), -1, group)
    largest = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)
    step = np.minimum(np.rint(x / np.where(largest == 0, 1, -largest / 8)), 7)
    code = torch.from_numpy((step + 8).astype(np.uint8)).flatten(1)
    return (
        code,
        torch.from_numpy(-largest[..., 0] / 8).float(),
        torch.from_numpy(step * -largest / 8).flatten(1).float(),
    )


@wrong("not written")
def stub(weight, group):
    raise NotImplementedError()


@wrong("raises")
def only_what_comes_back(weight, group):
    return _with(weight, group)[2]


@wrong("type")
def codes_as_floats(weight, group):
    code, scale, back = _with(weight, group)
    return code.float(), scale, back


@wrong("type")
def steps_for_codes(weight, group):
    code, scale, back = _with(weight, group)
    return code.to(torch.int8) - 8, scale, back


@wrong("shape")
def groups_left_split(weight, group):
    code, scale, back = _with(weight, group)
    return code.unflatten(1, (-1, group)), scale, back


@wrong("shape")
def axis_of_the_scale_kept(weight, group):
    code, scale, back = _with(weight, group)
    return code, scale[..., None], back


@wrong("changes its input")
def rounds_in_place(weight, group):
    code, scale, back = _with(weight, group)
    weight.copy_(back)
    return code, scale, back


@wrong("each group has the scale of its own largest weight")
def zeros_of_the_right_shape(weight, group):
    return tuple(map(torch.zeros_like, _with(weight, group)))


@wrong("sign lost")
def positive_scales(weight, group):
    return _with(weight, group, scale=lambda largest: largest.abs() / 8)


@wrong("other sign")
def plus_eight_steps(weight, group):
    return _with(weight, group, scale=lambda largest: largest / 8)


@wrong("7 steps")
def as_in_most_libraries(weight, group):
    return _with(weight, group, scale=lambda largest: largest.abs() / 7)


@wrong("-7 steps")
def largest_is_minus_seven(weight, group):
    return _with(weight, group, scale=lambda largest: largest / -7)


@wrong("15 steps from end to end")
@_of
def from_end_to_end(weight, group):
    lowest, highest = weight.unflatten(1, (-1, group)).aminmax(dim=2)
    return (highest - lowest) / 15


@wrong("largest without magnitude")
@_of
def by_the_highest(weight, group):
    return weight.unflatten(1, (-1, group)).amax(dim=2) / -8


@wrong("one scale for a row")
@_of
def one_scale_for_a_row(weight, group):
    return _largest(weight, weight.shape[1]).expand(-1, weight.shape[1] // group) / -8


@wrong("one scale for all")
@_of
def one_scale_for_all(weight, group):
    return _largest(weight.flatten()[None], weight.numel()).expand(len(weight), weight.shape[1] // group) / -8


@wrong("every n-th input")
@_of
def groups_that_are_no_neighbours(weight, group):
    return _largest(weight.unflatten(1, (group, -1)).mT.flatten(1), group) / -8


@wrong("upside down")
def steps_for_a_weight(weight, group):
    return _with(weight, group, scale=lambda largest: -8 / largest)


@wrong("cut, not rounded")
def converted_to_int(weight, group):
    return _with(weight, group, code=lambda x, s: (x / s).to(torch.int8).add(8).clamp(max=15).to(torch.uint8))


@wrong("rounded down")
def rounded_down(weight, group):
    return _with(weight, group, code=lambda x, s: (x / s).floor().add(8).clamp(0, 15).to(torch.uint8))


@wrong("rounded up")
def rounded_up(weight, group):
    return _with(weight, group, code=lambda x, s: (x / s).ceil().add(8).to(torch.uint8))


@wrong("8 not added")
def steps_in_uint8(weight, group):
    return _with(weight, group, code=lambda x, s: (x / s).round().clamp(-8, 7).to(torch.int8).to(torch.uint8))


@wrong("a code never used")
def clamped_to_seven(weight, group):
    return _with(weight, group, code=lambda x, s: (x / s).round().clamp(-7, 7).add(8).to(torch.uint8))


@wrong("sign of the scale lost")
def divided_by_the_magnitude(weight, group):
    return _with(weight, group, code=lambda x, s: _code(x, s.abs()))


@wrong("scale of another group")
def codes_with_scales_tiled(weight, group):
    code = _code(weight, _with(weight, group)[1].repeat(1, group))
    return _with(weight, group, code=lambda x, s: code)


@wrong("the nearest code, and 8 for zero")
def multiplied_by_the_scale(weight, group):
    return _with(weight, group, code=lambda x, s: (x * s).round().clamp(-8, 7).add(8).to(torch.uint8))


@wrong("not quantised")
def gives_the_weights_back(weight, group):
    return _with(weight, group, back=lambda code, s: weight.clone())


@wrong("8 not taken off")
def codes_times_scale(weight, group):
    return _with(weight, group, back=lambda code, s: code * s)


@wrong("wraps around in uint8")
def eight_taken_off_a_uint8(weight, group):
    return _with(weight, group, back=lambda code, s: (code - 8) * s)


@wrong("scale of another group")
def back_with_scales_tiled(weight, group):
    scale = _with(weight, group)[1]
    return _with(weight, group, back=lambda code, s: (code.float() - 8) * scale.repeat(1, group))


@wrong("divided by the scale")
def divided_on_the_way_back(weight, group):
    return _with(weight, group, back=lambda code, s: (code.float() - 8) / s)


@wrong("16 is no code")
def not_cut_off(weight, group):
    return _with(weight, group, code=lambda x, s: (x / torch.where(s == 0, 1, s)).round().add(8).to(torch.uint8))


@wrong("wraps around")
def cut_by_its_bits(weight, group):
    return _with(weight, group, code=lambda x, s: (x / torch.where(s == 0, 1, s)).round().add(8).to(torch.uint8) & 15)


@wrong("and comes back as 7 steps")
def comes_back_from_before_the_cut(weight, group):
    code, scale, _ = _with(weight, group)
    each = _each(scale, group)
    return code, scale, (weight / torch.where(each == 0, 1, each)).round() * each


@wrong("0 / 0")
def zeros_divided_by_zero(weight, group):
    return _with(weight, group, code=lambda x, s: (x / s).round().clamp(-8, 7).add(8).to(torch.uint8))


@wrong("and comes back as zeros")
def from_codes_that_are_nan(weight, group):
    code, scale, _ = _with(weight, group)
    each = _each(scale, group)
    return code, scale, (weight / each).round().clamp(-8, 7) * each


@wrong("its scale is a number")
def infinite_scale_of_zeros(weight, group):
    code, scale, back = _with(weight, group)
    return code, torch.where(scale == 0, torch.inf, scale), back


@wrong("off by half a step at most, or by one where it was cut off")
def a_little_added_to_the_scale(weight, group):
    return _with(weight, group, scale=lambda largest: largest / -8 + 1e-8)


@wrong("off by half a step at most, or by one where it was cut off")
def scale_in_half_precision(weight, group):
    """As gguf stores it: below 6e-8 there is nothing."""
    return _with(weight, group, code=lambda x, s: _code(x, s.half().float()) if s.abs().max() < 1e-3 else _code(x, s))


@wrong("borrowed")
def from_the_package(weight, group):
    """Each group filled up with zeros to the package's own 128."""
    outputs, inputs = weight.shape
    packed, scale = quantise(F.pad(weight.unflatten(1, (-1, group)), (0, 128 - group)).flatten(1))
    back = dequantise(packed, scale, scale.shape[1] * 128).unflatten(1, (-1, 128))[..., :group].flatten(1)
    byte = packed.unflatten(1, (-1, 64))
    code = torch.cat([byte & 15, byte >> 4], dim=2)[..., :group]
    return code.flatten(1), scale, back


EQUIVALENT = {
    "tuple[Tensor, Tensor, Tensor]  ->  tuple": "an annotation computes nothing at all",
    "1  ->  2": "a group of zeros may be divided by any other number",
}
