"""The flat step against the model that it stands for, and all the cases in which it must not stand for it."""

import sys

import pytest
import torch
from tiny_models import CONFIGS, SCOUT_LIKE, assert_same, build, picture_prompt, with_text, words
from torch import nn

from minillama4 import decode, generate, trace
from minillama4.cuda.int4 import to_int4
from minillama4.decode import Step, expert_product, halved, is_plain, product
from minillama4.moe import MoE

generate_module = sys.modules["minillama4.generate"]  # `minillama4.generate` is the function

VARIANTS = CONFIGS | {
    "no chunks": with_text(SCOUT_LIKE, chunk_size=None),
    "no temperature": with_text(SCOUT_LIKE, temperature_tuning=False),
    "all layers dense": with_text(SCOUT_LIKE, moe_layers=()),
}


@pytest.fixture(params=VARIANTS)
def model(request):
    return build(VARIANTS[request.param], seed=3)


@pytest.mark.parametrize("large", [0, 1 << 16], ids=["halves", "whole"])
@torch.no_grad()
def test_a_step_gives_the_logits_and_the_cache_of_the_model(model, large, monkeypatch):
    """Over 40 positions after a picture: three borders of a chunk and four steps of the temperature."""
    monkeypatch.setattr(decode, "LARGE", large)  # these matrices are small
    monkeypatch.setattr(decode, "BLOCK", 16)
    ids, pixels = picture_prompt()
    caches = [model.new_cache(1, ids.shape[1] + 40) for _ in range(2)]
    for cache in caches:
        model(ids, pixels, cache, logits="none")
    mine, its = caches
    step = Step(model, mine)
    for token in words(40, seed=7)[0]:
        assert_same(step(int(token)), model(token.view(1, 1), cache=its, logits="last")[0, 0])
    assert mine.length == its.length
    for a, b in zip(mine.layers, its.layers, strict=True):
        for position in range(max(0, mine.length - a.k.shape[1]), mine.length):
            row = position % a.k.shape[1]
            assert_same(a.k[:, row], b.k[:, row])
            assert_same(a.v[:, row], b.v[:, row])


def test_a_full_cache_is_refused_and_keeps_its_length():
    model = build(SCOUT_LIKE)
    cache = model.new_cache(1, 3)
    step = Step(model, cache)
    for token in (7, 8, 9):
        step(token)
    with pytest.raises(ValueError, match=r"max_tokens=3 tokens; 1 more do not fit"):
        step(10)
    assert cache.length == 3


@pytest.fixture
def steps(monkeypatch):
    """Tokens that `generate` gave to a `Step`."""
    seen = []
    call = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, token: seen.append(token) or call(self, token))
    return seen


def test_generate_takes_steps_for_one_row_and_the_model_for_more(steps):
    model = build(SCOUT_LIKE)
    tokens = generate(model, words(5), max_new_tokens=9)
    assert steps == tokens[0, :-1].tolist()
    steps.clear()
    generate(model, words(5, rows=2), max_new_tokens=9)
    assert steps == []


def hook(model):
    model.layers[2].self_attn.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))


def pre_hook(model):
    model.register_forward_pre_hook(lambda module, inputs: None)


def another_forward(model):
    model.layers[4].feed_forward.forward = lambda x: x * 0


def another_class(model):
    class Louder(MoE):
        def forward(self, x):
            return 2 * super().forward(x)

    model.layers[1].feed_forward.__class__ = Louder


def another_module(model):
    model.layers[1].feed_forward.router = nn.Sequential(model.layers[1].feed_forward.router)


def a_bias(model):
    model.lm_head = nn.Linear(40, 131)


def probe(model):
    model.layers[3].self_attn.probe = lambda q, k, end: None


@pytest.mark.parametrize("change", [
    hook, pre_hook, another_forward, another_class, another_module, a_bias, probe,
    nn.Module.bfloat16, nn.Module.double, lambda model: model.to("meta"), lambda model: to_int4(model, torch.float32),
])  # fmt: skip
def test_a_model_that_is_watched_or_changed_runs_itself(change):
    model = build(SCOUT_LIKE)
    assert is_plain(model)
    change(model)
    assert not is_plain(model)


def test_generating_inside_a_trace_records_every_token(steps):
    model = build(SCOUT_LIKE)
    with trace(model, attention=[2], router=True) as seen:
        traced = generate(model, words(5), max_new_tokens=9)
    assert steps == [] and seen.router[1].expert.shape == (1, 13) and seen.attention[2].shape[2:] == (13, 13)
    assert torch.equal(generate(model, words(5), max_new_tokens=9), traced) and len(steps) == 8


def test_a_later_answer_knows_weights_that_were_changed_or_replaced(monkeypatch):
    model = build(SCOUT_LIKE)
    before = generate(model, words(5), max_new_tokens=9)
    for change in (
        lambda: model.layers[1].self_attn.q_proj.weight.data.mul_(-3),
        lambda: setattr(model.layers[3].self_attn.v_proj, "weight", nn.Parameter(torch.randn(32, 40))),
    ):
        change()
        after = generate(model, words(5), max_new_tokens=9)
        assert not torch.equal(after, before)
        with monkeypatch.context() as patch:
            patch.setattr(generate_module, "is_plain", lambda model: False)
            assert torch.equal(generate(model, words(5), max_new_tokens=9), after)
        before = after


@pytest.mark.parametrize("inputs,outputs", [(24, 128), (24, 129), (23, 128), (2, 2)])
@pytest.mark.parametrize("large", [0, 1 << 16], ids=["halves", "whole"])
def test_products_of_one_row_are_those_of_loops(monkeypatch, inputs, outputs, large):
    """With halves where there are any, for weights that lie either way round."""
    monkeypatch.setattr(decode, "LARGE", large)
    x, weight = torch.randn(inputs), torch.randn(outputs, inputs)
    wanted = [sum(a * b for a, b in zip(row, x.tolist(), strict=True)) for row in weight.tolist()]
    assert_same(product(halved(weight), x), torch.tensor(wanted, dtype=torch.float64))
    assert_same(expert_product(x, halved(weight.T.contiguous())), torch.tensor(wanted, dtype=torch.float64))
    assert halved(weight).ndim == (3 if large == 0 and outputs % 2 == 0 else 2)
