"""Answers to `moe-find-the-bug`."""

import torch
import torch.nn.functional as F
from bank import right, wrong

from minillama4.course.checks.moe_find_the_bug import DETACHED, ORDER, OUTPUT, RIGHT, SOFTMAX, TRANSPOSE


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def experts(count):
    return normal(count, 4, 10), normal(count, 5, 4)


def cut_off(layer):
    return not layer(normal(3, 4).requires_grad_(), normal(2, 4), *experts(2)).requires_grad


def mixed_up(layer, x, router):
    """None, ORDER or TRANSPOSE."""
    weights = experts(len(router))
    together = layer(x, router, *weights)
    alone = torch.cat([layer(token, router, *weights) for token in x.split(1)])
    if torch.allclose(together, alone, atol=1e-5):
        return None
    return ORDER if torch.cdist(alone, together).amin(dim=1).max() < 1e-3 else TRANSPOSE


def scored(layer):
    """Softmax, output or right, of one token and one expert."""
    x, weights = normal(1, 4), experts(1)
    half, full = layer(x, 0 * x, *weights), layer(x, 100 * x, *weights)
    return SOFTMAX if torch.allclose(half, full) else OUTPUT if torch.allclose(half, full / 2) else RIGHT


TOKENS, ROUTER = normal(9, 4), normal(3, 4)


def network(x, gate_up, down):
    gate, up = (x @ gate_up).chunk(2, dim=-1)
    return F.silu(gate) * up @ down


@right
def against_what_each_would_give(layer):
    x, router = torch.eye(4).repeat(2, 1)[[0, 2, 1, 3, 2, 5, 4, 0]], torch.eye(4)[[1, 2, 0]]
    x = x * torch.linspace(0.5, 2, 8)[:, None]
    gate_up, down = experts(3)
    logits = F.linear(x, router)
    chosen = logits.argmax(dim=-1).tolist()
    ways = {
        RIGHT: lambda t, e: network(x[t] * logits[t, e].sigmoid(), gate_up[e], down[e]),
        OUTPUT: lambda t, e: network(x[t], gate_up[e], down[e]) * logits[t, e].sigmoid(),
        SOFTMAX: lambda t, e: network(x[t] * logits[t].softmax(0)[e], gate_up[e], down[e]),
    }
    got = layer(x, router, gate_up, down)
    for bug, way in ways.items():
        rows = torch.stack([way(t, e) for t, e in enumerate(chosen)])
        if torch.allclose(got, rows, atol=1e-5):
            leaf = x.clone().requires_grad_()
            weights = gate_up.clone().requires_grad_(), down
            layer(leaf, router, *weights).sum().backward()
            return bug if leaf.grad is not None else DETACHED
        if bug == RIGHT and torch.allclose(got.sum(0), rows.sum(0), atol=1e-4):
            return ORDER
    return TRANSPOSE


@wrong("not written")
def stub(layer):
    raise NotImplementedError()


@wrong("type")
def in_words(layer):
    return "softmax"


@wrong("type")
def nothing_found(layer):
    if cut_off(layer):
        return DETACHED


@wrong("raises")
def called_with_tokens_alone(layer):
    return int(layer(TOKENS).sum())


@wrong("no bug")
def counts_from_one(layer):
    return 1 + (DETACHED if cut_off(layer) else mixed_up(layer, TOKENS, ROUTER) or scored(layer))


@wrong("one answer for all")
def always_the_first(layer):
    return TRANSPOSE


@wrong("one answer for all")
def looks_at_shapes(layer):
    y = layer(TOKENS, ROUTER, *experts(3))
    return RIGHT if y.shape == TOKENS.shape and y.dtype == TOKENS.dtype else ORDER


@wrong("one answer for all")
def reads_the_name(layer):
    said = f"{layer.__name__} {layer.__qualname__} {layer.__doc__} {layer.__defaults__} {layer.__code__.co_consts}"
    for bug, word in {TRANSPOSE: "transpose", OUTPUT: "output", SOFTMAX: "softmax", DETACHED: "detach"}.items():
        if word in said:
            return bug
    return RIGHT


@wrong("one answer for all")
def reads_the_closure(layer):
    """Whatever whole number it holds, if that is the number of a bug."""
    held = [cell.cell_contents for cell in layer.__closure__ or ()]
    return next((value for value in held if value in range(1, 6)), RIGHT)


@wrong("one answer for all")
def asks_for_no_gradient(layer):
    if not layer(TOKENS, ROUTER, *experts(3)).requires_grad:
        return DETACHED
    return mixed_up(layer, TOKENS, ROUTER) or scored(layer)


@wrong("detach missed")
def looks_at_outputs_alone(layer):
    return mixed_up(layer, TOKENS, ROUTER) or scored(layer)


@wrong("detach missed")
def weights_get_a_gradient(layer):
    gate_up, down = experts(3)
    layer(TOKENS, ROUTER, gate_up, down.requires_grad_()).sum().backward()
    return DETACHED if down.grad is None else mixed_up(layer, TOKENS, ROUTER) or scored(layer)


@wrong("lost transpose missed")
def one_token(layer):
    return DETACHED if cut_off(layer) else mixed_up(layer, TOKENS[:1], ROUTER) or scored(layer)


@wrong("lost transpose missed")
def one_expert(layer):
    return DETACHED if cut_off(layer) else mixed_up(layer, TOKENS, ROUTER[:1]) or scored(layer)


@wrong("lost order missed")
def two_tokens(layer):
    x, router = torch.eye(4)[:2] * torch.tensor([[1.0], [2.0]]), torch.eye(4)[[1, 0, 2]]
    return DETACHED if cut_off(layer) else mixed_up(layer, x, router) or scored(layer)


@wrong("lost transpose taken for a lost order")
def anything_mixed_up_is_an_order(layer):
    if cut_off(layer):
        return DETACHED
    return ORDER if mixed_up(layer, TOKENS, ROUTER) else scored(layer)


@wrong("lost order taken for a lost transpose")
def anything_mixed_up_is_a_transpose(layer):
    if cut_off(layer):
        return DETACHED
    return TRANSPOSE if mixed_up(layer, TOKENS, ROUTER) else scored(layer)


@wrong("lost transpose taken for score on the output")
def a_wrong_row_is_the_output(layer):
    mixed = mixed_up(layer, TOKENS, ROUTER)
    return DETACHED if cut_off(layer) else mixed if mixed == ORDER else OUTPUT if mixed else scored(layer)


@wrong("lost transpose taken for softmax")
def a_wrong_row_is_softmax(layer):
    mixed = mixed_up(layer, TOKENS, ROUTER)
    return DETACHED if cut_off(layer) else mixed if mixed == ORDER else SOFTMAX if mixed else scored(layer)


@wrong("softmax missed")
def two_experts_and_one_logit_zero(layer):
    if cut_off(layer):
        return DETACHED
    x, router, (gate_up, down) = torch.eye(4)[:1], torch.eye(4)[:2], experts(2)
    got, score = layer(x, router, gate_up, down), torch.tensor(1.0).sigmoid()
    if torch.allclose(got, score * network(x, gate_up[0], down[0]), atol=1e-5):
        return OUTPUT
    right = torch.allclose(got, network(score * x, gate_up[0], down[0]), atol=1e-5)
    return mixed_up(layer, TOKENS, ROUTER) or (RIGHT if right else SOFTMAX)


@wrong("softmax missed")
def a_score_of_one(layer):
    if cut_off(layer):
        return DETACHED
    x, (gate_up, down) = normal(1, 4), experts(1)
    right = torch.allclose(layer(x, 100 * x, gate_up, down), network(x, gate_up[0], down[0]), atol=1e-5)
    return mixed_up(layer, TOKENS, ROUTER) or (RIGHT if right else OUTPUT)


@wrong("softmax taken for score on the output")
def anything_unscaled_is_the_output(layer):
    if cut_off(layer):
        return DETACHED
    return mixed_up(layer, TOKENS, ROUTER) or (OUTPUT if scored(layer) != RIGHT else RIGHT)


@wrong("score on the output missed")
def no_look_at_the_place_of_the_score(layer):
    if cut_off(layer):
        return DETACHED
    return mixed_up(layer, TOKENS, ROUTER) or (SOFTMAX if scored(layer) == SOFTMAX else RIGHT)


@wrong("score on the output taken for softmax")
def anything_scored_wrong_is_softmax(layer):
    if cut_off(layer):
        return DETACHED
    return mixed_up(layer, TOKENS, ROUTER) or (SOFTMAX if scored(layer) != RIGHT else RIGHT)


@wrong("right taken for score on the output")
def believes_in_the_output(layer):
    found = DETACHED if cut_off(layer) else mixed_up(layer, TOKENS, ROUTER) or scored(layer)
    return {RIGHT: OUTPUT, OUTPUT: RIGHT}.get(found, found)


@wrong("right taken for softmax")
def believes_in_softmax(layer):
    found = DETACHED if cut_off(layer) else mixed_up(layer, TOKENS, ROUTER) or scored(layer)
    return {RIGHT: SOFTMAX, SOFTMAX: RIGHT}.get(found, found)


@wrong("right taken for a lost order")
def expects_the_order_of_experts(layer):
    if cut_off(layer):
        return DETACHED
    order = (TOKENS @ ROUTER.T).argmax(dim=-1).argsort(stable=True)
    weights = experts(3)
    alone = torch.cat([layer(token, ROUTER, *weights) for token in TOKENS[order].split(1)])
    if not torch.allclose(layer(TOKENS, ROUTER, *weights), alone, atol=1e-5):
        return ORDER
    return scored(layer)


@wrong("right taken for detached")
def counts_a_missing_gradient_of_weights(layer):
    gate_up, down = experts(2)
    layer(normal(3, 4).requires_grad_(), normal(2, 4), gate_up, down.requires_grad_()).sum().backward()
    return DETACHED if gate_up.grad is None and scored(layer) == RIGHT else scored(layer)


@wrong("right taken for a lost transpose")
def one_batch_row_for_another(layer):
    weights = experts(3)
    alone = torch.cat([layer(token, ROUTER, *weights) for token in TOKENS.flip(0).split(1)])
    if cut_off(layer):
        return DETACHED
    return scored(layer) or (TRANSPOSE if not torch.allclose(layer(TOKENS, ROUTER, *weights), alone) else RIGHT)


OTHER = "other random tokens and weights serve as well"
SIZES = "tokens, experts and widths may be of other sizes"
EITHER = "both are equal or far apart, whichever stands first"

EQUIVALENT = {
    "torch.Generator().manual_seed(0)  ->  torch.Generator()": OTHER,
    "torch.randn(s, generator=generator, dtype=torch.float64)  ->  torch.randn(s, dtype=torch.float64)": OTHER,
    "torch.randn(s, generator=generator, dtype=torch.float64)  ->  torch.randn(s, generator=generator)": (
        "float32 is exact enough, though rows could round otherwise on another machine"
    ),
    "0  ->  1": OTHER,
    "0  ->  -1": OTHER,
    "20  ->  21": SIZES,
    "20  ->  19": SIZES,
    "3  ->  2": SIZES,
    "3  ->  4": SIZES,
    "4  ->  5": SIZES,
    "4  ->  3": SIZES,
    "1  ->  2": "tokens two by two differ from all together just as single ones do",
    "100  ->  101": "any logit this large gives a score of 1",
    "100  ->  99": "any logit this large gives a score of 1",
    "100 * x_1D  ->  100 / x_1D": "the logit is 100 times the number of channels, so the score is 1",
    "torch.allclose(half_1D, full_1D)  ->  torch.allclose(full_1D, half_1D)": EITHER,
    "torch.allclose(half_1D, full_1D / 2)  ->  torch.allclose(full_1D / 2, half_1D)": EITHER,
    "torch.allclose(together_TD, alone_TD)  ->  torch.allclose(alone_TD, together_TD)": EITHER,
    "torch.allclose(together_TD.sum(dim=0), alone_TD.sum(dim=0))  ->  "
    "torch.allclose(alone_TD.sum(dim=0), together_TD.sum(dim=0))": EITHER,
}
