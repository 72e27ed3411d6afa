"""Answers to `distill-kl-directions`."""

import math

import torch
import torch.nn.functional as F
from bank import right, wrong
from torch.distributions import Categorical, kl_divergence

from minillama4.distill import soft_loss


def _kl(log_a, log_b):
    a = log_a.exp()
    return (a * torch.where(a > 0, log_a - log_b, 0)).sum(1)


def _logs(student_TV, teacher_TV):
    """(log q, log p)"""
    return student_TV.log_softmax(1), teacher_TV.log_softmax(1)


def pair(kl):
    """An answer that is right but for its KL, which gets two rows of log-probabilities."""

    def answer(student_TV, teacher_TV):
        log_q, log_p = _logs(student_TV, teacher_TV)
        return kl(log_p, log_q), kl(log_q, log_p)

    return answer


def only(kl, index):
    """An answer with this KL in one place of the pair, and the right one in the other."""
    return lambda *given: tuple(pair(kl if i == index else _kl)(*given)[i] for i in range(2))


@right
def row_by_row_over_what_is_said(student_TV, teacher_TV):
    def kl(a_V, b_V):
        said = a_V.softmax(0) > 0
        a_V, b_V = a_V.log_softmax(0)[said], b_V.log_softmax(0)[said]
        return torch.dot(a_V.exp(), a_V - b_V)

    rows = list(zip(student_TV, teacher_TV, strict=True))
    return torch.stack([kl(t, s) for s, t in rows]), torch.stack([kl(s, t) for s, t in rows])


@right
def lowest_number_for_never(student_TV, teacher_TV):
    """A number in place of -inf where both are, so that the differences are finite, and 0 where neither says it."""
    neither_TV = student_TV.isneginf() & teacher_TV.isneginf()
    log_q, log_p = (x.masked_fill(neither_TV, -1e6).log_softmax(-1) for x in (student_TV, teacher_TV))
    p, q = log_p.exp(), log_q.exp()
    forward_T = (torch.xlogy(p, p) - p * log_q).nansum(-1)
    return forward_T, (q * (log_q.masked_fill(q == 0, 0) - log_p.masked_fill(q == 0, 0))).sum(-1)


@wrong("not written")
def stub(student_TV, teacher_TV):
    raise NotImplementedError()


@wrong("raises")
def one_of_the_two(student_TV, teacher_TV):
    return pair(_kl)(student_TV, teacher_TV)[0]


@wrong("type")
def numbers(student_TV, teacher_TV):
    return tuple(value.mean().item() for value in pair(_kl)(student_TV, teacher_TV))


@wrong("shape")
def not_summed(student_TV, teacher_TV):
    return pair(lambda a, b: a.exp() * (a - b))(student_TV, teacher_TV)


@wrong("shape")
def mean_over_tokens(student_TV, teacher_TV):
    return pair(lambda a, b: _kl(a, b).mean())(student_TV, teacher_TV)


@wrong("changes its input")
def masked_in_place(student_TV, teacher_TV):
    student_TV.detach().clamp_(min=-1.0)
    return pair(_kl)(student_TV, teacher_TV)


@wrong("the other direction")
def swapped(student_TV, teacher_TV):
    return pair(_kl)(teacher_TV, student_TV)


FORWARD = "forward: the teacher weighs, and asks its student to cover all that it says"


@wrong(FORWARD)
def total_variation(student_TV, teacher_TV):
    return pair(lambda a, b: (a.exp() - b.exp()).abs().sum(1) / 2)(student_TV, teacher_TV)


def _jensen_shannon(a, b):
    middle = ((a.exp() + b.exp()) / 2).log()
    return (_kl(a, middle) + _kl(b, middle)) / 2


MISTAKES = {
    "sign": lambda a, b: -_kl(a, b),
    "cross-entropy": lambda a, b: -(a.exp() * b).sum(1),
    "mean over the vocabulary": lambda a, b: _kl(a, b) / a.shape[1],
    "bits": lambda a, b: _kl(a, b) / math.log(2),
    "both directions": lambda a, b: _kl(a, b) + _kl(b, a),
    "mean of both directions": lambda a, b: (_kl(a, b) + _kl(b, a)) / 2,
    "Jensen-Shannon": _jensen_shannon,
    "sizes only": lambda a, b: (a.exp() * (a - b).abs()).sum(1),
}
for _mistake, _loss in MISTAKES.items():
    _name = _mistake.replace(" ", "_").replace("-", "_")
    globals()[f"{_name}_in_forward"] = wrong(_mistake)(only(_loss, 0))
    globals()[f"{_name}_in_reverse"] = wrong(_mistake)(only(_loss, 1))


@wrong("softmax over tokens")
def over_tokens(student_TV, teacher_TV):
    log_q, log_p = student_TV.log_softmax(0), teacher_TV.log_softmax(0)
    return _kl(log_p, log_q), _kl(log_q, log_p)


@wrong("logits as logarithms")
def no_softmax(student_TV, teacher_TV):
    return _kl(teacher_TV, student_TV), _kl(student_TV, teacher_TV)


@wrong("difference of logits")
def logits_subtracted(student_TV, teacher_TV):
    p, q = teacher_TV.softmax(1), student_TV.softmax(1)
    return (p * (teacher_TV - student_TV)).sum(1), (q * (student_TV - teacher_TV)).sum(1)


forward_twice = wrong("forward twice")(lambda s, t: (pair(_kl)(s, t)[0], pair(_kl)(s, t)[0]))
minus_forward = wrong("forward with a minus")(lambda s, t: (pair(_kl)(s, t)[0], -pair(_kl)(s, t)[0]))


def of_probabilities(kl):
    """An answer with a KL that gets probabilities."""
    return lambda s, t: (kl(t.softmax(1), s.softmax(1)), kl(s.softmax(1), t.softmax(1)))


FAR = "forward: finite for finite logits, however far apart"
log_of_a_softmax = wrong("nan")(of_probabilities(lambda p, q: (p * (p.log() - q.log())).sum(1)))
eps_inside = wrong(FAR)(of_probabilities(lambda p, q: (p * ((p + 1e-20).log() - (q + 1e-20).log())).sum(1)))
clamped = wrong(FAR)(of_probabilities(lambda p, q: (p * (p.clamp_min(1e-20).log() - q.clamp_min(1e-20).log())).sum(1)))


@wrong("infinite")
def by_distributions(student_TV, teacher_TV):
    """Takes a probability that float32 rounds to 0 for one that is 0."""
    q, p = Categorical(logits=student_TV), Categorical(logits=teacher_TV)
    return kl_divergence(p, q), kl_divergence(q, p)


no_case_for_zero = wrong("nan")(pair(lambda a, b: (a.exp() * (a - b)).sum(1)))
by_kl_div = wrong("nan")(pair(lambda a, b: F.kl_div(b, a.exp(), reduction="none").sum(1)))
by_kl_div_of_logs = wrong("nan")(pair(lambda a, b: F.kl_div(b, a, reduction="none", log_target=True).sum(1)))
nan_skipped = wrong("cut off")(pair(lambda a, b: (a.exp().detach() * (a - b)).nansum(1)))
zero_is_infinite = wrong("infinite")(
    pair(lambda a, b: torch.where(a.isneginf() | b.isneginf(), torch.inf, a.exp() * (a - b)).sum(1))
)
only_what_both_say = wrong("infinity hidden")(
    pair(lambda a, b: (a.exp() * torch.where(a.isfinite() & b.isfinite(), a - b, 0)).sum(1))
)
infinity_replaced = wrong("infinity hidden")(pair(lambda a, b: (a.exp() * (a - b)).nan_to_num(0, posinf=0).sum(1)))
REVERSE_INFINITE = "reverse: infinite where the teacher never says what the student does"
largest_number = wrong(REVERSE_INFINITE)(pair(lambda a, b: (a.exp() * (a - b)).nan_to_num(0).sum(1)))
lowest_logit = wrong(REVERSE_INFINITE)(
    lambda s, t: pair(lambda a, b: (a.exp() * (a - b)).sum(1))(s.clamp_min(-1e5), t.clamp_min(-1e5))
)


@wrong("renormalised")
def cut_to_what_both_say(student_TV, teacher_TV):
    never = student_TV.isneginf() | teacher_TV.isneginf()
    return pair(_kl)(student_TV.masked_fill(never, -math.inf), teacher_TV.masked_fill(never, -math.inf))


@wrong("cut off")
def student_detached(student_TV, teacher_TV):
    return tuple(
        value + 0 * student_TV[:, :1].nan_to_num(neginf=0).sum() for value in pair(_kl)(student_TV.detach(), teacher_TV)
    )


@wrong("forward: its gradient reaches the student")
def no_grad(student_TV, teacher_TV):
    with torch.no_grad():
        return pair(_kl)(student_TV, teacher_TV)


@wrong("cut off")
def weights_held_fixed(student_TV, teacher_TV):
    """A quick policy gradient: through the logarithm of what was said, and not through how often it was."""
    return pair(lambda a, b: (a.exp().detach() * torch.where(a > -math.inf, a - b, 0)).sum(1))(student_TV, teacher_TV)


@wrong("reverse: the gradient is finite where neither says a token")
def where_behind_the_product(student_TV, teacher_TV):
    return pair(lambda a, b: torch.where(a > -math.inf, a.exp() * (a - b), 0).sum(1))(student_TV, teacher_TV)


@wrong("reverse: the gradient is finite where neither says a token")
def nan_left_out_of_the_sum(student_TV, teacher_TV):
    return pair(lambda a, b: (a.exp() * (a - b)).nansum(1))(student_TV, teacher_TV)


@wrong("borrowed")
def from_the_package(student_TV, teacher_TV):
    return soft_loss(student_TV, teacher_TV), soft_loss(student_TV, teacher_TV, reverse=True)


_NO_WEIGHT = "it is multiplied by a, which is 0 there"
EQUIVALENT = {
    "0  ->  1": _NO_WEIGHT,
    "0  ->  -1": _NO_WEIGHT,
    "tuple[Tensor, Tensor]  ->  tuple": "an annotation computes nothing at all",
}
