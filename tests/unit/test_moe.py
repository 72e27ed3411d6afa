"""The mixture of experts against a dense oracle in float64 that runs every expert on every token.

Shapes: T tokens, D = 6 hidden size, F = 10 expert width, E = 5 experts.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import randomise, relative_error

from minillama4 import moe as moe_module
from minillama4.moe import Experts, FeedForward, MoE, grouped_mm, worth_padding

D, WIDTH, E = 6, 10, 5


@pytest.fixture(scope="module", autouse=True, params=[False, True], ids=["loop", "padded"])
def backend(request):
    """Everything below holds for both ways of multiplying groups: never pad, or always."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_module, "worth_padding", lambda counts_E: request.param)
        yield request.param


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def moe() -> MoE:
    return randomise(MoE(D, E, WIDTH), seed=1)


def router_that_chooses(moe, x_TD, expert_T, score=0.7):
    """Tokens x_TD whose router logits pick exactly these experts, with this sigmoid (above one half).

    The first E channels of a token say which expert it wants; the others are free.
    """
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[:, :E] = torch.eye(E) * math.log(score / (1 - score))
    x_TD = x_TD.clone()
    x_TD[:, :E] = F.one_hot(torch.as_tensor(expert_T), E).to(x_TD.dtype)
    return x_TD


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate) * (x @ up)) @ down


def dense(moe: MoE, x: torch.Tensor, scale_output: bool = False) -> torch.Tensor:
    """The definition: all experts on all tokens, then 0 for those that were not chosen; one token at a time."""
    experts = moe.experts
    out = []
    for token in x.double().reshape(-1, x.shape[-1]):
        logits = moe.router.weight.double() @ token
        chosen = int(logits.argmax())
        score = 1 / (1 + torch.exp(-logits[chosen]))
        total = 0
        for expert in range(len(logits)):
            gate, up = experts.gate_up_proj[expert].double().chunk(2, dim=1)
            down = experts.down_proj[expert].double()
            y = score * swiglu(token, gate, up, down) if scale_output else swiglu(score * token, gate, up, down)
            total = total + y * (expert == chosen)
        shared = moe.shared_expert
        weights = (w.weight.double().T for w in (shared.gate_proj, shared.up_proj, shared.down_proj))
        out.append(total + swiglu(token, *weights))
    return torch.stack(out).view_as(x)


# ----------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (2, 17), (4, 64)], ids=str)
def test_sparse_dispatch_equals_dense_compute(moe, shape):
    x = draw(*shape, D)
    assert relative_error(moe(x), dense(moe, x)) < 1e-6


@given(st.lists(st.integers(0, E - 1), min_size=1, max_size=12))
def test_any_distribution_of_tokens_equals_dense_compute(experts):
    """All to one expert, one to each, any expert empty (the first, the last, several): hypothesis tries them."""
    moe = randomise(MoE(D, E, WIDTH), seed=1)
    x = router_that_chooses(moe, draw(len(experts), D), experts)[None]
    assert relative_error(moe(x), dense(moe, x)) < 1e-6


def test_tokens_return_to_their_places(moe):
    """A batch of tokens gives each token what it gets alone, in whatever order the experts worked."""
    x = draw(3, 11, D)
    alone = torch.stack([torch.cat([moe(x[b : b + 1, t : t + 1]) for t in range(11)], dim=1)[0] for b in range(3)])
    torch.testing.assert_close(moe(x), alone)


def test_of_equal_router_logits_the_first_expert_wins(moe):
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[[1, 2, 4], 0] = 1
    x = draw(2, 7, D).abs()  # experts 1, 2 and 4 share the lead
    seen = []
    moe.probe = lambda shape, logits, expert, score: seen.append(expert)
    got = moe(x), moe(x[:1, :1])
    assert all((expert == 1).all() for expert in seen)
    assert relative_error(got[0], dense(moe, x)) < 1e-6


def test_the_score_is_the_sigmoid_of_the_winning_logit_alone(moe):
    """Not a softmax: the losers may change as they like as long as they lose."""
    seen = []
    moe.probe = lambda shape, logits, expert, score: seen.append((logits, expert, score))
    x = draw(1, 9, D)
    moe(x)
    logits, expert, score = seen[0]
    torch.testing.assert_close(logits, (x[0] @ moe.router.weight.T))
    assert torch.equal(expert, logits.argmax(-1))
    torch.testing.assert_close(score, 1 / (1 + torch.exp(-logits.max(-1).values)))


def test_the_score_scales_the_experts_input_not_its_output(moe):
    """SwiGLU is not linear: scaling what comes out is another function, and by far."""
    x = draw(2, 17, D)
    assert relative_error(moe(x), dense(moe, x, scale_output=True)) > 0.05
    tokens = router_that_chooses(moe, draw(1, D), [3], score=0.6)
    shared, routed = moe.shared_expert(tokens), moe(tokens[None])[0] - moe.shared_expert(tokens)
    torch.testing.assert_close(routed, moe.experts(tokens * 0.6, torch.tensor([3])), rtol=1e-4, atol=1e-6)
    assert relative_error(routed, 0.6 * moe.experts(tokens, torch.tensor([3]))) > 0.05
    torch.testing.assert_close(moe(tokens[None])[0], shared + routed)


def test_the_shared_expert_runs_on_every_token_unscaled(moe):
    x = draw(2, 5, D)
    with torch.no_grad():
        moe.experts.down_proj.zero_()
    torch.testing.assert_close(moe(x), moe.shared_expert(x))


def test_gate_comes_first_in_gate_up(moe):
    x, expert = draw(1, D), torch.tensor([2])
    gate, up = moe.experts.gate_up_proj[2, :, :WIDTH], moe.experts.gate_up_proj[2, :, WIDTH:]
    torch.testing.assert_close(moe.experts(x, expert), swiglu(x, gate, up, moe.experts.down_proj[2]))


def test_grouped_mm_multiplies_each_group_by_its_own_matrix():
    x, w = draw(6, D), draw(4, D, 3, seed=1)
    got = grouped_mm(x, w, [2, 0, 1, 3])
    wanted = torch.stack([row @ w[expert] for row, expert in zip(x, [0, 0, 2, 3, 3, 3], strict=True)])
    torch.testing.assert_close(got, wanted)


def test_feed_forward_is_swiglu():
    ff = randomise(FeedForward(D, WIDTH))
    x = draw(2, 3, D)
    torch.testing.assert_close(ff(x), swiglu(x, ff.gate_proj.weight.T, ff.up_proj.weight.T, ff.down_proj.weight.T))


# ----------------------------------------------------------------------------------------------------------------------
# What is not computed


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_experts_that_nobody_chose_are_never_computed(moe, tokens):
    """Their weights are NaN here, which any arithmetic would carry into the result, even 0 times NaN."""
    x = router_that_chooses(moe, draw(tokens, D), [1, 3, 1, 1, 3, 3, 1, 3, 1][:tokens])[None]
    wanted = moe(x)
    with torch.no_grad():
        for expert in {0, 2, 4} | ({3} if tokens == 1 else set()):
            moe.experts.gate_up_proj[expert] = float("nan")
            moe.experts.down_proj[expert] = float("nan")
    assert torch.equal(moe(x), wanted)


def flops_of_experts(experts: int, tokens: int) -> int:
    """Counted by torch, without the router's."""
    from torch.utils.flop_counter import FlopCounterMode

    moe, x = randomise(MoE(D, experts, WIDTH)), draw(1, tokens, D)
    with FlopCounterMode(display=False) as counter:
        moe(x)
    return counter.get_total_flops() - 2 * tokens * D * experts


def test_a_token_costs_the_same_with_8_experts_as_with_128(backend):
    if backend:
        pytest.skip("padding costs more; the next test says how much at most")
    need = 2 * 2 * 3 * 40 * D * WIDTH  # routed and shared, three matrices, 2 per product
    assert flops_of_experts(8, 40) == flops_of_experts(128, 40) == need


@pytest.mark.parametrize("counts_E,pads", [
    ([8, 9, 7, 8], True),  # small groups, nearly even
    ([16, 0, 0, 0], True),  # four times as many rows
    ([21, 0, 0, 0, 0], False),  # more than that would waste work
    ([100, 101, 99, 100], False),  # large groups fill both threads alone
    ([4, 3, 4, 4], False),  # few tokens: experts without any need not be read at all
])  # fmt: skip
def test_padding_is_used_only_where_it_costs_little(monkeypatch, counts_E, pads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert worth_padding(counts_E) == pads
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not worth_padding(counts_E)


# ----------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("tokens", [1, 7])
def test_all_gradients_pass_finite_differences_the_routers_included(tokens):
    moe = randomise(MoE(4, E, 3).double(), seed=1)
    x = draw(1, tokens, 4, dtype=torch.float64).requires_grad_()
    names, parameters = zip(*moe.named_parameters(), strict=True)
    assert "router.weight" in names

    def run(x, *values):
        return torch.func.functional_call(moe, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in parameters))
    assert torch.autograd.gradcheck(run, inputs, eps=1e-3, atol=1e-3, rtol=1e-3)  # the sigmoid is always float32


def test_gradients_equal_those_of_dense_compute(moe):
    x = draw(2, 9, D).requires_grad_()
    weight = draw(2, 9, D, seed=5)
    wanted = torch.autograd.grad((dense(moe, x) * weight).sum(), [x, *moe.parameters()])
    got = torch.autograd.grad((moe(x) * weight).sum(), [x, *moe.parameters()])
    for name, mine, theirs in zip(["x", *dict(moe.named_parameters())], got, wanted, strict=True):
        assert relative_error(mine, theirs) < 2e-6, name


@pytest.mark.parametrize("tokens", [1, 6])
def test_experts_that_nobody_chose_and_their_router_rows_get_no_gradient(moe, tokens):
    x = router_that_chooses(moe, draw(tokens, D), [1, 3, 1, 3, 3, 1][:tokens])[None]
    moe(x).square().sum().backward()
    used = {1} if tokens == 1 else {1, 3}
    for name in ("experts.gate_up_proj", "experts.down_proj", "router.weight"):
        moved = moe.get_parameter(name).grad.flatten(1).abs().sum(1).nonzero().flatten()
        assert set(moved.tolist()) == used, name


def test_the_router_learns_through_the_score_of_the_chosen_expert(moe):
    """A detached expert input, as in Meta's inference code, would leave the router without any gradient."""
    x = draw(1, 8, D)
    moe(x).square().sum().backward()
    assert moe.router.weight.grad.abs().sum() > 0


def test_experts_keep_their_dtype(moe):
    x = draw(1, 8, D).bfloat16()
    assert moe.bfloat16()(x).dtype == torch.bfloat16
    assert isinstance(moe.experts, Experts) and moe.experts.down_proj.shape == (E, WIDTH, D)


# ----------------------------------------------------------------------------------------------------------------------
# The memory of gradients


def backward(moe: MoE, seed: int = 0) -> torch.Tensor:
    """The gradient that arrives for the experts' down projection."""
    moe(draw(2, 9, D, seed=seed)).square().sum().backward()
    return moe.experts.down_proj.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_takes_the_memory_of_the_one_before(moe, dtype):
    moe.to(dtype)
    x = draw(2, 9, D, dtype=dtype)
    places = []
    for _ in range(3):
        moe(x).square().sum().backward()
        places.append([weight.grad.data_ptr() for weight in moe.experts.parameters()])
        assert all(w.grad.dtype == dtype and w.grad.is_contiguous() for w in moe.experts.parameters())
        moe.zero_grad()
    assert places[0] == places[1] == places[2] and places[0][0] != places[0][1]


def test_a_gradient_that_somebody_keeps_is_left_alone(moe):
    kept = backward(moe)
    alone = kept.clone()
    moe.zero_grad()
    second = backward(moe, seed=1)  # `kept` still lies where the first gradient lay
    assert torch.equal(kept, alone) and not torch.equal(second, alone)
    row = kept[2]  # nor may a view of it be overwritten
    del kept
    moe.zero_grad()
    backward(moe, seed=2)
    assert torch.equal(row, alone[2])


def test_gradients_of_two_passes_add_up(moe):
    first, second = (backward(moe, seed).clone() for seed in (0, 1))
    moe.zero_grad()
    torch.testing.assert_close(second - first, backward(moe, seed=1), rtol=1e-4, atol=1e-5)


def test_the_memory_goes_with_the_weight():
    moe = randomise(MoE(D, E, WIDTH))
    before = len(moe_module._spare)
    backward(moe)
    assert len(moe_module._spare) == before + 2
    del moe
    assert len(moe_module._spare) == before
