"""Answers to `h100-expert-gemv`."""

import torch
import torch.nn.functional as F
from bank import right, wrong

from minillama4.cuda.int4 import dequantise, int4_linear


def _take(every, expert):
    """[E, ...] -> [...], without asking which."""
    return every.index_select(0, expert.reshape(1)).squeeze(0)


def _codes(packed, groups):
    """[N, B] -> [N, K] from 0 to 15, float32."""
    byte = packed.unflatten(-1, (groups, -1))
    return torch.cat([byte & 15, byte >> 4], dim=-1).flatten(-2).float()


def _weight(packed, scale, codes=_codes, shift=8, spread=lambda scale, group: scale.repeat_interleave(group, -1)):
    """[N, B] and [N, G] -> [N, K]. codes, spread: how both become [N, K]; shift: what is taken off a code."""
    code = codes(packed, scale.shape[-1]) - shift
    return code * spread(scale, code.shape[-1] // scale.shape[-1])


def _with(take_packed=_take, take_scale=_take, **how):
    """An answer that is right but for this part of it."""

    def answer(x_K, expert, packed_ENB, scale_ENG):
        return _weight(take_packed(packed_ENB, expert), take_scale(scale_ENG, expert), **how) @ x_K

    return answer


def _by(take):
    """An answer that is right but for how it takes one expert of all: take(every, expert)."""
    return _with(take, take)


def _all(x, packed, scale):
    """[E, N]: what every expert makes of x."""
    return torch.stack([_weight(*both) @ x for both in zip(packed, scale, strict=True)])


@right
def by_sums_of_groups(x_K, expert, packed_ENB, scale_ENG):
    """8 times the sum of x is taken off once a group, and the two halves are never joined."""
    packed, scale = F.embedding(expert, packed_ENB.flatten(1)), scale_ENG[expert[None]][0]
    outputs, groups = scale.shape
    byte = packed.view(outputs, groups, -1)
    low, high = x_K.view(groups, 2, -1).unbind(1)
    total = torch.einsum("ngj,gj->ng", (byte % 16).float(), low) + torch.einsum(
        "ngj,gj->ng", (byte // 16).float(), high
    )
    return ((total - 8 * x_K.view(groups, -1).sum(1)) * scale).sum(1)


@right
def by_gathering_and_a_table(x_K, expert, packed_ENB, scale_ENG):
    byte = packed_ENB.gather(0, expert.view(1, 1, 1).expand(1, *packed_ENB.shape[1:]))[0].int()
    scale = scale_ENG.take_along_dim(expert.view(1, 1, 1), dim=0)[0]
    table = torch.arange(-8.0, 8.0, device=x_K.device)
    pairs = torch.stack([table[byte & 0xF], table[byte >> 4]])  # [2, N, B]
    x = x_K.view(scale.shape[1], 2, -1).transpose(0, 1).flatten(1)  # [2, B]
    products = (pairs * x[:, None]).sum(0)  # [N, B]
    return (products.unflatten(1, (scale.shape[1], -1)).sum(2) * scale).sum(1)


@wrong("not written")
def stub(x_K, expert, packed_ENB, scale_ENG):
    raise NotImplementedError()


scales_not_spread = wrong("raises")(_with(spread=lambda scale, group: scale))


@wrong("groups of 128")
def groups_of_128_whatever_comes(x_K, expert, packed_ENB, scale_ENG):
    byte = _take(packed_ENB, expert).unflatten(1, (-1, 64))
    return _weight(byte.flatten(1), _take(scale_ENG, expert)) @ x_K


@wrong("groups of 128")
def as_many_groups_as_128_go_into_inputs(x_K, expert, packed_ENB, scale_ENG):
    """No error: it finds no group at all."""
    weight = _weight(_take(packed_ENB, expert), _take(scale_ENG, expert))
    whole = len(x_K) // 128 * 128
    return weight[:, :whole] @ x_K[:whole]


each_scale_128_times = wrong("groups of 128")(_with(spread=lambda scale, group: scale.repeat_interleave(128, -1)))


@wrong("shape")
def axis_of_the_expert_kept(x_K, expert, packed_ENB, scale_ENG):
    return _weight(packed_ENB[expert[None]], scale_ENG[expert[None]]) @ x_K


@wrong("type")
def in_float64(x_K, expert, packed_ENB, scale_ENG):
    return _weight(_take(packed_ENB, expert), _take(scale_ENG, expert).double()) @ x_K.double()


@wrong("changes its input")
def cut_in_place(x_K, expert, packed_ENB, scale_ENG):
    y_N = _with()(x_K, expert, packed_ENB, scale_ENG)
    packed_ENB &= 15
    return y_N


@wrong("a group: both halves of its bytes, less 8, times the scale")
def zeros_of_the_right_shape(x_K, expert, packed_ENB, scale_ENG):
    return x_K.new_zeros(packed_ENB.shape[1])


def _high_first(packed, groups):
    byte = packed.unflatten(-1, (groups, -1))
    return torch.cat([byte >> 4, byte & 15], dim=-1).flatten(-2).float()


def _neighbours(packed, groups):
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).float()


def _signed_bytes(packed, groups):
    return _codes(packed.view(torch.int8), groups)


def _halves_of_the_row(packed, groups):
    return torch.cat([packed & 15, packed >> 4], dim=-1).float()


def _kept_in_uint8(packed, groups):
    return (_codes(packed, groups).byte() - 8).float()


def _signed_codes(packed, groups):
    code = _codes(packed, groups)
    return torch.where(code > 7, code - 16, code)


high_half_first = wrong("halves exchanged")(_with(codes=_high_first))
neighbours_in_a_byte = wrong("neighbours")(_with(codes=_neighbours))
eight_not_taken_off = wrong("8 not taken off")(_with(shift=0))
eight_taken_off_a_uint8 = wrong("wraps around in uint8")(_with(codes=_kept_in_uint8, shift=0))
twos_complement = wrong("a sign bit")(_with(codes=_signed_codes, shift=0))
shift_of_a_signed_byte = wrong("the shift keeps the sign")(_with(codes=_signed_bytes))
no_scale = wrong("no scale")(_with(spread=lambda scale, group: 1))
divided_by_the_scale = wrong("divided by the scale")(
    _with(spread=lambda scale, group: 1 / scale.repeat_interleave(group, 1))
)
scale_without_its_sign = wrong("size of the scale")(
    _with(spread=lambda scale, group: scale.abs().repeat_interleave(group, 1))
)
eight_for_the_whole_sum = wrong("a group: both halves of its bytes, less 8, times the scale")(_with(shift=7.5))
halves_of_the_row = wrong("halves of the row")(_with(codes=_halves_of_the_row))
first_scale_of_a_row = wrong("one scale for a row")(_with(spread=lambda scale, group: scale[:, :1]))
scales_in_turns = wrong("scales in turns")(_with(spread=lambda scale, group: scale.repeat(1, group)))
all_scales_of_a_row = wrong("scales added")(_with(spread=lambda scale, group: scale.sum(1, keepdim=True)))
mean_of_the_scales = wrong("each group has its own bytes and its own scale")(
    _with(spread=lambda scale, group: scale.mean(1, keepdim=True))
)


@wrong("expert 0")
@_by
def always_expert_0(every, expert):
    return every[0]


@wrong("expert before")
@_by
def numbered_from_1(every, expert):
    return _take(every, (expert - 1).clamp(min=0))


@wrong("expert after")
@_by
def one_too_far(every, expert):
    return _take(every, (expert + 1) % len(every))


first_scales = wrong("scales of expert 0")(_with(take_scale=lambda every, expert: every[0]))
first_bytes = wrong("bytes of expert 0")(_with(take_packed=lambda every, expert: every[0]))


@wrong("all experts added")
def all_experts_added(x_K, expert, packed_ENB, scale_ENG):
    return _all(x_K, packed_ENB, scale_ENG).sum(0)


@wrong("whichever that is")
def remembers(x_K, expert, packed_ENB, scale_ENG, seen={}):  # noqa: B006
    """The first expert that this token was sent to, as a recording would."""
    first = seen.setdefault((float(x_K.sum()), len(packed_ENB)), expert)
    return _with()(x_K, first, packed_ENB, scale_ENG)


def _asks(take):
    """An answer that waits for the host to learn which expert it is."""
    return wrong("waits for the host")(_by(take))


by_item = _asks(lambda every, expert: every[expert.item()])
by_int = _asks(lambda every, expert: every[int(expert)])
by_a_tensor_without_axes = _asks(lambda every, expert: every[expert])
by_select = _asks(lambda every, expert: every.select(0, expert))
by_tolist = _asks(lambda every, expert: every[expert.tolist()])
by_numpy = _asks(lambda every, expert: every[int(expert.numpy())])
on_the_cpu = _asks(lambda every, expert: every[expert.cpu()])
by_a_mask = _asks(lambda every, expert: every[torch.arange(len(every), device=every.device) == expert][0])
by_a_list = _asks(lambda every, expert: every.unbind(0)[expert])


@_asks
def by_comparing(every, expert):
    return next(each for e, each in enumerate(every) if e == expert)


@wrong("others computed")
def all_experts_weighted(x_K, expert, packed_ENB, scale_ENG):
    """A sum over experts, times 0 but for one."""
    hot_E = F.one_hot(expert, len(packed_ENB)).float()
    return hot_E @ _all(x_K, packed_ENB, scale_ENG)


@wrong("others computed")
def scales_weighted(x_K, expert, packed_ENB, scale_ENG):
    hot_E = (torch.arange(len(scale_ENG), device=expert.device) == expert).float()
    return _weight(_take(packed_ENB, expert), torch.einsum("e,eng->ng", hot_E, scale_ENG)) @ x_K


@wrong("all experts computed")
def all_experts_and_then_one(x_K, expert, packed_ENB, scale_ENG):
    return _take(_all(x_K, packed_ENB, scale_ENG), expert)


@wrong("all experts computed")
def all_bytes_unpacked(x_K, expert, packed_ENB, scale_ENG):
    groups = scale_ENG.shape[2]
    codes = _codes(packed_ENB.flatten(0, 1), groups).unflatten(0, packed_ENB.shape[:2])
    return _weight(_take(codes, expert), _take(scale_ENG, expert), codes=lambda code, groups: code) @ x_K


@wrong("all experts computed")
def bytes_weighted(x_K, expert, packed_ENB, scale_ENG):
    """Whole numbers, so no NaN can tell; but all bytes are read."""
    hot_E = (torch.arange(len(packed_ENB), device=expert.device) == expert).to(torch.uint8)
    return _weight((packed_ENB * hot_E[:, None, None]).sum(0).byte(), _take(scale_ENG, expert)) @ x_K


def _filled_up(x_K, packed, scale):
    """Groups of 128, as the package has them: code 8 and zeros of x behind each half of a group."""
    groups = scale.shape[1]
    more = 64 - packed.shape[1] // groups
    packed = F.pad(packed.unflatten(1, (groups, -1)), (0, more), value=0x88).flatten(1)
    return F.pad(x_K.view(groups, 2, -1), (0, more)).flatten(), packed, scale


@wrong("borrowed")
def from_the_package(x_K, expert, packed_ENB, scale_ENG):
    return int4_linear(*_filled_up(x_K, _take(packed_ENB, expert), _take(scale_ENG, expert)))


@wrong("borrowed")
def dequantised_by_the_package(x_K, expert, packed_ENB, scale_ENG):
    x, packed, scale = _filled_up(x_K, _take(packed_ENB, expert), _take(scale_ENG, expert))
    return dequantise(packed, scale, len(x)) @ x


EQUIVALENT = {}
