"""Each mechanism matters: switched off, or built with a bug that a public implementation once had, it shows at once.

The parity tests allow a relative error of 2e-5 on these very models, weights and prompts. Here every planted fault must
move the logits by more than 100 times that; a parity test that passes with the fault would prove nothing about it.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from faults import (
    TEXT_FAULTS,
    config_fault,
    nope,
    on_queries_and_keys,
    sigmoid_of_winner,
    turned,
    unit_rms,
    wrong_moe,
    wrong_qk_norm,
)
from partner import make_pair
from picture_faults import PICTURE_FAULTS, code_fault, tanh_gelu, vectors_reordered
from tiny_models import CONFIGS, TOLERANCE, in_pieces, picture_prompt, rebuilt, relative_error, words

from minillama4 import Llama4, attention


@pytest.fixture(scope="module")
def models() -> dict[str, Llama4]:
    return {name: make_pair(config).ours for name, config in CONFIGS.items()}


def assert_moves(broken: torch.Tensor, right: torch.Tensor):
    movement = relative_error(broken, right)
    print(f"{movement:.1e}: {movement / TOLERANCE:,.0f} times the tolerance")
    assert movement > 100 * TOLERANCE, f"the fault moves the logits by no more than {movement:.1e}"


FAULTS = TEXT_FAULTS | PICTURE_FAULTS
CASES = [pytest.param(name, fault, id=f"{what}, {name}") for what, (names, fault) in FAULTS.items() for name in names]


@torch.no_grad()
@pytest.mark.parametrize("name, fault", CASES)
def test_this_fault_moves_the_logits_by_over_100_times_the_tolerance(models, monkeypatch, name, fault):
    ids, pixels = picture_prompt()
    right = models[name](ids, pixels)
    assert_moves(fault(copy.deepcopy(models[name]), monkeypatch)(ids, pixels), right)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_the_machinery_of_these_tests_moves_nothing_by_itself(models, monkeypatch, name):
    """The same detours without a fault in them: otherwise the test above would pass for the wrong reason."""
    ids, pixels = picture_prompt()
    right = models[name](ids, pixels)
    for detour in (
        config_fault(),
        wrong_moe(sigmoid_of_winner),
        wrong_qk_norm(lambda x, eps: F.rms_norm(x, x.shape[-1:], eps=eps)),
        on_queries_and_keys(nope, lambda x, text: x),
        vectors_reordered(lambda x: x.flatten(0, -2)),
    ):
        assert relative_error(detour(copy.deepcopy(models[name]), monkeypatch)(ids, pixels), right) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_the_tanh_form_of_gelu_would_be_noticed(models, monkeypatch, name):
    """An approximation by design, to three digits; parity sees it with a margin of 10 instead of 100."""
    ids, pixels = picture_prompt()
    right = models[name](ids, pixels)
    broken = code_fault(F, "gelu", tanh_gelu)(models[name], monkeypatch)
    assert relative_error(broken(ids, pixels), right) > 10 * TOLERANCE


# ----------------------------------------------------------------------------------------------------------------------
# Faults that one pass cannot show: decode must equal prefill.


@pytest.mark.parametrize("name", CONFIGS)
def test_temperature_by_index_in_the_call_breaks_decode(models, monkeypatch, name):
    ids = words(67)
    prefill = models[name](ids)
    assert relative_error(in_pieces(models[name], ids, [1] * 67), prefill) < TOLERANCE
    right = attention.temperature
    monkeypatch.setattr(attention, "temperature", lambda positions, text: right(positions - positions[0], text))
    assert_moves(in_pieces(models[name], ids, [1] * 67), prefill)


@pytest.mark.parametrize("name", CONFIGS)
def test_rotary_position_by_index_in_the_call_breaks_decode(models, monkeypatch, name):
    ids = words(67)
    prefill = models[name](ids)
    right = attention.rotation
    monkeypatch.setattr(attention, "rotation", lambda positions, f: right(positions - positions[0], f))
    assert_moves(in_pieces(models[name], ids, [1] * 67), prefill)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_local_layers_that_see_the_whole_cache_break_decode(models, name):
    """Meta's reference: a one-token call passes no mask, so a local layer forgets its chunk; prefill keeps it.

    The cache of a prompt that ends inside the fourth chunk is decoded once as it is, and once by the same weights with
    keys and values of all tokens in every layer.
    """
    ids = words(41)
    right, whole = models[name], rebuilt(models[name], chunk_size=None)
    prefill = right(ids)[:, -1:]
    cache, full_cache = right.new_cache(1, 41), whole.new_cache(1, 41)
    right(ids[:, :40], cache=cache, logits="none")
    assert relative_error(right(ids[:, 40:], cache=cache), prefill) < TOLERANCE
    fill_as_chunked_prefill_does(right, full_cache, ids[:, :40])
    assert_moves(whole(ids[:, 40:], cache=full_cache), prefill)


def fill_as_chunked_prefill_does(llama, full_cache, ids):
    """Keys and values of a correct, chunked prefill, all of them kept (with rotations by absolute position)."""
    hooks = []
    for layer, block in enumerate(llama.layers):

        def keep(module, inputs, layer=layer):
            x, dim = inputs[0], llama.config.text.head_dim
            k, v = (proj(x).unflatten(-1, (-1, dim)) for proj in (module.k_proj, module.v_proj))
            if module.rotary:
                k = turned(k, llama.config.text)
                k = unit_rms(k, llama.config.text) if llama.config.text.qk_norm else k
            full_cache.layers[layer].write(k, v, 0)

        hooks.append(block.self_attn.register_forward_pre_hook(keep))
    llama(ids)
    for hook in hooks:
        hook.remove()
    full_cache.length = ids.shape[1]
