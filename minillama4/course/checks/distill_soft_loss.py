"""Soft targets: what a student loses by not saying what its teacher says, at a temperature."""

import math
import random

import numpy as np
import torch

from ..exercise import Card, different, normal, runs, same
from ..observe import call
from .distill_kl_directions import far_apart, kl

CARD = Card("04", "Soft targets", difficulty=2, importance=5, minutes=15, trains="temperature, KL, who gets a gradient")

HINTS = (
    "Work on one token: two rows of logits become two rows of log-probabilities, both at the temperature. Where does "
    "that come in: before the softmax, or after?",
    "KL(p ‖ q) is the sum over the vocabulary of p * (log p - log q), with p the teacher's. Take both logarithms from "
    "log_softmax: a probability of 0 has none.",
    "Once the teacher is detached: temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=1), in float32. The square "
    "makes up for the gradient of the student, which falls as 1 / temperature**2.",
)

ANSWERED_BY = ("minillama4.distill.soft_loss",)


def draw(rng: random.Random) -> dict:
    tokens, vocab = different(rng, 4, 9, 2)
    shape = tokens, vocab
    far_student, far_teacher = far_apart(rng, *shape)
    return {
        "student": 2 * normal(rng, *shape),
        "teacher": 2 * normal(rng, *shape),
        "temperature": rng.uniform(2.5, 4.0),  # not near 2, where its square is its double
        "cool": rng.uniform(0.4, 0.7),
        "far_student": 4 * far_student,  # still far apart when divided by the temperature
        "far_teacher": 4 * far_teacher,
        "push": normal(rng, tokens).abs() + 1,
    }


def observe(function, inputs: dict) -> dict:
    student, teacher, temperature = inputs["student"], inputs["teacher"], inputs["temperature"]
    return (
        call("one", function, student, teacher, 1.0)
        | call("warm", function, student, teacher, temperature)
        | call("cool", function, student, teacher, inputs["cool"])
        | call("far", function, inputs["far_student"], inputs["far_teacher"], temperature)
        | call("push", function, student, teacher, temperature, cotangent=inputs["push"], wrt=(0, 1))
        | call("half", function, student.bfloat16(), teacher.bfloat16(), temperature)
    )


def judge(inputs: dict, observed: dict):
    student, teacher, temperature = inputs["student"], inputs["teacher"], inputs["temperature"]
    tokens, vocab = student.shape
    shapes = f"student_TV and teacher_TV [{tokens}, {vocab}]"
    given = f"{shapes}, temperature 1.0"
    yield from runs(observed, "one", [tokens], given)
    yield same(
        "at temperature 1 it is KL(teacher ‖ student) of each token", observed["one/value"],
        truth(student, teacher, 1.0), given,
        "Take a vocabulary of two. Which four numbers does the formula want, and what does it make of them?",
        _at_one(student.double(), teacher.double()),
    )  # fmt: skip
    for name, t in (("warm", temperature), ("cool", inputs["cool"])):
        given = f"{shapes}, temperature {t:.3f}"
        yield from runs(observed, name, [tokens], given)
        yield same(
            f"temperature {'above' if t > 1 else 'below'} 1: it divides both logits, and its square multiplies the KL",
            observed[f"{name}/value"], truth(student, teacher, t), given,
            "Where does the temperature come in, and how often? Write the two rows of probabilities for one token.",
            _at_temperature(student.double(), teacher.double(), t),
        )  # fmt: skip

    far = inputs["far_student"], inputs["far_teacher"]
    given = f"{shapes}, logits 1200 to 3600 apart, temperature {temperature:.3f}"
    yield from runs(observed, "far", [tokens], given)
    came_out = observed["far/value"]
    yield same(
        "logits far apart give a finite loss, and the right one", came_out, truth(*far, temperature), given,
        "Is there a smallest probability in your function, or one added to all of them? Should a student that is 2000 "
        "nats off not hear so?" if np.isfinite(came_out).all() else
        "What is the softmax of [0, -2000] in float32, and what is the logarithm of that?",
        {"hidden": (torch.zeros(tokens), "What has taken the place of the infinite values in your function?")},
    )  # fmt: skip
    yield from _gradients(inputs, observed, f"{shapes}, temperature {temperature:.3f}")

    half = student.bfloat16(), teacher.bfloat16()
    given = f"{shapes} in bfloat16, temperature {temperature:.3f}"
    yield from runs(observed, "half", [tokens], given)
    yield same(
        "logits in bfloat16 are worked on in float32", observed["half/value"], truth(*half, temperature), given,
        "bfloat16 has 8 bits, and a KL is a small difference of two logarithms. In which dtype does each of your lines "
        "work, for the student and for the teacher?",
    )  # fmt: skip


def _gradients(inputs: dict, observed: dict, given: str):
    """To the student temperature * (q - p), and to the teacher nothing."""
    student, teacher, t = inputs["student"].double(), inputs["teacher"].double(), inputs["temperature"]
    push = inputs["push"].double()[:, None]
    p, q = (teacher / t).softmax(1), (student / t).softmax(1)
    yield same(
        "the gradient reaches the student", observed["push/grad0"], t * (q - p) * push, given,
        "Does every step from student_TV to the loss stay a tensor: no .detach(), .item(), .data, no_grad?",
        {
            "student without gradient": (
                torch.zeros_like(student), "Who is to learn here? Whom have you cut off from the gradient?",
            )
        },
        tolerance=1e-3,
    )  # fmt: skip
    log_ratio = p.log() - q.log()
    to_teacher = t * p * (log_ratio - (p * log_ratio).sum(1, keepdim=True))
    yield same(
        "no gradient reaches the teacher", observed["push/grad1"], torch.zeros_like(teacher), given,
        "Which of your lines lets a gradient through to teacher_TV?",
        {
            "teacher learns": (
                to_teacher * push, "Backward would change the teacher too, towards the student. What keeps it out?",
            )
        },
        tolerance=1e-3,
    )  # fmt: skip


def _at_one(student: torch.Tensor, teacher: torch.Tensor) -> dict:
    """What known mistakes give at temperature 1, with their questions."""
    p, q = teacher.softmax(1), student.softmax(1)
    forward, reverse = truth(student, teacher, 1.0), truth(teacher, student, 1.0)
    middle = (p + q) / 2
    crossed = -(p * q.log()).sum(1)
    right_row = torch.arange(len(p)), p.argmax(1)
    down = teacher.softmax(0) * (teacher.log_softmax(0) - student.log_softmax(0))
    return {
        "reverse": (reverse, "Whose probabilities weigh the differences of the logarithms in yours?"),
        "sign": (-forward, "Can a KL be negative? Which logarithm is subtracted from which?"),
        "cross-entropy": (
            crossed, "A student that says exactly what its teacher says loses nothing. What does yours give for it?",
        ),
        "teacher's favourite only": (
            -q.log()[right_row], "How many tokens of the teacher's row does your loss look at? What do the others say?",
        ),
        "mean over the vocabulary": (
            forward / p.shape[1], "Would a tenfold vocabulary of which most is never said make your loss smaller?",
        ),
        "bits": (forward / math.log(2), "Which logarithm gives nats?"),
        "logits compared": (
            (student - teacher).square().sum(1), "Add 5 to all logits: no probability changes. Does your loss?",
        ),
        "logits compared, mean": (
            (student - teacher).square().mean(1), "Add 5 to all logits: no probability changes. Does your loss?",
        ),
        "probabilities compared": ((p - q).square().sum(1), "Which line of yours takes a logarithm?"),
        "probabilities compared, mean": ((p - q).square().mean(1), "Which line of yours takes a logarithm?"),
        "Jensen-Shannon": (
            (truth(middle.log(), teacher, 1.0) + truth(middle.log(), student, 1.0)) / 2,
            "Swap teacher and student: should the loss stay the same? Does yours?",
        ),
        "no logarithm of the student": (
            (p * (p.log() - q)).sum(1), "Of which of the two does your function take the logarithm: of one, or both?",
        ),
        "softmax over tokens": (
            down.sum(1), "Change one token: may the loss of another one change? Which axis is which?",
        ),
        "softmax twice": (
            truth(q, p, 1.0), "What goes into your last softmax: logits, or what a softmax has made of them?",
        ),
    }  # fmt: skip


def _at_temperature(student: torch.Tensor, teacher: torch.Tensor, t: float) -> dict:
    """What known mistakes give at temperature t, with their questions."""
    right = truth(student, teacher, t)

    def squared(of_student: torch.Tensor, of_teacher: torch.Tensor) -> torch.Tensor:
        return t**2 * truth(of_student, of_teacher, 1.0)

    log_p, log_q, warm_p = teacher.log_softmax(1), student.log_softmax(1), (teacher / t).log_softmax(1)
    half_done = {
        "temperature on the student alone": (squared(student / t, teacher), "At which temperature is your teacher?"),
        "temperature on the teacher alone": (squared(student, teacher / t), "At which temperature is your student?"),
    }
    asks_how_often = "How often does the temperature multiply your KL? The gradient falls with its square."
    return half_done | {
        "no square": (
            right / t**2, "At temperature 10, how large is your gradient, beside that at 1? What would make up for it?",
        ),
        "temperature once": (right / t, asks_how_often + " What would make up for that?"),
        "divided": (right / t**4, "Does a high temperature make the gradient of the KL larger or smaller?"),
        "too often": (right * t**2, asks_how_often + " Does yours do more than make up for that?"),
        "ignores temperature": (truth(student, teacher, 1.0), "What does your function do with temperature?"),
        "square only": (squared(student, teacher), "Are your two rows of probabilities softer at temperature 3?"),
        "multiplied": (
            squared(t * student, t * teacher), "Does a high temperature make your probabilities more even, or less?",
        ),
        "multiplied, no square": (
            truth(t * student, t * teacher, 1.0), "Does a high temperature make your probabilities more even, or less?",
        ),
        "log-probabilities divided": (
            t**2 * ((log_p / t).exp() * (log_p - log_q) / t).sum(1),
            "After you have divided log-probabilities by the temperature, do their exponentials still add up to 1?",
        ),
        "student's log-probabilities divided": (
            t**2 * (warm_p.exp() * (warm_p - log_q / t)).sum(1),
            "After you have divided the student's log-probabilities, do their exponentials still add up to 1?",
        ),
    }  # fmt: skip


def truth(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """[T] float64, entry by entry."""
    return temperature**2 * kl(teacher.double() / temperature, student.double() / temperature)
