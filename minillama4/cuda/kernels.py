"""Products of one token with int4 weights, as Triton kernels. `plain.py` has the same functions without them.

Decoding is reading: 8.6 GB of weights for a token of Scout, two FLOPs for each. So a kernel has to keep memory busy,
unpack in few instructions, and come with as few others as possible: each launch leaves the memory idle for about 1.3
microseconds, even inside a CUDA graph.

Shapes: K inputs and N outputs of a product, W = K / 8 words a row (a word is 32 bits, eight weights), F expert width.

Nibble order: nibble n of word i in group g is channel 128 g + 64 (n % 2) + 4 i + n // 2 (see `int4.py`). All vectors
that a product reads lie in memory as [8, W], the channel of nibble n and word w at n W + w. So the eight weights of a
word meet eight numbers that neighbouring threads load as neighbours. K is filled up with zeros to whole groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .int4 import GROUP

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU here; nothing in this file can be called, and `plain.py` does the work
    triton = tl = None

ROWS, GROUPS = 16, 8  # outputs of a program, and groups of each that it takes at a time: 8 kB a step
WARPS, STAGES = 2, 3  # STAGES steps are on their way from memory while one is computed
SPLITS = 2  # programs that share a row of `add_product`
_arrived: dict[torch.device, Tensor] = {}  # see `add_product_kernel`; all zeros between two launches


def jit(function):
    """A Triton kernel, where there is Triton."""
    return triton.jit(function) if triton else function


def order(x: Tensor) -> Tensor:
    """[..., K] -> [..., 8 W] float32 in nibble order, zeros where K was filled up."""
    x = F.pad(x.float(), (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, 2, 16, 4))  # [..., G, n % 2, i, n // 2]
    return x.movedim((-1, -3), (-4, -3)).flatten(-4)  # [..., n // 2, n % 2, G, i]


@jit
def place(channel, W):
    """Where a channel lies in nibble order."""
    group, inside = channel // 128, channel % 128
    nibble = inside % 4 * 2 + inside // 64
    return nibble * W + group * 16 + inside % 64 // 4


@jit
def packed_dot(
    words, scale, x, norm, row_N, rows, first, W: tl.constexpr, COUNT: tl.constexpr, GROUPS: tl.constexpr,
    NORM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows of a packed matrix times x, over COUNT groups from `first`: [N] float32. With NORM, x is x norm, and the
    squares of x are summed as well: rms(x) is a factor on the whole sum, so the norm costs no pass of its own.

    Two instructions a weight, an AND and a multiply-add. The bits 0 to 23 of a float whose others are 0 count in steps
    of 2^-149: they are the subnormal floats and the first normal ones. So a nibble that is cut out where it lies, in
    bits s to s + 3, is the float code 2^(s - 149), without shift or conversion, and x brings 2^(89 - s) along. The
    format's 8 is the same for all weights: 8 times the sum of x is taken off once a word.
    """
    WORDS: tl.constexpr = 16 * GROUPS
    sum_NW = tl.zeros([row_N.shape[0], WORDS], tl.float32)
    squares_W = tl.zeros([WORDS], tl.float32)
    row_N1 = row_N.to(tl.int64)[:, None]
    last = tl.minimum(first + COUNT, W // 16)
    for start in tl.range(0, COUNT, GROUPS, num_stages=STAGES):
        group_G = first + start + tl.arange(0, GROUPS)
        word_W = (first + start) * 16 + tl.arange(0, WORDS)
        there_W = word_W < last * 16
        there_NG = (row_N < rows)[:, None] & (group_G < last)[None, :]
        there_NW = (row_N < rows)[:, None] & there_W[None, :]
        scale_NG = tl.load(scale + row_N1 * (W // 16) + group_G[None, :], mask=there_NG, other=0.0)
        packed_NW = tl.load(words + row_N1 * W + word_W[None, :], mask=there_NW, other=0)
        part_NW = tl.zeros([row_N.shape[0], WORDS], tl.float32)
        total_W = tl.zeros([WORDS], tl.float32)
        for n in tl.static_range(8):
            x_W = tl.load(x + n * W + word_W, mask=there_W, other=0.0)
            if NORM:
                squares_W += x_W * x_W
                x_W *= tl.load(norm + n * W + word_W, mask=there_W, other=0.0)
            # The last two nibbles would lie beyond bit 23; moved down by 24 bits, they are where the first two were.
            code_NW = (packed_NW if n < 6 else packed_NW >> 24) & (15 << 4 * (n % 6))
            part_NW += code_NW.to(tl.float32, bitcast=True) * (x_W * 2.0 ** (89 - 4 * (n % 6)))[None, :]
            total_W += x_W
        scale_NGI = tl.broadcast_to(scale_NG[:, :, None], [row_N.shape[0], GROUPS, 16])  # for each word of a group
        sum_NW += tl.reshape(scale_NGI, [row_N.shape[0], WORDS]) * (part_NW * 2.0**60 - 8.0 * total_W[None, :])
    return tl.sum(sum_NW, axis=1), tl.sum(squares_W, axis=0)


@jit
def chosen(logits, E: tl.constexpr, BLOCK: tl.constexpr):
    """The expert with the largest logit, of equal ones the first, and its score. Nobody asks the host which it is."""
    expert_E = tl.arange(0, BLOCK)
    logit_E = tl.load(logits + expert_E, mask=expert_E < E, other=float("-inf"))
    return tl.argmax(logit_E, axis=0).to(tl.int64), tl.sigmoid(tl.max(logit_E, axis=0))


# ----------------------------------------------------------------------------------------------------------------------
# norm, then query, key and value; and norm, then head


@jit
def norm_product_kernel(
    x, norm, words, scale, out, N, inputs, eps, W: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row_N = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out_N, squares = packed_dot(words, scale, x, norm, row_N, N, 0, W, W // 16, GROUPS, True, STAGES)
    tl.store(out + row_N, out_N * tl.rsqrt(squares / inputs + eps), mask=row_N < N)


def norm_product(x: Tensor, norm: Tensor, eps: float, packed: Tensor, scale: Tensor, inputs: int) -> Tensor:
    """RMSNorm and product in one launch: x [8 W] -> [N] float32, in the order of the rows.

    Fast because query, key and value are one matrix, and because the norm needs no pass (see `packed_dot`).
    """
    outputs, width = len(packed), x.numel() // 8
    out = x.new_empty(outputs)
    norm_product_kernel[(triton.cdiv(outputs, ROWS),)](
        x, norm, packed.view(torch.int32), scale, out, outputs, inputs, eps,
        W=width, ROWS=ROWS, GROUPS=_groups(width // 16), STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return out


# ----------------------------------------------------------------------------------------------------------------------
# output projection, and down projections of both experts


@jit
def add_product_kernel(
    x, y, logits, routed_words, routed_scale, words, scale, parts, arrived, out, N, XW,
    W: tl.constexpr, COUNT: tl.constexpr, E: tl.constexpr, EXPERTS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    row_N = block * ROWS + tl.arange(0, ROWS)
    first = split * COUNT
    if E > 0:  # the first split is the routed expert, the second one the shared expert, each over all its words
        first = split * 0
        y += split * 8 * W
        if split == 0:
            expert, _ = chosen(logits, E, EXPERTS)
            words = routed_words + expert * N * W
            scale = routed_scale + expert * N * (W // 16)
    part_N, _ = packed_dot(words, scale, y, y, row_N, N, first, W, COUNT, GROUPS, False, STAGES)
    tl.store(parts + split * N + row_N, part_N, mask=row_N < N)
    tl.debug_barrier()  # all of the program's threads have stored before one of them says so
    if tl.atomic_add(arrived + block, 1) == SPLITS - 1:  # the last one adds up, always in the same order
        place_N = place(row_N, XW)
        sum_N = tl.load(x + place_N, mask=row_N < N)
        for i in tl.static_range(SPLITS):
            sum_N += tl.load(parts + i * N + row_N, mask=row_N < N, cache_modifier=".cg")
        tl.store(out + place_N, sum_N, mask=row_N < N)
        tl.store(arrived + block, 0)


def add_product(
    x: Tensor, y: Tensor, packed: Tensor, scale: Tensor, logits: Tensor | None = None, routed: tuple | None = None
) -> Tensor:
    """x plus the product with y: [8 W of x] -> the same, both in nibble order. Adds what a layer's branch returns.

    y: [1, 8 W] for one matrix, or [2, 8 W]: the chosen expert's inputs for `routed`, (packed, scale) of all experts,
    and those of the matrix that everyone takes. logits: [E] of the router.
    Fast because two programs share a row (split-K), which doubles the reads that are under way at once; the one that
    comes last adds the two halves and x, so this takes neither a second launch nor sums in random order.
    """
    outputs, width = len(packed), y.shape[1] // 8
    if outputs > 1 << 20:
        raise ValueError(f"the matrix has {outputs} rows; at most {1 << 20} can be added up")
    if x.device not in _arrived:
        _arrived[x.device] = torch.zeros(1 << 16, dtype=torch.int32, device=x.device)
    experts = 0 if routed is None else len(logits)
    count = width // 16 if experts else triton.cdiv(width // 16, SPLITS)  # groups of a program
    out = torch.zeros_like(x) if outputs < x.numel() else torch.empty_like(x)
    parts = x.new_empty(SPLITS, outputs)
    routed_packed, routed_scale = (packed, scale) if routed is None else routed
    add_product_kernel[(triton.cdiv(outputs, ROWS), SPLITS)](
        x, y, x if logits is None else logits, routed_packed.view(torch.int32), routed_scale,
        packed.view(torch.int32), scale, parts, _arrived[x.device], out, outputs, x.numel() // 8,
        W=width, COUNT=count, E=experts, EXPERTS=triton.next_power_of_2(max(experts, 1)), SPLITS=SPLITS,
        ROWS=ROWS, GROUPS=_groups(count), STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return out


# ----------------------------------------------------------------------------------------------------------------------
# norm and router, then gate and up of both experts


@jit
def norm_router_kernel(
    x, norm, router, y, logits, inputs, eps, SIZE: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr
):
    expert, channel = tl.program_id(0), tl.arange(0, BLOCK)
    there = channel < SIZE
    x_K = tl.load(x + channel, mask=there, other=0.0)
    y_K = x_K * tl.rsqrt(tl.sum(x_K * x_K, axis=0) / inputs + eps) * tl.load(norm + channel, mask=there, other=0.0)
    if expert == 0:
        tl.store(y + channel, y_K, mask=there)
    if E > 0:
        router_K = tl.load(router + expert * SIZE + channel, mask=there, other=0.0)
        tl.store(logits + expert, tl.sum(y_K * router_K, axis=0))


def norm_router(x: Tensor, norm: Tensor, eps: float, router: Tensor | None, inputs: int) -> tuple[Tensor, Tensor]:
    """RMSNorm and the router: x [8 W] -> (normed [8 W], logits [E]); router [E, 8 W] in nibble order, None if dense.

    Fast enough because each expert has a program that norms x for itself: a launch less for 20 kB more from the cache.
    """
    y, experts = torch.empty_like(x), 0 if router is None else len(router)
    logits = x.new_empty(experts)
    norm_router_kernel[(max(experts, 1),)](
        x, norm, x if router is None else router, y, logits, inputs, eps,
        SIZE=x.numel(), E=experts, BLOCK=triton.next_power_of_2(x.numel()), num_warps=8,
    )  # fmt: skip
    return y, logits


@jit
def gate_up_kernel(
    y, logits, routed_words, routed_scale, words, scale, h, WIDTH, W: tl.constexpr, HW: tl.constexpr, E: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row_N = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(1)
    score = 1.0
    if E > 0:
        expert, score = chosen(logits, E, EXPERTS)
        if which == 0:
            words = routed_words + expert * 2 * WIDTH * W
            scale = routed_scale + expert * 2 * WIDTH * (W // 16)
        score = tl.where(which == 0, score, 1.0)
    gate_N, _ = packed_dot(words, scale, y, y, row_N, WIDTH, 0, W, W // 16, GROUPS, False, STAGES)
    words += WIDTH.to(tl.int64) * W
    scale += WIDTH.to(tl.int64) * (W // 16)
    up_N, _ = packed_dot(words, scale, y, y, row_N, WIDTH, 0, W, W // 16, GROUPS, False, STAGES)
    gate_N, up_N = gate_N * score, up_N * score  # the same as scaling the input: up to here all is linear
    tl.store(h + which * 8 * HW + place(row_N, HW), gate_N * tl.sigmoid(gate_N) * up_N, mask=row_N < WIDTH)


def gate_up(
    y: Tensor, packed: Tensor, scale: Tensor, logits: Tensor | None = None, routed: tuple | None = None
) -> Tensor:
    """silu(gate(y)) up(y): y [8 W] -> [1, 8 W of F], or [2, …] with the chosen expert first, if there is a router.

    packed: gate, then up, [2 F, 64 G]; routed: (packed, scale) of all experts, [E, 2 F, 64 G]; logits: [E].
    Fast because the routed and the shared expert are one launch of 2 F rows each, and nothing waits for the host.
    """
    width, experts = len(packed) // 2, 0 if routed is None else len(logits)
    padded = -(-width // GROUP) * GROUP
    h = (y.new_empty if padded == width else y.new_zeros)(2 if experts else 1, padded)
    routed_packed, routed_scale = (packed, scale) if routed is None else routed
    gate_up_kernel[(triton.cdiv(width, ROWS), len(h))](
        y, y if logits is None else logits, routed_packed.view(torch.int32), routed_scale,
        packed.view(torch.int32), scale, h, width, W=y.numel() // 8, HW=padded // 8, E=experts,
        EXPERTS=triton.next_power_of_2(max(experts, 1)), ROWS=ROWS, GROUPS=_groups(y.numel() // 128), STAGES=STAGES,
        num_warps=WARPS,
    )  # fmt: skip
    return h


# ----------------------------------------------------------------------------------------------------------------------
# whole matrices, for prompts


@jit
def expand_kernel(packed, scale, out, groups, inputs, G, BLOCK: tl.constexpr):
    group = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]  # [BLOCK, 1], over all rows
    byte = tl.arange(0, 64)[None, :]
    there = group < groups
    code = tl.load(packed + group * 64 + byte, mask=there, other=0).to(tl.int32)
    step = tl.load(scale + group, mask=there, other=0.0)
    channel = group % G * 128 + byte
    target = out + group // G * inputs + channel
    tl.store(target, ((code & 15) - 8).to(tl.float32) * step, mask=there & (channel < inputs))
    tl.store(target + 64, ((code >> 4) - 8).to(tl.float32) * step, mask=there & (channel + 64 < inputs))


def expand(packed: Tensor, scale: Tensor, out: Tensor):
    """`int4.dequantise` into `out` [N, K], in one pass: packed [N, 64 G], scale [N, G].

    Fast because each byte is read once and each weight written once, where PyTorch makes five tensors on the way.
    """
    groups = scale.numel()
    expand_kernel[(triton.cdiv(groups, 32),)](packed, scale, out, groups, out.shape[1], scale.shape[-1], BLOCK=32)


def _groups(count: int) -> int:
    return min(GROUPS, triton.next_power_of_2(count))
