"""Answers to `irope-temperature`."""

import math

import torch
from bank import right, wrong


def is_nope(layer, interval):
    return (layer + 1) % interval == 0


def on_nope(factor):
    """An answer that scales by `factor(positions [tokens], scale, floor_scale)` on the right layers."""

    def temper(q, positions, layer, nope_interval, scale, floor_scale):
        if not is_nope(layer, nope_interval):
            return q
        return (q * factor(positions, scale, floor_scale)[:, None, None]).type_as(q)

    return temper


def on_layers(condition):
    """An answer with the right factor, on layers with `condition(layer, interval)`."""

    def temper(q, positions, layer, nope_interval, scale, floor_scale):
        return q * released(positions, scale, floor_scale)[:, None, None] if condition(layer, nope_interval) else q

    return temper


def released(positions, scale, floor_scale):
    return 1 + scale * torch.log1p(torch.floor((positions.float() + 1) / floor_scale))


def logarithm(inside):
    return on_nope(lambda positions, scale, floor_scale: 1 + scale * inside(positions.float(), floor_scale).log())


@right
def one_query_at_a_time(q, positions, layer, nope_interval, scale, floor_scale):
    if layer % nope_interval != nope_interval - 1:
        return q
    out = torch.empty_like(q)
    for i, p in enumerate(positions.tolist()):
        out[:, i] = q[:, i] * (1 + scale * math.log(1 + (p + 1) // floor_scale))
    return out


@right
def a_factor_of_one_for_the_others(q, positions, layer, nope_interval, scale, floor_scale):
    """As Meta's: the steps in float32."""
    nope = layer in range(nope_interval - 1, 1000, nope_interval)
    factor = released(positions, scale if nope else 0.0, floor_scale)
    return torch.einsum("bthd,t->bthd", q.float(), factor).to(q.dtype)


@wrong("not written")
def stub(q, positions, layer, nope_interval, scale, floor_scale):
    raise NotImplementedError()


@wrong("raises")
def no_axes_for_heads_and_channels(q, positions, layer, nope_interval, scale, floor_scale):
    return q * released(positions, scale, floor_scale) if is_nope(layer, nope_interval) else q


@wrong("raises")
def for_one_position(q, positions, layer, nope_interval, scale, floor_scale):
    return q * (1 + scale * math.log(1 + (positions + 1) // floor_scale))


@wrong("raises")
def a_list_of_layers_that_ends(q, positions, layer, nope_interval, scale, floor_scale):
    nope = [False] * (nope_interval - 1) + [True]
    return q * released(positions, scale, floor_scale)[:, None, None] if nope[layer] else q


@wrong("type")
def nothing_for_a_rope_layer(q, positions, layer, nope_interval, scale, floor_scale):
    if is_nope(layer, nope_interval):
        return q * released(positions, scale, floor_scale)[:, None, None]


@wrong("type")
def promoted(q, positions, layer, nope_interval, scale, floor_scale):
    return q * released(positions, scale, floor_scale)[:, None, None] if is_nope(layer, nope_interval) else q


@wrong("shape")
def the_last_query_alone(q, positions, layer, nope_interval, scale, floor_scale):
    return q[:, -1:] * released(positions[-1:], scale, floor_scale)


@wrong("changes its input")
def in_place(q, positions, layer, nope_interval, scale, floor_scale):
    if is_nope(layer, nope_interval):
        q *= released(positions, scale, floor_scale)[:, None, None]
    return q


@wrong("identity")
def identity(q, positions, layer, nope_interval, scale, floor_scale):
    return q


@wrong("identity")
def the_released_floor_scale(q, positions, layer, nope_interval, scale, floor_scale):
    return q * released(positions, scale, 8192)[:, None, None] if is_nope(layer, nope_interval) else q


every_layer = wrong("every layer")(on_layers(lambda layer, interval: True))
rope_layers = wrong("RoPE layers")(on_layers(lambda layer, interval: (layer + 1) % interval))
torchtitan = wrong("first of each group")(on_layers(lambda layer, interval: layer % interval == 0))
every_fourth = wrong("interval by heart")(on_layers(lambda layer, interval: (layer + 1) % 4 == 0))
the_first_one = wrong("one layer only")(on_layers(lambda layer, interval: layer + 1 == interval))
quotient = wrong("all after the first")(on_layers(lambda layer, interval: (layer + 1) // interval))
counted_twice = wrong("one layer early")(on_layers(lambda layer, interval: (layer + 2) % interval == 0))
one_layer_late = wrong("NoPE layers scale their queries, and RoPE layers leave them alone")(
    on_layers(lambda layer, interval: layer > 1 and (layer - 1) % interval == 0)
)

no_plus_one = wrong("no plus one")(logarithm(lambda p, size: 1 + (p / size).floor()))
no_floor = wrong("no floor")(logarithm(lambda p, size: 1 + (p + 1) / size))
rounded = wrong("rounded")(logarithm(lambda p, size: 1 + ((p + 1) / size).round()))
ceil = wrong("one step early")(logarithm(lambda p, size: 1 + ((p + 1) / size).ceil()))
plus_one_after_the_floor = wrong("one step early")(logarithm(lambda p, size: 1 + (p // size + 1)))
log1p_and_one = wrong("one too many")(logarithm(lambda p, size: 1 + (1 + (p + 1) // size)))
minus_infinity = wrong("no one inside the logarithm")(logarithm(lambda p, size: (p + 1) // size))
in_the_chunk = wrong("position in the chunk")(logarithm(lambda p, size: 1 + (p % size + 1) // size))

log10 = wrong("log10")(on_nope(lambda p, scale, size: 1 + scale * (1 + (p + 1) // size).log10()))
log2 = wrong("log2")(on_nope(lambda p, scale, size: 1 + scale * (1 + (p + 1) // size).log2()))
no_logarithm = wrong("no logarithm")(on_nope(lambda p, scale, size: 1 + scale * ((p + 1) // size)))
floor_last = wrong("floor of the logarithm")(
    on_nope(lambda p, scale, size: 1 + scale * ((p + 1) // size).log1p().floor())
)
scale_outside = wrong("scale outside")(on_nope(lambda p, scale, size: scale * (1 + ((p + 1) // size).log1p())))
scale_inside = wrong("scale inside")(on_nope(lambda p, scale, size: 1 + (scale * ((p + 1) // size)).log1p()))
zero_at_first = wrong("no one outside")(on_nope(lambda p, scale, size: scale * ((p + 1) // size).log1p()))
ignores_scale = wrong("ignores scale")(on_nope(lambda p, scale, size: 1 + ((p + 1) // size).log1p()))
divided = wrong("divided")(on_nope(lambda p, scale, size: 1 / released(p, scale, size)))
twice = wrong("twice")(on_nope(lambda p, scale, size: released(p, scale, size).square()))
one_for_all = wrong("one factor for the call")(
    on_nope(lambda p, scale, size: released(p.max().repeat(len(p)), scale, size))
)
the_first_for_all = wrong("first position for all")(
    on_nope(lambda p, scale, size: released(p[:1].expand(len(p)), scale, size))
)
index_in_the_call = wrong("index in the call")(
    on_nope(lambda p, scale, size: released(torch.arange(len(p)), scale, size))
)
from_the_start_on = wrong("consecutive positions")(
    on_nope(lambda p, scale, size: released(p[0] + torch.arange(len(p)), scale, size))
)
in_the_dtype_of_positions = wrong("whole number")(
    on_nope(lambda p, scale, size: released(p, scale, size).to(p.dtype))
)  # fmt: skip


@wrong("added")
def added(q, positions, layer, nope_interval, scale, floor_scale):
    return q + released(positions, scale, floor_scale)[:, None, None] if is_nope(layer, nope_interval) else q


@wrong("attention's own scale")
def divided_by_the_root_of_dim(q, positions, layer, nope_interval, scale, floor_scale):
    factor = released(positions, scale, floor_scale)[:, None, None] / math.sqrt(q.shape[-1])
    return q * factor if is_nope(layer, nope_interval) else q


@wrong("a query is scaled by 1 + scale ln(1 + floor((p + 1) / floor_scale))")
def of_the_head(q, positions, layer, nope_interval, scale, floor_scale):
    heads = torch.arange(q.shape[2])
    return q * released(positions[0] + heads, scale, floor_scale)[:, None] if is_nope(layer, nope_interval) else q


@wrong("the gradient reaches q")
def cut_off(q, positions, layer, nope_interval, scale, floor_scale):
    return q.detach() * released(positions, scale, floor_scale)[:, None, None] if is_nope(layer, nope_interval) else q


@wrong("the factors of the released models, up to position 10,485,759")
def a_table_of_a_million(q, positions, layer, nope_interval, scale, floor_scale):
    positions = positions.clamp(max=1_048_575)
    return q * released(positions, scale, floor_scale)[:, None, None] if is_nope(layer, nope_interval) else q


@wrong("positions in float16")
def in_the_dtype_of_q(q, positions, layer, nope_interval, scale, floor_scale):
    steps = torch.floor((positions.to(q.dtype) + 1) / floor_scale)
    return q * (1 + scale * torch.log1p(steps))[:, None, None] if is_nope(layer, nope_interval) else q


EQUIVALENT = {}
