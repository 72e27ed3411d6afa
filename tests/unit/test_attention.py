"""Attention, piece by piece, against float64 loops that know nothing of chunks as batch rows or of log-sum-exps."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CONFIGS, SCOUT_LIKE, build, relative_error, with_text, words
from torch.utils._python_dispatch import TorchDispatchMode

from minillama4 import Llama4Config
from minillama4.attention import (
    Attention,
    causal_attention,
    chunked_attention,
    continued_attention,
    full_attention,
    inverse_frequencies,
    rotate,
    rotation,
    temperature,
)


def draw(batch, tokens, heads, dim, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, heads, dim, generator=generator, dtype=torch.float64).to(dtype)


def loops(q, k, v, sees):
    """Attention by its definition in float64, one query and one head at a time; `sees(i, j)` of absolute positions.

    The last query and the last key are the same token, so a piece on a cache has its queries at the end.
    """
    q, k, v = q.double(), k.double(), v.double()
    batch, queries, heads, dim = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(batch):
        for row in range(queries):
            i = keys - queries + row
            seen = [j for j in range(keys) if sees(i, j)]
            for head in range(heads):
                logits = torch.stack([q[b, row, head] @ k[b, j, head // group] for j in seen]) / math.sqrt(dim)
                out[b, row, head] = logits.softmax(0) @ v[b, seen, head // group]
    return out


def causal(i, j):
    return j <= i


# ----------------------------------------------------------------------------------------------------------------------
# What sees what


def visible(attend, tokens):
    """[tokens, tokens] booleans: does key j reach the output of query i? Measured with one-hot values."""
    q, k = draw(1, tokens, 2, 4, seed=1), draw(1, tokens, 2, 4, seed=2)
    v = torch.eye(tokens).view(1, tokens, 1, tokens).expand(-1, -1, 2, -1)  # the value of key j is the j-th unit vector
    return (attend(F.pad(q, (0, tokens - 4)), F.pad(k, (0, tokens - 4)), v) > 0).all(dim=2)[0]


def test_chunk_8_over_20_tokens_sees_1_to_8_then_1_to_8_then_1_to_4_keys():
    """Block-diagonal and causal: the first token of each chunk sees only itself."""
    sees = visible(lambda q, k, v: chunked_attention(q, k, v, 8), 20)
    assert sees.sum(dim=1).tolist() == [*range(1, 9), *range(1, 9), *range(1, 5)]
    i, j = torch.arange(20)[:, None], torch.arange(20)
    assert torch.equal(sees, (j <= i) & (i // 8 == j // 8))


def test_gradients_reach_exactly_the_keys_of_the_own_chunk():
    k = draw(1, 20, 2, 4, seed=2).requires_grad_()
    v = draw(1, 20, 2, 4, seed=3).requires_grad_()
    out = chunked_attention(draw(1, 20, 2, 4, seed=1), k, v, 8)
    for i in range(20):
        (grad,) = torch.autograd.grad(out[0, i].sum(), v, retain_graph=True)
        assert grad[0].abs().sum((1, 2)).nonzero().flatten().tolist() == list(range(i // 8 * 8, i + 1))


def test_causal_attention_sees_all_earlier_keys_and_no_later_one():
    assert visible(causal_attention, 9).sum(dim=1).tolist() == list(range(1, 10))


@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 10, 13])
def test_chunked_attention_equals_loops_for_every_remainder(tokens):
    q, k, v = draw(2, tokens, 6, 8, 1), draw(2, tokens, 2, 8, 2), draw(2, tokens, 2, 8, 3)
    got = chunked_attention(q, k, v, 5)
    assert relative_error(got, loops(q, k, v, lambda i, j: j <= i and i // 5 == j // 5)) < 1e-6


def test_full_attention_equals_loops_and_groups_query_heads_by_key_head():
    q, k, v = draw(2, 3, 6, 8, 1), draw(2, 7, 2, 8, 2), draw(2, 7, 2, 8, 3)
    assert relative_error(full_attention(q, k, v), loops(q, k, v, lambda i, j: True)) < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# A piece on top of a cache


@pytest.mark.parametrize("past, tokens", [(1, 2), (7, 5), (3, 11), (40, 2)])
def test_continued_attention_equals_loops(past, tokens):
    q = draw(2, tokens, 6, 8, 1)
    k, v = draw(2, past + tokens, 2, 8, 2), draw(2, past + tokens, 2, 8, 3)
    got = continued_attention(q, k[:, :past], v[:, :past], k[:, past:], v[:, past:])
    assert relative_error(got, loops(q, k, v, causal)) < 1e-6


def test_continued_attention_is_stable_where_one_part_has_nearly_all_the_mass():
    """Logits of several hundred on either side: the log-sum-exps differ by more than exp can hold."""
    q, k, v = draw(1, 4, 2, 8, 1), draw(1, 9, 2, 8, 2), draw(1, 9, 2, 8, 3)
    for strong in (slice(0, 5), slice(5, 9)):
        loud = k.clone()
        loud[:, strong] *= 300
        got = continued_attention(q, loud[:, :5], v[:, :5], loud[:, 5:], v[:, 5:])
        assert torch.isfinite(got).all() and relative_error(got, loops(q, loud, v, causal)) < 1e-5


def inputs_of_a_piece(dtype, past=3, tokens=4, heads=4, kv_heads=2, dim=6):
    shapes = [(tokens, heads), (past, kv_heads), (past, kv_heads), (tokens, kv_heads), (tokens, kv_heads)]
    return [draw(2, *shape, dim, seed, dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def explicit(q, k_past, v_past, k, v):
    """The same by one softmax over all keys, with a mask; autograd does the rest."""
    k, v = torch.cat([k_past, k], dim=1), torch.cat([v_past, v], dim=1)
    group, tokens, keys = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, 2)) / math.sqrt(q.shape[-1])
    hidden = torch.arange(keys) > torch.arange(keys - tokens, keys)[:, None]
    return torch.einsum(
        "bhqk,bkhd->bqhd", logits.masked_fill(hidden, -math.inf).softmax(-1), v.repeat_interleave(group, 2)
    )


@pytest.mark.parametrize("heads", [2, 6], ids=["one query head a key head", "three"])
def test_gradients_of_continued_attention_equal_those_of_an_explicit_float64_softmax(heads):
    mine, exact = (
        inputs_of_a_piece(dtype, past=7, tokens=5, heads=heads, dim=8) for dtype in (torch.float32, torch.float64)
    )
    weight = draw(2, 5, heads, 8, 9, torch.float64)
    (continued_attention(*mine) * weight.float()).sum().backward()
    (explicit(*exact) * weight).sum().backward()
    for name, got, wanted in zip(("q", "k_past", "v_past", "k", "v"), mine, exact, strict=True):
        assert relative_error(got.grad, wanted.grad) < 1e-6, name


def test_gradients_of_continued_attention_pass_finite_differences():
    assert torch.autograd.gradcheck(continued_attention, inputs_of_a_piece(torch.float64), atol=1e-7, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# No tokens x tokens tensor, anywhere


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor had which an operation made, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


TOKENS = 1536


@pytest.fixture(scope="module")
def narrow():
    """So narrow that tokens x tokens would be by far the largest tensor; local, NoPE, dense and MoE layers."""
    return build(with_text(SCOUT_LIKE, num_layers=3, moe_layers=(1,), nope_layers=(1,), chunk_size=64))


def test_no_tokens_by_tokens_tensor_exists_in_a_training_step(narrow):
    with LargestTensor() as largest:
        narrow(words(TOKENS)).square().mean().backward()
    assert 0 < largest.elements < TOKENS**2 / 4, "not even one head of one quarter"


@torch.no_grad()
def test_no_tokens_by_tokens_tensor_exists_on_a_cache(narrow):
    """Prefill, then a long piece that ends several chunks later, then one token."""
    ids, cache = words(TOKENS + 800), narrow.new_cache(1, TOKENS + 800)
    with LargestTensor() as largest:
        for piece, logits in zip(ids.split([TOKENS - 70, 869, 1], dim=1), ("none", "last", "all"), strict=True):
            narrow(piece, cache=cache, logits=logits)
    assert 0 < largest.elements < 869 * TOKENS / 4


def test_this_way_of_looking_does_see_a_mask():
    with LargestTensor() as largest:
        explicit(*inputs_of_a_piece(torch.float32, past=300, tokens=200))
    assert largest.elements >= 200 * 500


# ----------------------------------------------------------------------------------------------------------------------
# QK norm, rotary, temperature


def query_and_key(config, layer, x):
    """q and k as they are compared, for x [1, tokens, hidden]."""
    torch.manual_seed(0)
    module, seen = Attention(config.text, layer), []
    module.probe = lambda q, k, end: seen.extend((q, k))
    tokens = x.shape[1]
    positions = torch.arange(tokens)
    turn = rotation(positions, inverse_frequencies(config.text))
    module(x, turn, temperature(positions, config.text), None, 0, tokens)
    return module, *seen


@pytest.mark.parametrize("size", [1e-2, 1, 1e3])
def test_qk_norm_gives_each_head_a_mean_square_of_1_whatever_the_input_and_has_no_parameters(size):
    x = torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(1)) * size
    module, q, k = query_and_key(with_text(SCOUT_LIKE, norm_eps=1e-12), 0, x)
    for heads in (q, k):
        torch.testing.assert_close(heads.square().mean(-1), torch.ones(heads.shape[:-1]), rtol=1e-4, atol=0)
    assert [name for name, _ in module.named_parameters()] == [f"{x}_proj.weight" for x in "qkvo"]


def test_qk_norm_adds_its_epsilon_of_1e_5_to_the_mean_square():
    """Meta's launch code used 1e-6 by accident; small queries show which one it is."""
    config = with_text(SCOUT_LIKE, norm_eps=Llama4Config.preset("scout").text.norm_eps)
    x = torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(1)) * 3e-3
    module, q, _ = query_and_key(config, 0, x)
    raw = module.q_proj(x).unflatten(-1, (-1, 16)).square().mean(-1)
    torch.testing.assert_close(q.square().mean(-1), raw / (raw + 1e-5), rtol=1e-4, atol=0)


def test_logits_of_rotary_layers_are_bounded_by_the_root_of_the_head_size():
    _, q, k = query_and_key(SCOUT_LIKE, 0, draw(1, 30, 1, 40, seed=1)[:, :, 0] * 100)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(3, dim=2)) / math.sqrt(16)
    assert logits.abs().max() <= math.sqrt(16) * 1.0001


def test_rotation_turns_adjacent_channels_by_position_times_frequency():
    x = draw(1, 5, 2, 6, seed=1, dtype=torch.float64).float()
    frequency = torch.tensor([1.0, 0.3, 0.07], dtype=torch.float64)
    got = rotate(x, rotation(torch.arange(5), frequency))
    for p in range(5):
        for pair in range(3):
            a, b, angle = x[0, p, :, 2 * pair], x[0, p, :, 2 * pair + 1], p * float(frequency[pair])
            torch.testing.assert_close(got[0, p, :, 2 * pair], a * math.cos(angle) - b * math.sin(angle))
            torch.testing.assert_close(got[0, p, :, 2 * pair + 1], a * math.sin(angle) + b * math.cos(angle))


def test_scores_depend_on_the_distance_alone_so_a_chunk_may_start_at_position_0():
    q, k = draw(1, 1, 2, 16, 1), draw(1, 1, 2, 16, 2)
    frequencies = inverse_frequencies(SCOUT_LIKE.text)

    def score(i, j):
        turned = [rotate(x, rotation(torch.tensor([p]), frequencies)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(score(8200, 8195), score(8, 3), rtol=1e-5, atol=1e-5)


def test_blended_rope_scaling_equals_its_definition_pair_by_pair():
    text = CONFIGS["maverick-like"].text
    scaling, got = text.rope_scaling, inverse_frequencies(text)
    for pair in range(8):
        plain = text.rope_theta ** (-2 * pair / 16)
        wavelength = 2 * math.pi / plain
        turns = scaling.original_positions / wavelength
        if turns >= 4:
            wanted = plain
        elif turns <= 1:
            wanted = plain / 8
        else:
            share = (turns - 1) / (4 - 1)
            wanted = (1 - share) * plain / 8 + share * plain
        assert float(got[pair]) == pytest.approx(wanted, rel=1e-12), f"pair {pair}"


def test_temperature_multiplies_queries_of_nope_layers_only():
    x = torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(1))
    config = with_text(SCOUT_LIKE, qk_norm=False)
    factor = torch.tensor([1 + 0.1 * math.log(1 + (p + 1) // 9) for p in range(30)])
    module, q, k = query_and_key(config, 2, x)
    plain = [proj(x).unflatten(-1, (-1, 16)) for proj in (module.q_proj, module.k_proj)]
    torch.testing.assert_close(q, plain[0] * factor[:, None, None])
    torch.testing.assert_close(k, plain[1])
    hot = with_text(replace(config, vision=None), temperature_scale=5.0)
    assert torch.equal(query_and_key(hot, 1, x)[1], query_and_key(config, 1, x)[1]), "a rotary layer ignores it"
