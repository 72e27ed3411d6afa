"""A cached teacher: its k likeliest tokens and the mass of all others, and a loss over these k + 1 outcomes."""

import random

import numpy as np
import torch

from ..exercise import Card, Step, different, normal, runs, same
from ..observe import call

CARD = Card("04", "Top-k cache", difficulty=4, importance=4, minutes=35, trains="log-sum-exp, what a cache may forget")

HINTS = (
    "The k kept tokens and 'any other token' are k + 1 outcomes, and their probabilities add up to 1, for the teacher "
    "and for the student. Which k + 1 logs does the cache hold, and how do you get the same ones of the student?",
    "Of log-probabilities [T, V] the kept ones are a topk of the teacher's, and a gather of the student's at the same "
    "index. The tail is a sum of the others' probabilities. In float32, 1 - sum has lost it when it is small: take a "
    "logsumexp over what is left.",
    "log_TV.scatter(1, index_TK, -torch.inf).logsumexp(dim=1) is the log of the tail, for both models. Then the square "
    "of the temperature times the sum of p * (log p - log q), where an outcome with p = 0 adds nothing: torch.where "
    "keeps 0 * (-inf - -inf) out. And of the teacher no graph may stay: detach it.",
)

ANSWERED_BY = ("minillama4.distill.top_k", "minillama4.distill.top_k_loss")

SURE = 60  # nats between kept tokens and all others: 1 - sum has nothing left of e^-60 in float32, nor in float64
TAIL = "log_tail_T"


def draw(rng: random.Random) -> dict:
    k, tokens = different(rng, 3, 7, 2)
    vocab = rng.randint(25, 40)  # the tail is many tokens, and the cache a small part of the logits
    temperature = rng.uniform(1.5, 3)
    teacher = 2 * normal(rng, tokens, vocab)
    sure = torch.zeros(tokens, vocab).scatter(1, torch.tensor(kept(teacher, k)), SURE * temperature)
    return {
        "k": k,
        "temperature": temperature,
        "teacher": teacher,
        "student": 2 * normal(rng, tokens, vocab),
        "sure": sure,  # to be added to logits, of the teacher or the student
        "push": normal(rng, tokens).abs() + 1,
    }


def observe(function, inputs: dict) -> dict:
    teacher, student, sure, push = (inputs[key] for key in ("teacher", "student", "sure", "push"))
    given = inputs["k"], inputs["temperature"]
    whole = teacher.shape[1], inputs["temperature"]

    def part(name: str):
        return lambda *given: getattr(function(*given), name)

    def loss(student_TV, *given):
        return function(*given).loss(student_TV)

    def graph(teacher_TV, *given):
        tensors = held(function(teacher_TV.clone().requires_grad_(), *given))
        return any(tensor.requires_grad for tensor in tensors)

    seen = {}
    for name in ("index_TK", "log_prob_TK", TAIL):
        seen |= call(name, part(name), teacher, *given)
    return (
        seen
        | call("sure_tail", part(TAIL), teacher + sure, *given)
        | call("no_tail", part(TAIL), teacher, *whole)
        | call("size", lambda *given: size(held(function(*given))), teacher, *given)
        | call("graph", graph, teacher, *given)
        | call("loss", loss, student, teacher, *given)
        | call("equal", loss, teacher, teacher, *given)
        | call("sure_loss", loss, student + sure, teacher, *given)
        | call("push", loss, student, teacher, *given, cotangent=push, wrt=(0,))
        | call("whole", loss, student, teacher, *whole, cotangent=push, wrt=(0,))
    )


def held(thing) -> list[torch.Tensor]:
    """The tensors in its attributes, also in lists and dicts."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict):
        return [tensor for value in thing.values() for tensor in held(value)]
    if isinstance(thing, (list, tuple)):
        return [tensor for value in thing for tensor in held(value)]
    return held(vars(thing)) if hasattr(thing, "__dict__") and hasattr(thing, "loss") else []


def size(tensors: list[torch.Tensor]) -> int:
    """Numbers in memory: a view keeps all that it is a view of."""
    memory = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in memory.values())


def judge(inputs: dict, observed: dict):
    teacher, k, temperature = inputs["teacher"], inputs["k"], inputs["temperature"]
    tokens, vocab = teacher.shape
    given = f"teacher_TV [{tokens}, {vocab}], k {k}, temperature {temperature:.3f}"
    for name, shape, dtype in (
        ("index_TK", [tokens, k], "int64"), ("log_prob_TK", [tokens, k], "float32"), (TAIL, [tokens], "float32")
    ):  # fmt: skip
        yield from runs(observed, name, shape, given, dtype=dtype)
    yield from _cache(inputs, observed, given)
    yield from _little(inputs, observed, given)
    yield from runs(observed, "loss", [tokens], f"student_TV [{tokens}, {vocab}], {given}")
    yield from _loss(inputs, observed, given)


def _cache(inputs: dict, observed: dict, given: str):
    teacher, k, temperature = inputs["teacher"].double(), inputs["k"], inputs["temperature"]
    index = torch.tensor(kept(teacher, k))
    yield same(
        "the k likeliest tokens, the likeliest first", observed["index_TK/value"], index, given,
        "For the first token: which of its logits is the largest, and where is that one in your index?",
        {
            "the first k": (
                torch.arange(k).expand_as(index), "Which tokens do you keep: likely ones, or those that come first?",
            ),
            "the least likely": (teacher.argsort(1)[:, :k], "Which end of the order do you take?"),
            "the likeliest last": (index.flip(1), "You keep the right ones. Which of them comes first?"),
        },
    )  # fmt: skip

    probs = probabilities(teacher, temperature)
    right = probs.log().gather(1, index)
    plain = teacher.log_softmax(1).gather(1, index)
    yield same(
        "their log-probabilities at the temperature", observed["log_prob_TK/value"], right, given,
        "Which function makes probabilities of logits, over how many tokens, and what becomes of the logits before?",
        {
            "renormalised": (
                right - right.logsumexp(1, keepdim=True),
                "Your k probabilities add up to 1. What probability is left for all other tokens?",
            ),
            "no temperature": (plain, "What does your function do with temperature?"),
            "temperature after the softmax": (
                plain / temperature, "Do the exponentials of these numbers still add up to at most 1?",
            ),
            "times temperature": (
                (teacher * temperature).log_softmax(1).gather(1, index),
                "Does a higher temperature make your teacher softer, or surer?",
            ),
            "logits": (teacher.gather(1, index), "Can a log-probability be larger than 0?"),
            "softened logits": (teacher.gather(1, index) / temperature, "Can a log-probability be larger than 0?"),
            "probabilities": (right.exp(), "Are these probabilities, or their logs?"),
        },
    )  # fmt: skip

    rest = probs.scatter(1, index, 0).sum(1)
    yield same(
        "the log of the mass of all other tokens", observed[f"{TAIL}/value"], rest.log(), given,
        "What do the exponentials of your k + 1 logs add up to, for one token? And what should they?",
        {
            "mass, not its log": (rest, "Is this a probability, or its log?"),
            "the kept mass": ((1 - rest).log(), "Whose mass is this: of the kept tokens, or of the others?"),
            "mean of the others": (
                (rest / (teacher.shape[1] - k)).log(), "Is the tail one outcome, or an average of many?",
            ),
            "sum of logs": (
                probs.log().scatter(1, index, 0).sum(1), "Do probabilities of different tokens add up, or their logs?",
            ),
            "not normalised": (
                (teacher / temperature).scatter(1, index, -torch.inf).logsumexp(1),
                "By what do you divide the sum of exponentials, to get a probability?",
            ),
            "tail without temperature": (
                teacher.log_softmax(1).scatter(1, index, -torch.inf).logsumexp(1),
                "At which temperature are the tail's probabilities?",
            ),
        },
    )  # fmt: skip
    sure = probabilities(teacher + inputs["sure"].double(), temperature).scatter(1, index, 0).sum(1).log()
    yield same(
        "a tiny tail keeps its digits", observed["sure_tail/value"], sure,
        f"a teacher whose kept tokens are {SURE} nats above the others, k {k}",
        "The kept probabilities add up to nearly 1. How many digits are left of 1 - sum in float32? Can you do without "
        "that difference?",
    )  # fmt: skip
    yield same(
        "no tail is -inf", observed["no_tail/value"], torch.full((len(teacher),), -torch.inf),
        f"k = {teacher.shape[1]}, the whole vocabulary", "How much mass is outside the whole vocabulary, and its log?",
    )  # fmt: skip


def _little(inputs: dict, observed: dict, given: str):
    tokens, vocab = inputs["teacher"].shape
    yield from runs(observed, "size", [], given, dtype="int")
    numbers = int(observed["size/value"])
    yield Step(
        "it keeps a small part of the logits", numbers < tokens * vocab, given, f"{numbers} numbers in memory",
        f"{tokens * (2 * inputs['k'] + 1)} are enough, of {tokens * vocab} logits",
        "Which tensors does your object hold? And is one of them a view (a slice of a sorted one, say) that keeps all "
        "of a larger one in memory?", "whole vocabulary kept",
    )  # fmt: skip
    yield same(
        "it keeps no graph of the teacher", observed["graph/value"], False, f"{given}; teacher_TV.requires_grad",
        "Your tensors know how they were made of the teacher's logits. What is kept in memory with them, and where "
        "would the student's gradient go?",
    )  # fmt: skip


def _loss(inputs: dict, observed: dict, given: str):
    teacher, student, sure = (inputs[key].double() for key in ("teacher", "student", "sure"))
    k, temperature, push = inputs["k"], inputs["temperature"], inputs["push"].double()
    vocab = teacher.shape[1]
    given = f"student_TV {list(student.shape)}, {given}"
    yield same(
        "the loss over k + 1 outcomes", observed["loss/value"], truth(student, teacher, k, temperature), given,
        "For one token, write down the k + 1 probabilities of teacher and student. What does each outcome add?",
        _mistakes(student, teacher, k, temperature),
    )  # fmt: skip
    yield from runs(observed, "equal", [len(student)], given)
    equal = observed["equal/value"]
    yield Step(
        "equal logits cost nothing", bool(np.isfinite(equal).all() and np.abs(equal).max() < 1e-5),
        "a student with the teacher's logits", str(np.abs(equal).max()), "0, up to rounding",
        "Which numbers of the student and of the teacher should be the same here, and are they?",
    )  # fmt: skip
    yield same(
        "a student that gives the tail next to nothing pays for it", observed["sure_loss/value"],
        truth(student + sure, teacher, k, temperature),
        f"a student whose kept tokens are {SURE} nats above the others, {given}",
        "The student's kept probabilities add up to nearly 1. How many digits are left of 1 - sum in float32, and "
        "what is its log? Does a smallest allowed value make it right?",
    )  # fmt: skip
    yield same(
        "the gradient moves the kept tokens one by one, and the tail as a whole", observed["push/grad0"],
        push[:, None] * slope(student, teacher, k, temperature), given,
        "Does every step from student_TV to the loss stay a tensor with a gradient? Also that of the tail?",
        {
            "tail without gradient": (
                push[:, None] * slope(student, teacher, k, temperature, tail=False),
                "Kept tokens get the gradient of a loss in which the tail is a constant. Where is it cut off?",
            ),
            "no gradient": (torch.zeros_like(student), "Which line cuts the student off: detach, no_grad, item?"),
        },
        tolerance=1e-3,
    )  # fmt: skip
    given = f"student_TV {list(student.shape)}, k = {vocab}, the whole vocabulary"
    asks = "There is no tail: p = 0, and both logs are -inf. What is 0 * (-inf - -inf), and what should it add?"
    yield same(
        "with k = V it is the whole KL", observed["whole/value"], truth(student, teacher, vocab, temperature), given,
        asks,
    )  # fmt: skip
    yield same(
        "with k = V it has the gradient of the whole KL", observed["whole/grad0"],
        push[:, None] * slope(student, teacher, vocab, temperature), given,
        "The value is right. What is the derivative of what you do with the empty tail? A NaN that `where` hides in "
        "the value can come back in the gradient: where would that be?",
        tolerance=1e-3,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Truth, outcome by outcome and in float64


def kept(teacher: torch.Tensor, k: int) -> list[list[int]]:
    return [sorted(range(len(row)), key=lambda token, row=row: -row[token])[:k] for row in teacher.tolist()]


def probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """[T, V] float64, from the definition."""
    power = ((logits.double() - logits.double().amax(1, keepdim=True)) / temperature).exp()
    return power / power.sum(1, keepdim=True)


def truth(student: torch.Tensor, teacher: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    """[T]: outcome by outcome; the tail is the one of many tokens, or of none."""
    losses = []
    rows = zip(probabilities(teacher, temperature), probabilities(student, temperature), kept(teacher, k), strict=True)
    for p, q, own in rows:
        others = [token for token in range(len(p)) if token not in own]
        outcomes = [[token] for token in own] + ([others] if others else [])
        losses.append(sum(p[group].sum() * (p[group].sum() / q[group].sum()).log() for group in outcomes))
    return temperature**2 * torch.stack(losses)


def slope(student: torch.Tensor, teacher: torch.Tensor, k: int, temperature: float, tail: bool = True) -> torch.Tensor:
    """[T, V]: of each row of `truth` by the student's logits, T * q * (1 - p / q of a token's outcome)."""
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    index = torch.tensor(kept(teacher, k))
    rest = torch.ones_like(p).scatter(1, index, 0)  # 1 for tokens of the tail
    shared = ((p * rest).sum(1, keepdim=True) / (q * rest).sum(1, keepdim=True)).nan_to_num()
    # A constant tail: what pulls at q are the kept tokens alone, and their share of p is less than 1.
    weight = 1 if tail else (p * (1 - rest)).sum(1, keepdim=True)
    return temperature * (q * weight - torch.where(rest > 0, q * shared if tail else 0, p))


def _mistakes(student: torch.Tensor, teacher: torch.Tensor, k: int, temperature: float) -> dict:
    """What known mistakes give, with their questions."""
    index, square = torch.tensor(kept(teacher, k)), temperature**2
    vocab = teacher.shape[1]

    def outcomes(logits, index, temperature=temperature):
        probs = probabilities(logits, temperature)
        return torch.cat([probs.gather(1, index), probs.scatter(1, index, 0).sum(1, keepdim=True)], 1)

    def kl(p, q):
        return (p * (p / q).log()).sum(1)

    def share(x):
        return x[:, :-1] / x[:, :-1].sum(1, keepdim=True)

    p, q = outcomes(teacher, index), outcomes(student, index)
    whole_p, whole_q = probabilities(teacher, temperature), probabilities(student, temperature)
    even = (p[:, -1:] / (vocab - k)).expand_as(whole_p).scatter(1, index, p[:, :-1])
    return {
        "tail dropped": (
            square * kl(p[:, :-1], q[:, :-1]),
            "Could this sum become negative? What does a student pay in yours for mass on tokens outside the k?",
        ),
        "both renormalised": (
            square * kl(share(p), share(q)),
            "A student with all its mass outside the k: what does it pay in yours?",
        ),
        "teacher renormalised": (
            square * kl(share(p), q[:, :-1]),
            "Is the loss 0 for a student that equals the teacher? What would it have to do with the tail to pay least?",
        ),
        "no square": (kl(p, q), "How does a gradient shrink when the temperature grows, and what makes up for it?"),
        "temperature not squared": (
            temperature * kl(p, q), "Logits are divided by the temperature in two places. To which power does it grow?",
        ),
        "student without temperature": (
            square * kl(p, outcomes(student, index, 1)), "At which temperature does each of the two models speak?",
        ),
        "directions swapped": (
            square * kl(q, p), "Whose probabilities weigh the logs: of the one who teaches, or of the one who learns?",
        ),
        "cross-entropy": (
            -square * (p * q.log()).sum(1), "What does your loss give for a student that equals the teacher?",
        ),
        "tail spread evenly": (
            square * kl(even, whole_q), "What does the cache know about single tokens of the tail? And your loss?",
        ),
        "whole KL": (square * kl(whole_p, whole_q), "Which numbers of the teacher does this loss read?"),
        "the student's own k": (
            square * kl(p, outcomes(student, torch.tensor(kept(student, k)))),
            "Are the k outcomes of the student the same tokens as the teacher's?",
        ),
        "mean over outcomes": (square * kl(p, q) / (k + 1), "Is a KL a sum over outcomes, or their average?"),
    }  # fmt: skip
