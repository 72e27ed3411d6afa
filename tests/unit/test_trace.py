"""`trace` shows what really happened: its probabilities and routes give back the layer's own output."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CONFIGS, assert_same, build, picture_prompt, words

from minillama4 import trace

PIECES = {"one pass": [67], "token by token": [1] * 67, "uneven": [3, 25, 1, 1, 30, 7]}
by_pieces = pytest.mark.parametrize("sizes", PIECES.values(), ids=PIECES)
ALL = range(6)


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request):
    return build(CONFIGS[request.param])


class Recorder:
    """Inputs and outputs of submodules, joined along the tokens over several calls."""

    def __init__(self):
        self.seen, self.hooks = {}, []

    def watch(self, name, module, which):
        def hook(module, inputs, out):
            tensor = out if which == "output" else inputs[0]
            self.seen.setdefault(name, []).append(tensor.detach())

        self.hooks.append(module.register_forward_hook(hook))

    def __getitem__(self, name):
        return torch.cat([tensor.flatten(0, -2)[None] for tensor in self.seen[name]], dim=1)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def feed(model, ids, sizes, pixels=None):
    """All logits: without a cache if there is one piece."""
    cache = model.new_cache(len(ids), ids.shape[1]) if len(sizes) > 1 else None
    out = []
    for piece in ids.split(sizes, dim=1):
        out.append(model(piece, pixels, cache))
        pixels = None
    return torch.cat(out, dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Attention


@torch.no_grad()
@by_pieces
def test_probabilities_times_values_are_the_attention_output_of_every_layer(model, sizes):
    """The values are those of `v_proj`, the output what `o_proj` receives; nothing is computed twice by hand."""
    ids, pixels = picture_prompt()
    with Recorder() as recorder, trace(model, attention=ALL) as seen:
        for layer in ALL:
            recorder.watch(f"v{layer}", model.layers[layer].self_attn.v_proj, "output")
            recorder.watch(f"out{layer}", model.layers[layer].self_attn.o_proj, "input")
        feed(model, ids, sizes, pixels)
    for layer in ALL:
        v = recorder[f"v{layer}"].view(1, 67, 2, 16).repeat_interleave(3, dim=2)
        got = torch.einsum("bhqk,bkhd->bqhd", seen.attention[layer], v).flatten(-2)
        assert_same(got, recorder[f"out{layer}"])


@torch.no_grad()
@by_pieces
def test_probabilities_are_a_distribution_over_what_the_layer_may_see(model, sizes):
    ids = words(67, rows=2)
    with trace(model, attention=ALL) as seen:
        feed(model, ids, sizes)
    i, j = torch.arange(67)[:, None], torch.arange(67)
    for layer in ALL:
        probabilities = seen.attention[layer]
        assert probabilities.shape == (2, 6, 67, 67)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 6, 67))
        sees = (j <= i) & (model.config.text.is_nope(layer) | (i // 11 == j // 11))
        assert (probabilities[..., ~sees] == 0).all() and (probabilities[..., sees] >= 0).all()


@torch.no_grad()
def test_with_logits_last_the_last_layer_has_one_query_and_with_none_it_has_none(model):
    ids = words(30)
    with trace(model, attention=[4, 5], router=True) as all_of_it:
        model(ids)
    with trace(model, attention=[4, 5], router=True) as last:
        model(ids, logits="last")
    assert last.attention[4].shape == (1, 6, 30, 30) and last.attention[5].shape == (1, 6, 1, 30)
    torch.testing.assert_close(last.attention[5], all_of_it.attention[5][:, :, -1:])
    assert last.router[5].expert.tolist() == all_of_it.router[5].expert[:, -1:].tolist()
    with trace(model, attention=[4, 5], router=True) as none:
        model(ids, cache=model.new_cache(1, 30), logits="none")
    assert 5 not in none.attention and 5 not in none.router and 4 in none.attention


# ----------------------------------------------------------------------------------------------------------------------
# Routes


@torch.no_grad()
@by_pieces
def test_routes_are_those_the_forward_pass_took(model, sizes):
    """From the router's own output; and each token's layer output follows from its expert and score alone."""
    ids, pixels = picture_prompt()
    with Recorder() as recorder, trace(model, router=True) as seen:
        for layer in model.config.text.moe_layers:
            block = model.layers[layer].feed_forward
            recorder.watch(f"logits{layer}", block.router, "output")
            recorder.watch(f"in{layer}", block.router, "input")
            recorder.watch(f"out{layer}", block, "output")
        feed(model, ids, sizes, pixels)
    assert sorted(seen.router) == list(model.config.text.moe_layers)
    for layer, routes in seen.router.items():
        logits, x = recorder[f"logits{layer}"], recorder[f"in{layer}"]
        assert torch.equal(routes.logits, logits)
        assert torch.equal(routes.expert, logits.argmax(-1))
        torch.testing.assert_close(routes.score, logits.max(-1).values.sigmoid())
        block = model.layers[layer].feed_forward
        gate_up, down = block.experts.gate_up_proj[routes.expert], block.experts.down_proj[routes.expert]
        gate, up = torch.einsum("btd,btdf->btf", x * routes.score[..., None], gate_up).chunk(2, dim=-1)
        routed = torch.einsum("btf,btfd->btd", F.silu(gate) * up, down)
        assert_same(routed + block.shared_expert(x), recorder[f"out{layer}"])


@torch.no_grad()
def test_routes_of_a_batch_keep_rows_and_tokens_apart(model):
    ids = words(20, rows=3)
    with trace(model, router=True) as together:
        model(ids)
    layer = model.config.text.moe_layers[0]
    assert together.router[layer].expert.shape == together.router[layer].score.shape == (3, 20)
    for row in range(3):
        with trace(model, router=True) as alone:
            model(ids[row : row + 1])
        assert torch.equal(alone.router[layer].expert[0], together.router[layer].expert[row])


def test_router_logits_stay_in_the_graph_so_that_a_loss_can_use_them(model):
    with trace(model, router=True) as seen:
        model(words(8))
    layer = model.config.text.moe_layers[0]
    (grad,) = torch.autograd.grad(
        seen.router[layer].logits.logsumexp(-1).sum(), model.layers[0].self_attn.q_proj.weight
    )
    assert grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------------------
# Off


def probes(model):
    return [module.probe for module in model.modules() if hasattr(module, "probe")]


@torch.no_grad()
@by_pieces
def test_a_trace_changes_no_bit_of_the_result(model, sizes):
    ids, pixels = picture_prompt()
    plain = feed(model, ids, sizes, pixels)
    with trace(model, attention=ALL, router=True):
        traced = feed(model, ids, sizes, pixels)
    assert torch.equal(traced, plain)
    assert torch.equal(feed(model, ids, sizes, pixels), plain)


def test_outside_a_trace_every_probe_is_none(model):
    assert len(probes(model)) == 6 + 3 and set(probes(model)) == {None}
    with trace(model, attention=[1], router=True):
        assert sum(probe is not None for probe in probes(model)) == 1 + 3
    assert set(probes(model)) == {None}


def test_an_error_inside_a_trace_leaves_no_probe_behind(model):
    with pytest.raises(ValueError, match="ids run from"):
        with trace(model, attention=ALL, router=True):
            model(torch.tensor([[999]]))
    assert set(probes(model)) == {None}


def test_only_what_was_asked_for_is_kept(model):
    with trace(model, attention=[3]) as seen:
        model(words(5))
    assert list(seen.attention) == [3] and not seen.router


def test_a_second_trace_on_the_same_model_is_refused_and_the_first_goes_on(model):
    with trace(model, attention=[2]) as seen:
        with pytest.raises(ValueError, match="already being traced"):
            with trace(model, attention=[1, 2]):
                pass
        model(words(5))
    assert list(seen.attention) == [2] and set(probes(model)) == {None}


@pytest.mark.parametrize("layers", [[6], [-1], [0, 48]])
def test_a_layer_that_does_not_exist_is_refused(model, layers):
    with pytest.raises(ValueError, match="the model's layers run from 0 to 5"):
        with trace(model, attention=layers):
            pass
