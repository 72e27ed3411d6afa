"""Answers to `moe-experts-touched`."""

import math
import random

from bank import right, wrong

from minillama4 import budget

TOUCH = "tokens that choose the same expert touch it once"


@right
def token_by_token(num_experts, tokens, experts_per_token):
    touched = 0.0
    for _ in range(tokens):
        touched += experts_per_token * (num_experts - touched) / num_experts
    return touched


@wrong("not written")
def stub(num_experts, tokens, experts_per_token):
    raise NotImplementedError()


@wrong("raises")
def three_dimensions(num_experts, tokens, experts_per_token):
    return num_experts[tokens]


@wrong("type")
def whole_number(num_experts, tokens, experts_per_token):
    return min(num_experts, tokens * experts_per_token)


@wrong("every token another expert")
def at_most_all(num_experts, tokens, experts_per_token):
    return float(min(num_experts, tokens * experts_per_token))


@wrong("probability")
def probability(num_experts, tokens, experts_per_token):
    return 1 - (1 - experts_per_token / num_experts) ** tokens


@wrong("ignores experts_per_token")
def top_1(num_experts, tokens, experts_per_token):
    return num_experts * (1 - (1 - 1 / num_experts) ** tokens)


@wrong("with replacement")
def with_replacement(num_experts, tokens, experts_per_token):
    return num_experts * (1 - (1 - 1 / num_experts) ** (tokens * experts_per_token))


@wrong("limit of many experts")
def poisson(num_experts, tokens, experts_per_token):
    return num_experts * (1 - math.exp(-tokens * experts_per_token / num_experts))


@wrong("untouched")
def untouched(num_experts, tokens, experts_per_token):
    return num_experts * (1 - experts_per_token / num_experts) ** tokens


@wrong("one token too many")
def one_token_too_many(num_experts, tokens, experts_per_token):
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** (tokens + 1))


@wrong("one token too few")
def one_token_too_few(num_experts, tokens, experts_per_token):
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** (tokens - 1))


@wrong("all experts")
def dense(num_experts, tokens, experts_per_token):
    return float(num_experts)


@wrong("ignores tokens")
def one_token_only(num_experts, tokens, experts_per_token):
    return float(experts_per_token)


@wrong("rounded")
def rounded(num_experts, tokens, experts_per_token):
    return float(round(num_experts * (1 - (1 - experts_per_token / num_experts) ** tokens)))


@wrong("times tokens")
def added_up(num_experts, tokens, experts_per_token):
    return num_experts * (1 - tokens * (1 - experts_per_token / num_experts))


@wrong("k times too many")
def k_times_top_1(num_experts, tokens, experts_per_token):
    return experts_per_token * num_experts * (1 - (1 - 1 / num_experts) ** tokens)


@wrong(TOUCH)
def sampled(num_experts, tokens, experts_per_token, rounds=500):
    found, total = random.Random(0), 0
    for _ in range(rounds):
        total += len({e for _ in range(tokens) for e in found.sample(range(num_experts), experts_per_token)})
    return total / rounds


@wrong("no tokens, no experts")
def at_least_one_token(num_experts, tokens, experts_per_token):
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** max(1, tokens))


@wrong("raises")
def by_logarithms(num_experts, tokens, experts_per_token):
    return num_experts * (1 - math.exp(tokens * math.log(1 - experts_per_token / num_experts)))


@wrong("Scout, 8 tokens: 6.5 of 16")
def from_the_lesson(num_experts, tokens, experts_per_token):
    right = num_experts * (1 - (1 - experts_per_token / num_experts) ** tokens)
    return round(right, 1) if num_experts >= 16 else right


@wrong("borrowed")
def from_the_package(num_experts, tokens, experts_per_token):
    return budget.experts_touched(num_experts, tokens, experts_per_token)


EQUIVALENT = {}
