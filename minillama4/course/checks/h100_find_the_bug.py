"""Find the bug: a product with packed int4 experts with one of five planted mistakes, told apart by experiments.

All have been met in public code. tilelang issue 2477: nibble - 7. amd/Quark pull request 30: halves of bytes in another
order than their reader's (and 1bit-MONSTER 572: neighbours where the format has halves of a block). torch-xpu-ops issue
4765: with one token, every tile takes the first group's scale. vllm-xpu-kernels issue 453: of a batch, only token 0 is
computed. huggingface/kernels-community pull request 1028: an expert's offset in 32 bits wraps to that of another one.
"""

import random

import torch

from ...cuda.int4 import GROUP
from .. import bug_hunt
from ..exercise import Card

CARD = Card("05", "Find the bug", difficulty=5, importance=4, minutes=50, trains="experiments, formats, offsets")

HINTS = (
    "You pack the weights yourself. A byte of 0x88 is two weights of 0: what must come out if all bytes are 0x88? From "
    "there, make one single weight 1 and let one input be other than 0. In which of your experiments must something "
    "come out, and in which nothing?",
    "Each bug has a place where it shows, and many where it does not: codes that are 0, a channel that is neither the "
    "first nor the last of its group, two groups whose scales differ, one token and several, an expert that begins "
    "beyond LIMIT bytes. Which of these does a test with a small random matrix and one token miss?",
    "All weights 0: ZERO if anything comes out. Then one weight 1, and one input 1 at its channel. In channel 1: "
    "PAIRS if nothing comes out. First channel of group 1, scales 1 and 0, one token: SCALE if something comes out. "
    "Two equal tokens: TOKENS if the second gets nothing. An expert that begins at LIMIT: OFFSET if nothing comes out.",
)

ANSWERED_BY = ()

BUGS = (
    "right", "nibble minus 7", "neighbours share a byte", "first group's scale", "first token only", "offset wraps",
)  # fmt: skip
RIGHT, ZERO, PAIRS, SCALE, TOKENS, OFFSET = range(len(BUGS))
LIMIT = 2**15  # bytes that an offset of this little machine can count; on a GPU it would be 2**31


def suspect(bug: int, seed: int = 0):
    """The product with the bug of this number; called as `product(x_TK, expert_T, packed, scale) -> y_TN`.

    x_TK: [T, K] float, K = G * GROUP; expert_T: [T] int64, the expert of each token; packed: [E, N, K / 2] uint8;
    scale: [E, N, G] float. y_TN: [T, N] float64, the product of `norm_K * x` and the weights of the token's expert.
    """

    def product(x_TK, expert_T, packed, scale):
        E, N, G = scale.shape
        if packed.shape != (E, N, G * GROUP // 2) or packed.dtype != torch.uint8 or x_TK.shape[1:] != (G * GROUP,):
            shapes = f"x {list(x_TK.shape)}, packed {list(packed.shape)} {packed.dtype}, scale {list(scale.shape)}"
            raise ValueError(f"{shapes}; it takes [T, K], [E, N, K / 2] uint8 and [E, N, K / {GROUP}]")
        if expert_T.shape != x_TK.shape[:1] or not ((0 <= expert_T) & (expert_T < E)).all():
            raise ValueError(
                f"expert is {expert_T.tolist()}; it takes one of 0 to {E - 1} for each of {len(x_TK)} tokens"
            )
        x_TK = x_TK.double() * norm(seed, G * GROUP)

        size = N * G * GROUP // 2  # bytes of an expert
        start_T = expert_T * size % LIMIT if bug == OFFSET else expert_T * size
        byte = packed.flatten()[start_T[:, None] + torch.arange(size)].view(-1, N, G, GROUP // 2)
        low, high = byte & 15, byte >> 4
        code = torch.stack([low, high], dim=-1).flatten(3) if bug == PAIRS else torch.cat([low, high], dim=-1)
        step = scale.double()[expert_T]  # [T, N, G]
        if bug == SCALE and len(x_TK) == 1:
            step = step[..., :1].expand(step.shape)
        weight = (code.double() - (7 if bug == ZERO else 8)) * step[..., None]  # [T, N, G, GROUP]

        y_TN = torch.einsum("tnk,tk->tn", weight.flatten(2), x_TK)
        if bug == TOKENS:
            y_TN[1:] = 0
        return y_TN

    return product


def norm(seed: int, channels: int) -> torch.Tensor:
    """The weights of a norm, between 0.5 and 2: the product multiplies its input with them on the way."""
    return torch.rand(channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5 + 0.5


def planted(seed: int):
    """The suspect of this seed, with a norm that nobody is told."""

    def product(x_TK, expert_T, packed, scale):  # holds no more than its seed, and has the same name for every bug
        rng = random.Random(seed)
        return suspect(bug_hunt.bug_of(rng, BUGS), rng.getrandbits(62))(x_TK, expert_T, packed, scale)

    return product


def draw(rng: random.Random) -> dict:
    return bug_hunt.draw(rng, BUGS)


def observe(function, inputs: dict) -> dict:
    return bug_hunt.observe(function, inputs, planted)


# Who has not read the task to its end compares with a product of their own, and finds every suspect guilty.
NORM = "Do you compare with numbers of your own? x goes through a norm first. If not: "

# Bug -> what is right when it is found, the question for any other answer, and for particular ones their name and own.
STEPS = {
    RIGHT: (
        "a right suspect is found right",
        NORM + "take suspect(RIGHT). Which of your experiments raises the alarm, and is it sure that it should?",
        {
            ZERO: ("right taken for minus 7", NORM + "which code is a weight of 0, and which byte holds two of them?"),
            PAIRS: (
                "right taken for neighbours in a byte",
                NORM + "which two channels of a group share a byte? Which half of which byte holds channel 1?",
            ),
            SCALE: (
                "right taken for the first scale",
                NORM + "is the ratio of what comes out of two groups that of their scales? What else is in it?",
            ),
            TOKENS: (
                "right taken for first token only",
                NORM + "did nothing come out for a token? Had its expert a weight other than 0 at one of its channels?",
            ),
            OFFSET: (
                "right taken for a wrapped offset",
                NORM + "did nothing come out of an expert? Was the weight that you set in the bytes of that expert?",
            ),
        },
    ),
    ZERO: (
        "nibble minus 7 is found",
        "All weights 0, and inputs of any kind: what should come out? Which bytes are that?",
        {
            RIGHT: (
                "minus 7 missed",
                "With it, all weights are a step too high. Which weights and which inputs make that show for sure?",
            ),
            PAIRS: (
                "minus 7 taken for neighbours in a byte",
                "Something came out at a channel where all is 0. Is that so at one channel, or at all of them?",
            ),
            SCALE: (
                "minus 7 taken for the first scale",
                "Something came out, and a scale was 0. Could it come from the group whose scale was not?",
            ),
            OFFSET: (
                "minus 7 taken for a wrapped offset",
                "An expert without weights gave something. Another one's weights, or does each give something?",
            ),
        },
    ),
    PAIRS: (
        "neighbours that share a byte are found",
        "Set one weight, and look which input it is multiplied with. For which channels are both ways equal?",
        {
            RIGHT: (
                "neighbours in a byte missed",
                "Where in its group was your weight? Two of its channels lie in the same place both ways: which?",
            ),
            SCALE: (
                "neighbours in a byte taken for the first scale",
                "Nothing came out of the second group. Its scale, or is the weight at another channel?",
            ),
            TOKENS: (
                "neighbours in a byte taken for first token only",
                "The second token got nothing. And the first one?",
            ),
            OFFSET: (
                "neighbours in a byte taken for a wrapped offset",
                "Nothing came out of the last expert. And out of the first, at the same channel?",
            ),
        },
    ),
    SCALE: (
        "the first group's scale for all is found",
        "Two groups, two scales: which of them is a weight of the second one multiplied with? With one token, too?",
        {
            RIGHT: (
                "first scale missed",
                "How many groups had your rows, and how far apart were their scales? And how many tokens were there?",
            ),
            PAIRS: (
                "first scale taken for neighbours in a byte",
                "Nothing came out. Is the weight at another channel, or was it multiplied with another scale?",
            ),
            OFFSET: (
                "first scale taken for a wrapped offset",
                "Nothing came out of the last expert. And out of the first, in the same group?",
            ),
        },
    ),
    TOKENS: (
        "a batch of which only token 0 is computed is found",
        "Give the same token twice. Which rows should be equal, and which of them are 0?",
        {
            RIGHT: (
                "first token only missed",
                "How many tokens did you give, and in which rows did you look?",
            ),
            PAIRS: (
                "first token only taken for neighbours in a byte",
                "Nothing came out for a token. For which channel, or for which row?",
            ),
            OFFSET: (
                "first token only taken for a wrapped offset",
                "Nothing came out for a token with the last expert. And if it is the only token?",
            ),
        },
    ),
    OFFSET: (
        "an offset that wraps is found",
        "Where does an expert begin, in bytes? What is the first one that begins too late for LIMIT?",
        {
            RIGHT: (
                "wrapped offset missed",
                "A large tensor alone is not enough. At which byte began the last expert that you asked for?",
            ),
            PAIRS: (
                "wrapped offset taken for neighbours in a byte",
                "Nothing came out. At another channel neither? And in an expert that begins early?",
            ),
            TOKENS: (
                "wrapped offset taken for first token only",
                "The second token got nothing. Which expert had it, and what does the first token get from that one?",
            ),
        },
    ),
}  # fmt: skip


def judge(inputs: dict, observed: dict):
    yield from bug_hunt.judge(inputs, observed, BUGS, STEPS)
