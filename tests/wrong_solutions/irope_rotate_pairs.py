"""Answers to `irope-rotate-pairs`."""

import math

import torch
from bank import right, wrong

from minillama4.attention import rotate, rotation


def _frequencies(theta, dim):
    """[dim / 2], from fast to slow."""
    return theta ** (-torch.arange(0, dim, 2) / dim)


def _turn(x, angle):
    """x: [batch, tokens, heads, dim], angle: [tokens, dim / 2]; all of it right."""
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).type_as(x)


def _angle(x, positions, theta):
    return positions[:, None] * _frequencies(theta, x.shape[-1])


def _mixed(x, angle, mix):
    """`_turn` with another way to put first, second, cos and sin together."""
    first, second = x.float()[..., 0::2], x.float()[..., 1::2]
    pair = mix(first, second, angle.cos()[:, None], angle.sin()[:, None])
    return torch.stack(pair, dim=-1).flatten(-2).type_as(x)


@right
def with_complex_numbers_in_float64(x, positions, theta):
    angle = torch.outer(positions.double(), _frequencies(theta, x.shape[-1]).double())
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2).to(x.dtype)


@right
def with_two_by_two_matrices(x, positions, theta):
    angle = _angle(x, positions, theta)
    matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(-1, (2, 2))
    return torch.einsum("tpij,bthpj->bthpi", matrix, x.float().unflatten(-1, (-1, 2))).flatten(-2).to(x.dtype)


@right
def with_the_neighbour_on_each_channel(x, positions, theta):
    """As GPT-J does it; cos and sin may come down to bfloat16 before they meet x, if only the angle did not."""
    angle = _angle(x, positions, theta).repeat_interleave(2, dim=-1)[:, None]
    neighbour = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * angle.cos().to(x.dtype) + neighbour * angle.sin().to(x.dtype)


@wrong("not written")
def stub(x, positions, theta):
    raise NotImplementedError()


@wrong("identity")
def identity(x, positions, theta):
    return x.clone()


@wrong("a pair turns by its position")
def shape_only(x, positions, theta):
    return torch.zeros_like(x)


@wrong("raises")
def heads_forgotten(x, positions, theta):
    angle = _angle(x, positions, theta)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], -1)


@wrong("shape")
def pairs_not_joined(x, positions, theta):
    return _turn(x, _angle(x, positions, theta)).unflatten(-1, (-1, 2))


@wrong("changes its input")
def in_place(x, positions, theta):
    cos, sin = (f(_angle(x, positions, theta))[:, None] for f in (torch.cos, torch.sin))
    first, second = x[..., 0::2].clone(), x[..., 1::2].clone()
    x[..., 0::2] = first * cos - second * sin
    x[..., 1::2] = first * sin + second * cos
    return x


@wrong("the other way")
def turned_back(x, positions, theta):
    return _turn(x, -_angle(x, positions, theta))


@wrong("the other way")
def minus_on_the_wrong_half(x, positions, theta):
    angle = _angle(x, positions, theta)
    return _mixed(x, angle, lambda a, b, cos, sin: (a * cos + b * sin, -a * sin + b * cos))


@wrong("sin and cos swapped")
def sin_and_cos_swapped(x, positions, theta):
    angle = _angle(x, positions, theta)
    return _mixed(x, angle, lambda a, b, cos, sin: (a * sin - b * cos, a * cos + b * sin))


@wrong("mirrored")
def mirrored(x, positions, theta):
    angle = _angle(x, positions, theta)
    return _mixed(x, angle, lambda a, b, cos, sin: (a * cos + b * sin, a * sin - b * cos))


@wrong("no minus")
def no_minus(x, positions, theta):
    angle = _angle(x, positions, theta)
    return _mixed(x, angle, lambda a, b, cos, sin: (a * cos + b * sin, a * sin + b * cos))


@wrong("two minuses")
def two_minuses(x, positions, theta):
    angle = _angle(x, positions, theta)
    return _mixed(x, angle, lambda a, b, cos, sin: (a * cos - b * sin, a * sin - b * cos))


@wrong("one position too far")
def counted_from_one(x, positions, theta):
    return _turn(x, _angle(x, positions + 1, theta))


@wrong("one position too few")
def counted_from_minus_one(x, positions, theta):
    return _turn(x, _angle(x, positions - 1, theta))


@wrong("index for position")
def index_in_the_call(x, positions, theta):
    """What goes wrong in decode, where a token's index in the call is always 0."""
    return _turn(x, _angle(x, torch.arange(x.shape[1]), theta))


@wrong("degrees")
def degrees(x, positions, theta):
    return _turn(x, torch.deg2rad(_angle(x, positions, theta)))


@wrong("frequency of the next pair")
def pairs_counted_from_one(x, positions, theta):
    dim = x.shape[-1]
    return _turn(x, positions[:, None] * theta ** (-torch.arange(2, dim + 1, 2) / dim))


@wrong("odd numbers for even ones")
def odd_exponents(x, positions, theta):
    dim = x.shape[-1]
    return _turn(x, positions[:, None] * theta ** (-torch.arange(1, dim, 2) / dim))


def _half_split(x, angle):
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).type_as(x)


@wrong("half-split pairs")
def half_split(x, positions, theta):
    return _half_split(x, _angle(x, positions, theta))


@wrong("half-split pairs")
def rotate_half(x, positions, theta):
    """The function that Llama 1 to 3 have on the Hub."""
    angle = _angle(x, positions, theta)
    angle = torch.cat([angle, angle], dim=-1)[:, None]
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()


@wrong("results side by side")
def not_interleaved_again(x, positions, theta):
    y = _turn(x, _angle(x, positions, theta))
    return torch.cat([y[..., 0::2], y[..., 1::2]], dim=-1)


@wrong("taken from the halves")
def only_interleaved_again(x, positions, theta):
    first, second = _half_split(x, _angle(x, positions, theta)).chunk(2, dim=-1)
    return torch.stack([first, second], dim=-1).flatten(-2)


@wrong("only the first pair")
def only_the_first_pair(x, positions, theta):
    y = _turn(x, _angle(x, positions, theta))
    return torch.cat([y[..., :2], x[..., 2:]], dim=-1)


@wrong("one frequency")
def one_frequency(x, positions, theta):
    return _turn(x, _angle(x, positions, 1.0))


@wrong("exponent i / dim")
def half_the_exponent(x, positions, theta):
    return _turn(x, positions[:, None] * _frequencies(theta, x.shape[-1]).sqrt())


@wrong("exponent reaches -1")
def exponents_with_both_ends(x, positions, theta):
    return _turn(x, positions[:, None] * theta ** -torch.linspace(0, 1, x.shape[-1] // 2))


@wrong("exponent 4i / dim")
def doubled_twice(x, positions, theta):
    return _turn(x, positions[:, None] * _frequencies(theta, x.shape[-1]) ** 2)


@wrong("slowest first")
def slowest_first(x, positions, theta):
    return _turn(x, positions[:, None] * _frequencies(theta, x.shape[-1]).flip(0))


@wrong("pair i turns theta ** (-2i / dim) radians a token")
def frequency_grows(x, positions, theta):
    """Angles of some millions, of which float32 leaves nothing that a message could be written for."""
    return _turn(x, positions[:, None] / _frequencies(theta, x.shape[-1]))


@wrong("theta 10,000")
def theta_of_the_first_llamas(x, positions, theta):
    return _turn(x, _angle(x, positions, 1.0 if theta == 1 else 10_000))


@wrong("theta 500,000")
def theta_as_a_constant(x, positions, theta):
    return _turn(x, _angle(x, positions, 1.0 if theta == 1 else 500_000))


@wrong("pair i turns theta ** (-2i / dim) radians a token")
def a_decay_of_its_own(x, positions, theta):
    pair = torch.arange(x.shape[-1] // 2)
    return _turn(x, positions[:, None] / (1 + (theta - 1) * pair))


@wrong("pair i turns theta ** (-2i / dim) radians a token")
def wavelengths_forgot_the_base(x, positions, theta):
    pair = torch.arange(0, x.shape[-1], 2) / x.shape[-1]
    return _turn(x, positions[:, None] * torch.exp(-pair * math.log10(theta)))


@wrong("x without gradient")
def detached(x, positions, theta):
    return _turn(x.data, _angle(x, positions, theta)) + 0 * x


@wrong("the gradient turns back")
def cut_off(x, positions, theta):
    return _turn(x, _angle(x, positions, theta)).detach()


@wrong("angles are float32 when x is bfloat16")
def angles_in_the_dtype_of_x(x, positions, theta):
    return _turn(x, positions.to(x.dtype)[:, None] * _frequencies(theta, x.shape[-1]).to(x.dtype))


@wrong("angles are float32 when x is bfloat16")
def frequencies_in_the_dtype_of_x(x, positions, theta):
    return _turn(x, positions[:, None] * _frequencies(theta, x.shape[-1]).to(x.dtype).float())


@wrong("type")
def stays_in_float32(x, positions, theta):
    return _turn(x.float(), _angle(x, positions, theta))


@wrong("borrowed")
def from_the_package(x, positions, theta):
    return rotate(x, rotation(positions, _frequencies(theta, x.shape[-1])))


EQUIVALENT = {}
