"""Each Triton kernel against its plain twin in float32: on a GPU for real, elsewhere in Triton's interpreter.

The twins are held to the model by `test_cuda_decode.py`. Random numbers everywhere, all sizes differ, and none is a
multiple of a group, of a program's rows or of a block, unless the model's own sizes would be.
"""

import math

import pytest
import torch
from tiny_models import relative_error
from triton_interpreter import DEVICE, kernels_run  # noqa: F401, and before the kernels

from minillama4.cuda import attention, kernels, plain
from minillama4.cuda.int4 import quantise

pytestmark = pytest.mark.usefixtures("kernels_run")

TOLERANCE = 2e-6  # relative error
EPS = 1e-5


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def packed(*shape, seed=0):
    """A quantised random matrix [..., N, K]: (packed, scale)."""
    return tuple(part.to(DEVICE) for part in quantise(random(*shape, seed=seed).cpu() * shape[-1] ** -0.5))


def assert_same(got, wanted, tolerance=TOLERANCE):
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    error = relative_error(got.float(), wanted.float())
    assert error < tolerance, f"relative error {error:.1e}"


# ----------------------------------------------------------------------------------------------------------------------
# Nibble order


def test_nibble_order_is_the_order_in_which_nibbles_leave_words():
    """Weight by weight: nibble n of word w of a row, as the format has it, meets the number at n W + w."""
    codes = torch.randint(16, (1, 3 * 128), generator=torch.Generator().manual_seed(0))
    low, high = codes.view(1, 3, 128).split(64, dim=-1)
    words = (low | high << 4).flatten(1).to(torch.uint8).view(torch.int32)[0].tolist()
    ordered = kernels.order(codes[0]).tolist()
    for w, word in enumerate(words):
        for n in range(8):
            assert (word >> 4 * n) & 15 == ordered[n * len(words) + w]


def test_what_was_filled_up_is_zero():
    x = random(300)
    ordered = kernels.order(x)
    assert len(ordered) == 384 and (ordered == 0).sum() == 84
    assert torch.equal(ordered.sort().values, torch.cat([x, x.new_zeros(84)]).sort().values)


# ----------------------------------------------------------------------------------------------------------------------
# Products


@pytest.mark.parametrize("outputs, inputs", [(37, 300), (16, 128), (5, 2200)])
def test_norm_and_product(outputs, inputs):
    matrix, x, norm = packed(outputs, inputs), random(inputs, seed=1) * 3, random(inputs, seed=2)
    got = kernels.norm_product(kernels.order(x), kernels.order(norm), EPS, *matrix, inputs)
    assert_same(got, plain.norm_product(x, norm, EPS, *matrix, inputs))


@pytest.mark.parametrize("inputs", [300, 128, 2200])
def test_add_product(inputs):
    matrix, x, y = packed(150, inputs), random(150, seed=1), random(1, inputs, seed=2)
    got = kernels.add_product(kernels.order(x), kernels.order(y), *matrix)
    assert_same(got, kernels.order(plain.add_product(x, y, *matrix)))


def test_adding_up_leaves_the_counters_as_it_found_them():
    """Twice the same: a counter that is not put back lets the second launch add up too early, or never."""
    matrix, x, y = packed(150, 300), kernels.order(random(150)), kernels.order(random(1, 300))
    assert torch.equal(kernels.add_product(x, y, *matrix), kernels.add_product(x, y, *matrix))
    assert not any(counters.any() for counters in kernels._arrived.values())


@pytest.mark.parametrize("expert", [0, 3, 4])
def test_down_of_the_chosen_and_the_shared_expert(expert):
    routed, shared, x, h = packed(5, 40, 300), packed(40, 300, seed=3), random(40, seed=1), random(2, 300, seed=2)
    logits = torch.zeros(5, device=DEVICE)
    logits[expert] = 0.7
    got = kernels.add_product(kernels.order(x), kernels.order(h), *shared, logits, routed)
    assert_same(got, kernels.order(plain.add_product(x, h, *shared, logits, routed)))


@pytest.mark.parametrize("expert", [0, 4])
def test_gate_and_up_of_the_chosen_and_the_shared_expert(expert):
    routed, shared, y = packed(5, 2 * 40, 300), packed(2 * 40, 300, seed=3), random(300, seed=1)
    logits = torch.full((5,), -2.0, device=DEVICE)
    logits[expert] = -0.4
    got = kernels.gate_up(kernels.order(y), *shared, logits, routed)
    assert_same(got, kernels.order(plain.gate_up(y, *shared, logits, routed)))


def test_gate_and_up_without_experts():
    matrix, y = packed(2 * 40, 300), random(300, seed=1)
    assert_same(kernels.gate_up(kernels.order(y), *matrix), kernels.order(plain.gate_up(y, *matrix)))


def test_of_equal_logits_the_first_expert_is_chosen():
    routed, shared, y = packed(5, 2 * 40, 300), packed(2 * 40, 300, seed=3), random(300, seed=1)
    logits = torch.tensor([0.1, 0.6, 0.2, 0.6, 0.6], device=DEVICE)
    got = kernels.gate_up(kernels.order(y), *shared, logits, routed)
    clear = torch.tensor([0.1, 0.6, 0.2, 0.5, 0.5], device=DEVICE)
    assert_same(got, kernels.order(plain.gate_up(y, *shared, clear, routed)))


@pytest.mark.parametrize("experts", [5, 0])
def test_norm_and_router(experts):
    x, norm = random(300, seed=1) * 3, random(300, seed=2)
    router = random(experts, 300, seed=3) if experts else None
    got = kernels.norm_router(
        kernels.order(x), kernels.order(norm), EPS, None if router is None else kernels.order(router), 300
    )
    wanted = plain.norm_router(x, norm, EPS, router, 300)
    assert_same(got[0], kernels.order(wanted[0]))
    if experts:
        assert_same(got[1], wanted[1])


@pytest.mark.parametrize("outputs, inputs", [(37, 300), (3, 128), (50, 200)])
def test_expand(outputs, inputs):
    matrix = packed(outputs, inputs)
    got, wanted = (torch.full((outputs, inputs), torch.nan, device=DEVICE) for _ in range(2))
    kernels.expand(*matrix, got)
    plain.expand(*matrix, wanted)
    assert torch.equal(got, wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Attention

HEADS, KV_HEADS, DIM = 6, 2, 16


def turns_of(rows):
    angle = torch.rand(rows, DIM // 2, generator=torch.Generator().manual_seed(4)) * 6
    return torch.stack([angle.cos(), angle.sin()], dim=-1).to(DEVICE)


@pytest.mark.parametrize("position", [0, 8, 47])
@pytest.mark.parametrize("kind", ["rotary, norm", "rotary", "temperature", "nothing"])
def test_turn_and_store(kind, position):
    qkv, caches = random((HEADS + 2 * KV_HEADS) * DIM, seed=1), [random(11, KV_HEADS, DIM, seed=i) for i in (2, 3)]
    place = torch.tensor([position], device=DEVICE)
    turns = turns_of(7) if "rotary" in kind else None
    eps, temperature = EPS if "norm" in kind else None, (0.1, 9) if kind == "temperature" else None
    sides = []
    for module in (attention, plain):
        mine = [cache.clone() for cache in caches]
        sides.append((module.turn_and_store(qkv, place, turns, *mine, HEADS, eps, temperature), *mine))
    for got, wanted in zip(*sides, strict=True):
        assert_same(got, wanted)


@pytest.mark.parametrize("chunk", [None, 211])
@pytest.mark.parametrize("position", [0, 63, 64, 210, 211, 500, 699])
def test_attend(chunk, position, monkeypatch):
    """Shares of the keys that are full, cut short and empty; and a chunk that has just begun."""
    monkeypatch.setattr(attention, "LEAST", 100)  # several programs for a key head
    capacity = chunk or 700
    q, k, v = random(HEADS, DIM) * 3, random(capacity, KV_HEADS, DIM, seed=1), random(capacity, KV_HEADS, DIM, seed=2)
    place = torch.tensor([position], device=DEVICE)
    got = attention.attend(q, k, v, place, chunk)
    assert_same(got, kernels.order(plain.attend(q, k, v, place, chunk)))


def test_attend_by_hand():
    """Two keys for each of two key heads, logits ln 3 apart: weights 3/4 and 1/4."""
    q = torch.zeros(2, 16, device=DEVICE)
    q[:, 0] = 4.0  # 1 / sqrt(16) of it remains
    k, v = torch.zeros(2, 2, 16, device=DEVICE), torch.zeros(2, 2, 16, device=DEVICE)
    k[0, 0, 0] = k[1, 1, 0] = math.log(3)
    v[0, :, 3], v[1, :, 3] = 8.0, 4.0
    out = attention.attend(q, k, v, torch.tensor([1], device=DEVICE), None)
    wanted = torch.zeros(32, device=DEVICE)
    wanted[[3, 19]] = torch.tensor([7.0, 5.0], device=DEVICE)
    torch.testing.assert_close(out[0], kernels.order(wanted))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_more_numbers_than_32_bits_count():
    """Keys past 2^31 numbers: the last one wins by far, and only 64-bit offsets find it."""
    tokens = 2_200_000
    k = torch.zeros(tokens, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    v = torch.zeros_like(k)
    k[-1], v[-1] = 8.0, 1.0
    q = torch.full((8, 128), 8.0, dtype=torch.bfloat16, device=DEVICE)
    out = attention.attend(q, k, v, torch.tensor([tokens - 1], device=DEVICE), None)
    torch.testing.assert_close(out, torch.ones_like(out))
