"""Find the bug: a distillation loss with one of five planted mistakes, to be told apart by experiments alone.

All have been met in public code or papers. IntelLabs/distiller issue 122: no factor T squared. TinyBERT's first paper
divides the student's logits alone (its code both: issue 11 of huawei-noah/Pretrained-Language-Model). paiml/aprender
pull request 2153: the KL the other way round. HikariTJU/LD issue 74: a mean over the classes where a KL is a sum.
DeepOpt-com/WrinkleFree-Monorepo issue 13: teacher and student one token apart.
"""

import random

import torch.nn.functional as F

from .. import bug_hunt
from ..exercise import Card

CARD = Card("04", "Find the bug", difficulty=5, importance=4, minutes=50, trains="experiments, small and large logits")

HINTS = (
    "Make parts vanish. If the student's logits are all 0, which targets cost the same? And if the teacher's are 0 as "
    "well, what is left of the loss, and what does it say about soft_weight? From then on you can subtract the hard "
    "part, and look at the soft one alone.",
    "Student flat, teacher not. A teacher that knows something in one row only: in which row does the loss change? A "
    "teacher that is surer and surer of one token: T^2 * KL(teacher || flat) stops growing, and KL(flat || teacher) "
    "does not. And a teacher that is almost flat: for small logits T^2 * KL is half their variance, whatever T is.",
    "Take V = 1000, flat = zeros [3, V], hard = loss(flat, flat, ids), so w = 1 - hard / log(V). With logit a for one "
    "token: SHIFT if row 0 does not feel its own teacher, SWAPPED if a = 1000 costs more than twice a = 100. For a = "
    "0.01 half the variance is h = a^2 / V * (1 - 1/V) / 2; (loss - hard) / (w * h) is 1 if right, T^2 for TEACHER, "
    "1 / T^2 for SQUARE, and 1 / V for MEAN.",
)

ANSWERED_BY = ()

BUGS = (
    "right",
    "no T squared",
    "teacher at temperature 1",
    "KL swapped",
    "mean over the vocabulary",
    "shifted teacher",
)
RIGHT, SQUARE, TEACHER, SWAPPED, MEAN, SHIFT = range(len(BUGS))


def suspect(bug: int, seed: int = 0):
    """The loss with the bug of this number; called as `loss(student_TV, teacher_TV, ids_T) -> [tokens - 1]`.

    Logits [tokens, vocab] and the text they come from, [tokens] int64: row t of both models says what token t + 1 is.
    """
    rng = random.Random(seed)
    temperature, soft_weight = rng.uniform(2, 4), rng.uniform(0.6, 0.8)

    def loss(student_TV, teacher_TV, ids_T):
        if student_TV.ndim != 2 or student_TV.shape != teacher_TV.shape or ids_T.shape != student_TV.shape[:1]:
            shapes = [list(x.shape) for x in (student_TV, teacher_TV, ids_T)]
            raise ValueError(f"shapes are {shapes}; it takes two times [tokens, vocab], and ids [tokens]")
        student, target = student_TV.double()[:-1], ids_T[1:]
        teacher = teacher_TV.double()[1:] if bug == SHIFT else teacher_TV.double()[:-1]
        hard = F.cross_entropy(student, target, reduction="none")

        log_q = (student / temperature).log_softmax(dim=1)
        log_p = (teacher if bug == TEACHER else teacher / temperature).log_softmax(dim=1)
        if bug == SWAPPED:
            log_p, log_q = log_q, log_p
        each = F.kl_div(log_q, log_p, log_target=True, reduction="none")  # [tokens - 1, vocab]; their sum is KL(p || q)
        soft = each.mean(dim=1) if bug == MEAN else each.sum(dim=1)
        soft = soft if bug == SQUARE else temperature**2 * soft
        return (1 - soft_weight) * hard + soft_weight * soft

    return loss


def planted(seed: int):
    """The suspect of this seed, with a temperature and a weight that nobody is told."""

    def loss(student_TV, teacher_TV, ids_T):  # holds no more than its seed, and has the same name for every bug
        rng = random.Random(seed)
        return suspect(bug_hunt.bug_of(rng, BUGS), rng.getrandbits(62))(student_TV, teacher_TV, ids_T)

    return loss


def draw(rng: random.Random) -> dict:
    return bug_hunt.draw(rng, BUGS)


def observe(function, inputs: dict) -> dict:
    return bug_hunt.observe(function, inputs, planted)


# Bug -> what is right when it is found, the question for any other answer, and for particular ones their name and own.
STEPS = {
    RIGHT: (
        "a right suspect is found right",
        "Take suspect(RIGHT). Which of your experiments raises the alarm, and is it sure that it should?",
        {
            SQUARE: (
                "right taken for no T squared",
                "For which logits is T^2 * KL the same at every T: for large ones, or only for small ones?",
            ),
            TEACHER: (
                "right taken for a teacher at temperature 1",
                "What should be left of the loss when both models agree: nothing, or the hard part? For which target?",
            ),
            SWAPPED: (
                "right taken for KL swapped",
                "A KL the right way round is not symmetric, and grows at first as well. When does it stop growing?",
            ),
            MEAN: (
                "right taken for a mean over the vocabulary",
                "With more tokens to choose from, does the KL itself change for the two models that you compare?",
            ),
            SHIFT: (
                "right taken for a shifted teacher",
                "Row t of both models says what token t + 1 is. Which row of the result should feel row t of the "
                "teacher?",
            ),
        },
    ),
    SHIFT: (
        "a shifted teacher is found",
        "Change one row of the teacher. Which row of the result should change, and which does?",
        {
            RIGHT: ("shifted teacher missed", "Are the rows of your teacher different from each other?"),
            TEACHER: (
                "shifted teacher taken for temperature 1",
                "The models agree, and still something soft is left. Is that so as well if all their rows are equal?",
            ),
            SQUARE: (
                "shifted teacher taken for no T squared",
                "The soft part is too small. Is it too small in every row, or did it go to another one?",
            ),
        },
    ),
    SWAPPED: (
        "a swapped KL is found",
        "One model is flat, and the other is sure. Which of the two directions has a bound, and what is it?",
        {
            RIGHT: (
                "swapped KL missed",
                "For nearly equal distributions both directions are the same. How far apart are yours?",
            ),
            TEACHER: (
                "swapped KL taken for temperature 1",
                "The soft part is large. Is it still as large, compared with yours, for logits near 0?",
            ),
        },
    ),
    TEACHER: (
        "a teacher at temperature 1 is found",
        "Two models with the same logits: does the soft part vanish? When does it vanish even with this bug?",
        {
            RIGHT: (
                "temperature 1 missed",
                "A teacher that is flat, or quite sure, is the same at every temperature. What is yours?",
            ),
            SWAPPED: (
                "temperature 1 taken for KL swapped",
                "The two directions differ in where they end, for a very sure teacher. Is yours that sure?",
            ),
            SHIFT: (
                "temperature 1 taken for a shifted teacher",
                "The models agree, and still something soft is left. Did a row of the teacher go to another row?",
            ),
        },
    ),
    MEAN: (
        "a mean over the vocabulary is found",
        "The soft part is too small. By which factor, and does that factor change with V?",
        {
            RIGHT: (
                "mean over the vocabulary missed",
                "What size has the soft part in yours? Or did you only ask where it is 0, and when it grows?",
            ),
            SQUARE: (
                "mean over the vocabulary taken for no T squared",
                "Too small by one factor or by another. Which V tells 1 / V from 1 / T^2?",
            ),
        },
    ),
    SQUARE: (
        "a missing T squared is found",
        "The soft part is too small. By which factor, and does that factor change with V?",
        {
            RIGHT: (
                "no T squared missed",
                "What size has the soft part in yours? Or did you only ask where it is 0, and when it grows?",
            ),
            MEAN: (
                "no T squared taken for a mean over the vocabulary",
                "Too small by one factor or by another. Which V tells 1 / V from 1 / T^2?",
            ),
        },
    ),
}  # fmt: skip


def judge(inputs: dict, observed: dict):
    yield from bug_hunt.judge(inputs, observed, BUGS, STEPS)
