"""Chunked attention: block diagonal and causal, and the blocks off the diagonal are never computed."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..exercise import Card, Step, normal, runs, same
from ..observe import call

CARD = Card("02", "Chunked attention", difficulty=3, importance=5, minutes=25, trains="chunks, reshapes, no big mask")

HINTS = (
    "A chunk knows nothing of any other, just as a row of a batch knows nothing of any other row. Which reshape makes "
    "each chunk a row of its own?",
    "[batch, heads, tokens, dim] becomes [batch, heads, chunks, chunk_size, dim]. The scores of all chunks are then "
    "one product, [..., chunk_size, chunk_size], and one small causal mask serves them all.",
    "Fill the last chunk up with zeros at its end: these keys are later than every real query, so the causal mask "
    "hides them already. Join the chunks again and cut off what you have added.",
)

ANSWERED_BY = ("minillama4.attention.chunked_attention", "minillama4.attention.Attention.attend")

CHUNKS = 4  # whole ones, before the short one
LONG = 481  # tokens: whatever has tokens x tokens numbers stands out, and still fits anywhere


def draw(rng: random.Random) -> dict:
    batch, heads = rng.sample((2, 3), 2)
    chunk_size, dim = rng.randint(7, 9), rng.randint(5, 6)
    tokens = CHUNKS * chunk_size + rng.randint(2, chunk_size - 5)  # so few that equal chunks would all be shorter
    names = ("q", "k", "v", "push")
    return {name: normal(rng, batch, heads, tokens, dim) for name in names} | {"chunk_size": chunk_size}


def observe(function, inputs: dict) -> dict:
    q, k, v, size = inputs["q"], inputs["k"], inputs["v"], inputs["chunk_size"]

    def first(count: int) -> list:
        return [x[:, :, :count] for x in (q, k, v)] + [size]

    long = torch.ones(1, 1, LONG, 4)
    return (
        call("one", function, *first(size))
        | call("whole", function, *first(CHUNKS * size))
        | call("all", function, q, k, v, size, cotangent=inputs["push"], wrt=(0, 1, 2))
        | call("less", function, *first(size - 1))
        | call("poisoned", function, q, *poisoned(inputs), size)
        | call("long", largest_made_by(function), long, long, long, size)
    )


def poisoned(inputs: dict) -> list[torch.Tensor]:
    """k and v with NaN in the whole second chunk: whatever multiplies them shows."""
    size, token = inputs["chunk_size"], torch.arange(inputs["q"].shape[2])
    return [inputs[name].masked_fill((token // size == 1)[:, None], float("nan")) for name in ("k", "v")]


def largest_made_by(function):
    """A function that gives the largest number of numbers in any tensor that `function` makes on its way."""

    class Watch(TorchFunctionMode):
        largest = 0

        def __torch_function__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                self.largest = max(self.largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    def watched(*arguments):
        with Watch() as watch:
            function(*arguments)
        return watch.largest

    return watched


def judge(inputs: dict, observed: dict):
    q, k, v, size = inputs["q"], inputs["k"], inputs["v"], inputs["chunk_size"]
    batch, heads, tokens, dim = q.shape
    whole = CHUNKS * size

    def over(count: int, sees, **how) -> torch.Tensor:
        """Attention among the first `count` tokens; sees(i, j): may query i see key j?"""
        i, j = torch.arange(count)[:, None], torch.arange(count)
        return attention(*(x[:, :, :count] for x in (q, k, v)), sees(i, j), **how)

    def causal(i, j):
        return j <= i

    def cut(number):
        """Causal attention among tokens with the same number(i)."""
        return lambda i, j: (j <= i) & (number(i) == number(j))

    chunked = cut(lambda i: i // size)

    given = f"q, k, v [batch, heads, tokens, dim] = {[batch, heads, size, dim]}, chunk_size {size}"
    yield from runs(observed, "one", [batch, heads, size, dim], given)
    yield same(
        "inside a chunk: causal attention", observed["one/value"], over(size, causal), given,
        "All tokens are in one chunk. Write down the scores of the second query and its weights. Do they add up to 1?",
        {
            "no scale": (
                over(size, causal, scale=1), "A score is a sum over dim. How large is it for a large dim, in yours?",
            ),
            "scale 1 / dim": (
                over(size, causal, scale=1 / dim), "A sum of dim random products grows like which power of dim?",
            ),
            "scale of another axis": (
                over(size, causal, scale=size**-0.5), "Over which axis does a score add up, and how long is that axis?",
            ),
            "not causal": (over(size, lambda i, j: i + j >= 0), "Does a query see keys that come after it in yours?"),
            "sees only later ones": (over(size, lambda i, j: j >= i), "Which triangle of the scores do you keep?"),
            "softmax over queries": (
                over(size, causal, axis=-2), "Over which axis do the weights of one query add up to 1?",
            ),
            "mean of the values": (
                over(size, causal, scale=0), "All keys weigh the same in yours. Where do the scores come in?",
            ),
            "own value": (v[:, :, :size], "Each token sees itself alone in yours. Which others may it see?"),
        },
    )  # fmt: skip

    given = f"q, k, v {[batch, heads, whole, dim]}, chunk_size {size}"
    right, border = over(whole, chunked), f"Query {size} is the first of its chunk."
    yield same(
        "each chunk by itself", observed["whole/value"], right, given,
        f"Write down which keys the queries {size - 1}, {size} and {size + 1} see. How many are they each?",
        {
            "no chunks": (over(whole, causal), f"{border} Which keys does it see in yours?"),
            "sliding window": (
                over(whole, lambda i, j: (j <= i) & (j > i - size)), f"{border} Does it see the key right before it?",
            ),
            "one chunk back": (
                over(whole, lambda i, j: (j <= i) & (i // size - j // size <= 1)),
                f"{border} Is it also the last of another?",
            ),
            "not causal": (
                over(whole, lambda i, j: i // size == j // size), "Inside one chunk, does a query see later keys?",
            ),
            "strided": (
                over(whole, cut(lambda i: i % CHUNKS)),
                f"Which tokens share a chunk after your reshape: neighbours, or every {CHUNKS}th one?",
            ),
            "border one too late": (
                over(whole, cut(lambda i: (i - 1) // size)),
                f"Is token {size} the last one of the first chunk, or the first one of the second?",
            ),
            "heads and chunks mixed": (
                right.unflatten(2, (CHUNKS, size)).transpose(1, 2).reshape(right.shape),
                "In which order are the axes before your last reshape, and in which after your first?",
            ),
        },
    )  # fmt: skip

    given = f"q, k, v {list(q.shape)}, chunk_size {size}"
    yield from runs(observed, "all", q.shape, given)
    right, rest, pad, short = over(tokens, chunked), tokens - whole, -tokens % size, -(-tokens // (CHUNKS + 1))
    is_rest = (torch.arange(tokens) >= whole)[:, None]
    i, j = torch.arange(tokens + pad)[:, None], torch.arange(tokens + pad)
    front = [F.pad(x, (0, 0, pad, 0)) for x in (q, k, v)]
    yield same(
        "the last chunk may be short", observed["all/value"], right, given,
        f"{rest} tokens are left for the last chunk. Which keys does the first of them see, and which the last?",
        {
            "rest left out": (
                right.masked_fill(is_rest, 0),
                f"The last {rest} tokens came out as 0. Which of your lines computes them?",
            ),
            "rest sees itself alone": (
                torch.where(is_rest, v, right), f"Do the last {rest} tokens see each other in yours?",
            ),
            "rest sees everything": (
                over(tokens, lambda i, j: (j <= i) & ((i // size == j // size) | (i >= whole))),
                f"Where does the chunk of the last {rest} tokens start, and which keys do you give them?",
            ),
            "rest joins the chunk before": (
                over(tokens, cut(lambda i: (i // size).clamp_max(CHUNKS - 1))),
                f"How many chunks do {tokens} tokens make, and how many tokens has your last one?",
            ),
            "rest not causal": (
                over(tokens, lambda i, j: (i // size == j // size) & ((j <= i) | (i >= whole))),
                "Inside the last chunk, does a query see later keys?",
            ),
            "counted from the end": (
                over(tokens, cut(lambda i: (i + pad) // size)),
                "Which chunk is the short one in yours, the first or the last?",
            ),
            "padding in front": (
                attention(*front, chunked(i, j))[:, :, pad:],
                "On which side do you fill up? A key of zeros has score 0: which weight does it get?",
            ),
            "equal chunks": (
                over(tokens, cut(lambda i: i // short)),
                "How many tokens has each of your chunks? Is that chunk_size?",
            ),
        },
    )  # fmt: skip

    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    attention(*leaves, chunked(i, j)[:tokens, :tokens]).mul(inputs["push"]).sum().backward()
    for n, (name, leaf) in enumerate(zip("qkv", leaves, strict=True)):
        yield same(
            f"the gradient reaches {name}", observed[f"all/grad{n}"], leaf.grad, given,
            "Does every step from the argument to the result stay a tensor: no .detach(), .item(), .data, no_grad?",
            {f"{name} without gradient": (leaf.grad * 0, f"Which of your lines takes {name} out of the graph?")},
            tolerance=1e-3,
        )  # fmt: skip

    given = f"q, k, v {[batch, heads, size - 1, dim]}, chunk_size {size}"
    yield from runs(observed, "less", [batch, heads, size - 1, dim], given)
    yield same(
        "fewer tokens than chunk_size are one chunk", observed["less/value"], over(size - 1, causal), given,
        "How many whole chunks are there, and what does your function do then?",
    )  # fmt: skip

    given = f"q, k, v {list(q.shape)}, chunk_size {size}, with NaN in keys and values {size} to {2 * size - 1}"
    yield from runs(observed, "poisoned", q.shape, given)
    second = (torch.arange(tokens) // size == 1)[:, None]  # its own tokens see the NaN, and may come out as anything
    got = np.where(second, 0, observed["poisoned/value"])
    want = right.masked_fill(second, 0)
    yield same(
        "keys of other chunks are not touched", got, want, given,
        "Follow one token of the last chunk: which keys and values does it meet?",
        {
            "other chunks masked": (
                want.masked_fill(torch.from_numpy(np.isnan(got)), float("nan")),
                "A hidden key has weight 0, and 0 times NaN is NaN. Why are they multiplied at all?",
            ),
        },
    )  # fmt: skip

    given = f"q, k, v {[1, 1, LONG, 4]}, chunk_size {size}"
    yield from list(runs(observed, "long", [], given, dtype="int"))[:1]  # what is returned was looked at above
    largest = int(observed["long/value"])
    yield Step(
        "no tensor has tokens x tokens numbers", largest < LONG**2 // 4, given, f"a tensor of {largest:,} numbers",
        f"far fewer than {LONG} x {LONG} = {LONG**2:,}",
        "Which of your tensors has the tokens on two of its axes? How large is it for 10 million tokens?",
        "tokens x tokens",
    )  # fmt: skip


def attention(q, k, v, sees: torch.Tensor, scale: float | None = None, axis: int = -1) -> torch.Tensor:
    """In float64, from the definition, with a mask of all pairs: sees [tokens, tokens]. axis: of the softmax."""
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double())
    weights = sees * torch.exp(scores * (q.shape[-1] ** -0.5 if scale is None else scale))
    return torch.einsum("bhij,bhjd->bhid", weights / weights.sum(axis, keepdim=True), v.double())
