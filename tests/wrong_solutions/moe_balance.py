"""Answers to `moe-balance`."""

import torch
import torch.nn.functional as F
from bank import right, wrong

from minillama4.train import balance_loss


def _share(probs_TE, expert_T):
    """f: the share of tokens of each expert."""
    return torch.bincount(expert_T, minlength=probs_TE.shape[1]) / len(expert_T)


def _loss(probs_TE, expert_T):
    return probs_TE.shape[1] * (_share(probs_TE, expert_T) * probs_TE.mean(0)).sum()


def _gap(expert_T, bias_E):
    """[E]: by how many tokens an expert is below the average."""
    return len(expert_T) / len(bias_E) - torch.bincount(expert_T, minlength=len(bias_E))


def _step(expert_T, bias_E, rate):
    return bias_E + rate * torch.sign(_gap(expert_T, bias_E))


@right
def by_one_hot_and_comparing(probs_TE, expert_T, bias_E, rate):
    chosen_TE = F.one_hot(expert_T, probs_TE.size(1)).float()
    load_E = chosen_TE.mean(dim=0)
    loss = torch.dot(load_E, probs_TE.sum(dim=0)) * probs_TE.size(1) / probs_TE.size(0)
    average = load_E.mean()
    return loss, torch.where(load_E < average, bias_E + rate, torch.where(load_E > average, bias_E - rate, bias_E))


@wrong("not written")
def stub(probs_TE, expert_T, bias_E, rate):
    raise NotImplementedError()


@wrong("raises")
def one_of_the_two(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE, expert_T)


@wrong("type")
def loss_as_a_number(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE, expert_T).item(), _step(expert_T, bias_E, rate)


@wrong("shape")
def not_summed(probs_TE, expert_T, bias_E, rate):
    return len(bias_E) * _share(probs_TE, expert_T) * probs_TE.mean(0), _step(expert_T, bias_E, rate)


@wrong("changes its input")
def bias_in_place(probs_TE, expert_T, bias_E, rate):
    bias_E += rate * torch.sign(_gap(expert_T, bias_E))
    return _loss(probs_TE, expert_T), bias_E


@wrong("factor E missing")
def factor_forgotten(probs_TE, expert_T, bias_E, rate):
    return (_share(probs_TE, expert_T) * probs_TE.mean(0)).sum(), _step(expert_T, bias_E, rate)


@wrong("factor E missing")
def mean_over_experts(probs_TE, expert_T, bias_E, rate):
    loss = probs_TE.shape[1] * (_share(probs_TE, expert_T) * probs_TE.mean(0)).mean()
    return loss, _step(expert_T, bias_E, rate)


@wrong("factor E twice")
def factor_squared(probs_TE, expert_T, bias_E, rate):
    return len(bias_E) * _loss(probs_TE, expert_T), _step(expert_T, bias_E, rate)


@wrong("sums for means")
def counts_for_shares(probs_TE, expert_T, bias_E, rate):
    return len(expert_T) * _loss(probs_TE, expert_T), _step(expert_T, bias_E, rate)


@wrong("two sums for means")
def counts_and_sums(probs_TE, expert_T, bias_E, rate):
    return len(expert_T) ** 2 * _loss(probs_TE, expert_T), _step(expert_T, bias_E, rate)


@wrong("zero when even")
def variance_of_the_load(probs_TE, expert_T, bias_E, rate):
    share_E = _share(probs_TE, expert_T)
    return (share_E.std() / share_E.mean()) ** 2, _step(expert_T, bias_E, rate)


@wrong("counted from the probabilities")
def counts_the_most_probable(probs_TE, expert_T, bias_E, rate):
    """What one writes where no bias takes part: then the two are the same."""
    share_E = torch.bincount(probs_TE.argmax(1), minlength=len(bias_E)) / len(expert_T)
    return len(bias_E) * (share_E * probs_TE.mean(0)).sum(), _step(expert_T, bias_E, rate)


@wrong("counted from the probabilities")
def from_the_package(probs_TE, expert_T, bias_E, rate):
    return balance_loss(probs_TE.log()), _step(expert_T, bias_E, rate)


@wrong("share squared")
def squares_of_the_shares(probs_TE, expert_T, bias_E, rate):
    return len(bias_E) * _share(probs_TE, expert_T).square().sum(), _step(expert_T, bias_E, rate)


@wrong("largest share")
def largest_share(probs_TE, expert_T, bias_E, rate):
    return len(bias_E) * _share(probs_TE, expert_T).max(), _step(expert_T, bias_E, rate)


@wrong("probability squared")
def squares_of_the_probabilities(probs_TE, expert_T, bias_E, rate):
    return len(bias_E) * probs_TE.mean(0).square().sum(), _step(expert_T, bias_E, rate)


@wrong("bias in the loss")
def bias_in_the_score(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE + bias_E, expert_T), _step(expert_T, bias_E, rate)


@wrong("softmax twice")
def softmax_of_probabilities(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE.softmax(-1), expert_T), _step(expert_T, bias_E, rate)


@wrong("mean over its own tokens")
def mean_of_those_that_came(probs_TE, expert_T, bias_E, rate):
    share_E = _share(probs_TE, expert_T)
    mine_TE = F.one_hot(expert_T, len(bias_E)) * probs_TE
    loss = len(bias_E) * (share_E * mine_TE.sum(0) / (share_E * len(expert_T))).sum()
    return loss, _step(expert_T, bias_E, rate)


@wrong("wrong way round")
def rich_get_richer(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE, expert_T), _step(expert_T, bias_E, -rate)


@wrong("bias not moved")
def bias_not_moved(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE, expert_T), bias_E.clone()


@wrong("old bias lost")
def starts_anew(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE, expert_T), rate * torch.sign(_gap(expert_T, bias_E))


@wrong("rate not used")
def steps_of_one(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE, expert_T), _step(expert_T, bias_E, 1.0)


@wrong("as far as the load is off")
def proportional_to_the_gap(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE, expert_T), bias_E + rate * _gap(expert_T, bias_E)


@wrong("as far as the share is off")
def proportional_to_the_share(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE, expert_T), bias_E + rate * (1 / len(bias_E) - _share(probs_TE, expert_T))


@wrong("as far as the load is off, relative")
def proportional_to_the_relative_gap(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE, expert_T), bias_E + rate * (1 - len(bias_E) * _share(probs_TE, expert_T))


@wrong("only up")
def only_up(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE, expert_T), bias_E + rate * (_gap(expert_T, bias_E) > 0)


@wrong("only down")
def only_down(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE, expert_T), bias_E - rate * (_gap(expert_T, bias_E) < 0)


@wrong("everyone up")
def compared_with_all_tokens(probs_TE, expert_T, bias_E, rate):
    count_E = torch.bincount(expert_T, minlength=len(bias_E))
    return _loss(probs_TE, expert_T), bias_E + rate * torch.sign(count_E.sum() - count_E)


@wrong("by probability")
def load_by_probability(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE, expert_T), bias_E + rate * torch.sign(1 / len(bias_E) - probs_TE.mean(0))


@wrong("by the most probable")
def load_by_the_most_probable(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE, expert_T), _step(probs_TE.argmax(1), bias_E, rate)


@wrong("an expert without tokens counts in the loss")
def counts_without_the_last(probs_TE, expert_T, bias_E, rate):
    count_E = torch.bincount(expert_T)
    loss = len(bias_E) * (count_E / len(expert_T) * probs_TE.mean(0)).sum()
    return loss, bias_E + rate * torch.sign(len(expert_T) / len(bias_E) - count_E)


@wrong("experts with tokens counted")
def only_experts_with_tokens(probs_TE, expert_T, bias_E, rate):
    return len(expert_T.unique()) / len(bias_E) * _loss(probs_TE, expert_T), _step(expert_T, bias_E, rate)


@wrong("no help for the dead")
def dead_stay_dead(probs_TE, expert_T, bias_E, rate):
    used = torch.bincount(expert_T, minlength=len(bias_E)) > 0
    return _loss(probs_TE, expert_T), torch.where(used, _step(expert_T, bias_E, rate), bias_E)


@wrong("average over the living")
def average_over_the_living(probs_TE, expert_T, bias_E, rate):
    count_E = torch.bincount(expert_T, minlength=len(bias_E))
    average = count_E[count_E > 0].float().mean()
    return _loss(probs_TE, expert_T), bias_E + rate * torch.sign(average - count_E)


@wrong("average goes up")
def average_is_underloaded(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE, expert_T), torch.where(_gap(expert_T, bias_E) >= 0, bias_E + rate, bias_E - rate)


@wrong("average goes down")
def average_is_overloaded(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE, expert_T), torch.where(_gap(expert_T, bias_E) > 0, bias_E + rate, bias_E - rate)


@wrong("the gradient goes through p alone")
def all_detached(probs_TE, expert_T, bias_E, rate):
    return _loss(probs_TE.detach(), expert_T), _step(expert_T, bias_E, rate)


@wrong("gradient through f")
def straight_through(probs_TE, expert_T, bias_E, rate):
    """Hard in value, soft in its gradient: a trick that other losses use."""
    chosen_TE = F.one_hot(expert_T, len(bias_E)) + probs_TE - probs_TE.detach()
    return len(bias_E) * (chosen_TE.mean(0) * probs_TE.mean(0)).sum(), _step(expert_T, bias_E, rate)


@wrong("loss without gradient")
def gradient_through_f_alone(probs_TE, expert_T, bias_E, rate):
    loss = len(bias_E) * (_share(probs_TE, expert_T) * probs_TE.detach().mean(0)).sum()
    return loss + 0 * probs_TE.sum(), _step(expert_T, bias_E, rate)


EQUIVALENT = {"tuple[Tensor, Tensor]  ->  tuple": "an annotation computes nothing at all"}
