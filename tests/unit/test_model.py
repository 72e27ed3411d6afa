"""The model as a whole: what it computes and what it does not, its first weights, the meta device."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CONFIGS, SCOUT_LIKE, assert_same, build, picture_prompt, relative_error, with_text, words

from minillama4 import Llama4, Llama4Config
from minillama4.model import NothingDrawnOnMeta, RMSNorm

BATCH, TOKENS = 2, 30


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request):
    return build(CONFIGS[request.param])


def tokens_computed(model, **call):
    """How many tokens went through each part of the last layer, and through the head."""
    block, seen = model.layers[-1], {}
    parts = {
        "q": block.self_attn.q_proj,
        "k": block.self_attn.k_proj,
        "o": block.self_attn.o_proj,
        "router": block.feed_forward.router,
        "shared": block.feed_forward.shared_expert,
        "head": model.lm_head,
        "k of the layer before": model.layers[-2].self_attn.k_proj,
        "q of the layer before": model.layers[-2].self_attn.q_proj,
    }

    def note(name):
        def hook(module, inputs):
            seen[name] = inputs[0].shape[:-1].numel() // BATCH

        return hook

    hooks = [part.register_forward_pre_hook(note(name)) for name, part in parts.items()]
    model(words(TOKENS, rows=BATCH), **call)
    for hook in hooks:
        hook.remove()
    return {name: seen.get(name, 0) for name in parts}


def test_the_last_layer_computes_queries_experts_and_head_only_where_logits_are_wanted(model):
    before = {"k of the layer before": 30, "q of the layer before": 30}
    wanted = dict.fromkeys(["q", "k", "o", "router", "shared", "head"], 30) | before
    assert tokens_computed(model) == wanted
    one = dict(q=1, k=30, o=1, router=1, shared=1, head=1) | before
    assert tokens_computed(model, logits="last") == one
    none = dict(q=0, k=30, o=0, router=0, shared=0, head=0) | before
    assert tokens_computed(model, cache=model.new_cache(BATCH, 30), logits="none") == none


def test_logits_last_has_the_gradients_of_the_last_of_all(model):
    """Training may ask for one position only."""
    ids, pixels = picture_prompt()
    model(ids, pixels)[:, -1:].square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(ids, pixels, logits="last").square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5, msg=name)
    model.zero_grad()


def test_later_tokens_never_change_earlier_logits(model):
    ids = words(40)
    other = ids.clone()
    other[:, 25:] = words(15, seed=8)
    assert_same(model(ids)[:, :25], model(other)[:, :25])
    assert relative_error(model(ids)[:, 25:], model(other)[:, 25:]) > 0.01


def test_information_crosses_a_chunk_border_through_nope_layers_only():
    """Without them, the first chunk cannot change what follows it; with one, it does."""
    ids = words(30)
    other = ids.clone()
    other[:, :5] = words(5, seed=8)
    closed, open_ = build(with_text(SCOUT_LIKE, nope_layers=())), build(with_text(SCOUT_LIKE, nope_layers=(2,)))
    assert_same(closed(ids)[:, 11:], closed(other)[:, 11:])
    assert relative_error(open_(ids)[:, 11:], open_(other)[:, 11:]) > 0.01


def test_rms_norm_divides_by_the_root_mean_square_in_float32_then_weighs():
    norm = RMSNorm(8, 1e-5)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) * 0.01
    wanted = x / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), wanted.float())
    half = norm.bfloat16()(x.bfloat16())
    rounded_once = F.rms_norm(x.bfloat16().float(), (8,), eps=1e-5).bfloat16() * norm.weight.bfloat16()
    assert torch.equal(half, rounded_once)


def test_fresh_weights_are_repeatable_and_give_finite_logits_and_a_loss_near_chance(model):
    fresh = Llama4(model.config)
    fresh.reset_parameters(torch.Generator().manual_seed(1))
    again = Llama4(model.config)
    again.reset_parameters(torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters(), strict=True))
    ids, pixels = picture_prompt()
    logits = fresh(ids, pixels).detach()
    loss = float(F.cross_entropy(logits[0, :-1], ids[0, 1:]))
    assert abs(loss - torch.tensor(131.0).log()) < 0.3
    assert {name for name, p in fresh.named_parameters() if (p == 1).all()} == {
        name for name, p in fresh.named_parameters() if "norm" in name and name.endswith("weight")
    }


def test_a_full_size_model_is_built_without_memory_on_the_meta_device():
    with torch.device("meta"):
        model = Llama4(Llama4Config.preset("scout"))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_loading_weights_does_not_wait_for_torchs_compiler():
    """Building on the meta device draws nothing: that alone would import it, and every command start 2 s later."""
    code = "import sys, minillama4; minillama4.load_checkpoint('mini-scout'); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def test_on_a_device_with_memory_all_modules_draw_as_ever():
    torch.manual_seed(0)
    drawn = torch.nn.Linear(4, 5).weight
    torch.manual_seed(0)
    with NothingDrawnOnMeta():
        assert torch.equal(torch.nn.Linear(4, 5).weight, drawn)


def test_a_model_works_in_training_after_inference_mode():
    """Tables that are kept between calls must not remember the mode in which they were first made."""
    config = with_text(SCOUT_LIKE, rope_theta=12_345.0)
    model = build(config)
    with torch.inference_mode():
        model(words(5))
    model(words(5)).sum().backward()
    assert model.layers[0].self_attn.q_proj.weight.grad is not None
