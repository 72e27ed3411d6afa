"""Who-sees-whom: the grid against the definition of each layer, and against a model that is broken on purpose."""

import random

import pytest
import torch
from matplotlib.colors import to_hex

import minillama4.attention
from minillama4.cache import LayerCache
from minillama4.course.widgets.frame import ORANGE, RED, png
from minillama4.course.widgets.who_sees_whom import KINDS, MODES, WhoSeesWhom, in_words, sees, shown

DEFINITIONS = {  # may query i see key j, where j <= i?
    "local": lambda i, j, chunk: i // chunk == j // chunk,
    "global": lambda i, j, chunk: True,
    "window": lambda i, j, chunk: i - j < chunk,
}


def by_definition(kind: str, chunk: int, tokens: int) -> list[list[bool]]:
    may = DEFINITIONS[kind]
    return [[j <= i and may(i, j, chunk) for j in range(tokens)] for i in range(tokens)]


# ----------------------------------------------------------------------------------------------------------------------
# The truth


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 23, 24, 99])
@pytest.mark.parametrize("mode", MODES.values())
@pytest.mark.parametrize("kind", DEFINITIONS)
def test_each_kind_sees_what_its_definition_says(kind, mode, chunk):
    tokens = random.Random(f"{kind} {chunk}").choice([2, 10, 20, 24])
    assert sees(kind, chunk, mode, tokens).tolist() == by_definition(kind, chunk, tokens)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_metas_reference_masks_chunks_in_prefill_and_forgets_them_in_decode(chunk):
    assert sees("meta", chunk, "prefill").tolist() == by_definition("local", chunk, 24)
    assert sees("meta", chunk, "decode").tolist() == by_definition("global", chunk, 24)


def test_row_sums_of_the_fact_sheet():
    """Section 10, item 5: chunk 8, length 20."""
    for mode in MODES.values():
        assert sees("local", 8, mode, 20).sum(1).tolist() == [*range(1, 9), *range(1, 9), *range(1, 5)]


def test_the_grid_is_asked_of_the_model_s_attention(monkeypatch):
    """A layer that forgets its chunks shows as one: in prefill through the attention, in decode through the cache."""
    full = by_definition("global", 8, 24)
    with monkeypatch.context() as broken:
        broken.setattr(minillama4.attention, "chunked_attention", lambda q, k, v, _: causal(q, k, v))
        assert sees("local", 8, "prefill").tolist() == full != sees("local", 8, "decode").tolist()
    with monkeypatch.context() as broken:
        broken.setattr(LayerCache, "read_through", lambda self, position: (self.k[:, :1], self.v[:, :1]))
        assert sees("local", 8, "decode").sum() == 24 != sees("local", 8, "prefill").sum()


def causal(q, k, v):
    return minillama4.attention.causal_attention(q, k, v)


def test_asking_draws_no_random_numbers():
    """A notebook's own numbers must not depend on whether a widget was looked at."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    WhoSeesWhom()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(kind="lokal"), "unknown kind 'lokal'; did you mean local"),
        (dict(mode="training"), "unknown mode 'training'; .*prefill, decode"),
        (dict(chunk=0), "chunk is 0; it must be at least 1 token"),
        (dict(token=24), "token is 24; tokens run from 0 to 23"),
        (dict(token=-1), "token is -1"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        shown(**arguments)


@pytest.mark.parametrize("tokens", [0, 7])
def test_tokens_are_an_even_number(tokens):
    with pytest.raises(ValueError, match=f"tokens is {tokens}; it must be an even number"):
        sees("local", tokens=tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Words and picture


@pytest.mark.parametrize("keys, said", [([3], "3"), ([0, 1, 2], "0 to 2"), ([0, 1, 4, 6, 7], "0 to 1, 4, 6 to 7")])
def test_ranges_in_words(keys, said):
    assert in_words(keys) == said


def test_the_first_token_of_a_chunk_sees_only_itself_and_in_a_window_it_sees_seven_more():
    assert "Token 8 sees 1 token: itself. Earlier, but out of its sight: 0 to 7." in shown("local", 8, 8).text
    assert "Token 8 sees 8 tokens: 1 to 8. Earlier, but out of its sight: 0." in shown("window", 8, 8).text
    assert "Token 8 sees 9 tokens: 0 to 8. Nothing earlier is hidden from it." in shown("global", 8, 8).text


def test_only_metas_reference_disagrees_with_itself():
    for kind in KINDS.values():
        agree = "Prefill and decode agree" in shown(kind, 5, 21).text
        assert agree == (kind != "meta")
    assert "disagree for 19 of 24 tokens: token 21 sees 2 in prefill and 22 in decode" in shown("meta", 5, 21).text
    assert "agree: each" in shown("meta", 24, 21).text  # a chunk that holds all


def colours(axes) -> list[list[str]]:
    image = axes.images[0]
    return [[to_hex(cell) for cell in row] for row in image.cmap(image.norm(image.get_array()))]


def test_the_picture_shows_the_seen_cells_and_marks_the_row():
    grid, counts = shown("meta", 8, 19, "decode").picture.axes
    cells = colours(grid)
    assert [[cell != "#ffffff" for cell in row] for row in cells] == by_definition("global", 8, 24)
    decode_only = [[j <= i and i // 8 != j // 8 for j in range(24)] for i in range(24)]
    assert [[cell == RED for cell in row] for row in cells] == decode_only
    assert [j for j, cell in enumerate(cells[19]) if cell == ORANGE] == [16, 17, 18, 19]
    (mark,) = grid.patches
    assert (mark.get_y(), mark.get_height(), mark.get_width()) == (19, 1, 24)
    assert sum(cell == ORANGE for i, row in enumerate(cells) if i != 19 for cell in row) == 0


def test_beside_the_grid_stands_how_many_each_token_sees():
    cells = colours(shown("local", 8, 11).picture.axes[1])
    wanted = [i % 8 + 1 for i in range(24)]
    assert [[cell != "#ffffff" for cell in row] for row in cells] == [[j < n for j in range(24)] for n in wanted]


def test_the_legend_names_what_is_there():
    def words(*arguments):
        return [text.get_text() for text in shown(*arguments).picture.legends[0].texts]

    assert words("local", 8, 8) == ["earlier, but not seen", "seen", "seen by the chosen token"]
    assert words("global", 8, 8) == ["seen", "seen by the chosen token"]
    assert words("meta", 8, 8, "decode")[-1] == "seen in decode only"


@pytest.mark.parametrize("kind", KINDS.values())
def test_the_picture_is_described_and_nothing_is_cut(kind):
    seen = shown(kind, 8, 9, "decode")
    assert "Token 9 sees" in seen.alt and "\n" not in seen.alt
    assert png(seen.picture)[1] <= 900
    for part in (*seen.picture.axes, *seen.picture.legends):
        box = part.get_tightbbox()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= seen.picture.bbox.x1 and box.y1 <= seen.picture.bbox.y1


# ----------------------------------------------------------------------------------------------------------------------
# The widget


def test_it_is_driven_as_a_learner_drives_it():
    widget = WhoSeesWhom()
    assert "Token 8 sees 1 token: itself" in widget.says() and "Token 8 sees 1 token" in widget.picture.value
    pictures = {widget.picture.value}
    for move, said in (
        (dict(token=11), "Token 11 sees 4 tokens: 8 to 11."),
        (dict(chunk=12), "Token 11 sees 12 tokens: 0 to 11."),
        (dict(kind="meta", token=13), "Token 13 sees 2 tokens: 12 to 13."),
        (dict(mode="decode"), "Token 13 sees 14 tokens: 0 to 13."),
    ):
        assert said in widget.drive(**move)
        pictures.add(widget.picture.value)
    assert len(pictures) == 5
    assert "Token 23 sees" in widget.drive(token=99)  # the slider ends there


def test_a_global_layer_has_no_chunk_to_choose():
    widget = WhoSeesWhom()
    for kind in KINDS.values():
        widget.drive(kind=kind)
        assert widget.controls["chunk"].disabled == (kind == "global")
