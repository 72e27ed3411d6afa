"""Find the bug: a layer of routed experts with one of five planted mistakes, to be told apart by experiments alone.

Most of them have been met in public code: `transformers` pull request 39501 lost the transpose, and Llama 4 wrote
garbage until 40609 brought it back; Meta's own `moe.py` detaches what goes into the experts, so it cannot be trained.
"""

import random

import torch
import torch.nn.functional as F

from .. import bug_hunt
from ..exercise import Card, runs
from ..observe import call

CARD = Card("03", "Find the bug", difficulty=4, importance=4, minutes=40, trains="experiments, one cause at a time")

HINTS = (
    "Make the layer so small that most bugs cannot show: with one token there is no order to lose, with one expert "
    "nothing to choose. What may then go on to differ? And what differs again when there are more tokens?",
    "One token, one expert: a router of zeros, then a very large score. A sigmoid of 0 is 1/2, a softmax over one "
    "expert is always 1; and half of the expert's output is not the output for half the input. Several tokens: feed "
    "them together, then one by one. Rows that only changed places tell one bug from another.",
    "First x.requires_grad_(): a result without requires_grad is cut off. Then twenty tokens together against one at a "
    "time: if not close, it is ORDER where rows only changed places (what is their sum?), else TRANSPOSE. Then one "
    "token and one expert: half = layer with router 0, full = layer with router 100 * x. half == full is SOFTMAX, "
    "half == full / 2 is OUTPUT, and if nothing was found it is RIGHT.",
)

ANSWERED_BY = ()

BUGS = ("right", "lost transpose", "score on the output", "softmax", "order not undone", "detached")
RIGHT, TRANSPOSE, OUTPUT, SOFTMAX, ORDER, DETACHED = range(len(BUGS))


def suspect(bug: int):
    """The routed half of a MoE layer, with the bug of this number.

    What it returns is called as `layer(x_TD, router_ED, gate_up_EDG, down_EFD) -> y_TD`, where G = 2F: gate, then up.
    """

    def layer(x_TD, router_ED, gate_up_EDG, down_EFD):
        experts, tokens = len(router_ED), len(x_TD)
        logits_TE = x_TD @ router_ED.T
        expert_T = logits_TE.argmax(dim=-1)
        score_ET = (logits_TE.softmax(dim=-1) if bug == SOFTMAX else logits_TE.sigmoid()).T
        score_TE = score_ET.reshape(tokens, experts) if bug == TRANSPOSE else score_ET.T
        score_T1 = score_TE.gather(1, expert_T[:, None])

        order_T = expert_T.argsort(stable=True)  # tokens of expert 0 first, then those of expert 1, ...
        counts_E = torch.bincount(expert_T, minlength=experts).tolist()
        routed_TD = (x_TD if bug == OUTPUT else x_TD * score_T1)[order_T]
        routed_TD = routed_TD.detach() if bug == DETACHED else routed_TD
        done = []
        for expert, rows_ND in enumerate(routed_TD.split(counts_E)):
            gate_NF, up_NF = (rows_ND @ gate_up_EDG[expert]).chunk(2, dim=-1)
            done.append((F.silu(gate_NF) * up_NF) @ down_EFD[expert])
        y_TD = torch.cat(done)[order_T if bug == ORDER else order_T.argsort()]
        return y_TD * score_T1 if bug == OUTPUT else y_TD

    return layer


def draw(rng: random.Random) -> dict:
    return bug_hunt.draw(rng, BUGS)


def bug_of(seed: int) -> int:
    return bug_hunt.bug_of(random.Random(seed), BUGS)


def unnamed(seed: int):
    """A suspect that holds no more than its seed, under one name for all."""
    return lambda *weights: suspect(bug_of(seed))(*weights)


def observe(function, inputs: dict) -> dict:
    seen = {}
    for number, seed in enumerate(inputs["seeds"]):
        seen |= call(f"layer{number}", function, unnamed(seed))
    return seen


# Bug -> what is right when it is found, the question for any other answer, and for particular ones their name and own.
STEPS = {
    RIGHT: (
        "a right layer is found right",
        "Take a layer that you trust. Which of your experiments raises the alarm, and is it sure that it should?",
        {
            TRANSPOSE: (
                "right taken for a lost transpose",
                "Do you compare each token with itself? Up to rounding, or to the last bit?",
            ),
            OUTPUT: (
                "right taken for score on the output", "Is the score in y = expert(score * x) inside or outside?",
            ),
            SOFTMAX: (
                "right taken for softmax",
                "With two experts and one logit 0, softmax and sigmoid give the same. With how many do they not?",
            ),
            ORDER: (
                "right taken for a lost order", "Should rows come out in the order of the tokens, or of the experts?",
            ),
            DETACHED: (
                "right taken for detached", "Which gradient did you look at, and did its tensor ask for one?",
            ),
        },
    ),
    SOFTMAX: (
        "softmax is told from sigmoid",
        "What is a softmax over a single expert, whatever its logit? And a sigmoid?",
        {
            RIGHT: (
                "softmax missed",
                "With two experts and one logit 0, does softmax differ from sigmoid? With one expert, or a huge logit?",
            ),
            OUTPUT: (
                "softmax taken for score on the output",
                "With one expert and two different logits, how do the results differ for a softmax, and how for yours?",
            ),
        },
    ),
    OUTPUT: (
        "a score on the output is told from one on the input",
        "One token, one expert, two scores: are the two results multiples of each other? Should they be?",
        {
            RIGHT: (
                "score on the output missed",
                "For a score of 1, does its place matter? For which score would it, and is the expert linear there?",
            ),
            SOFTMAX: (
                "score on the output taken for softmax",
                "With one expert, does the result depend on the logit? Would it, if a softmax made the score?",
            ),
        },
    ),
    TRANSPOSE: (
        "a lost transpose is found",
        "Whose score does a token get if [experts, tokens] is read as [tokens, experts]? When does that not show?",
        {
            RIGHT: (
                "lost transpose missed",
                "How many tokens and experts did you give? If one of them is 1, what does a transpose change?",
            ),
            ORDER: (
                "lost transpose taken for a lost order",
                "Have right rows changed places, or are the rows themselves wrong?",
            ),
            OUTPUT: (
                "lost transpose taken for score on the output",
                "Is a token right when it comes alone? Then is it the way of scoring?",
            ),
            SOFTMAX: (
                "lost transpose taken for softmax",
                "Is a token right when it comes alone? Then is it the way of scoring?",
            ),
        },
    ),
    ORDER: (
        "an order that is not undone is found",
        "Sorting by expert moves tokens. Which tokens must choose which experts, for a second move to go wrong?",
        {
            RIGHT: (
                "lost order missed",
                "Two tokens that swap are back after a second swap. How many does it take until they are not?",
            ),
            TRANSPOSE: (
                "lost order taken for a lost transpose",
                "Are the rows themselves wrong, or are they right and in wrong places?",
            ),
        },
    ),
    DETACHED: (
        "a layer that cannot be trained is found",
        "What else than its outputs does training ask of a layer?",
        {
            RIGHT: (
                "detach missed",
                "All its outputs are right. What else does training ask of a layer, and of which of its inputs?",
            ),
        },
    ),
}  # fmt: skip


def judge(inputs: dict, observed: dict):
    place = {bug_of(seed): number for number, seed in enumerate(inputs["seeds"])}
    for bug in STEPS:
        yield from runs(observed, f"layer{place[bug]}", (), _given(bug), dtype="int")
    said = {bug: observed[f"layer{number}/value"].item() for bug, number in place.items()}
    given = {bug: _given(bug) for bug in STEPS}
    yield from bug_hunt.named_right(BUGS, STEPS, said, given, "layers", "runs the layer")


def _given(bug: int) -> str:
    return f"a layer with bug {bug} ({BUGS[bug]})" if bug != RIGHT else "a layer without a bug"
