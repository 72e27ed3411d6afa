"""The same logits as Hugging Face: one pass, token by token, uneven pieces; text and pictures; one row and many."""

import pytest
import torch
from partner import make_pair
from tiny_models import (
    CONFIGS,
    MAVERICK_LIKE,
    SCOUT_LIKE,
    TOKENS_PER_TILE,
    assert_same,
    in_pieces,
    picture_prompt,
    text_only,
    with_text,
    words,
)

# 67 tokens, chunk 11. Borders lie at 11, 22, 33, 44, 55, 66.
PIECES = {
    "token by token": [1] * 67,
    "one token, then the rest": [1, 66],
    "whole chunks": [11] * 6 + [1],
    "each piece ends one token before a border": [10, 11, 11, 11, 11, 11, 2],
    "each piece ends one token after a border": [12, 11, 11, 11, 11, 11],
    "uneven, several borders in a piece": [3, 25, 1, 1, 30, 7],
}
by_pieces = pytest.mark.parametrize("sizes", PIECES.values(), ids=PIECES)


def test_the_tiny_models_hold_every_mechanism_at_once():
    """Parity on a model without a mechanism would say nothing about it."""
    for config in CONFIGS.values():
        text = config.text
        kinds = {(text.is_nope(layer), text.is_moe(layer)) for layer in range(text.num_layers)}
        assert kinds == {(nope, moe) for nope in (False, True) for moe in (False, True)}
        assert text.num_heads // text.num_kv_heads > 1
        assert text.rope_scaling is not None and text.temperature_tuning
        tokens = picture_prompt()[0].shape[1]
        assert tokens == 67 and tokens > 3 * text.chunk_size and tokens > 3 * text.floor_scale
        sizes = [text.vocab_size, text.hidden_size, text.num_heads, text.num_kv_heads, text.head_dim, text.num_experts]
        sizes += [text.expert_width, text.dense_width, config.vision.hidden_size, config.vision.adapter_width]
        sizes += [text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim]
        assert len(set(sizes)) == len(sizes), "two equal sizes could be mistaken for each other"
    assert SCOUT_LIKE.text.qk_norm and not MAVERICK_LIKE.text.qk_norm
    assert SCOUT_LIKE.text.rope_scaling.low_frequency_factor == SCOUT_LIKE.text.rope_scaling.high_frequency_factor
    assert SCOUT_LIKE.text.is_nope(5) and MAVERICK_LIKE.text.is_local(5), "the last layer has code of its own"


# ----------------------------------------------------------------------------------------------------------------------
# One pass


def test_one_pass_over_text_equals_hugging_face(pair):
    ids = words(67, rows=3)
    assert_same(pair.ours(ids), pair.wanted(ids))


def test_one_pass_over_two_pictures_of_unequal_tile_counts_equals_hugging_face(pair):
    ids, pixels = picture_prompt()
    assert_same(pair.ours(ids, pixels), pair.wanted(ids, pixels))


def test_a_batch_with_pictures_in_different_places_equals_hugging_face(pair):
    ids, pixels = picture_prompt(rows=3)
    assert len({tuple(row) for row in (ids == pair.config.patch_token).tolist()}) == 2
    assert_same(pair.ours(ids, pixels), pair.wanted(ids, pixels))


@torch.no_grad()
def test_picture_vectors_equal_hugging_face(pair):
    _, pixels = picture_prompt()
    features = pair.theirs.get_image_features(pixels, return_dict=True).last_hidden_state
    wanted = pair.theirs.multi_modal_projector(features)
    assert_same(pair.ours.encode_images(pixels), wanted)


VARIANTS = {
    "plain RoPE, as Maverick": with_text(MAVERICK_LIKE, rope_scaling=None),
    "no experts and no chunks, as Llama Guard 4": with_text(
        SCOUT_LIKE, moe_layers=(), nope_layers=(3,), chunk_size=None, dense_width=20
    ),
    "no temperature": with_text(SCOUT_LIKE, temperature_tuning=False),
    "stronger temperature": with_text(SCOUT_LIKE, temperature_scale=0.7, floor_scale=4),
    "experts in every layer, as Scout": with_text(SCOUT_LIKE, moe_layers=tuple(range(6))),
    "one query head per key head": with_text(SCOUT_LIKE, num_heads=2),
    "all layers NoPE": with_text(SCOUT_LIKE, nope_layers=tuple(range(6))),
    "all layers rotary": with_text(MAVERICK_LIKE, nope_layers=()),
    "larger norm epsilon": with_text(SCOUT_LIKE, norm_eps=0.3),
    "no vision": text_only(SCOUT_LIKE),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_each_switch_of_the_config_equals_hugging_face(config):
    pair = make_pair(config, seed=1)
    ids = words(67, rows=2, seed=1)
    wanted = pair.wanted(ids)
    assert_same(pair.ours(ids), wanted)
    assert_same(in_pieces(pair.ours, ids, PIECES["uneven, several borders in a piece"]), wanted)


# ----------------------------------------------------------------------------------------------------------------------
# On a cache


@by_pieces
def test_text_in_pieces_on_a_cache_equals_one_pass_of_hugging_face(pair, sizes):
    ids = words(67, rows=2)
    assert_same(in_pieces(pair.ours, ids, sizes), pair.wanted(ids))


@by_pieces
def test_pictures_in_pieces_on_a_cache_equal_one_pass_of_hugging_face(pair, sizes):
    """Most of these pieces cut a picture's patch tokens apart; the pixels come with the first piece only."""
    ids, pixels = picture_prompt()
    assert_same(in_pieces(pair.ours, ids, sizes, pixels), pair.wanted(ids, pixels))


@torch.no_grad()
def test_each_picture_may_come_with_its_own_piece(pair):
    """Pixels of the second picture arrive while patch tokens of the first are still waiting."""
    ids, pixels = picture_prompt()
    first_patches = (ids[0] == pair.config.patch_token).nonzero()[:TOKENS_PER_TILE, 0]
    cut = int(first_patches[4])
    cache = pair.ours.new_cache(1, 67)
    got = [pair.ours(ids[:, :cut], pixels[:1], cache), pair.ours(ids[:, cut:], pixels[1:], cache)]
    assert_same(torch.cat(got, dim=1), pair.wanted(ids, pixels))
    assert cache.pending_images is None


@torch.no_grad()
def test_a_batch_with_pictures_then_tokens_equals_hugging_face(pair):
    ids, pixels = picture_prompt(rows=2)
    cache = pair.ours.new_cache(2, 67)
    got = [pair.ours(ids[:, :60], pixels, cache)]
    got += [pair.ours(ids[:, i : i + 1], None, cache) for i in range(60, 67)]
    assert_same(torch.cat(got, dim=1), pair.wanted(ids, pixels))


@torch.no_grad()
def test_cached_decode_equals_cached_decode_of_hugging_face(pair):
    """Both go through their own caches: a prompt with pictures, then one token at a time across two borders."""
    ids, pixels = picture_prompt()
    more = words(20, seed=9)
    cache = pair.ours.new_cache(1, 87)
    ours = [pair.ours(ids, pixels, cache, logits="last")]
    theirs = pair.theirs(input_ids=ids, pixel_values=pixels, use_cache=True)
    wanted, past = [theirs.logits[:, -1:]], theirs.past_key_values
    for token in more.split(1, dim=1):
        ours.append(pair.ours(token, None, cache, logits="last"))
        theirs = pair.theirs(input_ids=token, past_key_values=past, use_cache=True)
        wanted.append(theirs.logits)
        past = theirs.past_key_values
    assert_same(torch.cat(ours, dim=1), torch.cat(wanted, dim=1))


# ----------------------------------------------------------------------------------------------------------------------
# Only the logits that are wanted


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5, 11, 12, 67])
def test_logits_last_is_the_last_of_hugging_face(pair, tokens):
    """Without a cache, and with one whether it is empty or not."""
    ids = words(tokens + 13, rows=2)
    wanted = pair.wanted(ids)[:, -1:]
    assert_same(pair.ours(ids, logits="last"), wanted)
    cache = pair.ours.new_cache(2, tokens + 13)
    pair.ours(ids[:, :13], cache=cache, logits="last")
    assert_same(pair.ours(ids[:, 13:], cache=cache, logits="last"), wanted)


@torch.no_grad()
def test_logits_none_fills_the_cache_so_that_later_logits_equal_hugging_face(pair):
    ids, pixels = picture_prompt()
    wanted = pair.wanted(ids, pixels)
    cache = pair.ours.new_cache(1, 67)
    for piece, pictures in zip(ids[:, :53].split([7, 21, 25], dim=1), [pixels, None, None], strict=True):
        assert pair.ours(piece, pictures, cache, logits="none") is None
    assert_same(pair.ours(ids[:, 53:54], cache=cache, logits="last"), wanted[:, 53:54])
    assert_same(pair.ours(ids[:, 54:], cache=cache), wanted[:, 54:])
