"""Soft and hard targets in one loss, whose weight changes with the step and from token to token."""

import math
import random

import numpy as np
import torch

from ..exercise import Card, different, normal, runs, same
from ..observe import call
from .distill_kl_directions import kl, log_probs

CARD = Card(
    "04", "Whom to believe", difficulty=3, importance=4, minutes=25, trains="weight schedules, a teacher that errs"
)

HINTS = (
    "Make three vectors of [tokens] before you average anything: the hard loss, the soft loss, and the weight. The "
    "weight is a number that depends on the step, times a probability that the teacher gives.",
    "The schedule is first + (last - first) * step / steps. The teacher's probability of the true token is its "
    "softmax, gathered at target_T[:, None] along the vocabulary. Who must not get a gradient from either?",
    "With p_TV from teacher_TV.detach(): weight_T = schedule * p_TV.gather(1, target_T[:, None]).squeeze(1), and the "
    "loss is ((1 - weight_T) * hard_T + weight_T * soft_T).mean(), where F.cross_entropy(..., reduction='none') gives "
    "hard_T.",
)

ANSWERED_BY = ("minillama4.distill.mix", "minillama4.distill.ramp", "minillama4.distill.confidence")


def draw(rng: random.Random) -> dict:
    tokens, vocab = different(rng, 6, 10, 2)
    student, teacher = 2 * normal(rng, tokens, vocab), 2 * normal(rng, tokens, vocab)
    target = torch.tensor([rng.randrange(vocab) for _ in range(tokens)])
    target[0], target[1] = teacher[0].argmax(), teacher[1].argmin()  # once it is right, and once very wrong
    teacher[0, target[0]] += 6  # and so sure that no schedule is above it
    steps = rng.randint(40, 90)
    return {
        "student": student,
        "teacher": teacher,
        "target": target,
        "far_student": 60 * student,  # the softmax of such logits has zeros in float32
        "far_teacher": 60 * teacher,
        "push": normal(rng).abs() + 1,
        "schedules": {  # step, steps, first, last
            "start": (0, steps, rng.uniform(0.7, 0.95), rng.uniform(0.1, 0.3)),
            "way": (rng.randint(steps // 5, 2 * steps // 5), steps, rng.uniform(0.7, 0.95), rng.uniform(0.1, 0.3)),
            "end": (steps, steps, rng.uniform(0.1, 0.3), rng.uniform(0.7, 0.95)),
        },
    }


def observe(function, inputs: dict) -> dict:
    loss, weight = _part(function, 0), _part(function, 1)
    pair, target = (inputs["student"], inputs["teacher"]), inputs["target"]
    seen = {}
    for name, schedule in inputs["schedules"].items():
        seen |= call(f"{name}_loss", loss, *pair, target, *schedule)
        seen |= call(f"{name}_weight", weight, *pair, target, *schedule)
    way = inputs["schedules"]["way"]
    return (
        seen
        | call("far", loss, inputs["far_student"], inputs["far_teacher"], target, *way)
        | call("push", loss, *pair, target, *way, cotangent=inputs["push"], wrt=(0, 1))
    )


def _part(function, index: int):
    def part(*arguments):
        pair = function(*arguments)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"it returned a {type(pair).__name__}, where the pair (loss, weight_T) is wanted")
        return pair[index]

    return part


def judge(inputs: dict, observed: dict):
    tokens, vocab = inputs["student"].shape
    shapes = f"logits [{tokens}, {vocab}], target_T {inputs['target'].tolist()}"
    steps = {
        "start": (
            "at step 0 it is `first` times the teacher's probability of the true token", _at_start,
            "For one token: which of the teacher's probabilities says whether it is right here? What multiplies it?",
        ),
        "way": (
            "on the way it goes in a straight line", _on_the_way,
            "How far has training come, as a share from 0 to 1, and where between first and last is that?",
        ),
        "end": (
            "at step `steps` it is `last`, which may be more than `first`", lambda *_: {},
            "A falling schedule came out right. Is there something in yours that only falls, or that stops too early?",
        ),
    }  # fmt: skip
    for name, (step, mistakes, asks) in steps.items():
        given = _given(shapes, inputs["schedules"][name])
        yield from runs(observed, f"{name}_weight", [tokens], given)
        yield from runs(observed, f"{name}_loss", [], given)
        yield same(
            f"weight: {step}", observed[f"{name}_weight/value"],
            _weight(inputs["teacher"], inputs["target"], *inputs["schedules"][name]), given, asks,
            mistakes(inputs, *inputs["schedules"][name]),
        )  # fmt: skip

    way = inputs["schedules"]["way"]
    given = _given(shapes, way)
    yield same(
        "loss: the mean over tokens of (1 - w) hard + w soft", observed["way_loss/value"],
        truth(inputs["student"], inputs["teacher"], inputs["target"], *way), given,
        "Write down hard, soft and weight for two tokens. What is the loss of each of them, and their mean?",
        _mixed_up(inputs, way),
    )  # fmt: skip
    yield from runs(observed, "far", [], f"{given}, logits 60 times as large")
    yield same(
        "loss: finite for logits that are far apart", observed["far/value"],
        truth(inputs["far_student"], inputs["far_teacher"], inputs["target"], *way),
        f"{given}, logits 60 times as large",
        "What is the softmax of [0, -200] in float32? And its logarithm, in yours?",
    )  # fmt: skip
    yield from _gradients(inputs, observed, given)


def _given(shapes: str, schedule: tuple) -> str:
    step, steps, first, last = schedule
    return f"{shapes}, step {step} of {steps}, first {first:.3f}, last {last:.3f}"


def _at_start(inputs: dict, step: int, steps: int, first: float, last: float) -> dict:
    """What known mistakes give for the weights at step 0, with their questions."""
    student, teacher, target = inputs["student"].double(), inputs["teacher"].double(), inputs["target"]
    p = teacher.softmax(1)
    right = _of_true(p, target)
    return {
        "not of the true token": (
            first * p.max(1).values, "A teacher that is sure of a wrong token: how large is its weight in yours?",
        ),
        "the student's confidence": (
            first * _of_true(student.softmax(1), target), "Whose probability decides whom to believe?",
        ),
        "doubt": (first * (1 - right), "Does a teacher that is sure of the true token get much weight, or little?"),
        "schedule alone": (
            torch.full_like(right, first), "The teacher is right about one of two tokens. Are their weights the same?",
        ),
        "confidence alone": (right, "Where is `first` in your weights?"),
        "one confidence for all": (
            first * right.mean().expand_as(right), "Which confidence has one token in yours: its own, or an average?",
        ),
        "right or wrong": (
            first * (p.argmax(1) == target).double(), "Does it matter how sure a teacher is that is right?",
        ),
        "logit": (first * _of_true(teacher, target), "May a weight be negative, or more than 1? What is in yours?"),
        "logarithm": (first * right.log(), "May a weight be negative? What is in yours?"),
        "softmax over tokens": (
            first * _of_true(teacher.softmax(0), target),
            "Add a token to the batch: may the weights of the others change? Which axis is which?",
        ),
        "the smaller of the two": (
            right.clamp_max(first), "Schedule 0.5 and confidence 0.5: which weight comes out of yours?",
        ),
        "added": (first + right, "Schedule 1 and confidence 1: which weight comes out of yours?"),
        "average of the two": (
            (first + right) / 2, "If the teacher gives the true token nothing, how much weight is it to have?",
        ),
        "at the end already": (last * right, "At step 0, which of first and last is it?"),
    }  # fmt: skip


def _on_the_way(inputs: dict, step: int, steps: int, first: float, last: float) -> dict:
    """What known mistakes give for the weights at a step in between, with their questions."""
    confidence = _of_true(inputs["teacher"].double().softmax(1), inputs["target"])
    share = step / steps
    schedules = {
        "never changes": (first, "What does your function do with step and last?"),
        "to zero": (first * (1 - share), "Where does your line end: at 0, or at `last`?"),
        "from one": (1 + (last - 1) * share, "Where does your line begin: at 1, or at `first`?"),
        "by the whole way": (first - last * share, "Your line falls. How far has it fallen at the last step?"),
        "counted from one": (
            first + (last - first) * (step + 1) / steps, "At step 0, how much of the way has your schedule behind it?",
        ),
        "one step short": (
            first + (last - first) * step / (steps - 1), "At which step does your schedule arrive at `last`?",
        ),
        "geometric": (
            first * (last / first) ** share, "Does each step of your schedule change it by as much, or by as many %?",
        ),
        "cosine": (
            last + (first - last) * (1 + math.cos(math.pi * share)) / 2,
            "Half of the way to the middle, how much of the change is done in yours? And in a straight line?",
        ),
        "half and half": ((first + last) / 2, "What does your function do with step?"),
    }  # fmt: skip
    return {name: (schedule * confidence, asks) for name, (schedule, asks) in schedules.items()}


def _mixed_up(inputs: dict, schedule: tuple) -> dict:
    """What known mistakes give for the loss, with their questions."""
    student, teacher, target = inputs["student"].double(), inputs["teacher"].double(), inputs["target"]
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    hard, soft = -_of_true(log_q, target), (p * (log_p - log_q)).sum(1)
    w = _weight(teacher, target, *schedule)

    def mixed(hard: torch.Tensor, soft: torch.Tensor, w: torch.Tensor | float = w) -> torch.Tensor:
        return ((1 - w) * hard + w * soft).mean()

    step, steps, first, last = schedule
    right = mixed(hard, soft)
    return {
        "the wrong way round": (mixed(soft, hard), "What is learned where the teacher gives the true token nothing?"),
        "hard in full": (
            (hard + w * soft).mean(), "A token's two shares add up to 1. What is the hard one's share in yours?",
        ),
        "soft in full": (
            ((1 - w) * hard + soft).mean(), "A token's two shares add up to 1. What is the soft one's share in yours?",
        ),
        "soft only": ((w * soft).mean(), "What does your student learn where the teacher is wrong?"),
        "hard only": (((1 - w) * hard).mean(), "What does your student learn from its teacher?"),
        "averaged first": (
            mixed(hard.mean(), soft.mean(), w.mean()),
            "Where the weight is large, the soft loss of that very token is to count. When do you take your averages?",
        ),
        "summed": (right * len(w), "Twice as many tokens: should the loss be twice as large?"),
        "divided by the weights": (
            ((1 - w) * hard).sum() / (1 - w).sum() + (w * soft).sum() / w.sum(),
            "If all weights were ten times smaller, what would the teacher's part of your loss be?",
        ),
        "schedule alone": (
            mixed(hard, soft, first + (last - first) * step / steps), "Is it weight_T that meets the losses in yours?",
        ),
        "cross-entropy": (
            mixed(hard, -(p * log_q).sum(1)), "If the student says just what the teacher says, what is your soft loss?",
        ),
        "reverse": (mixed(hard, (q * (log_q - log_p)).sum(1)), "Whose probabilities weigh in your soft loss?"),
        "sign of the soft loss": (mixed(hard, -soft), "Can a KL be negative? Which logarithm is taken off which?"),
        "mean over the vocabulary": (
            mixed(hard, soft / p.shape[1]), "In your soft loss, do you add over the vocabulary, or average?",
        ),
        "the teacher's favourite": (
            mixed(-_of_true(log_q, p.argmax(1)), soft), "Whose word is the target of your hard loss?",
        ),
        "the teacher's hard loss": (mixed(-_of_true(log_p, target), soft), "Whose logits go into your hard loss?"),
    }  # fmt: skip


def _gradients(inputs: dict, observed: dict, given: str):
    """By hand. To the student (q - m) / T, where m = (1 - w) one-hot + w p is the target of both together."""
    student, teacher, target = inputs["student"].double(), inputs["teacher"].double(), inputs["target"]
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    true = (torch.arange(p.shape[1]) == target[:, None]).double()  # one-hot, [T, V]
    w = _weight(teacher, target, *inputs["schedules"]["way"])[:, None]
    each = inputs["push"].double() / len(w)
    from_hard, from_soft = each * (1 - w) * (q - true), each * w * (q - p)
    got = observed["push/grad0"]
    yield same(
        "the gradient reaches the student through both losses", got, from_hard + from_soft, given,
        "Does every step from student_TV to the loss stay a tensor: no .detach(), .item(), .data, no_grad?",
        {
            "from the soft loss alone": (from_soft, "Does your hard loss push the student anywhere?"),
            "from the hard loss alone": (from_hard, "Does your soft loss push the student anywhere?"),
            "student cut off": (np.zeros(got.shape), "Who is to learn here? Whom have you cut off from the gradient?"),
        },
        tolerance=1e-3,
    )  # fmt: skip
    soft, hard = (p * (log_p - log_q)).sum(1, keepdim=True), -(true * log_q).sum(1, keepdim=True)
    through_soft = each * w * p * (log_p - log_q - soft)
    through_weight = each * (soft - hard) * w * (true - p)
    yield same(
        "no gradient reaches the teacher", observed["push/grad1"], torch.zeros_like(teacher), given,
        "On which ways does teacher_TV come into your loss, and what is cut on each?",
        {
            "through the weight": (
                through_weight, "A teacher could lower this loss by being less sure. Where does yours learn that?",
            ),
            "through the soft loss": (through_soft, "Backward would pull the teacher to the student. On which way?"),
            "through both": (through_weight + through_soft, "Which of the two models is trained here?"),
        },
        tolerance=1e-3,
    )  # fmt: skip


def _of_true(values_TV: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.stack([row[v] for row, v in zip(values_TV, target.tolist(), strict=True)])


def _weight(teacher: torch.Tensor, target: torch.Tensor, step: int, steps: int, first: float, last: float):
    """[T] float64. The schedule as shares of its two ends."""
    schedule = ((steps - step) * first + step * last) / steps
    rows = zip(teacher.tolist(), target.tolist(), strict=True)
    return torch.tensor([schedule * math.exp(log_probs(row)[v]) for row, v in rows], dtype=torch.float64)


def truth(student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor, *schedule) -> torch.Tensor:
    """The loss in float64, token by token."""
    weights, soft = _weight(teacher, target, *schedule).tolist(), kl(teacher.double(), student.double()).tolist()
    hard = [-log_probs(row)[v] for row, v in zip(student.tolist(), target.tolist(), strict=True)]
    losses = [(1 - w) * h + w * s for w, h, s in zip(weights, hard, soft, strict=True)]
    return torch.tensor(math.fsum(losses) / len(losses), dtype=torch.float64)
