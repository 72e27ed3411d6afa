"""The two KLs between a teacher and a student: what each of them asks for, and which zeros it forgives."""

import math
import random

import numpy as np
import torch

from ..exercise import Card, different, normal, runs, same
from ..observe import call

CARD = Card("04", "Two directions", difficulty=2, importance=4, minutes=20, trains="forward and reverse KL, zeros")

HINTS = (
    "Both are one function: kl(a, b) = sum of a * (ln a - ln b), in which a weighs. What are a and b in each of them?",
    "Take ln a and ln b from log_softmax: it is -inf where the logit is, and finite elsewhere. What is, in torch, "
    "a * (ln a - ln b) where a is 0, and what should it be? Which infinity may stay?",
    "With a = log_a.exp(): (a * torch.where(a > 0, log_a - log_b, 0)).sum(dim=1). It puts -inf aside before it meets "
    "the factor 0, and so backward never sees it; but where a is more than 0 and b is not, infinity stays.",
)

ANSWERED_BY = ("minillama4.distill.soft_loss",)


def draw(rng: random.Random) -> dict:
    tokens, vocab = different(rng, 5, 10, 2)
    student, teacher = 2 * normal(rng, tokens, vocab), 2 * normal(rng, tokens, vocab)
    never = torch.tensor([rng.sample([True] * (i % 3 + 1) + [False] * (vocab - i % 3 - 1), vocab)
                          for i in range(tokens)])  # fmt: skip
    far_student, far_teacher = far_apart(rng, tokens, vocab)
    return {
        "student": student,
        "teacher": teacher,
        "far_student": far_student,
        "far_teacher": far_teacher,
        "never_student": student.masked_fill(never, -math.inf),
        "never_teacher": teacher.masked_fill(never, -math.inf),
        "push": normal(rng, tokens).abs() + 1,
    }


def far_apart(rng: random.Random, tokens: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two times logits [T, V], 300 to 900 apart in each row. float32 has room for one probability only, but for all
    logarithms. Not all tokens have the same favourite in both."""

    def row() -> torch.Tensor:
        heights = [0.0]
        while len(heights) < vocab:
            heights.append(heights[-1] + rng.uniform(300, 900))
        return torch.tensor(rng.sample(heights, vocab)) - heights[-1] / 2

    one, other = (torch.stack([row() for _ in range(tokens)]) for _ in range(2))
    one[0] = other[0].roll(1)
    return one, other


PAIRS = {  # name -> (student, teacher)
    "plain": ("student", "teacher"),
    "far": ("far_student", "far_teacher"),
    "teacher_never": ("student", "never_teacher"),
    "student_never": ("never_student", "teacher"),
    "both_never": ("never_student", "never_teacher"),
}


def observe(function, inputs: dict) -> dict:
    seen = {}
    for i, direction in enumerate(("forward", "reverse")):
        part = _part(function, i)
        for name, (student, teacher) in PAIRS.items():
            pair = inputs[student], inputs[teacher]
            seen |= call(f"{name}_{direction}", part, *pair)
            if name in ("plain", "both_never"):
                seen |= call(f"{name}_{direction}_push", part, *pair, cotangent=inputs["push"], wrt=(0,))
    return seen


def _part(function, index: int):
    def part(student_TV, teacher_TV):
        pair = function(student_TV, teacher_TV)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"it returned a {type(pair).__name__}, where the pair (forward_T, reverse_T) is wanted")
        return pair[index]

    return part


def judge(inputs: dict, observed: dict):
    student, teacher = inputs["student"].double(), inputs["teacher"].double()
    tokens, vocab = student.shape
    shapes = f"student_TV and teacher_TV [{tokens}, {vocab}]"
    for direction in ("forward", "reverse"):
        yield from runs(observed, f"plain_{direction}", [tokens], f"{direction} KL, {shapes}")
    yield same(
        "forward: the teacher weighs, and asks its student to cover all that it says",
        observed["plain_forward/value"], kl(teacher, student), shapes,
        "Take a vocabulary of two. Which four numbers does KL(teacher ‖ student) want, and what does it make of them?",
        _of_one(teacher, student) | {
            "the other direction": (kl(student, teacher), "Whose probabilities weigh in the first of your pair?"),
        },
    )  # fmt: skip
    yield same(
        "reverse: the student weighs, and is asked to say nothing that the teacher would not",
        observed["plain_reverse/value"], kl(student, teacher), shapes,
        "Take a vocabulary of two. Which four numbers does KL(student ‖ teacher) want, and what does it make of them?",
        _of_one(student, teacher) | {
            "forward twice": (kl(teacher, student), "Whose probabilities weigh in the second of your pair?"),
            "forward with a minus": (
                -kl(teacher, student), "You turned the difference of the logarithms round. Who weighs it?",
            ),
        },
    )  # fmt: skip
    for direction in ("forward", "reverse"):
        yield from _value(
            "far", direction, inputs, observed, f"{shapes}, logits 300 to 900 apart",
            "finite for finite logits, however far apart",
            "What is the softmax of [0, -900] in float32? Is its logarithm -900, in yours?",
            {
                "infinite": (
                    _infinite_where_apart(inputs), "Is a probability of e^-900 the same as 0, for a KL?",
                ),
                "nan": (
                    torch.full((tokens,), math.nan), "In torch, what is 0 times infinity? Where does yours come from?",
                ),
            },
        )  # fmt: skip
    yield from _zeros(inputs, observed, shapes)
    yield from _gradients(inputs, observed, shapes)


def _infinite_where_apart(inputs: dict) -> torch.Tensor:
    """[T]: infinity, but 0 for the tokens whose favourite is the same in both."""
    apart = inputs["far_student"].argmax(1) != inputs["far_teacher"].argmax(1)
    return torch.where(apart, math.inf, 0.0)


def _value(name: str, direction: str, inputs: dict, observed: dict, given: str, step: str, asks: str, mistakes: dict):
    student, teacher = (inputs[key] for key in PAIRS[name])
    want = kl(teacher, student) if direction == "forward" else kl(student, teacher)
    yield from runs(observed, f"{name}_{direction}", want.shape, f"{direction} KL, {given}")
    yield same(
        f"{direction}: {step}", observed[f"{name}_{direction}/value"], want, f"{direction} KL, {given}", asks, mistakes
    )  # fmt: skip


def _zeros(inputs: dict, observed: dict, shapes: str):
    """Who may say never: a probability of exactly 0."""
    tokens = len(inputs["student"])
    infinite, nan = (torch.full((tokens,), value) for value in (math.inf, math.nan))
    asks_nan = "In torch, what is 0 times infinity? What should become of a term in which the one that weighs has 0?"
    for name, forgiven in (("teacher_never", "forward"), ("student_never", "reverse")):
        who = name.partition("_")[0]
        other = "teacher" if who == "student" else "student"
        given = f"{shapes}, one to three logits -inf in each row of the {who}"
        student, teacher = (inputs[key].double() for key in PAIRS[name])
        a, b = (student, teacher) if who == "teacher" else (teacher, student)
        both_say = kl(b, a.masked_fill(b.isneginf(), -math.inf))
        heard = kl_terms(a, b).masked_fill(b.isneginf(), 0).sum(1)
        yield from _value(
            name, forgiven, inputs, observed, given, f"finite where the {who} never says a token", asks_nan,
            {
                "nan": (nan, asks_nan),
                "infinite": (infinite, f"With which weight does the token come in that the {who} never says?"),
                "renormalised": (
                    both_say, f"The {other} does say the token that the {who} never says. Does what it spends on that "
                    "still count in yours?",
                ),
            },
        )  # fmt: skip
        asks = f"The {who} never says a token that the {other} does say. How large must your result be, and why?"
        yield from _value(
            name, "reverse" if forgiven == "forward" else "forward", inputs, observed, given,
            f"infinite where the {who} never says what the {other} does", asks,
            {"nan": (nan, asks_nan), "infinity hidden": (heard, asks)},
        )  # fmt: skip
    given = f"{shapes}, the same one to three logits of each row -inf in both"
    for direction in ("forward", "reverse"):
        yield from _value(
            "both_never", direction, inputs, observed, given, "a token that neither says changes nothing",
            "Cut the column of a token that neither says out of both: what changes? What does it give in yours?",
            {"nan": (nan, "What is infinity minus infinity, or 0 times infinity? Which of them is in yours?")},
        )  # fmt: skip


def _gradients(inputs: dict, observed: dict, shapes: str):
    """By the student's logits: q - p for forward KL, and q (ln q - ln p - KL) for reverse KL."""
    push = inputs["push"].double()[:, None]
    stays = "Does every step from student_TV to the result stay a tensor: no .detach(), .item(), .data, no_grad?"
    for name, given in (("plain", shapes), ("both_never", f"{shapes}, one to three logits of each row -inf in both")):
        student, teacher = (inputs[key].double() for key in PAIRS[name])
        p, q = teacher.softmax(1), student.softmax(1)
        log_ratio = torch.where(q > 0, student.log_softmax(1) - teacher.log_softmax(1), 0)
        wants = {"forward": q - p, "reverse": q * (log_ratio - kl(student, teacher)[:, None])}
        for direction, want in wants.items():
            got = observed[f"{name}_{direction}_push/grad0"]
            yield same(
                f"{direction}: its gradient reaches the student" if name == "plain" else
                f"{direction}: the gradient is finite where neither says a token",
                got, want * push, f"{direction} KL, {given}",
                stays if name == "plain" else
                "You put a nan aside. But what does backward multiply, on the way that was not taken?",
                {
                    "cut off": (
                        _nothing(got), stays if direction == "forward" else
                        "What is the gradient of the sum of c * ln q by the logits, if c is held fixed at q? How often "
                        "does the student come into this KL, and is it always with its gradient?",
                    ),
                },
                tolerance=1e-3,
            )  # fmt: skip


def _nothing(got: np.ndarray) -> np.ndarray:
    """Zeros, or what came out if it is zero but for rounding."""
    rounding = got.dtype.kind == "f" and bool((np.abs(got) < 1e-5).all())
    return got if rounding else np.zeros(got.shape)


def _of_one(a: torch.Tensor, b: torch.Tensor) -> dict:
    """What known mistakes in KL(a ‖ b) give, with their questions."""
    p, q = a.softmax(1), b.softmax(1)
    middle = ((p + q) / 2).log()
    right, other = kl(a, b), kl(b, a)
    return {
        "sign": (-right, "Can a KL be negative? Which logarithm is subtracted from which?"),
        "cross-entropy": (
            -(p * q.log()).sum(1), "Give your function the same logits twice. What should come out, and what does?",
        ),
        "mean over the vocabulary": (
            right / a.shape[1], "Would a tenfold vocabulary of which most is never said make your KL smaller?",
        ),
        "bits": (right / math.log(2), "Which logarithm gives nats?"),
        "both directions": (right + other, "How many of the two weigh in one direction?"),
        "mean of both directions": ((right + other) / 2, "How many of the two weigh in one direction?"),
        "Jensen-Shannon": (
            (kl(a, middle) + kl(b, middle)) / 2, "What do you compare with: with the other one, or with their average?",
        ),
        "softmax over tokens": (
            (a.softmax(0) * (a.log_softmax(0) - b.log_softmax(0))).sum(1),
            "Change one token: may the result of another one change? Which axis is which?",
        ),
        "logits as logarithms": (
            (a.exp() * (a - b)).sum(1), "Do the exponentials of your logarithms add up to 1 in each row?",
        ),
        "difference of logits": (
            (p * (a - b)).sum(1), "Add 5 to all logits of one of them: no probability changes. Does your result?",
        ),
        "sizes only": (
            (p * (p.log() - q.log()).abs()).sum(1), "May a term be negative? What would it take off the others?",
        ),
    }  # fmt: skip


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """KL(softmax(a) ‖ softmax(b)) of each row, in nats: [T] float64."""
    return torch.tensor([math.fsum(row) for row in kl_terms(a, b).tolist()], dtype=torch.float64)


def kl_terms(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[T, V] float64, entry by entry: a zero that weighs counts nothing, and one that is asked for is infinite."""

    def term(log_a: float, log_b: float) -> float:
        if log_a == -math.inf:
            return 0.0
        return math.inf if log_b == -math.inf else math.exp(log_a) * (log_a - log_b)

    rows = zip(map(log_probs, a.tolist()), map(log_probs, b.tolist()), strict=True)
    return torch.tensor([list(map(term, *row)) for row in rows], dtype=torch.float64)


def log_probs(row: list[float]) -> list[float]:
    highest = max(row)
    total = math.log(math.fsum(math.exp(value - highest) for value in row))
    return [value - highest - total for value in row]
