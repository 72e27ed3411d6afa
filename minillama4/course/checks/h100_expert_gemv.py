"""Expert GEMV: one token times the packed matrix of the expert that was chosen on the device, and of no other."""

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..exercise import Card, Step, close, normal, runs, same
from ..observe import call
from .h100_pack_nibbles import on_the_device

CARD = Card("05", "Expert GEMV", difficulty=4, importance=5, minutes=35,
            trains="packed weights, indices on the device, what is read")  # fmt: skip

HINTS = (
    "First for one matrix [outputs, inputs / 2]: `unflatten` the bytes to [outputs, groups, group / 2], cut out both "
    "halves, and join them to [outputs, groups, group]. In which dtype can 8 be taken off?",
    "`packed_ENB[expert]` asks the host for a number if `expert` has no axes. `index_select` takes an index that stays "
    "on the device: packed_ENB.index_select(0, expert) is [1, outputs, inputs / 2], and likewise the scales.",
    "weight = (code.float() - 8) * scale_NG[..., None] is [outputs, groups, group]; weight.flatten(1) @ x_K is the "
    "rest. Select the expert before anything is converted or multiplied: what is never made for the others costs "
    "nothing.",
)

ANSWERED_BY = ("minillama4.cuda.int4.dequantise", "minillama4.cuda.int4.int4_linear")

FEW, MANY = 3, 12  # experts
# Operations of which the host needs the result: a value, or a shape that depends on values.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")


def draw(rng: random.Random) -> dict:
    experts, outputs, groups, half = rng.sample((4, 5, 6, 7, 9), 4)
    inputs = groups * 2 * half
    middle = rng.randint(2, experts - 2)  # before it is one that is not expert 0, and after it another
    packed = [rng.randint(0, 255) for _ in range(experts * outputs * inputs // 2)]
    scale = normal(rng, experts, outputs, groups)
    scale[0, 0, 0] = -1 - scale[0, 0, 0].abs()  # in a draw of positive ones, a lost sign would go unnoticed
    return {
        "x": normal(rng, inputs),
        "packed": torch.tensor(packed, dtype=torch.uint8).view(experts, outputs, inputs // 2),
        "scale": scale,
        "expert": middle,
        "others": rng.sample([e for e in range(experts) if e != middle], 2),
    }


def observe(function, inputs: dict) -> dict:
    x, packed, scale = inputs["x"], inputs["packed"], inputs["scale"]
    group, alone = len(x) // scale.shape[2], torch.tensor(0)
    chosen = torch.tensor(inputs["expert"])
    seen = (
        call("of_128", function, *_of_128(inputs))
        | call("group", function, x[:group], alone, packed[:1, :, : group // 2], scale[:1, :, :1])
        | call("one", function, x, alone, packed[:1], scale[:1])
        | call("chosen", function, x, chosen, packed, scale)
        | call("poisoned", function, x, chosen, packed, poisoned(inputs))
        | call("recorded", recorded(function), x, chosen, packed, scale)
    )
    for other in inputs["others"]:
        seen |= call(f"other_{other}", function, x, torch.tensor(other), packed, scale)
    for name, experts in (("few", FEW), ("many", MANY)):
        packs = (tensor[:1].expand(experts, -1, -1).clone() for tensor in (packed, scale))
        seen |= call(name, touched(function), x, torch.tensor(1), *packs)
    return seen


def _of_128(inputs: dict) -> tuple[torch.Tensor, ...]:
    """What `function` takes, with the drawn numbers over and over in two groups of 128, the second of another scale."""
    x, scale = inputs["x"], inputs["scale"][:1, :, :1]  # [1, outputs, 1]
    byte = inputs["packed"].flatten().repeat(1 + 128 * scale.shape[1] // inputs["packed"].numel())
    packed = byte[: 128 * scale.shape[1]].view(1, -1, 128)
    return x.repeat(256)[:256], torch.tensor(0), packed, torch.cat([scale, scale - 2], dim=2)


def poisoned(inputs: dict) -> torch.Tensor:
    """The scales, with NaN in every expert but the chosen one: whatever touches them shows."""
    others = torch.arange(len(inputs["scale"])) != inputs["expert"]
    return inputs["scale"].masked_fill(others[:, None, None], float("nan"))


class Watch(TorchDispatchMode):
    """Sees every operation of torch, also those inside others.

    numbers: how many were read and written. A view reads nothing, and what takes rows by an index reads only those.
    An operation that makes the host wait for a value raises an error if `strict`.
    """

    def __init__(self, strict: bool = False):
        super().__init__()
        self.strict, self.numbers = strict, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would load its compiler for the first operation, which takes seconds

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if self.strict and (name in WAITS or name == "index" and any(map(_is_mask, args[1]))):
            raise RuntimeError("the host has to wait for the value of a tensor here")
        out = operation(*args, **(kwargs or {}))
        by_index = name in ("index_select", "index", "gather", "embedding", "take")
        if not any(result.alias_info and not result.alias_info.is_write for result in operation._schema.returns):
            self.numbers += _size(out) + _size(out if by_index else args)
        return out


def _is_mask(index) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def _size(values) -> int:
    if isinstance(values, torch.Tensor):
        return values.numel()
    return sum(map(_size, values)) if isinstance(values, (tuple, list)) else 0


def recorded(function):
    """`function`, where an operation is an error if a CUDA graph could not record it: it needs a value on the host."""

    def record(*arguments):
        with Watch(strict=True):
            return on_the_device(function)(*arguments)

    return record


def touched(function):
    """A function that gives how many numbers `function` reads and writes."""

    def counted(*arguments):
        with Watch() as watch:
            function(*arguments)
        return watch.numbers

    return counted


def judge(inputs: dict, observed: dict):
    x, packed, scale, expert = inputs["x"], inputs["packed"], inputs["scale"], inputs["expert"]
    experts, outputs, groups = scale.shape
    group = len(x) // groups

    few = packed[0, :, : group // 2], scale[0, :, :1]
    given = f"x_K [{group}], expert 0, packed_ENB [1, {outputs}, {group // 2}], scale_ENG [1, {outputs}, 1]: one group"
    yield from _any_group(inputs, observed, given)
    yield from runs(observed, "group", [outputs], given)
    yield _one_group(x[:group], *few, observed["group/value"], given)
    given = (
        f"x_K [{len(x)}], expert 0, packed_ENB [1, {outputs}, {len(x) // 2}], scale_ENG [1, {outputs}, {groups}]: "
        f"{groups} groups of {group}"
    )
    yield from runs(observed, "one", [outputs], given)
    yield _groups(x, packed[0], scale[0], observed["one/value"], given)

    given = f"x_K [{len(x)}], packed_ENB {list(packed.shape)}, scale_ENG {list(scale.shape)}, expert"
    each = torch.stack([truth(x, *both) for both in zip(packed, scale, strict=True)])  # [experts, outputs]
    yield from runs(observed, "chosen", [outputs], f"{given} {expert}")
    yield same(
        "the chosen expert's matrix", observed["chosen/value"], each[expert], f"{given} {expert}",
        "Which bytes and which scales does expert 0 have, and where do those of the next expert start?",
        {
            "expert 0": (each[0], "What does your function do with `expert`?"),
            "expert before": (each[expert - 1], "Are experts numbered from 0 or from 1 in your function?"),
            "expert after": (each[expert + 1], "Are experts numbered from 0 or from 1 in your function?"),
            "all experts added": (each.sum(0), "How many experts does a token go through in your function?"),
            "scales of expert 0": (
                truth(x, packed[expert], scale[0]), "You have the right bytes. Whose scales do they meet?",
            ),
            "bytes of expert 0": (
                truth(x, packed[0], scale[expert]), "You have the right scales. Whose bytes do they meet?",
            ),
        },
    )  # fmt: skip
    for other in inputs["others"]:
        yield same(
            "whichever that is", observed[f"other_{other}/value"], each[other], f"{given} {other}, after another one",
            "Does your function keep anything from one call to the next?",
        )  # fmt: skip

    got = observed["poisoned/value"]
    yield same(
        "scales of other experts are not touched", got, each[expert],
        f"{given} {expert}, with NaN in the scales of all others",
        "Every NaN is in a scale of an expert that was not chosen. Which of your lines multiplies with them?",
        {
            "others computed": (
                each[expert].masked_fill(torch.from_numpy(np.isnan(got)), float("nan"))
                if got.dtype.kind == "f" else each[expert],
                "The NaN are in experts that were not chosen. What is 0 times NaN, in your sum over experts?",
            ),
        },
    )  # fmt: skip
    for name in ("few", "many"):
        yield from list(runs(observed, name, [], f"{given} 1", dtype="int"))[:1]
    least, most = (int(observed[f"{name}/value"]) for name in ("few", "many"))
    yield Step(
        "more experts are no more work", most - least < packed[0].numel(), f"expert 1 of {MANY}, instead of {FEW}",
        f"{most:,} numbers read and written, instead of {least:,}", f"no more than with {FEW} experts: {least:,}",
        "Which of your lines makes something of all experts' bytes, and which line takes the chosen one out of it?",
        "all experts computed",
    )  # fmt: skip

    error = str(observed["recorded/error"])
    yield Step(
        "nobody asks the host which expert it is", not error, f"{given} {expert}, watched as if on a GPU", error,
        "operations that can be recorded",
        "The line shown needs the value of a tensor. Which way of taking a row leaves it on the device?",
        "waits for the host",
    )  # fmt: skip


def _any_group(inputs: dict, observed: dict, given: str) -> Iterator[Step]:
    """For whoever is right for groups of 128, and not for the single drawn one."""
    x, _, packed, scale = _of_128(inputs)
    group = len(inputs["x"]) // inputs["scale"].shape[2]
    here = truth(inputs["x"][:group], inputs["packed"][0, :, : group // 2], inputs["scale"][0, :, :1])
    fails = not close(observed["group/value"], here.numpy(), 1e-4)
    by_heart = fails and close(observed["of_128/value"], truth(x, packed[0], scale[0]).numpy(), 1e-4)
    if by_heart:
        yield Step(
            "any even size of group", False, given, str(observed["group/error"]) or "something else",
            f"right for a group of {group}, as for one of 128",
            f"Groups of 128 come out right, and this one of {group} does not. Which line of yours has a size written "
            "into it, and which shape would tell that size?", "groups of 128",
        )  # fmt: skip


def _one_group(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, got: np.ndarray, given: str) -> Step:
    """x [group], packed [outputs, group / 2], scale [outputs, 1]."""
    x64, scale64 = x.double(), scale.double()
    low, high = packed.long() % 16, packed.long() // 16
    code = torch.cat([low, high], dim=1)

    def times_x(code: torch.Tensor, scale: torch.Tensor = scale64) -> torch.Tensor:
        return (code * scale) @ x64

    return same(
        "a group: both halves of its bytes, less 8, times the scale", got, truth(x, packed, scale), given,
        "Take one output with x = [1, 0, 0, ...]. Which four bits of which byte is that, and which number is it?",
        {
            "halves exchanged": (times_x(torch.cat([high, low], 1) - 8), "Which half of byte 0 meets x[0] in yours?"),
            "neighbours": (
                times_x(torch.stack([low, high], -1).flatten(1) - 8),
                f"Which number of x does the high half of byte 0 meet: x[1], or x[{len(x) // 2}]?",
            ),
            "8 not taken off": (times_x(code), "Which weight does code 8 stand for, and what is it in yours?"),
            "wraps around in uint8": (times_x((code - 8) % 256), "What is 3 - 8 in a uint8?"),
            "a sign bit": (times_x(code - 16 * (code > 7)), "Is weight -1 stored as code 15, or as code 7?"),
            "the shift keeps the sign": (
                times_x(torch.cat([low, high - 16 * (high > 7)], 1) - 8),
                "How do the upper bits of a byte above 127 come down: with zeros behind them, or with ones?",
            ),
            "no scale": (times_x(code - 8, torch.ones_like(scale64)), "Where do the scales come in?"),
            "divided by the scale": (times_x(code - 8, 1 / scale64), "Is a code of 9 one scale, or one by the scale?"),
            "size of the scale": (
                times_x(code - 8, scale64.abs()), "A scale may be negative. What does your function make of its sign?",
            ),
        },
    )  # fmt: skip


def _groups(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, got: np.ndarray, given: str) -> Step:
    """x [inputs], packed [outputs, inputs / 2], scale [outputs, groups]."""
    groups, x64, scale64 = scale.shape[1], x.double(), scale.double()
    byte = packed.long().unflatten(1, (groups, -1))
    code = torch.cat([byte % 16, byte // 16], dim=2) - 8  # [outputs, groups, group]
    whole = torch.cat([packed.long() % 16, packed.long() // 16], dim=1) - 8  # [outputs, inputs]
    group = code.shape[2]
    each = scale64.repeat_interleave(group, 1)
    return same(
        "each group has its own bytes and its own scale", got, truth(x, packed, scale), given,
        "Where in a row of bytes does the second group start, and which numbers of x does it meet?",
        {
            "halves of the row": (
                (whole * each) @ x64,
                f"The high half of byte 0: is it number {group // 2}, or number {len(x) // 2} of the row?",
            ),
            "one scale for a row": (
                (code.flatten(1) * scale64[:, :1]) @ x64, "How many of the scales of a row does your function use?",
            ),
            "scales in turns": (
                (code.flatten(1) * scale64.repeat(1, group)) @ x64,
                "The first numbers of a row share a scale. Which scale does the second number meet in yours?",
            ),
            "scales added": (
                (code.flatten(1) * scale64.sum(1, keepdim=True)) @ x64,
                "Does a group meet its own scale in yours, or those of all groups?",
            ),
        },
    )  # fmt: skip


def truth(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[outputs] float64, nibble by nibble. x [inputs], packed [outputs, inputs / 2], scale [outputs, groups]."""
    groups, x = scale.shape[1], x.double().tolist()
    group = len(x) // groups
    out = []
    for row, scales in zip(packed.tolist(), scale.double().tolist(), strict=True):
        total = 0.0
        for k, value in enumerate(x):
            g, place = divmod(k, group)
            byte = row[g * (group // 2) + place % (group // 2)]
            code = byte % 16 if place < group // 2 else byte // 16
            total += (code - 8) * scales[g] * value
        out.append(total)
    return torch.tensor(out, dtype=torch.float64)
