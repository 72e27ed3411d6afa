"""Two cures for routing collapse: the loss of the Switch Transformer, and the bias step of DeepSeek-V3."""

import random

import torch

from ..exercise import Card, different, normal, runs, same
from ..observe import call

CARD = Card(
    "03", "Keep the experts busy", difficulty=3, importance=4, minutes=20, trains="load balance, what is counted"
)

HINTS = (
    "Two things can be uneven: how many tokens an expert got, a count, and how much probability the router gave it, a "
    "mean over tokens. A count has no gradient. Which of the two can the loss push on?",
    "torch.bincount(expert_T, minlength=E) counts the tokens of each expert, also of those that got none. With f = "
    "count / T and p = the mean over tokens, even load gives E terms of 1/E times 1/E. What makes 1 of their sum?",
    "loss = E * (f * p).sum(). For the bias only the sign counts: an expert below T / E tokens gets + rate, one above "
    "it - rate, and torch.sign(0) is 0.",
)

# `train.balance_loss` of the package is no answer: without a bias it counts the most probable expert as the chosen one.
ANSWERED_BY = ()


def draw(rng: random.Random) -> dict:
    experts, group = different(rng, 4, 7, 2)
    tokens = experts * group + rng.randint(1, experts - 1)  # no multiple: no expert has exactly its share
    power = rng.choice((4, 8))  # of 2: so shares of 32 tokens are exact, and equal to the average or not
    return {
        **_uneven(rng, tokens, experts),
        "dead": _dead(rng, tokens, experts),
        "bias": normal(rng, experts),
        "rate": rng.uniform(0.02, 0.2),
        "even": torch.tensor(rng.sample(list(range(experts)) * group, experts * group)),
        "exact_probs": normal(rng, 32, power).softmax(1),
        "exact": torch.tensor(rng.sample(_one_average(power), 32)),
        "exact_bias": normal(rng, power),
        "push": normal(rng).abs() + 1,
    }


def _uneven(rng: random.Random, tokens: int, experts: int) -> dict:
    """Probabilities [T, E], and choices [T] that they do not explain: a bias took part in choosing.

    Drawn again until the mistakes of a later step would show: loads by choice, by the most probable expert, by
    probability and the wrong way round tell four different stories, and the loss is not nearly 1.
    """
    while True:
        probs = (normal(rng, tokens, experts) + normal(rng, experts)).softmax(1)
        liking = [rng.random() for _ in range(experts)]
        chosen = [*range(experts), *rng.choices(range(experts), liking, k=tokens - experts)]  # each at least once
        expert = torch.tensor(rng.sample(chosen, tokens))
        loads = counts(expert, experts), counts(probs.argmax(1), experts), probs.sum(0)
        stories = {tuple(_sign(load).tolist()) for load in (*loads, -loads[0])}
        if len(stories) == 4 and abs(truth(probs, expert) - 1) > 0.02:
            return {"probs": probs, "expert": expert}


def _dead(rng: random.Random, tokens: int, experts: int) -> torch.Tensor:
    """Choices [T] without the first and the last expert. Expert 1 has more than the average of all experts, and less
    than the average of those with tokens."""
    just_above = tokens // experts + 1
    others = rng.choices(range(2, experts - 1), k=tokens - just_above)
    return torch.tensor(rng.sample([1] * just_above + others, tokens))


def _one_average(experts: int) -> list[int]:
    """32 choices: expert 0 with as many as the average, expert 1 with more, the last with fewer."""
    average = 32 // experts
    return [e for e in range(experts) for _ in range(average + (e == 1) - (e == experts - 1))]


def counts(expert: torch.Tensor, experts: int) -> torch.Tensor:
    """[E], by looking at every token for every expert."""
    return torch.tensor([sum(chosen == e for chosen in expert.tolist()) for e in range(experts)])


def _sign(load: torch.Tensor) -> torch.Tensor:
    """[E]: 1 below the average load, -1 above it."""
    return torch.sign(load.double().mean() - load)


def observe(function, inputs: dict) -> dict:
    loss, bias = _part(function, 0), _part(function, 1)
    probs, expert, dead, old, rate = (inputs[key] for key in ("probs", "expert", "dead", "bias", "rate"))
    even = inputs["even"]
    return (
        call("even", loss, torch.full_like(probs, 1 / len(old))[: len(even)], even, torch.zeros_like(old), rate)
        | call("loss", loss, probs, expert, old, rate)
        | call("bias", bias, probs, expert, old, rate)
        | call("dead_loss", loss, probs, dead, old, rate)
        | call("dead_bias", bias, probs, dead, old, rate)
        | call("exact", bias, inputs["exact_probs"], inputs["exact"], inputs["exact_bias"], rate)
        | call("push", loss, probs, expert, old, rate, cotangent=inputs["push"], wrt=(0,))
    )


def _part(function, index: int):
    def part(probs_TE, expert_T, bias_E, rate):
        pair = function(probs_TE, expert_T, bias_E, rate)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"it returned a {type(pair).__name__}, where the pair (loss, new_bias_E) is wanted")
        return pair[index]

    return part


def judge(inputs: dict, observed: dict):
    probs, expert, old, rate = inputs["probs"].double(), inputs["expert"], inputs["bias"].double(), inputs["rate"]
    tokens, experts = probs.shape
    given = f"probs_TE [{tokens}, {experts}], expert_T with loads {counts(expert, experts).tolist()}, rate {rate:.3f}"
    yield from runs(observed, "loss", [], given)
    yield from runs(observed, "bias", old.shape, given)

    even = inputs["even"]
    yield same(
        "even load gives 1", observed["even/value"], torch.tensor(1.0),
        f"probs_TE [{len(even)}, {experts}], all 1/{experts}; expert_T with loads {counts(even, experts).tolist()}",
        "With even load every f is 1/E, and so is every p. What is the sum of f * p, and what do you make of it?",
        {
            "factor E missing": (torch.tensor(1 / experts), "What is the sum of f * p here, and what makes 1 of it?"),
            "factor E twice": (torch.tensor(float(experts)), "How often does the number of experts come in?"),
            "sums for means": (torch.tensor(float(len(even))), "Would twice as many tokens make your loss larger?"),
            "two sums for means": (
                torch.tensor(float(len(even) ** 2)), "Would twice as many tokens make your loss larger, and how much?",
            ),
            "zero when even": (torch.tensor(0.0), "Is it the distance from even load that this loss measures?"),
        },
    )  # fmt: skip

    def switch(f: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return experts * (f * p).sum()

    f, p = counts(expert, experts).double() / tokens, probs.mean(0)
    liked = counts(probs.argmax(1), experts) / tokens
    yield same(
        "the loss is E times the sum of f times p", observed["loss/value"], truth(probs, expert), given,
        "For one expert: what share of the tokens did it get, and what is its mean probability over all tokens?",
        {
            "counted from the probabilities": (
                switch(liked, p), "A bias took part in choosing. Where do you take from which expert a token went to?",
            ),
            "share squared": (
                switch(f, f), "Where do the router's probabilities come in? What would it learn from counts alone?",
            ),
            "probability squared": (switch(p, p), "Where do the tokens come in that each expert really got?"),
            "bias in the loss": (
                switch(f, (probs + old).mean(0)), "The bias is for choosing only. Where does yours come in?",
            ),
            "softmax twice": (switch(f, probs.softmax(1).mean(0)), "probs_TE are probabilities already, are they not?"),
            "mean over its own tokens": (
                switch(f, _kept(probs, expert).sum(0) / counts(expert, experts)),
                "Is p the mean over all tokens, or over those that went to the expert?",
            ),
            "largest share": (experts * f.max(), "How many of the experts does your loss look at?"),
        },
    )  # fmt: skip

    load = counts(expert, experts)
    gap = load.double().mean() - load
    sign = torch.sign(gap)
    yield same(
        "the bias goes up below the average load and down above it", observed["bias/value"], old + rate * sign, given,
        "For one expert: is its load above or below the average, and by how much does its bias move?",
        {
            "wrong way round": (old - rate * sign, "Should an expert with too many tokens be chosen more often?"),
            "bias not moved": (old, "What changes the bias in your function?"),
            "old bias lost": (rate * sign, "Where does the bias of the step before come in?"),
            "rate not used": (old + sign, "By how much does a bias move in one step?"),
            "as far as the load is off": (
                old + rate * gap, "Does an expert with twice the excess move twice as far? Should it?",
            ),
            "as far as the share is off": (
                old + rate * gap / tokens, "Does an expert with twice the excess move twice as far? Should it?",
            ),
            "as far as the load is off, relative": (
                old + rate * gap / load.double().mean(), "Does an expert with twice the excess move twice as far?",
            ),
            "only up": (old + rate * sign.clamp_min(0), "What happens to the bias of an overloaded expert?"),
            "only down": (old + rate * sign.clamp_max(0), "What happens to the bias of an underloaded expert?"),
            "everyone up": (old + rate, "What load do you compare with: that of all experts, or the average of one?"),
            "by probability": (
                old + rate * _sign(probs.sum(0)), "Is an expert overloaded by its probability, or by its tokens?",
            ),
            "by the most probable": (
                old + rate * _sign(counts(probs.argmax(1), experts)),
                "A bias took part in choosing. Where do you take from which expert a token went to?",
            ),
        },
    )  # fmt: skip

    dead = inputs["dead"]
    given = f"probs_TE [{tokens}, {experts}], expert_T with loads {counts(dead, experts).tolist()}"
    asks = f"Nobody chose the last expert. For how many experts do you count tokens, and are those all {experts}?"
    alive = dead.unique()
    yield same(
        "an expert without tokens counts in the loss", observed["dead_loss/value"], truth(probs, dead), given, asks,
        {
            "experts with tokens counted": (
                len(alive) / experts * truth(probs, dead), "Is E the number of experts, or of those that have tokens?",
            ),
        },
    )  # fmt: skip
    sign = _sign(counts(dead, experts))
    unused = counts(dead, experts) == 0
    fewer = torch.sign(tokens / len(alive) - counts(dead, experts))
    yield same(
        "an expert without tokens gets a larger bias", observed["dead_bias/value"], old + rate * sign, given, asks,
        {
            "no help for the dead": (
                old + rate * sign.masked_fill(unused, 0), "Who needs a larger bias most? Does it get one in yours?",
            ),
            "average over the living": (
                old + rate * fewer, "By how many experts do you divide: by all, or by those that have tokens?",
            ),
        },
    )  # fmt: skip

    exact = inputs["exact"]
    size = len(inputs["exact_bias"])
    sign = _sign(counts(exact, size))
    moved, average = inputs["exact_bias"].double(), (sign == 0).double()
    yield same(
        "exactly the average load leaves the bias as it is", observed["exact/value"], moved + rate * sign,
        f"expert_T with loads {counts(exact, size).tolist()}",
        f"{32 // size} tokens are exactly the average. What does your comparison say of them?",
        {
            "average goes up": (moved + rate * (sign + average), "Is an expert with the average load underloaded?"),
            "average goes down": (moved + rate * (sign - average), "Is an expert with the average load overloaded?"),
        },
    )  # fmt: skip

    share = experts * f.expand(tokens, experts) / tokens
    yield same(
        "the gradient goes through p alone", observed["push/grad0"], inputs["push"] * share,
        f"probs_TE [{tokens}, {experts}], expert_T with loads {load.tolist()}",
        "Does every step from probs_TE to the loss stay a tensor: no .detach(), .item(), .data, no_grad?",
        {
            "loss without gradient": (
                torch.zeros_like(probs), "Which of f and p should carry the gradient, and does it in your function?",
            ),
            "gradient through f": (
                inputs["push"] * (share + experts * p / tokens), "f is a count of tokens. Can it have a gradient?",
            ),
        },
        tolerance=1e-3,
    )  # fmt: skip


def _kept(probs: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """[T, E]: the probability of the chosen expert, 0 for the others."""
    return torch.zeros_like(probs).scatter(1, expert[:, None], probs.gather(1, expert[:, None]))


def truth(probs: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """E / T^2 times the sum of probs[t, e] over all pairs of a token t and a token that chose e."""
    tokens, experts = probs.shape
    return experts / tokens**2 * sum(probs[:, e].sum() for e in expert.tolist())
