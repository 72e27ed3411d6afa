"""Dispatch by sorting: each token through its own expert, nothing through the others, and back to token order."""

import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from ..exercise import Card, normal, runs, same
from ..observe import call

CARD = Card("03", "Sort, compute, come back", difficulty=3, importance=5, minutes=25, trains="sparse dispatch, SwiGLU")

HINTS = (
    "If all tokens of one expert lay side by side, that expert would be one matrix product. Which call brings them "
    "together, and how many rows does each expert then have?",
    "order_T = expert_T.argsort(); x_TD[order_T] split by torch.bincount(expert_T) gives one group an expert, some of "
    "them empty. In a group, gate and up are the two halves of x @ gate_up_EDF2[e]; silu goes on the gate.",
    "Row i of the joined results belongs to token order_T[i]. To read it in token order you need the inverse of "
    "order_T, and the argsort of a permutation is its inverse.",
)

ANSWERED_BY = ("minillama4.moe.Experts", "minillama4.moe.MoE", "minillama4.moe.grouped_mm")


def draw(rng: random.Random) -> dict:
    experts, width = rng.sample((5, 6, 8), 2)
    hidden, tokens = rng.choice((7, 9)), rng.randint(15, 19)  # never twice the width, nor each other
    middle = rng.randint(2, experts - 2)  # with another expert than 0 before it, and one after it
    some = [e for e in range(1, experts - 1) if e != middle]  # nobody chooses the first, the last and one between
    x, gate_up = normal(rng, tokens, hidden), normal(rng, experts, hidden, 2 * width) / hidden**0.5
    gates = x[0] @ gate_up[middle]
    gate_up[middle, :, 0] *= -gates[0].sign()  # a gate below 0 and one above it: activations differ in the first alone
    gate_up[middle, :, 1] *= gates[1].sign()
    return {
        "x": x,
        "gate_up": gate_up,
        "down": normal(rng, experts, width, hidden) / width**0.5,
        "sorted": torch.tensor(sorted(_choices(rng, list(range(experts)), tokens))),
        "mixed": _mixed(rng, list(range(experts)), tokens),
        "some": _mixed(rng, some, tokens),
        "one": middle,
        "push": normal(rng, tokens, hidden),
    }


def _choices(rng: random.Random, experts: list[int], tokens: int) -> list[int]:
    """Each of these experts at least once, and one of them much more often: groups of unequal size."""
    often = rng.choice(experts)
    return experts + [often] * 4 + rng.choices(experts, k=tokens - len(experts) - 4)


def _mixed(rng: random.Random, experts: list[int], tokens: int) -> torch.Tensor:
    """In an order that neither sorting nor sorting twice leaves as it is."""
    chosen = _choices(rng, experts, tokens)
    while True:
        rng.shuffle(chosen)
        expert = torch.tensor(chosen)
        order = expert.argsort(stable=True)
        if not torch.equal(expert[order[order]], expert) and not torch.equal(expert[order], expert):
            return expert


def observe(function, inputs: dict) -> dict:
    x, gate_up, down, some = inputs["x"], inputs["gate_up"], inputs["down"], inputs["some"]
    push = {"cotangent": inputs["push"]}
    return (
        call("one", function, x[:1], torch.tensor([inputs["one"]]), gate_up, down)
        | call("sorted", function, x, inputs["sorted"], gate_up, down)
        | call("mixed", function, x, inputs["mixed"], gate_up, down)
        | call("some", function, x, some, gate_up, down, **push, wrt=(0, 2, 3))
        | call("all", function, x, torch.full_like(some, inputs["one"]), gate_up, down)
        | call("poisoned", function, x, some, *poisoned(inputs), **push, wrt=(0,))
    )


def poisoned(inputs: dict) -> list[torch.Tensor]:
    """Both weights, with NaN in every expert that nobody in `some` chose: whatever touches them shows."""
    idle = [e not in inputs["some"].tolist() for e in range(len(inputs["down"]))]
    return [inputs[name].masked_fill(torch.tensor(idle)[:, None, None], float("nan")) for name in ("gate_up", "down")]


def judge(inputs: dict, observed: dict):
    x, gate_up, down, one = inputs["x"], inputs["gate_up"], inputs["down"], inputs["one"]
    sizes = f"gate_up_EDF2 {list(gate_up.shape)}, down_EFD {list(down.shape)}"

    def true(expert: torch.Tensor, rows: torch.Tensor = x, layer: Callable | None = None) -> torch.Tensor:
        return truth(rows, expert, gate_up, down, layer or swiglu)

    first, only = x[:1], torch.tensor([one])
    given = f"x_TD {list(first.shape)}, expert_T [{one}], {sizes}"
    yield from runs(observed, "one", first.shape, given)
    each = torch.cat([true(torch.tensor([e]), first) for e in range(len(down))])  # [E, D]
    yield same(
        "one token goes through its expert's SwiGLU", observed["one/value"], true(only, first), given,
        "Take the weights of the token's expert alone. What are its gate, its up, and what comes of them?",
        {
            "gate and up swapped": (
                true(only, first, lambda h: _halves(h)[0] * F.silu(_halves(h)[1])),
                "The last axis holds the gate first and then up. On which of them is your silu?",
            ),
            "interleaved": (
                true(only, first, lambda h: F.silu(h[0::2]) * h[1::2]),
                "Are gate and up two halves of the last axis, or do they take turns on it?",
            ),
            "no silu": (
                true(only, first, lambda h: _halves(h)[0] * _halves(h)[1]), "Between gate and up: what is not linear?",
            ),
            "sigmoid for silu": (
                true(only, first, lambda h: _halves(h)[0].sigmoid() * _halves(h)[1]),
                "silu(z) for z = 4 is about 3.9. What does your activation give?",
            ),
            "relu for silu": (
                true(only, first, lambda h: _halves(h)[0].relu() * _halves(h)[1]),
                "silu(z) for z = -1 is about -0.27. What does your activation give?",
            ),
            "silu of the product": (
                true(only, first, lambda h: F.silu(_halves(h)[0] * _halves(h)[1])),
                "Is silu taken of the gate alone, or of gate times up?",
            ),
            "gate only": (
                true(only, first, lambda h: F.silu(_halves(h)[0])), "What does the second half of gate_up do in yours?",
            ),
            "expert 0": (each[:1], "Which expert's weights do you use, and which expert did the token choose?"),
            "expert before": (each[one - 1 : one], "Are experts numbered from 0 or from 1 in your function?"),
            "expert after": (each[one + 1 : one + 2], "Where does the first group start in yours, and whose is it?"),
            "all experts": (
                each.sum(0, keepdim=True), "How many experts does one token go through in your function?",
            ),
        },
    )  # fmt: skip

    ordered = inputs["sorted"]
    size = -(-len(x) // len(down))
    right = true(ordered)
    is_last = torch.cat([ordered[1:] != ordered[:-1], torch.tensor([True])])[:, None]
    is_first = is_last.roll(1, dims=0)
    yield same(
        "each group ends where the next one starts", observed["sorted/value"], right,
        f"x_TD {list(x.shape)}, expert_T {ordered.tolist()}, {sizes}",
        "Write down for this expert_T where each expert's rows start and end. What does your function take?",
        {
            "groups of equal size": (
                true(torch.arange(len(x)) // size), "How many tokens chose expert 0, and how many rows do you give it?",
            ),
            "last row of each group lost": (right.masked_fill(is_last, 0), "Is the end of a slice in it or not?"),
            "first row of each group lost": (right.masked_fill(is_first, 0), "At which row does the first one start?"),
            "tokens dropped": (
                right.masked_fill(_place(ordered)[:, None] >= size, 0),
                "What happens to tokens of an expert that is chosen very often? Llama 4 drops none: do you?",
            ),
        },
    )  # fmt: skip

    mixed = inputs["mixed"]
    right, order = true(mixed), mixed.argsort(stable=True)
    unmoved = true(mixed[order])
    yield same(
        "each token gets its own result back", observed["mixed/value"], right,
        f"x_TD {list(x.shape)}, expert_T {mixed.tolist()}, {sizes}",
        "Follow one token: in which row is it after sorting, and in which row of your result does it come out?",
        {
            "left in sorted order": (right[order], "In which order are the rows of your result?"),
            "sorted twice": (
                right[order][order],
                "Sorting sends token order[i] to row i. Does indexing with order once more undo that, or repeat it?",
            ),
            "tokens not sorted": (unmoved, "You sort the experts. Do the tokens move with them?"),
            "tokens only sorted back": (
                unmoved[order.argsort()], "You bring rows back to token order. Did you take them out of it before?",
            ),
        },
    )  # fmt: skip

    some = inputs["some"]
    used, rank = some.unique(return_inverse=True)
    right = true(some)
    given = f"x_TD {list(x.shape)}, expert_T {some.tolist()}, {sizes}"
    yield same(
        "an expert without tokens is skipped", observed["some/value"], right, given,
        f"Only experts {used.tolist()} have tokens. What does your function do for expert 0?",
        {
            "experts renumbered": (
                true(rank), "If expert 0 has no tokens, is your first group still used with the weights of its expert?",
            ),
        },
    )  # fmt: skip
    yield same(
        "one expert may take all tokens", observed["all/value"], true(torch.full_like(some, one)),
        f"x_TD {list(x.shape)}, expert_T all {one}, {sizes}",
        "Is there a place in your function where a group may be too large, or where there must be several?",
    )  # fmt: skip

    leaves = [value.double().requires_grad_() for value in (x, gate_up, down)]
    truth(leaves[0], some, *leaves[1:], swiglu).mul(inputs["push"]).sum().backward()
    asks = "Does every step from the argument to the result stay a tensor: no .detach(), .item(), .data, no_grad?"
    for name, i, leaf in zip(("x", "gate_up", "down"), (0, 2, 3), leaves, strict=True):
        cut = (torch.zeros_like(leaf), f"Which of your lines takes {name} out of the graph that backward follows?")
        yield same(
            f"the gradient reaches {name}", observed[f"some/grad{i}"], leaf.grad, given, asks,
            {f"{name} without gradient": cut}, tolerance=1e-3,
        )  # fmt: skip

    given = f"{given}, with NaN in the weights of all experts but {used.tolist()}"
    asks = "The NaN are in weights that no token chose. Which of your lines multiplies with them all the same?"
    for name, key, want in (("computed", "value", right), ("in the gradient", "grad0", leaves[0].grad)):
        got = observed[f"poisoned/{key}"]
        yield same(
            f"experts that nobody chose are not {name}", got, want, given, asks,
            {"all experts computed": (_with_nan_of(got, want), asks)}, tolerance=1e-3,
        )  # fmt: skip


def _with_nan_of(got: np.ndarray, want: torch.Tensor) -> torch.Tensor:
    """What is expected, but NaN where `got` has it: such a `got` is wrong for its NaN alone."""
    if got.dtype.kind != "f" or got.shape != want.shape:
        return want
    return want.detach().masked_fill(torch.from_numpy(np.isnan(got)), float("nan"))


def _place(expert: torch.Tensor) -> torch.Tensor:
    """[T]: how many earlier tokens chose the same expert."""
    return torch.tensor([int((expert[:t] == expert[t]).sum()) for t in range(len(expert))])


def _halves(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return h[: len(h) // 2], h[len(h) // 2 :]


def swiglu(h: torch.Tensor) -> torch.Tensor:
    """[2F], gate first, then up -> [F]; silu(z) = z / (1 + e^-z)."""
    gate, up = _halves(h)
    return gate / (1 + torch.exp(-gate)) * up


def truth(x: torch.Tensor, expert: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, layer: Callable):
    """Token by token in float64, without any sorting. layer: [2F] -> [F]."""
    x, gate_up, down = x.double(), gate_up.double(), down.double()
    return torch.stack([layer(token @ gate_up[e]) @ down[e] for token, e in zip(x, expert.tolist(), strict=True)])
