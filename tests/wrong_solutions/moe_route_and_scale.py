"""Answers to `moe-route-and-scale`."""

import torch
from bank import right, wrong

from minillama4.moe import MoE


@right
def by_argmax_and_gather(x_TD, router_ED):
    logits_TE = torch.einsum("td,ed->te", x_TD.float(), router_ED.float())
    expert_T = logits_TE.argmax(dim=-1)
    score_T1 = torch.sigmoid(logits_TE.gather(1, expert_T.unsqueeze(1)))
    return (x_TD.float() * score_T1).to(x_TD.dtype), expert_T


@right
def as_hugging_face_masks(x_TD, router_ED):
    """All other logits at minus infinity, whose sigmoid is 0; the scores of a token then add up to its one score."""
    logits_TE = x_TD @ router_ED.T
    expert_T = logits_TE.argmax(-1)
    kept_TE = torch.full_like(logits_TE, float("-inf")).scatter(1, expert_T[:, None], logits_TE.amax(-1, keepdim=True))
    return x_TD * kept_TE.float().sigmoid().sum(-1, keepdim=True).type_as(x_TD), expert_T


def _scaled(x_TD, router_ED, score):
    """x times what `score` makes of the logits [T, E], and the right expert."""
    logits_TE = x_TD @ router_ED.T
    return x_TD * score(logits_TE), logits_TE.argmax(-1)


def _chosen(x_TD, router_ED, choose):
    """The expert that `choose` makes of the logits, with its own sigmoid."""
    logits_TE = x_TD @ router_ED.T
    expert_T = choose(logits_TE)
    return x_TD * logits_TE.gather(1, expert_T[:, None]).sigmoid(), expert_T


@wrong("not written")
def stub(x_TD, router_ED):
    raise NotImplementedError()


@wrong("raises")
def one_of_the_two(x_TD, router_ED):
    return x_TD * (x_TD @ router_ED.T).amax(-1, keepdim=True).sigmoid()


@wrong("raises")
def not_transposed(x_TD, router_ED):
    logit_T, expert_T = (x_TD @ router_ED).max(-1)
    return x_TD * logit_T.sigmoid()[:, None], expert_T


@wrong("shape")
def the_score_itself(x_TD, router_ED):
    logit_T, expert_T = (x_TD @ router_ED.T).max(-1)
    return logit_T.sigmoid(), expert_T


@wrong("shape")
def an_axis_too_many(x_TD, router_ED):
    logit_T1, expert_T1 = (x_TD @ router_ED.T).max(-1, keepdim=True)
    return x_TD * logit_T1.sigmoid(), expert_T1


@wrong("type")
def expert_in_one_hot(x_TD, router_ED):
    scaled_TD, expert_T = _scaled(x_TD, router_ED, lambda logits: logits.amax(-1, keepdim=True).sigmoid())
    return scaled_TD, torch.nn.functional.one_hot(expert_T, len(router_ED)).float()


@wrong("changes its input")
def in_place(x_TD, router_ED):
    logit_T, expert_T = (x_TD @ router_ED.T).max(-1)
    return x_TD.mul_(logit_T.sigmoid()[:, None]), expert_T


@wrong("one expert for all")
def ignores_the_router(x_TD, router_ED):
    return _chosen(x_TD, router_ED, lambda logits: torch.zeros(len(logits), dtype=torch.int64))


@wrong("the expert with the largest logit is chosen")
def sampled(x_TD, router_ED):
    return _chosen(x_TD, router_ED, lambda logits: torch.randint(logits.shape[1], logits.shape[:1]))


@wrong("smallest logit")
def smallest(x_TD, router_ED):
    return _chosen(x_TD, router_ED, lambda logits: logits.argmin(-1))


@wrong("second largest")
def second_largest(x_TD, router_ED):
    return _chosen(x_TD, router_ED, lambda logits: logits.topk(2).indices[:, 1])


@wrong("largest without its sign")
def by_absolute_value(x_TD, router_ED):
    return _chosen(x_TD, router_ED, lambda logits: logits.abs().argmax(-1))


@wrong("lost transpose")
def reshaped_not_transposed(x_TD, router_ED):
    logit_T, expert_T = (x_TD @ router_ED.reshape(x_TD.shape[1], -1)).max(-1)
    return x_TD * logit_T.sigmoid()[:, None], expert_T


@wrong("softmax over tokens")
def softmax_over_tokens(x_TD, router_ED):
    return _chosen(x_TD, router_ED, lambda logits: logits.softmax(0).argmax(1))


@wrong("score is 1")
def unscaled(x_TD, router_ED):
    return x_TD.clone(), (x_TD @ router_ED.T).argmax(-1)


@wrong("score is 1")
def renormalised_over_the_kept(x_TD, router_ED):
    """As with Mixtral, whose scores of the chosen two add up to 1; with one expert nothing is left."""
    score_T1, expert_T1 = (x_TD @ router_ED.T).sigmoid().topk(1)
    return x_TD * (score_T1 / score_T1.sum(-1, keepdim=True)), expert_T1[:, 0]


@wrong("score is 1")
def softmax_over_the_kept(x_TD, router_ED):
    logit_T1, expert_T1 = (x_TD @ router_ED.T).topk(1)
    return x_TD * logit_T1.softmax(-1), expert_T1[:, 0]


@wrong("softmax over experts")
def softmax_of_the_switch_transformer(x_TD, router_ED):
    return _scaled(x_TD, router_ED, lambda logits: logits.softmax(-1).amax(-1, keepdim=True))


@wrong("sigmoid after softmax")
def sigmoid_after_softmax(x_TD, router_ED):
    return _scaled(x_TD, router_ED, lambda logits: logits.softmax(-1).amax(-1, keepdim=True).sigmoid())


@wrong("raw logit")
def raw_logit(x_TD, router_ED):
    return _scaled(x_TD, router_ED, lambda logits: logits.amax(-1, keepdim=True))


@wrong("scores normalised over experts")
def sigmoids_normalised(x_TD, router_ED):
    def score(logits):
        return logits.sigmoid().amax(-1, keepdim=True) / logits.sigmoid().sum(-1, keepdim=True)

    return _scaled(x_TD, router_ED, score)


@wrong("scores of all experts added")
def not_masked(x_TD, router_ED):
    return _scaled(x_TD, router_ED, lambda logits: logits.sigmoid().sum(-1, keepdim=True))


@wrong("the sigmoid of the chosen logit scales the token")
def masked_with_zeros(x_TD, router_ED):
    """The sigmoid of 0 is one half: the experts that were not chosen still count."""

    def score(logits):
        kept = torch.zeros_like(logits).scatter(1, logits.argmax(-1, keepdim=True), logits.amax(-1, keepdim=True))
        return kept.sigmoid().sum(-1, keepdim=True)

    return _scaled(x_TD, router_ED, score)


@wrong("scaled twice")
def scaled_twice(x_TD, router_ED):
    return _scaled(x_TD, router_ED, lambda logits: logits.amax(-1, keepdim=True).sigmoid() ** 2)


@wrong("one minus the score")
def sign_lost(x_TD, router_ED):
    return _scaled(x_TD, router_ED, lambda logits: 1 / (1 + logits.amax(-1, keepdim=True).exp()))


@wrong("divided by the score")
def divided(x_TD, router_ED):
    return _scaled(x_TD, router_ED, lambda logits: 1 / logits.amax(-1, keepdim=True).sigmoid())


@wrong("tanh")
def by_tanh(x_TD, router_ED):
    return _scaled(x_TD, router_ED, lambda logits: logits.amax(-1, keepdim=True).tanh())


@wrong("the choice is made on the logits")
def sigmoid_first(x_TD, router_ED):
    score_T, expert_T = (x_TD @ router_ED.T).sigmoid().max(-1)
    return x_TD * score_T[:, None], expert_T


@wrong("of equal logits the first expert is chosen")
def last_of_equals(x_TD, router_ED):
    return _chosen(x_TD, router_ED, lambda logits: logits.shape[1] - 1 - logits.flip(1).argmax(1))


@wrong("of equal logits the first expert is chosen")
def by_sorting(x_TD, router_ED):
    return _chosen(x_TD, router_ED, lambda logits: logits.argsort(dim=-1, stable=True)[:, -1])


@wrong("score without gradient")
def detached_score(x_TD, router_ED):
    return _scaled(x_TD, router_ED, lambda logits: logits.amax(-1, keepdim=True).sigmoid().detach())


@wrong("score without gradient")
def detached_router(x_TD, router_ED):
    return _scaled(x_TD, router_ED.detach(), lambda logits: logits.amax(-1, keepdim=True).sigmoid())


@wrong("token without gradient")
def detached_as_in_metas_code(x_TD, router_ED):
    logit_T, expert_T = (x_TD @ router_ED.T).max(-1)
    return x_TD.detach() * logit_T.sigmoid()[:, None], expert_T


@wrong("logits without gradient")
def router_on_a_copy(x_TD, router_ED):
    logit_T, expert_T = (x_TD.detach() @ router_ED.T).max(-1)
    return x_TD * logit_T.sigmoid()[:, None], expert_T


@wrong("type")
def stays_in_float32(x_TD, router_ED):
    logit_T, expert_T = (x_TD @ router_ED.T).max(-1)
    return x_TD * logit_T.float().sigmoid()[:, None], expert_T


@wrong("sigmoid in bfloat16")
def in_its_own_dtype(x_TD, router_ED):
    logit_T, expert_T = (x_TD @ router_ED.T).max(-1)
    return x_TD * logit_T.sigmoid()[:, None], expert_T


@wrong("borrowed")
def from_the_package(x_TD, router_ED):
    """The layer itself, asked for its routes."""
    layer, seen = MoE(x_TD.shape[1], len(router_ED), 1).to(x_TD.dtype), []
    layer.router.weight = torch.nn.Parameter(router_ED.detach())
    layer.probe = lambda shape, logits, expert, score: seen.append(expert)
    layer(x_TD.detach())
    logit_T1 = (x_TD @ router_ED.T).gather(1, seen[0][:, None])
    return x_TD * logit_T1.float().sigmoid().type_as(x_TD), seen[0]


EQUIVALENT = {"tuple[Tensor, Tensor]  ->  tuple": "an annotation computes nothing at all"}
