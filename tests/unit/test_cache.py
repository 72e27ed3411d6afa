"""The KV cache: what each layer keeps, what does not fit, and that no way of feeding it changes an answer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    CONFIGS,
    MAVERICK_LIKE,
    SCOUT_LIKE,
    assert_same,
    build,
    in_pieces,
    picture_prompt,
    with_text,
    words,
)

from minillama4 import Llama4
from minillama4.cache import KVCache, LayerCache

MODELS = {name: build(config) for name, config in CONFIGS.items()}
LOCAL, GLOBAL = 0, 2  # layers of the scout-like model


def filled(layer, tokens, pieces=(), max_tokens=100):
    """A layer's cache after tokens 0, 1, ... whose keys and values hold their own positions."""
    cache = LayerCache(SCOUT_LIKE.text, layer, 1, max_tokens, "cpu", torch.float32)
    start = 0
    for size in pieces or [tokens]:
        k = torch.arange(start, start + size).float()[None, :, None, None].expand(1, size, 2, 16)
        cache.write(k, -k, start)
        start += size
    return cache


def positions(pair):
    if pair is None:
        return []
    k, v = pair
    assert torch.equal(k, -v)
    return k[0, :, 0, 0].int().tolist()


# ----------------------------------------------------------------------------------------------------------------------
# What a layer keeps (chunk 11)


def test_local_layers_hold_at_most_one_chunk_and_global_layers_hold_everything():
    cache = build(SCOUT_LIKE).new_cache(3, 100)
    wanted = [(3, 100 if SCOUT_LIKE.text.is_nope(layer) else 11, 2, 16) for layer in range(6)]
    assert [tuple(layer.k.shape) for layer in cache.layers] == wanted
    assert cache.nbytes == 2 * 4 * 3 * 2 * 16 * (2 * 100 + 4 * 11)


def test_a_cache_shorter_than_a_chunk_reserves_no_more_than_it_needs():
    assert {layer.k.shape[1] for layer in build(SCOUT_LIKE).new_cache(1, 7).layers} == {7}


@pytest.mark.parametrize("tokens", [1, 10, 11, 12, 22, 25])
def test_a_query_of_a_local_layer_reads_its_own_chunk_only(tokens):
    """A new chunk starts from nothing; the last token of a chunk still reads all of it."""
    cache = filled(LOCAL, tokens)
    first = (tokens - 1) // 11 * 11
    assert positions(cache.read_through(tokens - 1)) == list(range(first, tokens))
    assert positions(cache.read(tokens)) == (list(range(first, tokens)) if tokens % 11 else [])


@pytest.mark.parametrize("tokens", [1, 11, 25])
def test_a_query_of_a_global_layer_reads_everything(tokens):
    cache = filled(GLOBAL, tokens)
    assert positions(cache.read_through(tokens - 1)) == positions(cache.read(tokens)) == list(range(tokens))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_whatever_the_pieces_a_layer_holds_the_same(pieces):
    tokens = sum(pieces)
    for layer in (LOCAL, GLOBAL):
        cache = filled(layer, tokens, pieces, max_tokens=150)
        assert positions(cache.read_through(tokens - 1)) == positions(
            filled(layer, tokens, max_tokens=150).read_through(tokens - 1)
        )


def test_the_cache_keeps_values_and_no_history():
    model = MODELS["scout-like"]
    cache = model.new_cache(1, 20)
    model(words(12), cache=cache)
    assert not any(layer.k.requires_grad or layer.v.requires_grad for layer in cache.layers)


def test_rows_of_a_batch_do_not_mix():
    ids = words(30, rows=3)
    for model in MODELS.values():
        together = in_pieces(model, ids, [8, 22])
        assert_same(together, torch.cat([in_pieces(model, row[None], [8, 22]) for row in ids]))


# ----------------------------------------------------------------------------------------------------------------------
# Any pieces, the same logits


@settings(max_examples=40)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=8), st.sampled_from(sorted(MODELS)), st.booleans())
def test_any_pieces_give_the_logits_of_one_pass(sizes, name, pictures):
    """Across chunk borders, past floor_scale, and through the middle of a picture; hypothesis draws the pieces."""
    sizes, left = [], sizes
    for size in left:
        sizes.append(min(size, 67 - sum(sizes)))
    sizes = [size for size in [*sizes, 67 - sum(sizes)] if size]
    ids, pixels = picture_prompt() if pictures else (words(67), None)
    with torch.no_grad():
        assert_same(in_pieces(MODELS[name], ids, sizes, pixels), MODELS[name](ids, pixels))


@pytest.mark.parametrize(
    "changes", [dict(chunk_size=1), dict(chunk_size=2), dict(chunk_size=67), dict(chunk_size=1000)], ids=str
)
def test_extreme_chunk_sizes_give_the_logits_of_one_pass(changes):
    model = build(with_text(MAVERICK_LIKE, **changes))
    ids = words(67)
    for sizes in ([1] * 67, [2, 1, 64], [66, 1], [33, 34]):
        assert_same(in_pieces(model, ids, sizes), model(ids))


@torch.no_grad()
def test_a_decoded_patch_token_is_a_word_like_any_other():
    """A model may write <|patch|> itself; without pixels that needs no picture."""
    model = MODELS["scout-like"]
    cache = model.new_cache(1, 10)
    model(words(9), cache=cache)
    assert model(torch.tensor([[127]]), cache=cache).shape == (1, 1, 131)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_more_tokens_than_the_cache_has_room_for_are_refused_before_anything_changes():
    model = MODELS["scout-like"]
    ids, cache = words(25), model.new_cache(1, 20)
    model(ids[:, :18], cache=cache, logits="none")
    before = [layer.k.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match="holds 18 of max_tokens=20 tokens; 3 more do not fit"):
        model(ids[:, 18:21], cache=cache)
    assert cache.length == 18
    assert all(torch.equal(old[:, :18], layer.k[:, :18]) for old, layer in zip(before, cache.layers, strict=True))
    assert_same(model(ids[:, 18:20], cache=cache), model(ids[:, :20])[:, 18:])


def test_another_number_of_rows_is_refused():
    model = MODELS["scout-like"]
    with pytest.raises(ValueError, match="2 rows, the cache was made for batch_size=1"):
        model(words(3, rows=2), cache=model.new_cache(1, 20))


@pytest.mark.parametrize("name", ["batch_size", "max_tokens"])
def test_an_empty_cache_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        KVCache(SCOUT_LIKE.text, **({"batch_size": 1, "max_tokens": 1} | {name: 0}))


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.tensor([[1, 131]]), "1 to 131; ids run from 0 to 130"),
        (torch.tensor([[-1, 4]]), "-1 to 4; ids run from 0 to 130"),
        (torch.tensor([1, 2]), r"input_ids is \[2\]"),
        (torch.zeros(1, 0, dtype=torch.int64), r"input_ids is \[1, 0\]"),
        (torch.tensor([[1.0]]), "float32; it must be"),
    ],
    ids=["too large", "negative", "no batch", "no tokens", "floats"],
)
def test_bad_token_ids_are_refused_in_one_line(ids, message):
    with pytest.raises(ValueError, match=message) as error:
        MODELS["scout-like"](ids)
    assert "\n" not in str(error.value)


def test_an_unknown_kind_of_logits_is_refused():
    with pytest.raises(ValueError, match="logits is 'first'; it must be 'all', 'last' or 'none'"):
        MODELS["scout-like"](words(3), logits="first")


def test_a_cache_has_the_models_dtype():
    model: Llama4 = build(SCOUT_LIKE).bfloat16()
    assert {layer.k.dtype for layer in model.new_cache(1, 5).layers} == {torch.bfloat16}
