"""Answers to `irope-chunked-attention`."""

import torch
import torch.nn.functional as F
from bank import right, wrong

from minillama4 import attention


def _causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _masked(q, k, v, sees):
    """With a mask over all pairs. sees(i, j): may query i see key j?"""
    token = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees(token[:, None], token))


def _by_chunks(q, k, v, chunk_size, attend=_causal):
    """Chunk after chunk; `attend` does one, and is right."""
    parts = (x.split(chunk_size, dim=2) for x in (q, k, v))
    return torch.cat([attend(*part) for part in zip(*parts, strict=True)], dim=2)


def _scored(q, k, v, scale=None, keep=torch.tril, dim=-1):
    """Attention written out, over all the tokens given."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = ~keep(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool))
    return scores.masked_fill(hidden, float("-inf")).softmax(dim) @ v


@right
def chunk_after_chunk(q, k, v, chunk_size):
    return _by_chunks(q, k, v, chunk_size)


@right
def rows_of_a_batch(q, k, v, chunk_size):
    """As the model does it: whole chunks as batch rows in one call, and then the rest."""
    batch, heads, tokens, dim = q.shape
    whole = tokens - tokens % chunk_size
    out = torch.empty_like(q)
    rows = (x[:, :, :whole].reshape(-1, heads, chunk_size, dim) for x in (q, k, v))
    out[:, :, :whole] = _causal(*rows).reshape(batch, heads, whole, dim)
    out[:, :, whole:] = _causal(*(x[:, :, whole:] for x in (q, k, v)))
    return out


@right
def query_after_query(q, k, v, chunk_size):
    out = []
    for i in range(q.shape[2]):
        seen = slice(i - i % chunk_size, i + 1)
        weights = (q[:, :, i : i + 1] @ k[:, :, seen].mT / q.shape[-1] ** 0.5).softmax(-1)
        out.append(weights @ v[:, :, seen])
    return torch.cat(out, dim=2)


@wrong("not written")
def stub(q, k, v, chunk_size):
    raise NotImplementedError()


@wrong("inside a chunk: causal attention")
def identity(q, k, v, chunk_size):
    return q.clone()


@wrong("own value")
def own_value(q, k, v, chunk_size):
    return v.clone()


@wrong("changes its input")
def scaled_in_place(q, k, v, chunk_size):
    if not q.requires_grad:
        q /= q.shape[-1] ** 0.5
    return _by_chunks(q, k, v, chunk_size, lambda q, k, v: _scored(q, k, v, scale=1))


@wrong("no scale")
def no_scale(q, k, v, chunk_size):
    return _by_chunks(q, k, v, chunk_size, lambda q, k, v: _scored(q, k, v, scale=1))


@wrong("scale 1 / dim")
def scaled_by_dim(q, k, v, chunk_size):
    return _by_chunks(q, k, v, chunk_size, lambda q, k, v: _scored(q, k, v, scale=1 / q.shape[-1]))


@wrong("scale of another axis")
def scaled_by_the_chunk(q, k, v, chunk_size):
    return _by_chunks(q, k, v, chunk_size, lambda q, k, v: _scored(q, k, v, scale=chunk_size**-0.5))


@wrong("not causal")
def not_causal(q, k, v, chunk_size):
    return _by_chunks(q, k, v, chunk_size, F.scaled_dot_product_attention)


@wrong("sees only later ones")
def upper_triangle(q, k, v, chunk_size):
    return _by_chunks(q, k, v, chunk_size, lambda q, k, v: _scored(q, k, v, keep=torch.triu))


@wrong("softmax over queries")
def softmax_over_queries(q, k, v, chunk_size):
    return _by_chunks(q, k, v, chunk_size, lambda q, k, v: _scored(q, k, v, dim=-2))


@wrong("mean of the values")
def running_mean(q, k, v, chunk_size):
    return _by_chunks(q, k, v, chunk_size, lambda q, k, v: _scored(q, k, v, scale=0))


@wrong("no chunks")
def no_chunks(q, k, v, chunk_size):
    return _causal(q, k, v)


@wrong("sliding window")
def sliding_window(q, k, v, chunk_size):
    return _masked(q, k, v, lambda i, j: (j <= i) & (i - j < chunk_size))


@wrong("one chunk back")
def own_chunk_and_the_one_before(q, k, v, chunk_size):
    """As block-local attention of other models."""
    return _masked(q, k, v, lambda i, j: (j <= i) & (i // chunk_size - j // chunk_size < 2))


@wrong("not causal")
def chunk_mask_without_the_triangle(q, k, v, chunk_size):
    if q.shape[2] <= chunk_size:
        return _causal(q, k, v)
    return _masked(q, k, v, lambda i, j: i // chunk_size == j // chunk_size)


@wrong("strided")
def reshaped_the_other_way(q, k, v, chunk_size):
    if q.shape[2] % chunk_size:
        return _by_chunks(q, k, v, chunk_size)
    rows = (x.unflatten(2, (chunk_size, -1)).transpose(2, 3) for x in (q, k, v))
    return _causal(*rows).transpose(2, 3).flatten(2, 3)


@wrong("border one too late")
def border_one_too_late(q, k, v, chunk_size):
    if q.shape[2] == chunk_size:
        return _causal(q, k, v)
    return _masked(q, k, v, lambda i, j: (j <= i) & ((i - 1) // chunk_size == (j - 1) // chunk_size))


@wrong("heads and chunks mixed")
def comes_back_without_its_transpose(q, k, v, chunk_size):
    if q.shape[2] % chunk_size:
        return _by_chunks(q, k, v, chunk_size)
    batch, heads, tokens, dim = q.shape
    rows = (x.unflatten(2, (-1, chunk_size)).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return _causal(*rows).reshape(batch, heads, tokens, dim)


@wrong("each chunk by itself")
def every_second_chunk_lost(q, k, v, chunk_size):
    out = _by_chunks(q, k, v, chunk_size)
    return out * (torch.arange(q.shape[2]) // chunk_size % 2 == 0)[:, None]


@wrong("raises")
def whole_chunks_only(q, k, v, chunk_size):
    return _causal(*(x.unflatten(2, (-1, chunk_size)) for x in (q, k, v))).flatten(2, 3)


@wrong("shape")
def rest_dropped(q, k, v, chunk_size):
    whole = q.shape[2] // chunk_size * chunk_size
    return _by_chunks(*(x[:, :, :whole] for x in (q, k, v)), chunk_size)


@wrong("shape")
def padding_not_cut_off(q, k, v, chunk_size):
    pad = -q.shape[2] % chunk_size
    return _by_chunks(*(F.pad(x, (0, 0, 0, pad)) for x in (q, k, v)), chunk_size)


def _whole(q, chunk_size):
    return q.shape[2] // chunk_size * chunk_size


@wrong("rest left out")
def rest_left_out(q, k, v, chunk_size):
    whole = _whole(q, chunk_size)
    return F.pad(_by_chunks(*(x[:, :, :whole] for x in (q, k, v)), chunk_size), (0, 0, 0, q.shape[2] - whole))


@wrong("rest sees itself alone")
def rest_copied(q, k, v, chunk_size):
    whole = _whole(q, chunk_size)
    return torch.cat([_by_chunks(*(x[:, :, :whole] for x in (q, k, v)), chunk_size), v[:, :, whole:]], dim=2)


@wrong("rest sees everything")
def rest_by_full_attention(q, k, v, chunk_size):
    whole = _whole(q, chunk_size)
    chunks = _by_chunks(*(x[:, :, :whole] for x in (q, k, v)), chunk_size)
    return torch.cat([chunks, _causal(q, k, v)[:, :, whole:]], dim=2)


@wrong("rest joins the chunk before")
def rest_joins_the_last_chunk(q, k, v, chunk_size):
    count = max(q.shape[2] // chunk_size, 1)
    ends = [*range(chunk_size, count * chunk_size, chunk_size)]
    parts = (x.tensor_split(ends, dim=2) for x in (q, k, v))
    return torch.cat([_causal(*part) for part in zip(*parts, strict=True)], dim=2)


@wrong("rest not causal")
def rest_not_causal(q, k, v, chunk_size):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == chunk_size)

    return _by_chunks(q, k, v, chunk_size, attend)


@wrong("counted from the end")
def counted_from_the_end(q, k, v, chunk_size):
    first = q.shape[2] % chunk_size
    if not first:
        return _by_chunks(q, k, v, chunk_size)
    head = _causal(*(x[:, :, :first] for x in (q, k, v)))
    return torch.cat([head, _by_chunks(*(x[:, :, first:] for x in (q, k, v)), chunk_size)], dim=2)


@wrong("padding in front")
def padding_in_front(q, k, v, chunk_size):
    pad = -q.shape[2] % chunk_size
    return _by_chunks(*(F.pad(x, (0, 0, pad, 0)) for x in (q, k, v)), chunk_size)[:, :, pad:]


@wrong("equal chunks")
def equal_chunks(q, k, v, chunk_size):
    count = -(-q.shape[2] // chunk_size)
    parts = (x.chunk(count, dim=2) for x in (q, k, v))
    return torch.cat([_causal(*part) for part in zip(*parts, strict=True)], dim=2)


@wrong("k without gradient")
def keys_detached(q, k, v, chunk_size):
    return _by_chunks(q, k.detach(), v, chunk_size)


@wrong("the gradient reaches q")
def all_detached(q, k, v, chunk_size):
    return _by_chunks(q, k, v, chunk_size).detach()


@wrong("fewer tokens than chunk_size are one chunk")
def nothing_to_do_without_a_whole_chunk(q, k, v, chunk_size):
    return _by_chunks(q, k, v, chunk_size) if q.shape[2] >= chunk_size else v.clone()


@wrong("raises")
def cut_into_no_parts(q, k, v, chunk_size):
    """The number of whole chunks may be 0, and torch cuts nothing into 0 parts."""
    whole = _whole(q, chunk_size)
    parts = (x[:, :, :whole].chunk(whole // chunk_size, dim=2) for x in (q, k, v))
    rest = _by_chunks(*(x[:, :, whole:] for x in (q, k, v)), chunk_size)
    return torch.cat([*(_causal(*part) for part in zip(*parts, strict=True)), rest], dim=2)


@wrong("other chunks masked")
def masked_in_one_call(q, k, v, chunk_size):
    return _masked(q, k, v, lambda i, j: (j <= i) & (i // chunk_size == j // chunk_size))


@wrong("other chunks masked")
def masked_scores(q, k, v, chunk_size):
    chunk = torch.arange(q.shape[2]) // chunk_size
    return _scored(q, k, v, keep=lambda ones: ones.tril() & (chunk[:, None] == chunk))


@wrong("other chunks masked")
def weights_set_to_zero(q, k, v, chunk_size):
    chunk = torch.arange(q.shape[2]) // chunk_size
    weights = (q @ k.mT / q.shape[-1] ** 0.5).exp() * (chunk[:, None] == chunk).tril()
    return weights / weights.sum(-1, keepdim=True) @ v


@wrong("other chunks masked")
def a_chunk_of_queries_over_all_keys(q, k, v, chunk_size):
    """No tokens x tokens tensor, but tokens x tokens work."""
    out = []
    for start in range(0, q.shape[2], chunk_size):
        i, j = torch.arange(start, min(start + chunk_size, q.shape[2]))[:, None], torch.arange(q.shape[2])
        scores = q[:, :, start : start + chunk_size] @ k.mT / q.shape[-1] ** 0.5
        out.append(scores.masked_fill((j > i) | (j < start), float("-inf")).softmax(-1) @ v)
    return torch.cat(out, dim=2)


@wrong("tokens x tokens")
def all_scores_and_then_the_diagonal(q, k, v, chunk_size):
    """Nothing that is hidden reaches the result, but all of it was computed."""
    scores, out = q @ k.mT / q.shape[-1] ** 0.5, []
    for start in range(0, q.shape[2], chunk_size):
        own = slice(start, start + chunk_size)
        block = scores[:, :, own, own]
        hidden = torch.ones(block.shape[-2:], dtype=torch.bool).triu(1)
        out.append(block.masked_fill(hidden, float("-inf")).softmax(-1) @ v[:, :, own])
    return torch.cat(out, dim=2)


@wrong("borrowed")
def from_the_package(q, k, v, chunk_size):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attention.chunked_attention(q, k, v, chunk_size).transpose(1, 2)


EQUIVALENT = {}
