"""Generation: greedy tokens are those of full passes; a batch gives each prompt what it gets alone."""

import pytest
import torch
from tiny_models import SCOUT_LIKE, TOKENS_PER_TILE, build, picture, picture_prompt, words

from minillama4 import generate, stream
from minillama4.generate import PIECE, prefill, sample

STOP, PAD = 4, SCOUT_LIKE.pad_token


@pytest.fixture(scope="module")
def model():
    return build(SCOUT_LIKE, seed=3)


def greedy_without_cache(model, ids, pixels, count):
    for _ in range(count):
        ids = torch.cat([ids, model(ids, pixels)[:, -1:].argmax(-1)], dim=1)
    return ids[:, -count:]


@torch.no_grad()
def test_greedy_tokens_are_those_of_full_passes(model):
    """Twenty tokens cross a chunk border; with pictures, and for a batch."""
    ids, pixels = picture_prompt()
    assert torch.equal(generate(model, ids, pixels, 20), greedy_without_cache(model, ids, pixels, 20))
    ids = words(15, rows=3)
    assert torch.equal(generate(model, ids, max_new_tokens=20), greedy_without_cache(model, ids, None, 20))


def test_prompts_of_unequal_length_give_each_what_it_gets_alone(model):
    """No padding enters the model, so chunk borders and temperatures stay where they belong."""
    prompts = [words(length, seed=length)[0] for length in (9, 30, 1, 11, 30, 12)]
    together = generate(model, prompts, max_new_tokens=15)
    assert together.shape == (6, 15)
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(generate(model, [prompt], max_new_tokens=15)[0], row)
        assert torch.equal(generate(model, prompt[None], max_new_tokens=15)[0], row)


def test_each_prompt_of_a_list_gets_its_own_pictures(model):
    """Lengths, and numbers of tiles, out of order; one prompt has no picture at all."""
    layouts = [(20, 3), (4, 1), (9, 0), (20, 1)]
    prompts, counts = [], []
    for seed, (text, grid) in enumerate(layouts):
        prompts.append(torch.tensor([*words(text, seed=seed)[0].tolist(), *(picture(grid) if grid else [])]))
        counts.append(int((prompts[-1] == 127).sum()) // TOKENS_PER_TILE)
    assert counts == [4, 1, 0, 1]
    pixels = torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    together = generate(model, prompts, pixels, 8)
    for prompt, tiles, row in zip(prompts, pixels.split(counts), together, strict=True):
        alone = generate(model, [prompt], tiles if len(tiles) else None, 8)
        assert torch.equal(alone[0], row)


def stop_early(model):
    """Three prompts, a token that one of them writes first, and what they write without stopping."""
    ids = words(10, rows=3, seed=5)
    free = generate(model, ids, max_new_tokens=12)
    stop = int(free[0, 3])
    first = [(row == stop).nonzero().flatten()[:1].tolist() for row in free]
    return ids, stop, free, [found[0] if found else None for found in first]


def test_a_row_is_padded_after_its_stop_token_which_is_kept(model):
    ids, stop, free, first = stop_early(model)
    assert any(where != first[0] for where in first), "the rows must stop at different places"
    got = generate(model, ids, max_new_tokens=12, stop_tokens=[stop])
    for row, unstopped, where in zip(got, free, first, strict=True):
        kept = got.shape[1] if where is None else where + 1
        assert torch.equal(row[:kept], unstopped[:kept])
        assert (row[kept:] == PAD).all()


def test_generation_ends_when_all_rows_have_stopped(model):
    ids, stop, _, first = stop_early(model)
    got = generate(model, ids[:1], max_new_tokens=12, stop_tokens=[stop, 130])
    assert got.shape == (1, first[0] + 1) and got[0, -1] == stop


def test_stream_yields_what_generate_returns_but_not_the_stop_token(model):
    ids, pixels = picture_prompt()
    whole = generate(model, ids, pixels, 12)[0].tolist()
    assert list(stream(model, ids[0], pixels, 12)) == list(stream(model, ids, pixels, 12)) == whole
    stop = whole[5]
    assert list(stream(model, ids, pixels, 12, stop_tokens=[stop])) == whole[: whole.index(stop)]
    options = dict(max_new_tokens=12, temperature=0.9, top_p=0.8)
    drawn = generate(model, ids, pixels, generator=torch.Generator().manual_seed(7), **options)[0].tolist()
    assert list(stream(model, ids, pixels, generator=torch.Generator().manual_seed(7), **options)) == drawn


def test_a_seed_repeats_a_draw(model):
    def draw(seed):
        return generate(
            model, words(9), max_new_tokens=30, temperature=1.5, generator=torch.Generator().manual_seed(seed)
        )

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_a_long_prompt_fed_in_pieces_gives_the_logits_of_one_pass(model):
    ids, pixels = picture_prompt()
    wanted = model(ids, pixels, logits="last")[:, -1].detach()
    for piece in (1, 7, 66, 67, PIECE):
        got = prefill(model, ids, pixels, model.new_cache(1, 67), piece)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def test_top_p_keeps_the_most_likely_tokens_up_to_its_mass():
    """Of 0.5, 0.3, 0.15, 0.05: mass 0.6 needs two tokens, 0.5 one, and a tiny mass still one."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().repeat(4000, 1)
    for top_p, kept in ((0.6, {1, 3}), (0.49, {1}), (1e-6, {1}), (0.9, {0, 1, 3}), (1.0, {0, 1, 2, 3})):
        drawn = sample(logits, 1.0, top_p, torch.Generator().manual_seed(0))
        assert set(drawn.tolist()) == kept
    share = (sample(logits, 1.0, 0.6, torch.Generator().manual_seed(0)) == 1).float().mean()
    assert abs(float(share) - 0.5 / 0.8) < 0.04


def test_a_higher_temperature_flattens():
    logits = torch.tensor([0.0, 2.0]).repeat(4000, 1)
    for temperature in (0.5, 1.0, 4.0):
        share = (sample(logits, temperature, 1.0, torch.Generator().manual_seed(0)) == 1).float().mean()
        assert abs(float(share) - float(torch.sigmoid(torch.tensor(2 / temperature)))) < 0.03


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(top_p=1.5), "top_p is 1.5"),
        (dict(pixel_values=torch.zeros(1, 3, 24, 24)), "pixel_values holds 1 tiles of 9 tokens, the prompts hold"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_options_are_refused_by_both(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, words(5), **options)
    with pytest.raises(ValueError, match=message):
        list(stream(model, words(5), **options))


def test_one_tile_too_many_is_refused_by_both(model):
    """On a cache a surplus tile would otherwise wait for tokens that never come."""
    ids, pixels = picture_prompt()
    for tiles in (pixels[:3], torch.cat([pixels, pixels[:1]])):
        for run in (lambda tiles: generate(model, ids, tiles), lambda tiles: list(stream(model, ids, tiles))):
            with pytest.raises(ValueError, match=rf"pixel_values holds {len(tiles)} tiles .* \[36\] patch tokens"):
                run(tiles)


@pytest.mark.parametrize(
    "prompts", [[], [torch.tensor([], dtype=torch.int64)], [words(3)]], ids=["none", "empty", "2-D"]
)
def test_prompts_of_another_form_are_refused(model, prompts):
    with pytest.raises(ValueError, match="prompts must be"):
        generate(model, prompts)


@pytest.mark.parametrize("prompt", [words(3, rows=2), torch.zeros(1, 0, dtype=torch.int64)], ids=["two", "empty"])
def test_stream_takes_exactly_one_prompt(model, prompt):
    with pytest.raises(ValueError, match="it must be one prompt"):
        list(stream(model, prompt))
