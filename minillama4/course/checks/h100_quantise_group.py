"""Quantise a group: int4 codes, one scale for a few neighbours, and how far what comes back may be off."""

import math
import random

import numpy as np
import torch

from ..exercise import Card, Step, different, normal, runs, same
from ..observe import call

CARD = Card("05", "Quantise a group", difficulty=2, importance=5, minutes=20, trains="scales, rounding, error bounds")

HINTS = (
    "Split the inputs axis: [outputs, groups, group]. In each group, find the weight of the largest magnitude, and "
    "keep its sign. Which scale makes exactly -8 steps of it?",
    "scale = largest / -8, negative where the largest weight is positive. Weight / scale is in steps, from -8 to 8. "
    "Round it; there is no +8, so that end is cut to 7; then add 8 to get codes.",
    "In a group of zeros the scale is 0, and 0 / 0 is NaN: divide by torch.where(scale == 0, 1, scale). What comes "
    "back is (code - 8) * scale, taken from codes that are still float32, or made int before the 8 is taken off.",
)

ANSWERED_BY = ("minillama4.cuda.int4.quantise", "minillama4.cuda.int4.dequantise")

PARTS = {"code": "uint8", "scale": "float32", "back": "float32"}  # what the function returns, in this order
SMALL = (-3, -9, -15, -25)  # powers of ten: rows of weights that a scale has to follow
ZERO_GROUP = "a group of zeros stays a group of zeros"


def draw(rng: random.Random) -> dict:
    outputs, groups, group = different(rng, 4, 9, 3)
    zero = _weight(rng, outputs, groups, group)
    zero.unflatten(1, (groups, group))[rng.randrange(outputs), rng.randrange(groups)] = 0
    return {
        "group": group,
        "weight": _weight(rng, outputs, groups, group),
        "opposite": _weight(rng, outputs, groups, group, opposite=True),
        "zero": zero,
        "small": normal(rng, len(SMALL), 3 * 128) * torch.tensor([[10.0**power] for power in SMALL]),
    }


def _weight(rng: random.Random, outputs: int, groups: int, group: int, opposite: bool = False) -> torch.Tensor:
    """[outputs, groups * group] float32, made so that every right way of rounding agrees, and every wrong one shows.

    Nothing is nearly half-way between two codes. In each group one weight is -8 steps, wherever it lies, and the others
    are -7.4 to 6.4; opposite: but for one, which is nearly 8. Both signs of the scale are there.
    """
    rows, first = [], rng.choice((-1, 1))
    for n in range(outputs):
        row = []
        for g in range(groups):
            sign = first * (-1) ** g if n == 0 else rng.choice((-1, 1))
            steps = [rng.randint(-7, 6) + rng.uniform(-0.4, 0.4) for _ in range(group - 1 - opposite)]
            steps += [-8.0] + [rng.uniform(7.6, 7.95)] * opposite
            rng.shuffle(steps)
            size = sign * rng.uniform(0.2, 2)
            row += [size * step for step in steps]
        rows.append(row)
    return torch.tensor(rows)


def observe(function, inputs: dict) -> dict:
    seen = {}
    for name in ("weight", "opposite", "zero", "small"):
        group = 128 if name == "small" else inputs["group"]
        for index, part in enumerate(PARTS):
            seen |= call(f"{name}_{part}", _part(function, index), inputs[name], group)
    return seen


def _part(function, index: int):
    def part(weight, group):
        parts = function(weight, group)
        if not isinstance(parts, (tuple, list)) or len(parts) != 3:
            raise TypeError(f"it returned a {type(parts).__name__}, where the three (code, scale, back) are wanted")
        return parts[index]

    return part


def judge(inputs: dict, observed: dict):
    weight, group = inputs["weight"], inputs["group"]
    outputs, size = weight.shape
    given = f"weight [{outputs}, {size}], group {group}, so {size // group} groups a row"
    for part, dtype in PARTS.items():
        shape = [outputs, size // group] if part == "scale" else [outputs, size]
        yield from runs(observed, f"weight_{part}", shape, f"{given}; looked at: {part}", dtype=dtype)
    yield _scale(weight, group, observed["weight_scale/value"], given)
    yield _code(weight, group, observed["weight_code/value"], given)
    yield _back(weight, group, observed["weight_back/value"], given)

    opposite = inputs["opposite"]
    code, scale, back = truth(opposite, group)
    given = f"{given}, each with a weight of nearly 8 steps"
    unlimited = code + (steps(opposite, scale, group) > 7.5)
    yield from list(runs(observed, "opposite_code", code.shape, given, dtype="uint8"))[:2]
    yield same(
        "what no code reaches is cut off", observed["opposite_code/value"], code, given,
        "Codes are 0 to 15. Which of them does a weight of 7.8 steps get?",
        {
            "16 is no code": (unlimited, "A code has 4 bits. What is your largest code here, and what is it in bits?"),
            "wraps around": (
                unlimited % 16, "A weight next to the largest possible one comes out as the smallest. What is 16 & 15?",
            ),
        },
    )  # fmt: skip
    yield same(
        "and comes back as 7 steps", observed["opposite_back/value"], back, given,
        "Is what you give back made of the codes that you return, or of what they were before they were cut off?",
    )  # fmt: skip
    yield from _zero(inputs["zero"], group, observed)
    yield from _bound(inputs["small"], observed)


def _scale(weight: torch.Tensor, group: int, got: np.ndarray, given: str) -> Step:
    right = truth(weight, group)[1]
    x = weight.double()
    grouped = x.unflatten(1, (-1, group))  # [outputs, groups, group]
    largest = -8 * right
    across = x.unflatten(1, (group, -1)).mT  # of every groups-th input
    return same(
        "each group has the scale of its own largest weight", got, right, given,
        "Take the first group. Which of its weights has the largest magnitude, and how many of your scales is it?",
        {
            "sign lost": (
                largest.abs() / 8,
                "All your scales are positive. If a group's largest weight is positive, how many steps is it then?",
            ),
            "other sign": (
                largest / 8, "How many of your steps is the largest weight: -8, or +8, which has no code?",
            ),
            "7 steps": (largest.abs() / 7, "|largest| / 7 makes steps from -7 to 7. How many codes is that?"),
            "-7 steps": (largest / -7, "How many of your steps is the largest weight, and what is the smallest code?"),
            "15 steps from end to end": (
                (grouped.amax(2) - grouped.amin(2)) / 15,
                "Your scale spreads 16 codes from the smallest weight to the largest. Which code is exactly 0 then?",
            ),
            "largest without magnitude": (
                grouped.amax(2) / -8, "In a group of -3 and 1, which weight needs most steps? Which one do you take?",
            ),
            "one scale for a row": (
                _furthest(x) / -8 * torch.ones_like(right), "How many of your scales in a row differ from each other?",
            ),
            "one scale for all": (
                _furthest(x.flatten()[None]) / -8 * torch.ones_like(right),
                "All your scales are equal. Which axes does your largest weight come from?",
            ),
            "every n-th input": (
                _furthest(across) [..., 0] / -8,
                "Are the weights of your first group neighbours? Into which two sizes is the inputs axis split?",
            ),
            "upside down": (1 / right, "Is your scale weights for a step, or steps for a weight?"),
        },
    )  # fmt: skip


def _code(weight: torch.Tensor, group: int, got: np.ndarray, given: str) -> Step:
    right, scale, _ = truth(weight, group)
    q = steps(weight, scale, group)
    other = scale[:, torch.arange(weight.shape[1]) % scale.shape[1]]  # [outputs, inputs], repeated as a whole
    return same(
        "the nearest code, and 8 for zero", got, right, given,
        "Divide one weight by the scale of its group. Which whole number is nearest, and which code is that?",
        {
            "cut, not rounded": (q.trunc() + 8, "Is 1.9 steps nearer to 1 or to 2? What does conversion to int do?"),
            "rounded down": (q.floor() + 8, "Which whole numbers are nearest to 1.9 and -1.1, and which are yours?"),
            "rounded up": (q.ceil() + 8, "Which whole numbers are nearest to 1.1 and -1.9, and which are yours?"),
            "8 not added": (
                q.round() % 256, "Codes are 0 to 15, and your steps go from -8 to 7. What is -8 in a uint8?",
            ),
            "a code never used": (
                q.round().clamp(-7, 7) + 8, "Is there a 0 among your codes? How many steps is the largest weight?",
            ),
            "sign of the scale lost": (
                q.abs().mul(weight.sign()).round().clamp(-8, 7) + 8,
                "Some of your scales are negative. What is a positive weight, divided by such a scale?",
            ),
            "scale of another group": (
                (weight.double() / other).round().clamp(-8, 7) + 8,
                "The first weights of a row share a scale. Does `repeat` give them one, or one after another?",
            ),
        },
    )  # fmt: skip


def _back(weight: torch.Tensor, group: int, got: np.ndarray, given: str) -> Step:
    code, scale, right = truth(weight, group)
    each = scale.repeat_interleave(group, 1)
    other = scale[:, torch.arange(weight.shape[1]) % scale.shape[1]]
    return same(
        "what comes back is steps times scale", got, right, given,
        "Take one code of yours. How many steps from zero is it, and how long is a step of its group?",
        {
            "not quantised": (weight, "Exactly the weights come back. Could they, from 16 codes and a scale alone?"),
            "8 not taken off": (code * each, "Which weight does code 8 stand for, and what does yours give for it?"),
            "wraps around in uint8": ((code - 8) % 256 * each, "What is 3 - 8 in a uint8?"),
            "scale of another group": (
                (code - 8) * other, "Which scale does the second weight of a row meet in yours, and whose is it?",
            ),
            "divided by the scale": ((code - 8) / each, "Is a step as long as the scale, or as 1 / scale?"),
        },
    )  # fmt: skip


def _zero(weight: torch.Tensor, group: int, observed: dict):
    code, scale, back = truth(weight, group)
    empty = (weight.unflatten(1, (-1, group)) == 0).all(2)  # [outputs, groups]
    given = f"weight {list(weight.shape)}, group {group}, where group {empty.nonzero().tolist()[0]} holds only zeros"
    asks = "What is the scale of that group, and what comes of 0 divided by it?"
    yield from list(runs(observed, "zero_code", code.shape, given, dtype="uint8"))[:2]
    not_a_number = code.masked_fill(empty.repeat_interleave(group, 1), 0)
    yield same(
        ZERO_GROUP, observed["zero_code/value"], code, given, asks,
        {"0 / 0": (not_a_number, "Which code stands for zero? Yours is what is left of a NaN. Which line makes one?")},
    )  # fmt: skip
    yield same("and comes back as zeros", observed["zero_back/value"], back, given, asks)
    scales = observed["zero_scale/value"]
    finite = scales.dtype.kind == "f" and bool(np.isfinite(scales).all())
    yield Step(
        "its scale is a number", finite, given, "infinite or NaN", "any finite number",
        "That scale is stored with the weights. What would whoever multiplies with it get?",
    )  # fmt: skip


def _bound(weight: torch.Tensor, observed: dict):
    """Here every right answer may differ from another (a half rounds either way), but none by more than this."""
    given = f"weight {list(weight.shape)}, group 128, rows of the size of " + ", ".join(f"1e{power}" for power in SMALL)
    yield from runs(observed, "small_back", weight.shape, given)
    back, scale = torch.from_numpy(observed["small_back/value"]).double(), truth(weight, 128)[1]
    error = (back - weight.double()).abs() / scale.abs().repeat_interleave(128, 1)  # in steps
    allowed = torch.where(steps(weight, scale, 128) > 7.5, 1, 0.5)
    wrong = ~(error <= allowed + 1e-3)  # also NaN
    i, j = wrong.nonzero()[0].tolist() if wrong.any() else (0, 0)
    yield Step(
        "off by half a step at most, or by one where it was cut off", not wrong.any(), given,
        f"{float(weight[i, j]):.4g} came back as {float(back[i, j]):.4g}, {float(error[i, j]):.3g} steps away; "
        f"{int(wrong.sum())} of {wrong.numel()} are too far off",
        f"at most {float(allowed[i, j])} steps",
        "Weights of 1e-25 have a scale as well. Is something added to yours, or how small may it get?",
    )  # fmt: skip


def _furthest(x: torch.Tensor) -> torch.Tensor:
    """[..., 1] from [..., n]: what has the largest magnitude, with its sign."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def steps(weight: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """[outputs, inputs] float64: each weight in scales of its group, not rounded."""
    return weight.double() / scale.repeat_interleave(group, 1)


def truth(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(code int64, scale, back), group by group and weight by weight in float64."""
    codes, scales, back = [], [], []
    for row in weight.double().tolist():
        groups = [row[start : start + group] for start in range(0, len(row), group)]
        scales.append([max(values, key=abs) / -8 for values in groups])
        nearest = [
            [min(math.floor(value / scale + 0.5), 7) if scale else 0 for value in values]
            for values, scale in zip(groups, scales[-1], strict=True)
        ]
        codes.append([q + 8 for values in nearest for q in values])
        back.append([q * scale + 0.0 for values, scale in zip(nearest, scales[-1], strict=True) for q in values])
    return torch.tensor(codes), *(torch.tensor(rows, dtype=torch.float64) for rows in (scales, back))
