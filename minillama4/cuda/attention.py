"""Attention of one token over a long cache, as Triton kernels. `plain.py` has the same functions without them.

Shapes: query [heads, dim]; caches [capacity, kv_heads, dim], where a local layer's capacity is a chunk. The position is
a number on the device: it decides where the token goes, how it is turned and how much it sees, so that one CUDA graph
serves all positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .kernels import jit, place, tl, triton

BLOCK = 64  # keys at a time: 16 kB of them in bf16, and as much of values
LEAST = 256  # keys that are worth a program of their own
MOST_SPLITS = 64  # times 8 key heads: four programs for each processor of an H100


@jit
def turn_and_store_kernel(
    qkv, position, turns, k_cache, v_cache, q, rows, capacity, eps, scale, floor_scale, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)  # queries, then keys, then values
    now = tl.load(position)
    pair = tl.arange(0, DIM // 2)
    even = tl.load(qkv + head * DIM + 2 * pair)
    odd = tl.load(qkv + head * DIM + 2 * pair + 1)
    if ROTARY:
        if head < HEADS + KV_HEADS:
            turn = turns + now % rows * DIM + 2 * pair
            cos, sin = tl.load(turn), tl.load(turn + 1)
            turned_even = even * cos - odd * sin
            odd = even * sin + odd * cos
            even = turned_even
            if NORM:
                factor = tl.rsqrt((tl.sum(even * even, axis=0) + tl.sum(odd * odd, axis=0)) / DIM + eps)
                even *= factor
                odd *= factor
    elif TEMPERATURE:
        if head < HEADS:
            factor = 1.0 + scale * tl.log(1.0 + tl.floor((now.to(tl.float32) + 1.0) / floor_scale))
            even *= factor
            odd *= factor
    if head < HEADS:
        tl.store(q + head * DIM + 2 * pair, even)
        tl.store(q + head * DIM + 2 * pair + 1, odd)
    else:
        kv_head = (head - HEADS) % KV_HEADS
        target = k_cache
        if head >= HEADS + KV_HEADS:
            target = v_cache
        target += (now % capacity * KV_HEADS + kv_head) * DIM  # `now` has 64 bits, and so has this
        tl.store(target + 2 * pair, even)
        tl.store(target + 2 * pair + 1, odd)


def turn_and_store(
    qkv: Tensor, position: Tensor, turns: Tensor | None, k_cache: Tensor, v_cache: Tensor, heads: int,
    eps: float | None, temperature: tuple[float, int] | None,
) -> Tensor:  # fmt: skip
    """Rotary turn, norm, temperature and the cache's new row; arguments as in `plain.turn_and_store`.

    Fast because what would be a dozen small kernels is one, and because angles come from a table.
    """
    capacity, kv_heads, dim = k_cache.shape
    q = k_cache.new_empty(heads, dim)
    scale, floor_scale = temperature or (0.0, 1)
    turn_and_store_kernel[(heads + 2 * kv_heads,)](
        qkv, position, qkv if turns is None else turns, k_cache, v_cache, q, 1 if turns is None else len(turns),
        capacity, eps or 0.0, scale, floor_scale, HEADS=heads, KV_HEADS=kv_heads, DIM=dim,
        ROTARY=turns is not None, NORM=eps is not None, TEMPERATURE=temperature is not None, num_warps=1,
    )  # fmt: skip
    return q


@jit
def attend_kernel(
    q, k_cache, v_cache, position, parts, sizes, factor, CHUNK: tl.constexpr, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One key head over one share of the keys. H = PADDED query heads, of which GROUP are real; B = BLOCK keys."""
    kv_head, split = tl.program_id(0), tl.program_id(1)
    now = tl.load(position)  # 64 bits; and so have all offsets below: 10M keys are more numbers than 32 bits count
    seen = now + 1
    if CHUNK > 0:
        seen = now % CHUNK + 1
    share = tl.cdiv(tl.cdiv(seen, SPLITS), BLOCK) * BLOCK
    first = split * share
    last = tl.minimum(first + share, seen)

    channel, member = tl.arange(0, DIM), tl.arange(0, PADDED)
    head = kv_head * GROUP + member
    real = member < GROUP
    q_HD = tl.load(q + head[:, None] * DIM + channel[None, :], mask=real[:, None], other=0.0)
    largest_H = tl.full([PADDED], float("-inf"), tl.float32)
    sum_H = tl.zeros([PADDED], tl.float32)
    out_HD = tl.zeros([PADDED, DIM], tl.float32)
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK)
        offset_BD = (key[:, None] * KV_HEADS + kv_head) * DIM + channel[None, :]
        there = key < last
        k_BD = tl.load(k_cache + offset_BD, mask=there[:, None], other=0.0)
        v_BD = tl.load(v_cache + offset_BD, mask=there[:, None], other=0.0)
        logit_HB = tl.dot(q_HD, tl.trans(k_BD), input_precision="ieee") * factor
        logit_HB = tl.where(there[None, :], logit_HB, float("-inf"))
        larger_H = tl.maximum(largest_H, tl.max(logit_HB, axis=1))
        weight_HB = tl.exp2(logit_HB - larger_H[:, None])
        shrink_H = tl.exp2(largest_H - larger_H)
        sum_H = sum_H * shrink_H + tl.sum(weight_HB, axis=1)
        out_HD *= shrink_H[:, None]
        out_HD += tl.dot(weight_HB.to(v_BD.dtype), v_BD, input_precision="ieee")
        largest_H = larger_H
    out_HD /= tl.where(sum_H > 0, sum_H, 1.0)[:, None]  # a share without keys: zeros, of size -inf
    place_H = head * SPLITS + split
    tl.store(parts + place_H[:, None] * DIM + channel[None, :], out_HD, mask=real[:, None])
    tl.store(sizes + place_H, largest_H + tl.log2(tl.where(sum_H > 0, sum_H, 1.0)), mask=real)


@jit
def merge_kernel(parts, sizes, out, W, DIM: tl.constexpr, SPLITS: tl.constexpr):
    """softmax over all keys = the softmaxes of the shares, weighted by 2^(size of a share - size of all)."""
    head, split, channel = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, DIM)
    size_S = tl.load(sizes + head * SPLITS + split)
    weight_S = tl.exp2(size_S - tl.max(size_S, axis=0))
    part_SD = tl.load(parts + (head * SPLITS + split)[:, None] * DIM + channel[None, :])
    out_D = tl.sum(part_SD * weight_S[:, None], axis=0) / tl.sum(weight_S, axis=0)
    tl.store(out + place(head * DIM + channel, W), out_D)


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, chunk: int | None) -> Tensor:
    """What the token at `position` sees: q [heads, dim] -> [1, 8 W of heads dim] float32 in nibble order.

    Fast because up to 64 programs for each key head read the cache at the same time, each key for all its queries at
    once; a second kernel merges what they found by the log-sum-exp of their shares.
    """
    (capacity, kv_heads, dim), heads = k_cache.shape, len(q)
    splits = min(MOST_SPLITS, triton.next_power_of_2(triton.cdiv(capacity, LEAST)))
    padded = -(-heads * dim // 128) * 128
    group = heads // kv_heads
    parts = q.new_empty(heads, splits, dim, dtype=torch.float32)
    sizes = parts.new_empty(heads, splits)
    out = (parts.new_empty if padded == heads * dim else parts.new_zeros)(1, padded)
    attend_kernel[(kv_heads, splits)](
        q, k_cache, v_cache, position, parts, sizes, math.log2(math.e) / math.sqrt(dim),
        CHUNK=chunk or 0, KV_HEADS=kv_heads, GROUP=group, PADDED=max(16, triton.next_power_of_2(group)), DIM=dim,
        SPLITS=splits, BLOCK=BLOCK, STAGES=3, num_warps=4,
    )  # fmt: skip
    merge_kernel[(heads,)](parts, sizes, out, padded // 8, DIM=dim, SPLITS=splits, num_warps=4)
    return out
