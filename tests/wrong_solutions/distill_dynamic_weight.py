"""Answers to `distill-dynamic-weight`."""

import math

import torch
import torch.nn.functional as F
from bank import right, wrong

from minillama4.distill import confidence, hard_loss, mix, ramp, soft_loss


def line(step, steps, first, last):
    return first + (last - first) * step / steps


def true_probability(student_TV, teacher_TV, target_T):
    return teacher_TV.detach().softmax(1).gather(1, target_T[:, None]).squeeze(1)


def kl(student_TV, teacher_TV):
    log_q, log_p = student_TV.log_softmax(1), teacher_TV.detach().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def cross_entropy(student_TV, teacher_TV, target_T):
    return F.cross_entropy(student_TV, target_T, reduction="none")


def mean_of_shares(hard_T, soft_T, weight_T):
    return ((1 - weight_T) * hard_T + weight_T * soft_T).mean()


def answer(
    schedule=line, confidence=true_probability, weigh=torch.mul, hard=cross_entropy, soft=kl, mixed=mean_of_shares
):
    """The right answer, but for the parts that are given."""

    def mixed_loss(student_TV, teacher_TV, target_T, step, steps, first, last):
        at, sure_T = torch.tensor(schedule(step, steps, first, last)), confidence(student_TV, teacher_TV, target_T)
        weight_T = weigh(at, sure_T)
        hard_T, soft_T = hard(student_TV, teacher_TV, target_T), soft(student_TV, teacher_TV)
        return mixed(hard_T, soft_T, weight_T), weight_T

    return mixed_loss


@right
def one_mixed_target(student_TV, teacher_TV, target_T, step, steps, first, last):
    """A cross-entropy with one soft target, less the teacher's own entropy."""
    with torch.no_grad():
        log_p_TV = teacher_TV - teacher_TV.logsumexp(-1, keepdim=True)
        p_TV = log_p_TV.exp()
        true_TV = F.one_hot(target_T, teacher_TV.shape[1])
        weight_T = (p_TV * true_TV).sum(-1) * (first * (1 - step / steps) + last * (step / steps))
        target_TV = torch.lerp(true_TV.float(), p_TV, weight_T[:, None])
        own_T = weight_T * (p_TV * log_p_TV).sum(-1)
    return F.cross_entropy(student_TV, target_TV) + own_T.mean(), weight_T


@right
def token_by_token(student_TV, teacher_TV, target_T, step, steps, first, last):
    losses, weights = [], []
    for q_V, p_V, target in zip(student_TV, teacher_TV.detach(), target_T.tolist(), strict=True):
        log_q_V, log_p_V = F.log_softmax(q_V, 0), F.log_softmax(p_V, 0)
        weight = line(step, steps, first, last) * log_p_V[target].exp()
        soft = F.kl_div(log_q_V, log_p_V, reduction="sum", log_target=True)
        losses.append(weight * soft - (1 - weight) * log_q_V[target])
        weights.append(weight)
    return torch.stack(losses).mean(), torch.stack(weights)


@wrong("not written")
def stub(student_TV, teacher_TV, target_T, step, steps, first, last):
    raise NotImplementedError()


@wrong("raises")
def loss_alone(*given):
    return answer()(*given)[0]


@wrong("raises")
def gathered_without_an_axis(student_TV, teacher_TV, target_T, step, steps, first, last):
    return answer(confidence=lambda s, t, target: t.softmax(1).gather(1, target))(
        student_TV, teacher_TV, target_T, step, steps, first, last
    )


@wrong("type")
def weight_as_a_number(*given):
    loss, weight_T = answer()(*given)
    return loss, weight_T.mean().item()


@wrong("type")
def loss_as_a_number(*given):
    loss, weight_T = answer()(*given)
    return loss.item(), weight_T


@wrong("changes its input")
def targets_in_place(student_TV, teacher_TV, target_T, step, steps, first, last):
    teacher_TV.detach().sub_(teacher_TV.detach().max())
    return answer()(student_TV, teacher_TV, target_T, step, steps, first, last)


a_loss_for_each_token = wrong("shape")(answer(mixed=lambda hard, soft, w: (1 - w) * hard + w * soft))
one_weight_for_all = wrong("shape")(answer(confidence=lambda *given: true_probability(*given).mean()))
weights_of_the_whole_vocabulary = wrong("shape")(
    answer(
        confidence=lambda s, t, target: t.detach().softmax(1),
        mixed=lambda hard, soft, w: mean_of_shares(hard, soft, w[:, 0]),
    )
)

favourite = wrong("not of the true token")(answer(confidence=lambda s, t, target: t.detach().softmax(1).amax(1)))
students_own = wrong("the student's confidence")(answer(confidence=lambda s, t, target: true_probability(t, s, target)))
doubt = wrong("doubt")(answer(confidence=lambda *given: 1 - true_probability(*given)))
schedule_only = wrong("schedule alone")(answer(weigh=lambda at, sure: at.expand_as(sure)))
confidence_only = wrong("confidence alone")(answer(weigh=lambda at, sure: sure))
average_confidence = wrong("one confidence for all")(answer(weigh=lambda at, sure: at * sure.mean().expand_as(sure)))
right_or_wrong = wrong("right or wrong")(answer(confidence=lambda s, t, target: (t.argmax(1) == target).float()))
logit = wrong("logit")(answer(confidence=lambda s, t, target: t.detach().gather(1, target[:, None]).squeeze(1)))
logarithm = wrong("logarithm")(answer(confidence=lambda *given: true_probability(*given).log()))
over_tokens = wrong("softmax over tokens")(
    answer(confidence=lambda s, t, target: t.detach().softmax(0).gather(1, target[:, None]).squeeze(1))
)
added = wrong("added")(answer(weigh=torch.add))
average = wrong("average of the two")(answer(weigh=lambda at, sure: (at + sure) / 2))
smaller_of_the_two = wrong("the smaller of the two")(answer(weigh=lambda at, sure: torch.minimum(at, sure)))
by_entropy = wrong("weight: at step 0 it is `first` times the teacher's probability of the true token")(
    answer(confidence=lambda s, t, target: 1 - torch.special.entr(t.detach().softmax(1)).sum(1) / math.log(t.shape[1]))
)

backwards = wrong("at the end already")(
    answer(schedule=lambda step, steps, first, last: line(step, steps, last, first))
)
constant = wrong("never changes")(answer(schedule=lambda step, steps, first, last: first))
whole_numbers = wrong("never changes")(
    answer(schedule=lambda step, steps, first, last: first + (last - first) * (step // steps))
)
to_zero = wrong("to zero")(answer(schedule=lambda step, steps, first, last: first * (1 - step / steps)))
from_one = wrong("from one")(
    answer(schedule=lambda step, steps, first, last: line(step, steps, first if step == 0 else 1.0, last))
)
by_the_whole_way = wrong("by the whole way")(
    answer(schedule=lambda step, steps, first, last: first - last * step / steps)
)
from_step_one = wrong("counted from one")(
    answer(schedule=lambda step, steps, first, last: line(min(step + 1, steps) if step else 0, steps, first, last))
)
one_step_short = wrong("one step short")(
    answer(schedule=lambda step, steps, first, last: line(min(step, steps - 1), steps - 1, first, last))
)
geometric = wrong("geometric")(
    answer(schedule=lambda step, steps, first, last: first * (last / first) ** (step / steps))
)
cosine = wrong("cosine")(
    answer(schedule=lambda step, steps, first, last: line((1 - math.cos(math.pi * step / steps)) / 2, 1, first, last))
)
half = wrong("half and half")(answer(schedule=lambda step, steps, first, last: (first + last) / 2 if step else first))
in_two_halves = wrong("never changes")(
    answer(schedule=lambda step, steps, first, last: first if 2 * step < steps else last)
)
END = "weight: at step `steps` it is `last`, which may be more than `first`"
only_falls = wrong(END)(answer(schedule=lambda step, steps, first, last: first - abs(last - first) * step / steps))
wraps_round = wrong(END)(answer(schedule=lambda step, steps, first, last: line(step % steps, steps, first, last)))

wrong_way_round = wrong("the wrong way round")(answer(mixed=lambda hard, soft, w: mean_of_shares(soft, hard, w)))
hard_in_full = wrong("hard in full")(answer(mixed=lambda hard, soft, w: (hard + w * soft).mean()))
soft_in_full = wrong("soft in full")(answer(mixed=lambda hard, soft, w: ((1 - w) * hard + soft).mean()))
soft_only = wrong("soft only")(answer(mixed=lambda hard, soft, w: (w * soft).mean()))
hard_only = wrong("hard only")(answer(mixed=lambda hard, soft, w: ((1 - w) * hard).mean()))
averaged_first = wrong("averaged first")(
    answer(mixed=lambda hard, soft, w: mean_of_shares(hard.mean(), soft.mean(), w.mean()))
)
weights_averaged = wrong("averaged first")(answer(mixed=lambda hard, soft, w: mean_of_shares(hard, soft, w.mean())))
losses_averaged = wrong("averaged first")(
    answer(mixed=lambda hard, soft, w: mean_of_shares(hard.mean(), soft.mean(), w))
)
summed = wrong("summed")(answer(mixed=lambda hard, soft, w: ((1 - w) * hard + w * soft).sum()))
by_the_weights = wrong("divided by the weights")(
    answer(mixed=lambda hard, soft, w: ((1 - w) * hard).sum() / (1 - w).sum() + (w * soft).sum() / w.sum())
)
soft_cross_entropy = wrong("cross-entropy")(
    answer(soft=lambda s, t: -(t.detach().softmax(1) * s.log_softmax(1)).sum(1))
)
reverse = wrong("reverse")(answer(soft=lambda s, t: kl(t.detach(), s)))
negative = wrong("sign of the soft loss")(answer(soft=lambda s, t: -kl(s, t)))
mean_over_vocabulary = wrong("mean over the vocabulary")(answer(soft=lambda s, t: kl(s, t) / t.shape[1]))
favourite_as_target = wrong("the teacher's favourite")(
    answer(hard=lambda s, t, target: cross_entropy(s, t, t.argmax(1)))
)
teachers_hard_loss = wrong("the teacher's hard loss")(
    answer(hard=lambda s, t, target: cross_entropy(t.detach(), s, target))
)


@wrong("schedule alone")
def weights_only_shown(student_TV, teacher_TV, target_T, step, steps, first, last):
    given = student_TV, teacher_TV, target_T, step, steps, first, last
    return answer(weigh=lambda at, sure: at.expand_as(sure))(*given)[0], answer()(*given)[1]


FAR = "loss: finite for logits that are far apart"
log_of_a_softmax = wrong(FAR)(
    answer(soft=lambda s, t: (t.detach().softmax(1) * (t.detach().softmax(1).log() - s.softmax(1).log())).sum(1))
)
hard_by_log_of_a_softmax = wrong(FAR)(
    answer(hard=lambda s, t, target: -s.softmax(1).gather(1, target[:, None]).squeeze(1).log())
)

hard_without_gradient = wrong("from the soft loss alone")(
    answer(hard=lambda s, t, target: cross_entropy(s.detach(), t, target))
)
soft_without_gradient = wrong("from the hard loss alone")(answer(soft=lambda s, t: kl(s.detach(), t)))


@wrong("student cut off")
def student_detached(student_TV, *given):
    loss, weight_T = answer()(student_TV.detach(), *given)
    return loss + 0 * student_TV.sum(), weight_T


@wrong("the gradient reaches the student through both losses")
def nobody_learns(*given):
    with torch.no_grad():
        return answer()(*given)


def live_weight(s, t, target):
    return t.softmax(1).gather(1, target[:, None]).squeeze(1)


def live_soft(s, t):
    return (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)


weight_with_gradient = wrong("through the weight")(answer(confidence=live_weight))
soft_with_gradient = wrong("through the soft loss")(answer(soft=live_soft))
teacher_learns = wrong("through both")(answer(confidence=live_weight, soft=live_soft))


@wrong("borrowed")
def from_the_package(student_TV, teacher_TV, target_T, step, steps, first, last):
    weight_T = ramp(step, steps, first, last) * confidence(teacher_TV, target_T)
    return mix(hard_loss(student_TV, target_T), soft_loss(student_TV, teacher_TV), weight_T), weight_T


EQUIVALENT = {"tuple[Tensor, Tensor]  ->  tuple": "an annotation computes nothing at all"}
