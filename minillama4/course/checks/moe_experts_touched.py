"""How many experts a batch wakes up, on average: why a sparse layer is cheap for one token and not for many."""

import math
import random
from fractions import Fraction

from ..exercise import Card, runs, same
from ..observe import call

CARD = Card("03", "Experts touched", difficulty=2, importance=4, minutes=15, trains="expected values, memory traffic")

HINTS = (
    "Do not count experts: look at a single one. How likely is it that one token does not choose it, and that none of "
    "the tokens does?",
    "A token draws k different experts of E, so it misses a given one with probability 1 - k / E. Tokens choose "
    "independently of each other.",
    "The expected number is the sum of the probabilities, one an expert, whether they depend on each other or not: E "
    "times (1 - probability that all tokens miss it).",
)

ANSWERED_BY = ("minillama4.budget.experts_touched",)


def draw(rng: random.Random) -> dict:
    experts = rng.randint(9, 14)
    k = rng.randint(2, 3)
    one, more = rng.randint(5, 8), rng.randint(3, 4)  # tokens: enough to collide, too few to touch every expert
    return {
        "single": (experts, 1, k),
        "top1": (experts, one, 1),
        "topk": (experts, more, k),
        "none": (experts, 0, k),
        "all": (experts, more, experts),
        "scout_8": (16, 8, 1),  # fact: 6.5
        "scout_64": (16, 64, 1),  # fact: 15.7
        "maverick_64": (128, 64, 1),
    }


def observe(function, inputs: dict) -> dict:
    seen = {}
    for name, arguments in inputs.items():
        seen |= call(name, function, *arguments)
    return seen


def judge(inputs: dict, observed: dict):
    experts, tokens, k = inputs["single"]
    given = f"num_experts {experts}, tokens 1, experts_per_token {k}"
    yield from runs(observed, "single", (), given, dtype="float")
    yield same(
        "one token touches its own experts, no two the same", observed["single/value"], float(k), given,
        "One token draws experts_per_token different experts. How many have been touched?",
        {
            "probability": (k / experts, "Is yours the share of the experts, or how many they are?"),
            "ignores experts_per_token": (1.0, "How many experts does one token get here? Where is that in yours?"),
            "with replacement": (
                experts * (1 - (1 - 1 / experts) ** k), "Yours lets a token draw the same expert twice. Can it?",
            ),
            "limit of many experts": (
                experts * (1 - math.exp(-k / experts)), "Is exp(-x) equal to 1 - x, or close to it? For which x?",
            ),
            "untouched": (float(experts - k), "Did you count the experts that are touched, or those that are not?"),
            "one token too many": (
                expected(experts, 2, k), "With one token, how many times is the chance of being missed multiplied?",
            ),
            "one token too few": (
                0.0, "With one token, how many times is the chance of being missed multiplied? Zero times?",
            ),
            "all experts": (float(experts), "Does one token touch all experts? Where is it said how many it gets?"),
        },
        tolerance=1e-6,
    )  # fmt: skip
    experts, tokens, _ = inputs["top1"]
    given = f"num_experts {experts}, tokens {tokens}, experts_per_token 1"
    right = expected(experts, tokens, 1)
    yield from runs(observed, "top1", (), given, dtype="float")
    yield same(
        "tokens that choose the same expert touch it once", observed["top1/value"], right, given,
        "Two tokens, two experts, one each: four cases. How many experts are touched in each, and on average?",
        {
            "every token another expert": (
                float(min(experts, tokens)), "Do tokens agree who takes which expert? Two may choose the same: then?",
            ),
            "ignores tokens": (1.0, "What does your function do with tokens?"),
            "rounded": (float(round(right)), "An average need not be a whole number. Which line rounds it?"),
            "times tokens": (
                experts * (1 - tokens * (1 - 1 / experts)), "T chances of being missed: are they added, or multiplied?",
            ),
        },
        tolerance=1e-6,
    )  # fmt: skip
    experts, tokens, k = inputs["topk"]
    given = f"num_experts {experts}, tokens {tokens}, experts_per_token {k}"
    right = expected(experts, tokens, k)
    yield from runs(observed, "topk", (), given, dtype="float")
    yield same(
        "several experts a token, all different", observed["topk/value"], right, given,
        "How likely is it that one token, with its k different experts, misses a given one?",
        {
            "k times too many": (k * expected(experts, tokens, 1), "Can your result be more than num_experts?"),
        },
        tolerance=1e-6,
    )  # fmt: skip
    edges = (
        ("none", "no tokens, no experts", "What is a number to the power 0? What does yours give for an empty batch?"),
        ("all", "a dense layer: every token touches all", "If k is num_experts, how likely is it to miss one?"),
        ("scout_8", "Scout, 8 tokens: 6.5 of 16", "Was it right for other numbers? What is special about these?"),
        ("scout_64", "Scout, 64 tokens: 15.7 of 16", "Was it right for other numbers? What is special about these?"),
        ("maverick_64", "Maverick, 64 tokens: 50.5 of 128", "Does your function know a number of experts by heart?"),
    )
    for name, step, question in edges:
        experts, tokens, k = inputs[name]
        given = f"num_experts {experts}, tokens {tokens}, experts_per_token {k}"
        yield from runs(observed, name, (), given, dtype="float")
        yield same(
            step, observed[f"{name}/value"], expected(experts, tokens, k), given, question, tolerance=1e-6
        )  # fmt: skip


def expected(experts: int, tokens: int, k: int) -> float:
    """From the whole distribution: token by token, how likely is it that n experts have been touched so far?

    Of the k experts of the next token, `new` are untouched with the chance of `new` white balls among k drawn from an
    urn. In exact fractions; the formula of the exercise is not used.
    """
    draws = math.comb(experts, k)
    chance = {0: Fraction(1)}
    for _ in range(tokens):
        after: dict[int, Fraction] = {}
        for touched, p in chance.items():
            for new in range(max(0, k - touched), min(k, experts - touched) + 1):
                ways = math.comb(experts - touched, new) * math.comb(touched, k - new)
                after[touched + new] = after.get(touched + new, Fraction(0)) + p * Fraction(ways, draws)
        chance = after
    return float(sum(touched * p for touched, p in chance.items()))
