"""Answers to `distill-top-k-cache`."""

import torch
import torch.nn.functional as F
from bank import right, wrong

from minillama4 import distill


class Good:
    """Right, and in parts: each wrong answer changes one of them."""

    def __init__(self, teacher_TV, k, temperature):
        self.k, self.temperature = k, temperature
        log_TV = self.logs(teacher_TV.detach())
        self.index_TK = self.choose(teacher_TV)
        self.log_prob_TK = self.keep(log_TV, teacher_TV.detach())
        self.log_tail_T = self.rest(log_TV, teacher_TV.detach())

    def logs(self, logits_TV):
        return F.log_softmax(logits_TV / self.temperature, dim=1)

    def choose(self, teacher_TV):
        return teacher_TV.topk(self.k).indices

    def keep(self, log_TV, teacher_TV):
        return log_TV.gather(1, self.index_TK)

    def rest(self, log_TV, teacher_TV):
        return self.tail(log_TV)

    def tail(self, log_TV):
        return log_TV.scatter(1, self.index_TK, -torch.inf).logsumexp(1)

    def outcomes(self, student_TV):
        """([T, k + 1], [T, k + 1]): logs of teacher and student."""
        log_TV = self.logs(student_TV)
        log_q = torch.cat([log_TV.gather(1, self.index_TK), self.tail(log_TV)[:, None]], 1)
        return torch.cat([self.log_prob_TK, self.log_tail_T[:, None]], 1), log_q

    def compare(self, log_p, log_q):
        """[T]"""
        return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0).sum(1)

    def loss(self, student_TV):
        return self.temperature**2 * self.compare(*self.outcomes(student_TV))


@right
class ByMask:
    """The tail over a mask, and kept and tail apart; the kept ones of a full sort."""

    def __init__(self, teacher_TV, k, temperature):
        with torch.no_grad():
            scaled = teacher_TV.double() / temperature
            scaled = scaled - scaled.logsumexp(dim=-1, keepdim=True)
            ordered, order = scaled.sort(dim=-1, descending=True)
            self.index_TK = order[:, :k].contiguous()
            self.log_prob_TK = ordered[:, :k].float()
            self.log_tail_T = ordered[:, k:].logsumexp(dim=-1).float()
            self.temperature = temperature

    def loss(self, student_TV):
        scaled = student_TV / self.temperature
        mask = torch.zeros_like(scaled, dtype=torch.bool).scatter_(1, self.index_TK, True)
        total_T = scaled.logsumexp(dim=-1)
        kept_TK = self.log_prob_TK.exp() * (self.log_prob_TK - scaled.gather(1, self.index_TK) + total_T[:, None])
        loss_T = kept_TK.sum(dim=-1)
        if not mask.all():
            tail_T = scaled.masked_fill(mask, -torch.inf).logsumexp(dim=-1) - total_T
            loss_T = loss_T + self.log_tail_T.exp() * (self.log_tail_T - tail_T)
        return loss_T * self.temperature * self.temperature


in_parts = right(Good)


@wrong("not written")
class Stub:
    def __init__(self, teacher_TV, k, temperature):
        raise NotImplementedError()


@wrong("not written")
class LossMissing(Good):
    def loss(self, student_TV):
        raise NotImplementedError()


@wrong("raises")
def three_tensors(teacher_TV, k, temperature):
    good = Good(teacher_TV, k, temperature)
    return good.index_TK, good.log_prob_TK, good.log_tail_T


@wrong("type")
class IndexAsFloat(Good):
    def choose(self, teacher_TV):
        return super().choose(teacher_TV).float()

    def keep(self, log_TV, teacher_TV):
        return log_TV.gather(1, self.index_TK.long())

    def tail(self, log_TV):
        return log_TV.scatter(1, self.index_TK.long(), -torch.inf).logsumexp(1)


@wrong("shape")
class TailWithAnAxis(Good):
    def rest(self, log_TV, teacher_TV):
        return self.tail(log_TV)[:, None]


@wrong("shape")
class MeanOverTokens(Good):
    def loss(self, student_TV):
        return super().loss(student_TV).mean()


@wrong("changes its input")
class InPlace(Good):
    def __init__(self, teacher_TV, k, temperature):
        super().__init__(teacher_TV.div_(temperature), k, 1.0)


@wrong("borrowed")
class FromThePackage:
    def __init__(self, teacher_TV, k, temperature):
        self.cached = distill.top_k(teacher_TV, k, temperature)
        self.index_TK, self.log_prob_TK = self.cached.index_TK.long(), self.cached.log_prob_TK
        self.log_tail_T = self.cached.log_tail_T

    def loss(self, student_TV):
        return distill.top_k_loss(student_TV, self.cached)


@wrong("the first k")
class FirstTokens(Good):
    def choose(self, teacher_TV):
        return torch.arange(self.k).repeat(len(teacher_TV), 1)


@wrong("the least likely")
class Ascending(Good):
    def choose(self, teacher_TV):
        return teacher_TV.argsort(1)[:, : self.k]


@wrong("the likeliest last")
class LikeliestLast(Good):
    def choose(self, teacher_TV):
        return teacher_TV.argsort(1)[:, -self.k :]


@wrong("the k likeliest tokens, the likeliest first")
class Unsorted(Good):
    def choose(self, teacher_TV):
        return super().choose(teacher_TV).roll(1, 1)


@wrong("renormalised")
class SoftmaxOverTheKept(Good):
    def keep(self, log_TV, teacher_TV):
        return self.logs(teacher_TV.gather(1, self.index_TK))


@wrong("no temperature")
class TeacherAsItIs(Good):
    def __init__(self, teacher_TV, k, temperature):
        super().__init__(teacher_TV, k, 1.0)
        self.temperature = temperature


@wrong("temperature after the softmax")
class LogsOverTemperature(Good):
    def logs(self, logits_TV):
        return logits_TV.log_softmax(1) / self.temperature


@wrong("times temperature")
class Hotter(Good):
    def logs(self, logits_TV):
        return (logits_TV * self.temperature).log_softmax(1)


@wrong("logits")
class KeepsLogits(Good):
    def keep(self, log_TV, teacher_TV):
        return teacher_TV.gather(1, self.index_TK)


@wrong("softened logits")
class KeepsSoftenedLogits(Good):
    def keep(self, log_TV, teacher_TV):
        return teacher_TV.gather(1, self.index_TK) / self.temperature


@wrong("probabilities")
class KeepsProbabilities(Good):
    def keep(self, log_TV, teacher_TV):
        return super().keep(log_TV, teacher_TV).exp()


@wrong("mass, not its log")
class TailAsMass(Good):
    def rest(self, log_TV, teacher_TV):
        return self.tail(log_TV).exp()


@wrong("the kept mass")
class MassOfTheKept(Good):
    def rest(self, log_TV, teacher_TV):
        return self.log_prob_TK.logsumexp(1)


@wrong("the log of the mass of all other tokens")
class TailOfEverything(Good):
    def rest(self, log_TV, teacher_TV):
        return log_TV.logsumexp(1)


@wrong("mean of the others")
class MeanOfTheOthers(Good):
    def rest(self, log_TV, teacher_TV):
        return log_TV.exp().scatter(1, self.index_TK, 0).sum(1).div(log_TV.shape[1] - self.k).log()


@wrong("sum of logs")
class SumOfLogs(Good):
    def rest(self, log_TV, teacher_TV):
        return log_TV.scatter(1, self.index_TK, 0).sum(1)


@wrong("not normalised")
class TailOfLogits(Good):
    def rest(self, log_TV, teacher_TV):
        return self.tail(teacher_TV / self.temperature)


@wrong("tail without temperature")
class TailAtOne(Good):
    def rest(self, log_TV, teacher_TV):
        return self.tail(teacher_TV.log_softmax(1))


@wrong("a tiny tail keeps its digits")
class OneMinusTheSum(Good):
    def rest(self, log_TV, teacher_TV):
        return (1 - self.log_prob_TK.exp().sum(1)).log()


@wrong("a tiny tail keeps its digits")
class Log1pOfTheSum(Good):
    """log1p is exact, but what it gets is not."""

    def rest(self, log_TV, teacher_TV):
        return torch.log1p(-self.log_prob_TK.logsumexp(1).exp())


@wrong("a tiny tail keeps its digits")
class NoLessThanEps(Good):
    def rest(self, log_TV, teacher_TV):
        return (1 - self.log_prob_TK.exp().sum(1)).clamp_min(1e-8).log()


@wrong("a tiny tail keeps its digits")
class InFloat64(Good):
    """e^-60 is too small for its 53 bits as well."""

    def rest(self, log_TV, teacher_TV):
        log_TV = self.logs(teacher_TV.double())
        return (1 - log_TV.gather(1, self.index_TK).exp().sum(1)).log().float()


@wrong("no tail is -inf")
class FiniteForNothing(Good):
    def tail(self, log_TV):
        return super().tail(log_TV).clamp_min(-100)


@wrong("whole vocabulary kept")
class KeepsTheTeacher(Good):
    def __init__(self, teacher_TV, k, temperature):
        super().__init__(teacher_TV, k, temperature)
        self.teacher_TV = teacher_TV.detach()


@wrong("whole vocabulary kept")
class ViewOfASort(Good):
    """A slice is a view: all of the sorted vocabulary stays in memory, and goes into a file with it."""

    def choose(self, teacher_TV):
        return teacher_TV.argsort(1, descending=True)[:, : self.k]


@wrong("it keeps no graph of the teacher")
class NotDetached(Good):
    def choose(self, teacher_TV):
        self.first_T = self.logs(teacher_TV).amax(1)
        return super().choose(teacher_TV)


@wrong("tail dropped")
class TailDropped(Good):
    def compare(self, log_p, log_q):
        return super().compare(log_p[:, :-1], log_q[:, :-1])


@wrong("both renormalised")
class BothRenormalised(Good):
    def compare(self, log_p, log_q):
        return super().compare(log_p[:, :-1].log_softmax(1), log_q[:, :-1].log_softmax(1))


@wrong("teacher renormalised")
class TeacherRenormalised(Good):
    def compare(self, log_p, log_q):
        return super().compare(log_p[:, :-1].log_softmax(1), log_q[:, :-1])


@wrong("no square")
class NoSquare(Good):
    def loss(self, student_TV):
        return self.compare(*self.outcomes(student_TV))


@wrong("temperature not squared")
class NotSquared(Good):
    def loss(self, student_TV):
        return self.temperature * self.compare(*self.outcomes(student_TV))


@wrong("student without temperature")
class StudentAsItIs(Good):
    def outcomes(self, student_TV):
        return super().outcomes(student_TV * self.temperature)


@wrong("directions swapped")
class Swapped(Good):
    def compare(self, log_p, log_q):
        return super().compare(log_q, log_p)


@wrong("directions swapped")
class KlDivTheWrongWay(Good):
    def compare(self, log_p, log_q):
        return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(1)


@wrong("cross-entropy")
class CrossEntropy(Good):
    def compare(self, log_p, log_q):
        return -(log_p.exp() * log_q).sum(1)


@wrong("tail spread evenly")
class TailSpread(Good):
    def loss(self, student_TV):
        even_T1 = (self.log_tail_T - torch.tensor(student_TV.shape[1] - self.k).log())[:, None]
        log_p_TV = even_T1.expand_as(student_TV).scatter(1, self.index_TK, self.log_prob_TK)
        return self.temperature**2 * self.compare(log_p_TV, self.logs(student_TV))


@wrong("the student's own k")
class StudentsOwn(Good):
    def outcomes(self, student_TV):
        log_p, _ = super().outcomes(student_TV)
        return log_p, super(StudentsOwn, type(self)(student_TV, self.k, self.temperature)).outcomes(student_TV)[1]


@wrong("mean over outcomes")
class MeanOverOutcomes(Good):
    def compare(self, log_p, log_q):
        return super().compare(log_p, log_q) / log_p.shape[1]


@wrong("a student that gives the tail next to nothing pays for it")
class StudentsTailByDifference(Good):
    def outcomes(self, student_TV):
        log_p, log_q = super().outcomes(student_TV)
        tail = (1 - log_q[:, :-1].exp().sum(1, keepdim=True)).clamp_min(1e-12).log()
        return log_p, torch.cat([log_q[:, :-1], tail], 1)


@wrong("tail without gradient")
class TailDetached(Good):
    def tail(self, log_TV):
        return super().tail(log_TV.detach())


@wrong("no gradient")
class StudentDetached(Good):
    def loss(self, student_TV):
        return super().loss(student_TV.detach()) + 0 * student_TV.sum(1)


@wrong("the gradient moves the kept tokens one by one, and the tail as a whole")
class CutOff(Good):
    @torch.no_grad()
    def loss(self, student_TV):
        return super().loss(student_TV)


@wrong("with k = V it is the whole KL")
class NothingTimesInfinity(Good):
    def compare(self, log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum(1)


@wrong("with k = V it has the gradient of the whole KL")
class HiddenInTheValueOnly(Good):
    """The value's NaN is hidden, and its derivative is not: 0 * log(0) comes back as 0 * inf."""

    def tail(self, log_TV):
        return (log_TV.exp() * torch.ones_like(log_TV).scatter(1, self.index_TK, 0)).sum(1).log()

    def rest(self, log_TV, teacher_TV):
        return super().tail(log_TV)


EQUIVALENT = {}
