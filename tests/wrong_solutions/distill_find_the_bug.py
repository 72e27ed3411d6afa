"""Answers to `distill-find-the-bug`.

Of a teacher with one logit a among 0s, beside a flat student: `soft` is 0 for a = 0, and for a -> infinity w T^2 log V.
"""

import math

import torch
from bank import right, wrong

from minillama4.course.checks.distill_find_the_bug import (
    MEAN,
    RIGHT,
    SHIFT,
    SQUARE,
    SWAPPED,
    TEACHER,
    suspect,
)

V = 500
IDS = torch.zeros(4, dtype=torch.int64)


def flat(vocab=V):
    return torch.zeros(4, vocab, dtype=torch.float64)


def weight(loss):
    """That of the soft part: of two flat models the hard part alone is left."""
    return 1 - loss(flat(), flat(), IDS)[0].item() / math.log(V)


def soft(loss, size, rows=slice(None), vocab=V, watch=0):
    """What a teacher with this logit for token 0 costs a flat student."""
    teacher = flat(vocab)
    teacher[rows, 0] = size
    return (loss(flat(vocab), teacher, IDS) - loss(flat(vocab), flat(vocab), IDS))[watch].item()


def agreed(loss, logits, target_row=1):
    """What is soft if both models have these logits [4, V]."""
    ids = torch.arange(4)
    hard = torch.nn.functional.cross_entropy(logits[:1], ids[target_row][None]).item()
    return loss(logits, logits, ids)[0].item() - (1 - weight(loss)) * hard


def exchanged(loss, size):
    """What a flat teacher costs a student with this logit for token 0, and the text says token 1."""
    student, ids = flat(), IDS + 1
    student[:, 0] = size
    hard = torch.nn.functional.cross_entropy(student[:1], ids[:1]).item()
    return loss(student, flat(), ids)[0].item() - (1 - weight(loss)) * hard


def noise(rows_differ=False):
    x = torch.randn(4, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x if rows_differ else x[:1].expand(4, V)


def small(loss, vocab=V, size=0.01):
    """The soft part over what it should be for small logits, half their variance."""
    return soft(loss, size, vocab=vocab) / (weight(loss) * size**2 * (1 - 1 / vocab) / vocab / 2)


EXPERIMENTS = {
    "shift": lambda loss: soft(loss, 5, rows=0) < 1e-9,
    "swapped": lambda loss: soft(loss, 4000) > 3 * soft(loss, 400),
    "teacher": lambda loss: agreed(loss, noise()) > 1e-6,
    "mean": lambda loss: small(loss) < 0.9 and small(loss, vocab=25) > 2 * small(loss),
    "square": lambda loss: small(loss) < 0.9,
}
FOUND = {"shift": SHIFT, "swapped": SWAPPED, "teacher": TEACHER, "mean": MEAN, "square": SQUARE}


def investigation(**changes):
    """Asks for one bug after another, with other experiments, or none (None), for what is given; that comes first."""
    assert set(changes) <= set(EXPERIMENTS)
    experiments = changes | {name: ask for name, ask in EXPERIMENTS.items() if name not in changes}

    def find_bug(loss):
        return next((FOUND[name] for name, ask in experiments.items() if ask is not None and ask(loss)), RIGHT)

    return find_bug


def with_another(**change):
    """The same, at its own place in the order."""
    return investigation(**EXPERIMENTS | change)


other_experiments = right(investigation())


@right
def by_gradients(loss):
    """Value and gradient of the soft part: of a very sure teacher they are w T^2 log V and w T."""
    vocab = 300
    student = torch.zeros(5, vocab, dtype=torch.float64, requires_grad=True)
    teacher = torch.zeros_like(student, requires_grad=True)
    ids = torch.zeros(5, dtype=torch.int64)
    uniform = loss(student, teacher, ids)[0]
    w = 1 - uniform.item() / math.log(vocab)
    push = torch.linspace(-1, 1, vocab, dtype=torch.float64)
    (pull,) = torch.autograd.grad(loss(push.expand(5, -1), teacher, ids)[0], teacher)
    if not pull[0].any():
        return SHIFT

    def soft(logits):
        out = loss(student, logits, ids)[0]
        # The hard part has a gradient of its own, which is known.
        (slope,) = torch.autograd.grad(out, student)
        return (out - uniform).item(), slope[0, 1].item() - (1 - w) / vocab

    sure = torch.zeros(5, vocab, dtype=torch.float64)
    sure[:, 0] = 1e4
    value, slope = soft(sure)
    if value > 500 * w * math.log(vocab):  # T^2 is 16 at most
        return SWAPPED
    # d/dq of w c T^2 KL is w c T / V, and its value is w c T^2 log V: c = 1, 1 / T^2 or 1 / V.
    temperature = value / math.log(vocab) / (slope * vocab)
    factor = value / (w * math.log(vocab) * temperature**2)
    if factor < 2 / vocab:
        return MEAN
    if factor < 0.9:
        return SQUARE
    slightly = torch.zeros(5, vocab, dtype=torch.float64)
    slightly[:, 0] = 1e-2
    # Of the other tokens T (1 / V - softmax(teacher / T)) is the teacher's logit / V^2; if undivided, T times that.
    return TEACHER if soft(slightly)[1] > 1.5 * w * 1e-2 / vocab**2 else RIGHT


@wrong("not written")
def stub(loss):
    raise NotImplementedError()


@wrong("type")
def in_words(loss):
    return "square"


@wrong("type")
def a_truth_value(loss):
    return EXPERIMENTS["shift"](loss)


@wrong("type")
def nothing_found(loss):
    if EXPERIMENTS["swapped"](loss):
        return SWAPPED


@wrong("raises")
def with_a_batch(loss):
    return int(loss(flat()[None], flat()[None], IDS[None]).sum())


@wrong("raises")
def without_a_text(loss):
    return int(loss(flat(), flat()).sum())


@wrong("raises")
def targets_without_the_first(loss):
    return int(loss(flat(), flat(), IDS[1:]).sum())


@wrong("no bug")
def counts_from_one(loss):
    return 1 + other_experiments(loss)


@wrong("one answer for all")
def always_the_first(loss):
    return SQUARE


@wrong("one answer for all")
def looks_at_shapes(loss):
    return RIGHT if loss(flat(), flat(), IDS).shape == (3,) else SHIFT


@wrong("one answer for all")
def reads_the_name(loss):
    said = f"{loss.__name__} {loss.__qualname__} {loss.__doc__} {loss.__defaults__} {loss.__code__.co_consts}"
    words = {SQUARE: "square", TEACHER: "temperature", SWAPPED: "swapped", MEAN: "mean", SHIFT: "shift"}
    return next((bug for bug, word in words.items() if word in said), RIGHT)


@wrong("one answer for all")
def reads_the_closure(loss):
    """Whatever whole number it holds, if that is the number of a bug."""
    held = [cell.cell_contents for cell in loss.__closure__ or ()]
    return next((value for value in held if value in range(1, 6)), RIGHT)


@wrong("one answer for all")
def compared_with_each_suspect(loss):
    """No use: a planted one has another temperature and weight."""
    given = noise(rows_differ=True), noise(rows_differ=True).flip(0), IDS
    return next((bug for bug in range(6) if torch.allclose(loss(*given), suspect(bug)(*given))), RIGHT)


# What an experiment does not see.
all_rows_equal = wrong("shifted teacher missed")(
    investigation(shift=lambda loss: not math.isclose(soft(loss, 5, watch=0), soft(loss, 5, watch=1)))
)
no_row_asked_for = wrong("shifted teacher missed")(investigation(shift=None))
nearly_equal = wrong("swapped KL missed")(investigation(swapped=lambda loss: soft(loss, 0.02) > 5 * soft(loss, 0.01)))
no_bound_asked_for = wrong("swapped KL missed")(investigation(swapped=None))
flat_models = wrong("temperature 1 missed")(investigation(teacher=lambda loss: abs(agreed(loss, flat())) > 1e-6))
very_sure_models = wrong("temperature 1 missed")(
    investigation(teacher=lambda loss: abs(agreed(loss, 1e4 * noise(), target_row=0)) > 1e9)
)
no_size_asked_for = wrong("mean over the vocabulary missed")(investigation(mean=None, square=None))
a_hundredth_at_most = wrong("no T squared missed")(with_another(square=lambda loss: small(loss) < 0.01))

# One taken for another.
agreed_in_rows_that_differ = wrong("shifted teacher taken for temperature 1")(
    investigation(teacher=lambda loss: agreed(loss, noise(rows_differ=True)) > 1e-6)
)
one_row_alone = wrong("shifted teacher taken for no T squared")(
    investigation(square=lambda loss: soft(loss, 0.01, rows=0) < 1e-12)
)
larger_than_a_square = wrong("swapped KL taken for temperature 1")(
    investigation(teacher=lambda loss: soft(loss, 400) > 16 * math.log(V))
)
too_large_at_all = wrong("temperature 1 taken for KL swapped")(
    investigation(swapped=lambda loss: EXPERIMENTS["swapped"](loss) or small(loss, size=1) > 1.5)
)
alarm_of_any_kind = wrong("temperature 1 taken for a shifted teacher")(
    with_another(shift=lambda loss: agreed(loss, noise(rows_differ=True)) > 1e-6)
)
too_small = wrong("mean over the vocabulary taken for no T squared")(investigation(mean=None))
too_small_is_mean = wrong("no T squared taken for a mean over the vocabulary")(
    with_another(mean=lambda loss: small(loss) < 0.9)
)
few_words = wrong("mean over the vocabulary taken for no T squared")(
    investigation(mean=lambda loss: small(loss, vocab=9) < 1 / 16)
)


# False alarms.
large_logits = wrong("right taken for no T squared")(with_another(square=lambda loss: small(loss, size=400) < 0.9))
to_the_last_digit = wrong("right taken for no T squared")(with_another(square=lambda loss: small(loss) != 1))
hard_part_forgotten = wrong("right taken for a teacher at temperature 1")(
    with_another(teacher=lambda loss: loss(noise(), noise(), IDS)[0] > 1e-6)
)
target_of_the_row_itself = wrong("right taken for a teacher at temperature 1")(
    with_another(teacher=lambda loss: abs(agreed(loss, noise(), target_row=0)) > 1e-6)
)
should_be_symmetric = wrong("right taken for KL swapped")(
    with_another(swapped=lambda loss: not math.isclose(exchanged(loss, 5), soft(loss, 5)))
)
grows_at_first = wrong("right taken for KL swapped")(
    with_another(swapped=lambda loss: soft(loss, 3) > 3 * soft(loss, 1))
)
another_teacher = wrong("right taken for a mean over the vocabulary")(
    with_another(mean=lambda loss: soft(loss, 0.01, vocab=25) > 2 * soft(loss, 0.01))
)
watches_the_next_row = wrong("right taken for a shifted teacher")(
    investigation(
        **{name: ask for name, ask in EXPERIMENTS.items() if name != "shift"},
        shift=lambda loss: soft(loss, 5, rows=0, watch=1) < 1e-9,
    )
)

EQUIVALENT = {
    "1000  ->  1001": "one token or one nat more changes no answer",
    "1000  ->  999": "one token or one nat less changes no answer",
    "100  ->  101": "very sure is sure enough, and one nat more is too",
    "100  ->  99": "very sure is sure enough, and one nat less is too",
    "torch.zeros  ->  torch.ones": "equal logits are flat as well, and any text will do",
    "0  ->  1": "which token the teacher likes does not matter",
    "0  ->  -1": "which token the teacher likes does not matter",
    "soft(1000, row=0) > 2 * soft(100, row=0)  ->  soft(1000, row=0) >= 2 * soft(100, row=0)": (
        "one way round it does not grow, the other way round it grows tenfold"
    ),
    "soft(100, row=0)  ->  100": "200 lies between T^2 log V, which is 111 at most, and 1000 T",
    "2  ->  3": "between no growth and tenfold growth, and between 1 / V and 1 / 16, there is room",
    "abs(ratio - 1) < 0.05  ->  abs(ratio - 1) <= 0.05": "no ratio lies on the border itself",
    "ratio > 1  ->  ratio >= 1": "a ratio of 1 was found right before",
    "1  ->  2": "T squared is 4 at least",
    "ratio < 2 / vocab  ->  ratio <= 2 / vocab": "no ratio lies on the border itself",
}
