"""Answers to `distill-soft-loss`."""

import math

import torch
import torch.nn.functional as F
from bank import right, wrong

from minillama4.distill import soft_loss


def _kl(log_p, log_q):
    """KL(p ‖ q) of each row."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


def _logs(student_TV, teacher_TV, temperature):
    """(log p, log q) at a temperature, the teacher's first and without gradient."""
    return tuple((x.float() / temperature).log_softmax(1) for x in (teacher_TV.detach(), student_TV))


def of_logs(loss):
    """An answer that is temperature² * loss(log p, log q)."""

    def answer(student_TV, teacher_TV, temperature):
        return temperature**2 * loss(*_logs(student_TV, teacher_TV, temperature))

    return answer


def times(factor):
    """An answer with another factor than temperature²."""
    return lambda student_TV, teacher_TV, temperature: (
        factor(temperature) * _kl(*_logs(student_TV, teacher_TV, temperature))
    )


@right
def cross_entropy_less_entropy(student_TV, teacher_TV, temperature):
    """By logsumexp; the teacher's own entropy taken off the cross-entropy."""
    with torch.no_grad():
        teacher_TV = teacher_TV.to(torch.float32) / temperature
        p_TV = torch.exp(teacher_TV - teacher_TV.logsumexp(-1, keepdim=True))
        entropy_T = teacher_TV.logsumexp(-1) - torch.einsum("tv,tv->t", p_TV, teacher_TV)
    student_TV = student_TV.to(torch.float32) / temperature
    crossed_T = student_TV.logsumexp(-1) - torch.einsum("tv,tv->t", p_TV, student_TV)
    return (crossed_T - entropy_T) * temperature * temperature


@right
def by_kl_div(student_TV, teacher_TV, temperature):
    """As in most distillation code: the student first, as a logarithm."""
    p_TV = F.softmax(teacher_TV.detach().float() / temperature, dim=-1)
    log_q_TV = F.log_softmax(student_TV.float() / temperature, dim=-1)
    return F.kl_div(log_q_TV, p_TV, reduction="none").sum(-1) * temperature**2


@wrong("not written")
def stub(student_TV, teacher_TV, temperature):
    raise NotImplementedError()


@wrong("raises")
def an_axis_too_many(student_TV, teacher_TV, temperature):
    return _kl(teacher_TV.log_softmax(2), student_TV.log_softmax(2))


@wrong("shape")
def batch_mean(student_TV, teacher_TV, temperature):
    log_p, log_q = _logs(student_TV, teacher_TV, temperature)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


@wrong("shape")
def not_summed(student_TV, teacher_TV, temperature):
    log_p, log_q = _logs(student_TV, teacher_TV, temperature)
    return temperature**2 * log_p.exp() * (log_p - log_q)


@wrong("type")
def a_number(student_TV, teacher_TV, temperature):
    return of_logs(_kl)(student_TV, teacher_TV, temperature).mean().item()


@wrong("changes its input")
def divided_in_place(student_TV, teacher_TV, temperature):
    teacher_TV = teacher_TV.detach()
    teacher_TV *= temperature / temperature * 0.5
    return of_logs(_kl)(student_TV, 2 * teacher_TV, temperature)


reverse = wrong("reverse")(of_logs(lambda log_p, log_q: _kl(log_q, log_p)))
negative = wrong("sign")(of_logs(lambda log_p, log_q: -_kl(log_p, log_q)))
crossed = wrong("cross-entropy")(of_logs(lambda log_p, log_q: -(log_p.exp() * log_q).sum(1)))
favourite = wrong("teacher's favourite only")(
    of_logs(lambda log_p, log_q: F.nll_loss(log_q, log_p.argmax(1), None, None, -100, None, "none"))
)
per_word = wrong("mean over the vocabulary")(of_logs(lambda log_p, log_q: (log_p.exp() * (log_p - log_q)).mean(1)))
in_bits = wrong("bits")(of_logs(lambda log_p, log_q: _kl(log_p, log_q) / math.log(2)))
squares = wrong("probabilities compared")(of_logs(lambda log_p, log_q: (log_p.exp() - log_q.exp()).square().sum(1)))
mean_squares = wrong("probabilities compared, mean")(
    of_logs(lambda log_p, log_q: (log_p.exp() - log_q.exp()).square().mean(1))
)
student_not_a_logarithm = wrong("no logarithm of the student")(
    of_logs(lambda log_p, log_q: F.kl_div(log_q.exp(), log_p.exp(), reduction="none").sum(1))
)


@wrong("reverse")
def arguments_of_kl_div_swapped(student_TV, teacher_TV, temperature):
    log_p, log_q = _logs(student_TV, teacher_TV, temperature)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)


@wrong("Jensen-Shannon")
def symmetric(student_TV, teacher_TV, temperature):
    log_p, log_q = _logs(student_TV, teacher_TV, temperature)
    middle = ((log_p.exp() + log_q.exp()) / 2).log()
    return temperature**2 * (_kl(log_p, middle) + _kl(log_q, middle)) / 2


@wrong("logits compared")
def logits_compared(student_TV, teacher_TV, temperature):
    return (student_TV - teacher_TV.detach()).square().sum(1)


@wrong("logits compared, mean")
def mean_square_of_logits(student_TV, teacher_TV, temperature):
    return F.mse_loss(student_TV, teacher_TV.detach(), reduction="none").mean(1)


@wrong("softmax over tokens")
def over_tokens(student_TV, teacher_TV, temperature):
    log_p, log_q = ((x / temperature).log_softmax(0) for x in (teacher_TV.detach(), student_TV))
    return temperature**2 * _kl(log_p, log_q)


@wrong("softmax twice")
def softmax_twice(student_TV, teacher_TV, temperature):
    p, q = ((x / temperature).softmax(1) for x in (teacher_TV.detach(), student_TV))
    return temperature**2 * _kl(p.log_softmax(1), q.log_softmax(1))


@wrong("at temperature 1 it is KL(teacher ‖ student) of each token")
def total_variation(student_TV, teacher_TV, temperature):
    p, q = ((x / temperature).softmax(1) for x in (teacher_TV.detach(), student_TV))
    return temperature**2 * (p - q).abs().sum(1) / 2


no_square = wrong("no square")(times(lambda t: 1))
once = wrong("temperature once")(times(lambda t: t))
divided = wrong("divided")(times(lambda t: 1 / t**2))
fourth_power = wrong("too often")(times(lambda t: t**4))
never_below_one = wrong("no square")(times(lambda t: max(t, 1.0) ** 2))


def heated(change, mistake, factor=lambda t: t**2):
    """A wrong answer: KL of change(student, teacher, temperature), a pair of logits."""

    def answer(student_TV, teacher_TV, temperature):
        student_TV, teacher_TV = change(student_TV.float(), teacher_TV.detach().float(), temperature)
        return factor(temperature) * _kl(teacher_TV.log_softmax(1), student_TV.log_softmax(1))

    return wrong(mistake)(answer)


student_alone = heated(lambda s, t, heat: (s / heat, t), "temperature on the student alone")
teacher_alone = heated(lambda s, t, heat: (s, t / heat), "temperature on the teacher alone")
ignored = heated(lambda s, t, heat: (s, t), "ignores temperature", lambda t: 1)
square_only = heated(lambda s, t, heat: (s, t), "square only")
multiplied = heated(lambda s, t, heat: (s * heat, t * heat), "multiplied")
multiplied_alone = heated(lambda s, t, heat: (s * heat, t * heat), "multiplied, no square", lambda t: 1)
of_probabilities = heated(lambda s, t, heat: (s.softmax(1) / heat, t.softmax(1) / heat), "softmax twice")


@wrong("log-probabilities divided")
def divided_too_late(student_TV, teacher_TV, temperature):
    log_p, log_q = _logs(student_TV, teacher_TV, 1.0)
    return temperature**2 * _kl(log_p / temperature, log_q / temperature)


@wrong("student's log-probabilities divided")
def student_divided_too_late(student_TV, teacher_TV, temperature):
    log_p = (teacher_TV.detach().float() / temperature).log_softmax(1)
    return temperature**2 * _kl(log_p, student_TV.float().log_softmax(1) / temperature)


def from_probabilities(log):
    """An answer that takes `log` of the softmax."""

    def answer(student_TV, teacher_TV, temperature):
        p, q = ((x.float() / temperature).softmax(1) for x in (teacher_TV.detach(), student_TV))
        return temperature**2 * (p * (log(p) - log(q))).sum(1)

    return answer


FAR = "logits far apart give a finite loss, and the right one"
log_of_a_softmax = wrong(FAR)(from_probabilities(torch.log))
eps_inside = wrong(FAR)(from_probabilities(lambda p: (p + 1e-20).log()))
clamped = wrong(FAR)(from_probabilities(lambda p: p.clamp_min(1e-20).log()))
infinities_hidden = wrong("hidden")(lambda *given: from_probabilities(torch.log)(*given).nan_to_num(0.0, 0.0, 0.0))


@wrong("student without gradient")
def wrong_one_detached(student_TV, teacher_TV, temperature):
    log_p, log_q = ((x.float() / temperature).log_softmax(1) for x in (teacher_TV, student_TV.detach()))
    return temperature**2 * _kl(log_p, log_q)


@wrong("the gradient reaches the student")
def nobody_learns(student_TV, teacher_TV, temperature):
    with torch.no_grad():
        return of_logs(_kl)(student_TV, teacher_TV, temperature)


@wrong("teacher learns")
def teacher_not_detached(student_TV, teacher_TV, temperature):
    log_p, log_q = ((x.float() / temperature).log_softmax(1) for x in (teacher_TV, student_TV))
    return temperature**2 * _kl(log_p, log_q)


@wrong("no gradient reaches the teacher")
def only_the_weights_detached(student_TV, teacher_TV, temperature):
    log_p, log_q = ((x.float() / temperature).log_softmax(1) for x in (teacher_TV, student_TV))
    return temperature**2 * (log_p.detach().exp() * (log_p * 2 - log_p.detach() - log_q)).sum(1)


@wrong("type")
def in_bfloat16(student_TV, teacher_TV, temperature):
    log_p, log_q = ((x / temperature).log_softmax(1) for x in (teacher_TV.detach(), student_TV))
    return temperature**2 * _kl(log_p, log_q)


@wrong("logits in bfloat16 are worked on in float32")
def too_late_to_float32(student_TV, teacher_TV, temperature):
    log_p, log_q = ((x / temperature).log_softmax(1).float() for x in (teacher_TV.detach(), student_TV))
    return temperature**2 * _kl(log_p, log_q)


@wrong("borrowed")
def from_the_package(student_TV, teacher_TV, temperature):
    return soft_loss(student_TV, teacher_TV, temperature)


EQUIVALENT = {}
