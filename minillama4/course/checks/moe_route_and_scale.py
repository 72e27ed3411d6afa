"""Route and scale: one expert a token, and a sigmoid of its logit on what goes into it. Facts: Meta's `moe.py`."""

import math
import random

import torch

from ..exercise import Card, different, normal, runs, same
from ..observe import call

CARD = Card("03", "Route and scale", difficulty=2, importance=5, minutes=15, trains="top-1 routing, sigmoid or softmax")

HINTS = (
    "A logit is the dot product of a token with an expert's row. Which product of [T, D] and [E, D] gives [T, E]?",
    "logits_TE.max over the experts gives two things at once: the largest logit of each token, [T], and whose it is. "
    "The other logits are never needed again.",
    "score_T is the sigmoid of that logit, taken in float32 and then brought to x's dtype; the token times score_T as "
    "[T, 1] is what the expert gets.",
)

ANSWERED_BY = ("minillama4.moe.MoE",)


def draw(rng: random.Random) -> dict:
    experts, hidden = different(rng, 4, 9, 2)
    tokens = rng.randint(10, 14)  # enough that a wrong choice cannot be right for all of them by chance
    x, router = normal(rng, tokens, hidden), normal(rng, experts, hidden)
    logits = router @ x[0]
    if logits.max() > -logits.min():
        x[0] = -x[0]  # at least this token's largest logit is not its largest without the sign
    first, later = sorted(rng.sample(range(experts), 2))
    return {
        "x": x,
        "router": router,
        "push": normal(rng, tokens, hidden),
        # Whole numbers: their products are exact in whatever order, so equal logits are equal.
        "whole": torch.tensor([[rng.randint(1, 4) for _ in range(hidden)] for _ in range(tokens)]).float(),
        "large": _two_rows(rng, experts, hidden, {first: 6, later: 7}),  # both logits above 17: their sigmoid is 1
        "tied": _two_rows(rng, experts, hidden, {first: 1, later: 1}),
        "confident": _sums_to_eight(rng, tokens, hidden),
        "one_row": _two_rows(rng, experts, hidden, {first: 1}),  # with `confident`: a largest logit of 8
    }


def _two_rows(rng: random.Random, experts: int, hidden: int, rows: dict[int, int]) -> torch.Tensor:
    """A router [E, D] whose rows are negative but for these, which have one value each."""
    router = torch.tensor([[float(rng.randint(-3, -1)) for _ in range(hidden)] for _ in range(experts)])
    for row, value in rows.items():
        router[row] = value
    return router


def _sums_to_eight(rng: random.Random, tokens: int, hidden: int) -> torch.Tensor:
    """Positive tokens [T, D] in bfloat16, halves that add up to 8 in each."""
    x = torch.full((tokens, hidden), 0.5)
    for token in x:
        for _ in range(16 - hidden):
            token[rng.randrange(hidden)] += 0.5
    return x.bfloat16()


def observe(function, inputs: dict) -> dict:
    scaled, expert = _part(function, 0), _part(function, 1)
    x, router, whole = inputs["x"], inputs["router"], inputs["whole"]
    half, positive = inputs["confident"], torch.ones_like(inputs["confident"])
    return (
        call("scaled", scaled, x, router)
        | call("expert", expert, x, router)
        | call("large", expert, whole, inputs["large"])
        | call("tied", expert, whole, inputs["tied"])
        | call("push", scaled, x, router, cotangent=inputs["push"], wrt=(0, 1))
        | call("half", scaled, half, inputs["one_row"].bfloat16(), cotangent=positive, wrt=(1,))
    )


def _part(function, index: int):
    def part(x_TD, router_ED):
        pair = function(x_TD, router_ED)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"it returned a {type(pair).__name__}, where the pair (scaled_TD, expert_T) is wanted")
        return pair[index]

    return part


def judge(inputs: dict, observed: dict):
    x, router = inputs["x"], inputs["router"]
    given = f"x_TD {list(x.shape)}, router_ED {list(router.shape)}"
    yield from runs(observed, "scaled", x.shape, given)
    yield from runs(observed, "expert", x.shape[:1], given, dtype="int64")
    x64, r64 = x.double(), router.double()
    logits, (scaled, chosen) = x64 @ r64.T, truth(x, router)
    ranked = logits.argsort(dim=1)
    got = observed["expert/value"]
    yield same(
        "the expert with the largest logit is chosen", got, chosen, given,
        "For one token, write down all its logits. Which expert has the largest, and which did you choose?",
        {
            "one expert for all": (
                torch.full_like(chosen, int(got.flat[0])), "All tokens go to one expert. Where does the token come in?",
            ),
            "smallest logit": (ranked[:, 0], "Is a large logit a good match of token and expert, or a poor one?"),
            "second largest": (ranked[:, -2], "Which place in the order of the logits does your choice have?"),
            "largest without its sign": (
                logits.abs().argmax(1), "One expert has logit -3, another 2. Which of them does your function take?",
            ),
            "lost transpose": (
                (x64 @ r64.reshape(x.shape[1], -1)).argmax(1),
                "Row e of the router is expert e. After your reshape to [D, E], is column e still that row?",
            ),
            "softmax over tokens": (
                logits.softmax(0).argmax(1), "Change one token: may another one's expert change? Which axis is which?",
            ),
        },
    )  # fmt: skip
    logit = logits.max(1, keepdim=True).values
    score, soft = logit.sigmoid(), logits.softmax(1).max(1, keepdim=True).values
    all_scores = logits.sigmoid().sum(1, keepdim=True)
    yield same(
        "the sigmoid of the chosen logit scales the token", observed["scaled/value"], scaled, given,
        "For one token: which number is its largest logit, and what do you make of it before it meets the token?",
        {
            "score is 1": (x64, "Your tokens come out unscaled. What is one kept score, divided by all kept scores?"),
            "softmax over experts": (
                x64 * soft, "Add an expert that nobody likes: does your score change? Should it know of the others?",
            ),
            "sigmoid after softmax": (
                x64 * soft.sigmoid(), "How many functions stand between the logit and the score in yours?",
            ),
            "raw logit": (x64 * logit, "Between which two values should a score lie, and can your score be 3?"),
            "scores normalised over experts": (
                x64 * score / all_scores, "Does the score of the chosen expert depend on the other experts in yours?",
            ),
            "scores of all experts added": (
                x64 * all_scores, "How many experts does a token go to, and how many scores have you added up?",
            ),
            "scaled twice": (x64 * score**2, "How often does the score meet the token in your function?"),
            "one minus the score": (
                x64 * (1 - score), "Is a token that fits its expert very well scaled by nearly 1, or by nearly 0?",
            ),
            "divided by the score": (x64 / score, "Does a small score make a token smaller or larger in yours?"),
            "tanh": (x64 * logit.tanh(), "What should the score be for logit 0: 0, or one half?"),
        },
    )  # fmt: skip
    whole, large = inputs["whole"], inputs["large"]
    both = large.max(1).values.topk(2)
    yield same(
        "the choice is made on the logits", observed["large/value"], truth(whole, large)[1],
        f"{given}, logits above 24 at experts {sorted(both.indices.tolist())}",
        "What is the sigmoid of 30 in float32, and of 40? Can you still tell which logit was larger?",
    )  # fmt: skip
    tied = inputs["tied"]
    yield same(
        "of equal logits the first expert is chosen", observed["tied/value"], truth(whole, tied)[1],
        f"{given}, equal largest logits at experts {(tied[:, 0] > 0).nonzero().flatten().tolist()}",
        "Which of two equal numbers does your way of finding the largest return? Does its documentation promise that?",
    )  # fmt: skip
    grad_x, grad_router = gradients(x, router, inputs["push"])
    asks = "Does every step from the argument to the result stay a tensor: no .detach(), .item(), .data, no_grad?"
    yield same(
        "the gradient reaches the router", observed["push/grad1"], grad_router, given, asks,
        {
            "score without gradient": (
                torch.zeros_like(router), "How does the router learn, if nothing tells it whether its score was good?",
            )
        },
        tolerance=1e-3,
    )  # fmt: skip
    yield same(
        "the gradient reaches x", observed["push/grad0"], grad_x, given, asks,
        {
            "token without gradient": (
                grad_x - score * inputs["push"],
                "A token acts through its score and as what is scaled. Which of the two ways have you cut?",
            ),
            "logits without gradient": (
                score * inputs["push"],
                "A token also decides how large its own score is. Does its gradient know of that?",
            ),
        },
        tolerance=1e-3,
    )  # fmt: skip
    half, one_row = inputs["confident"], inputs["one_row"]
    given = f"x_TD {list(half.shape)} and router_ED {list(one_row.shape)} in bfloat16, largest logits 8"
    yield from list(runs(observed, "half", half.shape, given, dtype="bfloat16"))[:2]
    yield same(
        "a confident router still learns in bfloat16", observed["half/grad1"],
        gradients(half, one_row, torch.ones_like(half))[1], given,
        "For x in bfloat16, in which dtype does each line of your function work?",
        {
            "sigmoid in bfloat16": (
                torch.zeros_like(one_row),
                "The slope of a sigmoid is s (1 - s). For logit 8, what is 1 - s in bfloat16, where s has 8 bits?",
            )
        },
        tolerance=3e-2,
    )  # fmt: skip


def truth(x: torch.Tensor, router: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scaled, expert), token by token in float64: the first of the largest dot products, and 1 / (1 + e^-it)."""
    scaled, chosen = [], []
    for token in x.double():
        logits = [float(token.dot(row)) for row in router.double()]
        chosen.append(logits.index(max(logits)))
        scaled.append(token / (1 + math.exp(-max(logits))))
    return torch.stack(scaled), torch.tensor(chosen)


def gradients(x: torch.Tensor, router: torch.Tensor, push: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of (scaled * push).sum() by x and by the router, by hand: scaled = s x, and s' = s (1 - s) by the logit."""
    x, router, push = x.double(), router.double(), push.double()
    grad_x, grad_router = torch.zeros_like(x), torch.zeros_like(router)
    for t, e in enumerate(truth(x, router)[1].tolist()):
        s = 1 / (1 + math.exp(-float(x[t].dot(router[e]))))
        slope = s * (1 - s) * float(push[t].dot(x[t]))
        grad_x[t] = s * push[t] + slope * router[e]
        grad_router[e] += slope * x[t]
    return grad_x, grad_router
