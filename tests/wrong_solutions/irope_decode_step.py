"""Answers to `irope-decode-step`."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from bank import right, wrong

from minillama4 import attention, cache
from minillama4.config import Llama4Config


def _over(q, k_cache, v_cache, start, end):
    """Attention over the entries start, ..., end - 1 of the caches; all of it right."""
    return F.scaled_dot_product_attention(q, k_cache[:, :, start:end], v_cache[:, :, start:end])


def _start(position, chunk_size):
    return 0 if chunk_size is None else position - position % chunk_size


def _written_out(q, k_cache, v_cache, position, chunk_size, scale=None, dim=-1):
    seen = slice(_start(position, chunk_size), position + 1)
    scores = q @ k_cache[:, :, seen].mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.softmax(dim) @ v_cache[:, :, seen]


def _masked(q, k_cache, v_cache, sees):
    """sees: [capacity], which entries the query may see."""
    scores = q @ k_cache.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~sees, float("-inf")).softmax(-1) @ v_cache


@right
def with_fused_attention(q, k_cache, v_cache, position, chunk_size):
    return _over(q, k_cache, v_cache, _start(position, chunk_size), position + 1)


@right
def with_the_number_of_keys(q, k_cache, v_cache, position, chunk_size):
    count = position + 1 if chunk_size is None else position % chunk_size + 1
    k, v = (x.narrow(2, position + 1 - count, count) for x in (k_cache, v_cache))
    weights = (torch.einsum("bhqd,bhsd->bhqs", q, k) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return torch.einsum("bhqs,bhsd->bhqd", weights, v)


@right
def with_the_positions_of_the_keys(q, k_cache, v_cache, position, chunk_size):
    key = torch.arange(position + 1)
    if chunk_size is not None:
        key = key[key // chunk_size == position // chunk_size]
    return F.scaled_dot_product_attention(q, k_cache[:, :, key], v_cache[:, :, key])


@wrong("not written")
def stub(q, k_cache, v_cache, position, chunk_size):
    raise NotImplementedError()


@wrong("without chunks the last position sees all keys")
def identity(q, k_cache, v_cache, position, chunk_size):
    return q.clone()


@wrong("raises")
def no_chunk_is_a_chunk_too(q, k_cache, v_cache, position, chunk_size):
    return _over(q, k_cache, v_cache, position // chunk_size * chunk_size, position + 1)


@wrong("shape")
def query_axis_lost(q, k_cache, v_cache, position, chunk_size):
    return with_fused_attention(q, k_cache, v_cache, position, chunk_size)[:, :, 0]


@wrong("changes its input")
def scaled_in_place(q, k_cache, v_cache, position, chunk_size):
    q /= q.shape[-1] ** 0.5
    return _written_out(q, k_cache, v_cache, position, chunk_size, scale=1)


@wrong("no scale")
def no_scale(q, k_cache, v_cache, position, chunk_size):
    return _written_out(q, k_cache, v_cache, position, chunk_size, scale=1)


@wrong("scale 1 / dim")
def scaled_by_dim(q, k_cache, v_cache, position, chunk_size):
    return _written_out(q, k_cache, v_cache, position, chunk_size, scale=1 / q.shape[-1])


@wrong("mean of the values")
def mean_of_the_values(q, k_cache, v_cache, position, chunk_size):
    return _written_out(q, k_cache, v_cache, position, chunk_size, scale=0)


@wrong("softmax over queries")
def softmax_over_queries(q, k_cache, v_cache, position, chunk_size):
    return _written_out(q, k_cache, v_cache, position, chunk_size, dim=-2)


@wrong("softmax over heads")
def softmax_over_heads(q, k_cache, v_cache, position, chunk_size):
    return _written_out(q, k_cache, v_cache, position, chunk_size, dim=1)


@wrong("without itself")
def end_of_the_slice(q, k_cache, v_cache, position, chunk_size):
    return _over(q, k_cache, v_cache, _start(position, chunk_size), position)


@wrong("own value")
def own_value(q, k_cache, v_cache, position, chunk_size):
    return v_cache[:, :, position : position + 1].clone()


@wrong("only the first key")
def is_causal_left_on(q, k_cache, v_cache, position, chunk_size):
    """It counts queries from the first key on, so that a single query sees a single key."""
    start = _start(position, chunk_size)
    k, v = (x[:, :, start : position + 1] for x in (k_cache, v_cache))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@wrong("without the first key")
def keys_counted_from_one(q, k_cache, v_cache, position, chunk_size):
    return _over(q, k_cache, v_cache, _start(position, chunk_size) + 1, position + 1)


@wrong("whole cache")
def stale_entries(q, k_cache, v_cache, position, chunk_size):
    return _over(q, k_cache, v_cache, _start(position, chunk_size), k_cache.shape[2])


@wrong("one too many")
def one_more(q, k_cache, v_cache, position, chunk_size):
    return _over(q, k_cache, v_cache, _start(position, chunk_size), position + 2)


@wrong("chunk forgotten")
def as_in_metas_code(q, k_cache, v_cache, position, chunk_size):
    """A mask is made for more than one token only, so a single one sees the whole cache in local layers as well."""
    return _over(q, k_cache, v_cache, 0, position + 1)


@wrong("sliding window")
def sliding_window(q, k_cache, v_cache, position, chunk_size):
    start = 0 if chunk_size is None else max(0, position - chunk_size + 1)
    return _over(q, k_cache, v_cache, start, position + 1)


@wrong("sliding window, one too many")
def sliding_window_one_too_many(q, k_cache, v_cache, position, chunk_size):
    start = 0 if chunk_size is None else max(0, position - chunk_size)
    return _over(q, k_cache, v_cache, start, position + 1)


@wrong("sees later ones")
def whole_chunk(q, k_cache, v_cache, position, chunk_size):
    start = _start(position, chunk_size)
    return _over(q, k_cache, v_cache, start, position + 1 if chunk_size is None else start + chunk_size)


@wrong("one key too few")
def remainder_as_the_count(q, k_cache, v_cache, position, chunk_size):
    count = position + 1 if chunk_size is None else position % chunk_size
    return _over(q, k_cache, v_cache, position + 1 - count, position + 1)


@wrong("one key too many")
def starts_one_too_early(q, k_cache, v_cache, position, chunk_size):
    return _over(q, k_cache, v_cache, max(0, _start(position, chunk_size) - 1), position + 1)


@wrong("without itself")
def local_without_itself(q, k_cache, v_cache, position, chunk_size):
    return _over(q, k_cache, v_cache, _start(position, chunk_size), position + (chunk_size is None))


@wrong("only itself")
def local_means_itself(q, k_cache, v_cache, position, chunk_size):
    return _over(q, k_cache, v_cache, 0 if chunk_size is None else position, position + 1)


@wrong("slots of a ring")
def reads_it_like_a_ring(q, k_cache, v_cache, position, chunk_size):
    return _over(q, k_cache, v_cache, 0, position + 1 if chunk_size is None else position % chunk_size + 1)


@wrong("number of the chunk")
def number_of_the_chunk(q, k_cache, v_cache, position, chunk_size):
    return _over(q, k_cache, v_cache, 0 if chunk_size is None else position // chunk_size, position + 1)


@wrong("chunk before")
def two_chunks(q, k_cache, v_cache, position, chunk_size):
    start = 0 if chunk_size is None else max(0, _start(position, chunk_size) - chunk_size)
    return _over(q, k_cache, v_cache, start, position + 1)


@wrong("a local layer sees its own chunk")
def the_first_key_stays_visible(q, k_cache, v_cache, position, chunk_size):
    """Other models keep it, as an attention sink."""
    key = torch.arange(_start(position, chunk_size), position + 1)
    if key[0] > 0:
        key = torch.cat([torch.tensor([0]), key])
    return F.scaled_dot_product_attention(q, k_cache[:, :, key], v_cache[:, :, key])


@wrong("chunk before")
def border_belongs_to_the_chunk_before(q, k_cache, v_cache, position, chunk_size):
    start = 0 if chunk_size is None else max(0, position - 1) // chunk_size * chunk_size
    return _over(q, k_cache, v_cache, start, position + 1)


@wrong("sliding window")
def slides_at_the_border(q, k_cache, v_cache, position, chunk_size):
    start = _start(position, chunk_size)
    if start == position:
        start = max(0, position + 1 - (chunk_size or 0))
    return _over(q, k_cache, v_cache, start, position + 1)


@wrong("sees nothing")
def border_sees_nothing(q, k_cache, v_cache, position, chunk_size):
    out = with_fused_attention(q, k_cache, v_cache, position, chunk_size)
    return out * (chunk_size is None or position % chunk_size != 0)


@wrong("sees nothing")
def chunk_of_the_next_position(q, k_cache, v_cache, position, chunk_size):
    start = 0 if chunk_size is None else (position + 1) // chunk_size * chunk_size
    scores = q @ k_cache[:, :, start : position + 1].mT / q.shape[-1] ** 0.5
    return scores.softmax(-1) @ v_cache[:, :, start : position + 1]


@wrong("only itself")
def chunk_of_the_next_position_with_a_guard(q, k_cache, v_cache, position, chunk_size):
    start = 0 if chunk_size is None else min((position + 1) // chunk_size * chunk_size, position)
    return _over(q, k_cache, v_cache, start, position + 1)


@wrong("token by token it gives what prefill gives")
def wrong_in_the_first_chunk(q, k_cache, v_cache, position, chunk_size):
    if chunk_size is not None and 0 < position < chunk_size - 1:
        return _over(q, k_cache, v_cache, 1, position + 1)
    return with_fused_attention(q, k_cache, v_cache, position, chunk_size)


@wrong("masked")
def masked_in_both_kinds(q, k_cache, v_cache, position, chunk_size):
    key = torch.arange(k_cache.shape[2])
    return _masked(q, k_cache, v_cache, (key <= position) & (key >= _start(position, chunk_size)))


@wrong("masked")
def masked_in_local_layers(q, k_cache, v_cache, position, chunk_size):
    k, v = (x[:, :, : position + 1] for x in (k_cache, v_cache))
    return _masked(q, k, v, torch.arange(position + 1) >= _start(position, chunk_size))


@wrong("masked")
def masked_in_one_call(q, k_cache, v_cache, position, chunk_size):
    key = torch.arange(k_cache.shape[2])
    sees = (key <= position) & (key >= _start(position, chunk_size))
    return F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=sees[None])


@wrong("borrowed")
def with_the_packages_attention(q, k_cache, v_cache, position, chunk_size):
    seen = slice(_start(position, chunk_size), position + 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache[:, :, seen], v_cache[:, :, seen]))
    return attention.full_attention(q, k, v).transpose(1, 2)


@wrong("borrowed")
def with_the_packages_cache(q, k_cache, v_cache, position, chunk_size):
    batch, heads, capacity, dim = k_cache.shape
    text = Llama4Config.preset("mini-scout").text
    text = replace(text, num_heads=heads, num_kv_heads=heads, head_dim=dim, chunk_size=chunk_size or capacity)
    layer = cache.LayerCache(text, 0, batch, capacity, "cpu", q.dtype)
    layer.write(*(x[:, :, : position + 1].transpose(1, 2) for x in (k_cache, v_cache)), 0)
    return F.scaled_dot_product_attention(q, *(x.transpose(1, 2) for x in layer.read_through(position)))


EQUIVALENT = {
    "int | None  ->  int": "an annotation only, which nothing reads when the function runs",
    "int | None  ->  None": "an annotation only, which nothing reads when the function runs",
}
