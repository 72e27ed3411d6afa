"""Answers to `moe-sort-dispatch`."""

import torch
import torch.nn.functional as F
from bank import right, wrong

from minillama4.moe import Experts, grouped_mm


def _ffn(x, gate_up, down):
    """[rows, D] through one expert."""
    gate, up = (x @ gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down


def _by_groups(x_TD, expert_T, gate_up, down, ffn=_ffn):
    """Sorted, computed group by group, and back."""
    order_T = expert_T.argsort(stable=True)
    groups = x_TD[order_T].split(torch.bincount(expert_T).tolist())
    rows = [ffn(group, gate_up[e], down[e]) for e, group in enumerate(groups) if len(group)]
    return torch.empty_like(x_TD).index_copy(0, order_T, torch.cat(rows))


@right
def by_selecting_rows(x_TD, expert_T, gate_up, down):
    y_TD = torch.zeros_like(x_TD)
    for expert in expert_T.unique().tolist():
        rows = (expert_T == expert).nonzero().flatten()
        y_TD = y_TD.index_add(0, rows, _ffn(x_TD[rows], gate_up[expert], down[expert]))
    return y_TD


@right
def by_gathering_weights(x_TD, expert_T, gate_up, down):
    """No expert too many, but a copy of two whole matrices for each token."""
    gate, up = torch.bmm(x_TD[:, None], gate_up[expert_T]).chunk(2, dim=-1)
    return torch.bmm(F.silu(gate) * up, down[expert_T])[:, 0]


@right
def by_ends_and_scatter(x_TD, expert_T, gate_up, down):
    values, order_T = torch.sort(expert_T)
    ends = torch.searchsorted(values, torch.arange(len(down)), right=True).tolist()
    y_TD, start = torch.empty_like(x_TD), 0
    for expert, end in enumerate(ends):
        if end > start:
            y_TD[order_T[start:end]] = _ffn(x_TD[order_T[start:end]], gate_up[expert], down[expert])
        start = end
    return y_TD


@wrong("not written")
def stub(x_TD, expert_T, gate_up, down):
    raise NotImplementedError()


@wrong("one token goes through its expert's SwiGLU")
def identity(x_TD, expert_T, gate_up, down):
    return x_TD.clone()


@wrong("raises")
def weights_transposed(x_TD, expert_T, gate_up, down):
    return _by_groups(x_TD, expert_T, gate_up, down, lambda x, g, d: _ffn(x, g.T, d.T))


@wrong("shape")
def one_token_squeezed(x_TD, expert_T, gate_up, down):
    return _by_groups(x_TD, expert_T, gate_up, down).squeeze()


@wrong("changes its input")
def results_over_the_tokens(x_TD, expert_T, gate_up, down):
    if x_TD.requires_grad:
        x_TD = x_TD.clone()
    for expert in range(len(down)):
        rows = expert_T == expert
        x_TD[rows] = _ffn(x_TD[rows], gate_up[expert], down[expert])
    return x_TD


@wrong("gate and up swapped")
def silu_on_up(x_TD, expert_T, gate_up, down):
    def ffn(x, gate_up, down):
        up, gate = (x @ gate_up).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ down

    return _by_groups(x_TD, expert_T, gate_up, down, ffn)


@wrong("interleaved")
def gate_and_up_interleaved(x_TD, expert_T, gate_up, down):
    def ffn(x, gate_up, down):
        h = x @ gate_up
        return (F.silu(h[:, 0::2]) * h[:, 1::2]) @ down

    return _by_groups(x_TD, expert_T, gate_up, down, ffn)


def _activated(activation):
    def ffn(x, gate_up, down):
        return activation(*(x @ gate_up).chunk(2, dim=-1)) @ down

    return ffn


@wrong("no silu")
def linear(x_TD, expert_T, gate_up, down):
    return _by_groups(x_TD, expert_T, gate_up, down, _activated(lambda gate, up: gate * up))


@wrong("sigmoid for silu")
def glu(x_TD, expert_T, gate_up, down):
    return _by_groups(x_TD, expert_T, gate_up, down, _activated(lambda gate, up: gate.sigmoid() * up))


@wrong("relu for silu")
def reglu(x_TD, expert_T, gate_up, down):
    return _by_groups(x_TD, expert_T, gate_up, down, _activated(lambda gate, up: gate.relu() * up))


@wrong("one token goes through its expert's SwiGLU")
def geglu(x_TD, expert_T, gate_up, down):
    return _by_groups(x_TD, expert_T, gate_up, down, _activated(lambda gate, up: F.gelu(gate) * up))


@wrong("silu of the product")
def silu_of_the_product(x_TD, expert_T, gate_up, down):
    return _by_groups(x_TD, expert_T, gate_up, down, _activated(lambda gate, up: F.silu(gate * up)))


@wrong("gate only")
def up_forgotten(x_TD, expert_T, gate_up, down):
    return _by_groups(x_TD, expert_T, gate_up, down, _activated(lambda gate, up: F.silu(gate)))


@wrong("expert 0")
def always_the_first_expert(x_TD, expert_T, gate_up, down):
    return _ffn(x_TD, gate_up[0], down[0])


@wrong("expert before")
def numbered_from_one(x_TD, expert_T, gate_up, down):
    return _by_groups(x_TD, expert_T, gate_up.roll(1, 0), down.roll(1, 0))


@wrong("expert after")
def one_expert_too_far(x_TD, expert_T, gate_up, down):
    return _by_groups(x_TD, expert_T, gate_up.roll(-1, 0), down.roll(-1, 0))


@wrong("all experts")
def summed_over_all_experts(x_TD, expert_T, gate_up, down):
    return sum(_ffn(x_TD, gate_up[e], down[e]) for e in range(len(down)))


@wrong("groups of equal size")
def equal_groups(x_TD, expert_T, gate_up, down):
    if len(x_TD) == 1:
        return _by_groups(x_TD, expert_T, gate_up, down)
    order_T = expert_T.argsort(stable=True)
    rows = [_ffn(group, gate_up[e], down[e]) for e, group in enumerate(x_TD[order_T].chunk(len(down)))]
    return torch.empty_like(x_TD).index_copy(0, order_T, torch.cat(rows))


def _with_bounds(x_TD, expert_T, gate_up, down, bounds):
    """Group by group with slices; `bounds` makes (start, end) of what they should be."""
    if len(x_TD) == 1:
        return _ffn(x_TD, gate_up[int(expert_T)], down[int(expert_T)])
    order_T = expert_T.argsort(stable=True)
    ends = torch.bincount(expert_T, minlength=len(down)).cumsum(0).tolist()
    y_TD = torch.zeros_like(x_TD)
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        start, end = bounds(start, end)
        y_TD[start:end] = _ffn(x_TD[order_T[start:end]], gate_up[expert], down[expert])
    return y_TD[order_T.argsort()]


@wrong("last row of each group lost")
def ends_one_too_early(x_TD, expert_T, gate_up, down):
    return _with_bounds(x_TD, expert_T, gate_up, down, lambda start, end: (start, end - 1))


@wrong("first row of each group lost")
def starts_one_too_late(x_TD, expert_T, gate_up, down):
    return _with_bounds(x_TD, expert_T, gate_up, down, lambda start, end: (start + 1, end))


@wrong("tokens dropped")
def with_a_capacity(x_TD, expert_T, gate_up, down):
    capacity = -(-len(x_TD) // len(down))
    return _with_bounds(x_TD, expert_T, gate_up, down, lambda start, end: (start, min(end, start + capacity)))


@wrong("each group ends where the next one starts")
def counts_taken_as_ends(x_TD, expert_T, gate_up, down):
    if len(x_TD) == 1:
        return _by_groups(x_TD, expert_T, gate_up, down)
    order_T, counts = expert_T.argsort(stable=True), torch.bincount(expert_T, minlength=len(down)).tolist()
    y_TD = torch.zeros_like(x_TD)
    for expert, (start, end) in enumerate(zip([0, *counts], counts, strict=False)):
        y_TD[order_T[start:end]] = _ffn(x_TD[order_T[start:end]], gate_up[expert], down[expert])
    return y_TD


def _rows_in_order(x_TD, expert_T, gate_up, down):
    """The results of x's rows in their order, by experts that are sorted."""
    return _by_groups(x_TD, expert_T.sort().values, gate_up, down)


@wrong("left in sorted order")
def never_comes_back(x_TD, expert_T, gate_up, down):
    return _rows_in_order(x_TD[expert_T.argsort(stable=True)], expert_T, gate_up, down)


@wrong("sorted twice")
def order_for_its_inverse(x_TD, expert_T, gate_up, down):
    order_T = expert_T.argsort(stable=True)
    return _rows_in_order(x_TD[order_T], expert_T, gate_up, down)[order_T]


@wrong("sorted twice")
def scattered_by_the_inverse(x_TD, expert_T, gate_up, down):
    order_T = expert_T.argsort(stable=True)
    rows = _rows_in_order(x_TD[order_T], expert_T, gate_up, down)
    return torch.empty_like(rows).index_copy(0, order_T.argsort(), rows)


@wrong("tokens not sorted")
def only_the_experts_sorted(x_TD, expert_T, gate_up, down):
    return _rows_in_order(x_TD, expert_T, gate_up, down)


@wrong("tokens only sorted back")
def only_sorted_back(x_TD, expert_T, gate_up, down):
    return _rows_in_order(x_TD, expert_T, gate_up, down)[expert_T.argsort(stable=True).argsort()]


@wrong("an expert without tokens is skipped")
def first_row_of_each_group(x_TD, expert_T, gate_up, down):
    if len(x_TD) == 1:
        return _by_groups(x_TD, expert_T, gate_up, down)
    values, order_T = expert_T.sort(stable=True)
    starts = [int((values == expert).nonzero()[0]) for expert in range(len(down))]
    groups = x_TD[order_T].tensor_split(starts[1:])
    rows = torch.cat([_ffn(group, gate_up[e], down[e]) for e, group in enumerate(groups)])
    return rows[order_T.argsort()]


@wrong("experts renumbered")
def groups_counted_without_the_empty_ones(x_TD, expert_T, gate_up, down):
    if len(x_TD) == 1:
        return _by_groups(x_TD, expert_T, gate_up, down)
    _, counts = expert_T.unique(return_counts=True)
    order_T = expert_T.argsort(stable=True)
    rows = [_ffn(group, gate_up[e], down[e]) for e, group in enumerate(x_TD[order_T].split(counts.tolist()))]
    return torch.cat(rows)[order_T.argsort()]


@wrong("one expert may take all tokens")
def room_for_a_number_of_rows(x_TD, expert_T, gate_up, down):
    """Padded groups with room for three times the average and more: enough until one expert takes all."""
    return _with_bounds(x_TD, expert_T, gate_up, down, lambda start, end: (start, min(end, start + len(x_TD) - 1)))


@wrong("x without gradient")
def detached_as_in_metas_code(x_TD, expert_T, gate_up, down):
    return _by_groups(x_TD.detach(), expert_T, gate_up, down)


@wrong("the gradient reaches x")
def all_detached(x_TD, expert_T, gate_up, down):
    return _by_groups(x_TD, expert_T, gate_up, down).detach()


@wrong("gate_up without gradient")
def gate_up_detached(x_TD, expert_T, gate_up, down):
    return _by_groups(x_TD, expert_T, gate_up.data, down)


@wrong("down without gradient")
def down_detached(x_TD, expert_T, gate_up, down):
    return _by_groups(x_TD, expert_T, gate_up, down.data)


@wrong("all experts computed")
def dense_with_a_mask(x_TD, expert_T, gate_up, down):
    mine_TE = F.one_hot(expert_T, len(down)).type_as(x_TD)
    return sum(mine_TE[:, e, None] * _ffn(x_TD, gate_up[e], down[e]) for e in range(len(down)))


@wrong("all experts computed")
def dense_with_zeroed_inputs(x_TD, expert_T, gate_up, down):
    """As Meta's and Hugging Face's code do it: an expert gives 0 for a token of zeros."""
    mine_ET = F.one_hot(expert_T, len(down)).type_as(x_TD).T
    gate, up = torch.bmm(mine_ET[..., None] * x_TD, gate_up).chunk(2, dim=-1)
    return torch.bmm(F.silu(gate) * up, down).sum(0)


@wrong("all experts computed")
def dense_and_one_picked(x_TD, expert_T, gate_up, down):
    """The values are right, and only backward meets what should never have been computed."""
    y_ETD = torch.stack([_ffn(x_TD, gate_up[e], down[e]) for e in range(len(down))])
    return y_ETD[expert_T, torch.arange(len(x_TD))]


@wrong("borrowed")
def from_the_package(x_TD, expert_T, gate_up, down):
    experts = Experts(len(down), x_TD.shape[1], down.shape[1])
    del experts.gate_up_proj, experts.down_proj
    experts.gate_up_proj, experts.down_proj = gate_up, down
    return experts(x_TD, expert_T)


@wrong("borrowed")
def with_the_packages_product(x_TD, expert_T, gate_up, down):
    order_T, counts = expert_T.argsort(stable=True), torch.bincount(expert_T, minlength=len(down)).tolist()
    gate, up = grouped_mm(x_TD[order_T], gate_up, counts).chunk(2, dim=-1)
    return grouped_mm(F.silu(gate) * up, down, counts)[order_T.argsort()]


EQUIVALENT = {}
