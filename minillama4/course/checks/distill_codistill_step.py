"""One batch of codistillation: the teacher reads it once, each of several students takes a step, and nothing leaks."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..exercise import Card, Step, different, normal, runs, same
from ..observe import call, plain

CARD = Card(
    "04", "Codistill step", difficulty=4, importance=5, minutes=35, trains="a training step, who gets a gradient"
)

HINTS = (
    "Who has to run how often, in which mode, and for whom does torch have to remember what happened? Answer for the "
    "teacher and for one student. Which tensors do they share, and which of their rows are to be learned?",
    "A model needs the whole text, but only the rows at `learn` go into the loss: logits[learn] is [T, vocab]. The "
    "teacher's come first, once, in eval mode and under torch.no_grad(), and then it gets its own mode back. In the "
    "loop over students: loss, gradients of the step before away, backward, step.",
    "For each pair of zip(students, optimizers): loss = token_loss(student(input_ids)[learn], teacher_TV, "
    "target_ids[learn]).mean(); optimizer.zero_grad(); loss.backward(); optimizer.step(); and loss.detach() into the "
    "list that torch.stack makes the result of. Before all that, a ValueError if learn has no True.",
)

ANSWERED_BY = ()

RATE = 0.5  # of learning


class Model(nn.Module):
    """Logits of the next token by a table: of the token itself, and half of those of the one before it.

    In training mode it drops some of them, always the same, so that what comes out can be known. `ran` holds what each
    call would have to remember for a gradient: True or False.
    """

    def __init__(self, table: torch.Tensor, keep: torch.Tensor):
        super().__init__()
        self.table = nn.Parameter(table.clone())  # [vocab, vocab]
        self.keep = keep  # [vocab]: 0 or 2
        self.ran = []

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids are {list(input_ids.shape)}; a model takes [batch, tokens]")
        rows = self.table[input_ids]  # [batch, tokens, vocab]
        logits = rows + 0.5 * F.pad(rows, (0, 0, 1, 0))[:, :-1]
        logits = logits * self.keep if self.training else logits
        self.ran.append(logits.requires_grad)
        return logits


class Descent:
    """Plain gradient descent. (The first optimizer of torch.optim takes seconds: it loads a compiler.)"""

    def __init__(self, table: nn.Parameter):
        self.table = table

    def zero_grad(self, set_to_none: bool = True):
        self.table.grad = None if set_to_none else torch.zeros_like(self.table)

    @torch.no_grad()
    def step(self):
        if self.table.grad is not None:
            self.table -= RATE * self.table.grad


def loss_of(temperature: float, soft_weight: float):
    """(1 - w) cross-entropy + w T^2 KL(teacher || student). It cuts nothing off: that is up to who calls it."""

    def token_loss(student_TV, teacher_TV, target_T):
        if student_TV.ndim != 2 or student_TV.shape != teacher_TV.shape or target_T.shape != student_TV.shape[:1]:
            shapes = [list(x.shape) for x in (student_TV, teacher_TV, target_T)]
            raise ValueError(f"token_loss got {shapes}; it takes student and teacher [T, vocab], and target [T]")
        hard_T = F.cross_entropy(student_TV, target_T, reduction="none")
        log_p, log_q = ((x / temperature).log_softmax(dim=1) for x in (teacher_TV, student_TV))
        soft_T = (log_p.exp() * (log_p - log_q)).sum(dim=1)
        return (1 - soft_weight) * hard_T + soft_weight * temperature**2 * soft_T

    return token_loss


def draw(rng: random.Random) -> dict:
    students, batch, tokens, vocab = *different(rng, 3, 5, 2), rng.randint(6, 8), rng.randint(9, 12)
    ids = torch.tensor([[rng.randrange(vocab) for _ in range(tokens + 1)] for _ in range(batch)])
    learn = torch.zeros(batch, tokens, dtype=torch.bool)
    for row in range(batch):  # an answer at the end of each text, of another length: neither all nor none of it
        learn[row, -1 - row :] = True
    one = torch.zeros_like(learn)
    one[rng.randrange(batch), rng.randrange(1, tokens - 1)] = True
    keep = torch.zeros(students + 1, vocab)
    for row in keep:  # the teacher's first; never all, so that dropping shows
        row[rng.sample(range(vocab), vocab - 3)] = 2.0
    return {
        "tables": normal(rng, students + 1, vocab, vocab),  # the teacher's first
        "keep": keep,
        "stale": normal(rng, students + 1, vocab, vocab),  # gradients that are there before the step
        "ids": ids[:, :-1].clone(),
        "targets": ids[:, 1:].clone(),
        "learn": learn,
        "one": one,
        "temperature": rng.uniform(1.5, 3),
        "soft_weight": rng.uniform(0.3, 0.7),
    }


def observe(function, inputs: dict) -> dict:
    students = len(inputs["tables"]) - 1
    return (
        play("step", function, inputs, students, inputs["learn"], training=True)
        | play("alone", function, inputs, 1, inputs["one"], training=False)
        | play("nothing", function, inputs, students, torch.zeros_like(inputs["learn"]), training=True)
    )


def play(name: str, function, inputs: dict, students: int, learn: torch.Tensor, training: bool) -> dict:
    """`call`, and what became of the models. training: the mode in which the teacher comes; students always train."""
    models = [Model(table, keep) for table, keep in zip(inputs["tables"], inputs["keep"], strict=True)][: students + 1]
    tables = [model.table for model in models]
    for table, stale in zip(tables, inputs["stale"], strict=False):
        table.grad = stale.clone()
    optimizers = [Descent(table) for table in tables[1:]]
    teacher = models[0].train(training)
    token_loss = loss_of(inputs["temperature"], inputs["soft_weight"])
    graph = []

    def step(input_ids, target_ids, learn):
        losses = function(teacher, models[1:], list(optimizers), input_ids, target_ids, learn, token_loss)
        graph.append(getattr(losses, "requires_grad", False))
        return losses

    seen = call(name, step, inputs["ids"], inputs["targets"], learn)
    after = {
        "students": torch.stack([table.detach() for table in tables[1:]]),
        "teacher": tables[0],
        "gradient": torch.zeros_like(tables[0]) if tables[0].grad is None else tables[0].grad,
        "mode": teacher.training,
        "trainable": tables[0].requires_grad,
        "runs": [len(model.ran) for model in models],
        "graph": any(teacher.ran),
        "result_graph": any(graph),
    }
    return seen | {f"{name}/{key}": plain(value) for key, value in after.items()}


def judge(inputs: dict, observed: dict):
    students, (batch, tokens) = len(inputs["tables"]) - 1, inputs["learn"].shape
    given = f"{students} students, ids [{batch}, {tokens}], {int(inputs['learn'].sum())} of them to be learned"
    yield from runs(observed, "step", [students], given)
    losses, after = truth(inputs, students, inputs["learn"])
    yield same(
        "each student has its mean loss over the tokens to be learned", observed["step/value"], losses, given,
        "Which rows of which logits go into token_loss, and by what is the sum of its result divided?",
        _wrong_losses(inputs, losses),
    )  # fmt: skip

    before, stale = inputs["tables"][1:].numpy(), inputs["stale"][1:].numpy()
    moved, places = after - before, np.arange(students)[:, None, None]
    rounds = students - places  # of the loop, from a student's own on
    yield same(
        "each student takes one step, by its own gradient", observed["step/students"], after,
        f"{given}; gradient descent with rate {RATE}",
        "What is in the .grad of this student when its optimizer steps: its own loss, whole, and nothing else?",
        {
            "nobody moved": (before, "Which of your lines changes weights, and what is in .grad when it comes?"),
            "old gradients": (
                after - RATE * stale, "What is in .grad before your backward, and what does backward do with it?",
            ),
            "divided among the students": (
                before + moved / students, "Should a student learn more slowly because others learn, too?",
            ),
            "one step for each round": (
                before + rounds * moved, "In the second round of your loop, which optimizers step? With which .grad?",
            ),
            "only the last one moved": (
                np.where(places == students - 1, after, before), "How many backwards and steps does your loop do?",
            ),
            "two steps": (before + 2 * moved, "How often does one student's gradient move it?"),
        },
        tolerance=1e-3,
    )  # fmt: skip
    yield from _of_the_teacher(inputs, observed, given)

    alone, after = truth(inputs, 1, inputs["one"])
    given = "one student, a teacher in eval mode, and one token to be learned"
    yield from runs(observed, "alone", [1], given)
    yield same(
        "the loss is right for one student and one token", observed["alone/value"], alone, given,
        "What do your lines do if there is only one row, or only one student?",
    )  # fmt: skip
    yield same(
        "and so is the step", observed["alone/students"], after, given,
        "The loss is right. What else do your lines do with the number of rows, or of students?", tolerance=1e-3,
    )  # fmt: skip
    yield same(
        "a teacher in eval mode stays there", observed["alone/mode"], False, given,
        "You gave the teacher a mode at the end. Which one did it have before?",
    )  # fmt: skip
    yield from _nothing(inputs, observed)


def _of_the_teacher(inputs: dict, observed: dict, given: str):
    students = len(inputs["tables"]) - 1
    once = np.ones(students + 1, dtype=int)
    each = once.copy()
    each[0] = students
    yield same(
        "the teacher runs once, and each student once", observed["step/runs"], once,
        f"{given}; runs of [teacher, students]",
        "The teacher costs many times what a student does. How often does each model run in yours?",
        {"a teacher for each student": (each, "What does the teacher say to the second student that is new?")},
    )  # fmt: skip
    yield same(
        "no gradient reaches the teacher", observed["step/gradient"], inputs["stale"][0], given,
        "token_loss cuts nothing off. Along which tensor does backward come to the teacher's weights?",
        {
            "teacher's gradients cleared": (
                torch.zeros_like(inputs["stale"][0]),
                "The teacher had gradients of its own, of another loss, before your step. Where did they go?",
            ),
        },
    )  # fmt: skip
    yield same(
        "the teacher runs without a graph", observed["step/graph"], False, given,
        "Cut off afterwards, no gradient comes back. But what did torch keep of all the teacher's layers while they "
        "ran, and for whom?",
    )  # fmt: skip
    yield same(
        "the teacher's weights are what they were", observed["step/teacher"], inputs["tables"][0], given,
        "Which of your lines writes into the teacher?",
    )  # fmt: skip
    yield same(
        "the teacher is in the mode it came in", observed["step/mode"], True, f"{given}; a teacher in training mode",
        "The teacher may be training itself, in a loop of its own. In which mode does that go on?",
    )  # fmt: skip
    yield same(
        "the teacher can still be trained by others", observed["step/trainable"], True, given,
        "What did your step do to the teacher's requires_grad, and who would look for that?",
    )  # fmt: skip
    yield same(
        "the losses hold no graph", observed["step/result_graph"], False, given,
        "Someone puts your losses into a list, step after step. What stays in memory with them?",
    )  # fmt: skip


def _nothing(inputs: dict, observed: dict):
    given = "a batch in which learn is False everywhere"
    said = str(observed["nothing/error"]) or "no error"
    yield Step(
        "a batch with nothing to learn is refused", "ValueError" in said, given, said, "a ValueError",
        "What is the mean of no number at all, and where does it go from your function?",
        "" if said == "no error" else "another error",
    )  # fmt: skip
    yield same(
        "before any model has run", observed["nothing/runs"], np.zeros(len(inputs["tables"]), dtype=int),
        f"{given}; runs of [teacher, students]",
        "What do you need to know, to see that there is nothing to learn? And what was it worth to run the teacher?",
    )  # fmt: skip


def _wrong_losses(inputs: dict, losses: np.ndarray) -> dict:
    """What known mistakes give, with their questions."""
    learn, students = inputs["learn"], len(losses)
    count, everything = int(learn.sum()), torch.ones_like(learn)

    def other(learn=learn, **changes):
        return truth(inputs, students, learn, **changes)[0]

    rows = [other(learn & (torch.arange(len(learn)) == row)[:, None]) for row in range(len(learn))]
    return {
        "every token": (other(everything), "Which tokens count in your loss? And which of them does learn name?"),
        "divided by all tokens": (
            losses * count / learn.numel(), "How many tokens does your loss count, and by how many do you divide?",
        ),
        "a sum": (losses * count, "Would a batch twice as large make your loss larger?"),
        "mean of the rows' means": (
            np.mean(rows, axis=0), "A row with one token to learn and a row with three: what does each token weigh?",
        ),
        "teacher in training mode": (
            other(teacher_drops=True), "The teacher came in training mode. What does dropout do to its words?",
        ),
        "students in eval mode": (other(students_drop=False), "In which mode do the students learn, and by whom?"),
        "teacher and student swapped": (
            other(swapped=True), "Which of the two models does token_loss take first, and which one is the target for?",
        ),
        "shifted once more": (other(shift=1), "target_ids holds the next tokens already. What do your slices hold?"),
        "context lost": (other(context=False), "Which tokens did the models read? Can they do without those before?"),
        "divided among the students": (losses / students, "Should a student's loss shrink because others learn, too?"),
        "running total": (np.cumsum(losses), "Does the second entry hold the loss of the first student as well?"),
        "taught by the student before": (other(chain=True), "Whose logits does your second student learn from?"),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Truth: token by token in float64, with the gradient written down instead of asked for


def truth(
    inputs: dict,
    students: int,
    learn: torch.Tensor,
    teacher_drops: bool = False,
    students_drop: bool = True,
    swapped: bool = False,
    shift: int = 0,
    context: bool = True,
    chain: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """([students] losses, [students, vocab, vocab] weights after the step); with a mistake, if a switch says so."""
    tables, keep = inputs["tables"].double().numpy(), inputs["keep"].double().numpy()
    ids, targets = inputs["ids"].tolist(), inputs["targets"].tolist()
    temperature, weight = inputs["temperature"], inputs["soft_weight"]
    places = [(b, t - shift) for b, t in learn.nonzero().tolist() if t >= shift]
    losses, after = np.zeros(students), tables[1 : students + 1].copy()

    def logits(model: int, b: int, t: int) -> np.ndarray:
        before = ids[b][t - 1] if t else None
        if not context:  # the learned tokens alone, one after the other
            at = places.index((b, t))
            before = ids[places[at - 1][0]][places[at - 1][1]] if at else None
        drops = students_drop if model else teacher_drops
        given = tables[model][ids[b][t]] + (0.5 * tables[model][before] if before is not None else 0)
        return given * (keep[model] if drops else 1)

    for student in range(1, students + 1):
        for b, t in places:
            pair = [logits(student, b, t), logits(student - 1 if chain else 0, b, t)]
            z, u = pair[::-1] if swapped else pair
            target = targets[b][t + shift]
            p, q, hard = softmax(u / temperature), softmax(z / temperature), softmax(z)
            soft = temperature**2 * sum(p * np.log(p / q))
            losses[student - 1] += ((1 - weight) * -np.log(hard[target]) + weight * soft) / len(places)
            slope = (1 - weight) * (hard - np.eye(len(z))[target]) + weight * temperature * (q - p)
            slope *= RATE / len(places) * keep[student]
            after[student - 1][ids[b][t]] -= slope
            if t:
                after[student - 1][ids[b][t - 1]] -= 0.5 * slope
    return losses, after


def softmax(x: np.ndarray) -> np.ndarray:
    power = np.exp(x - x.max())
    return power / power.sum()
