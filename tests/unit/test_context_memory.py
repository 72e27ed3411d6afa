"""Context memory against the fact sheet's table, against tensors that the model's cache holds, and as it is driven."""

import math
import re
from dataclasses import replace

import pytest
import torch
import traitlets

from minillama4.cache import KVCache
from minillama4.config import Llama4Config
from minillama4.course.widgets.context_memory import CONTEXTS, PRESETS, ContextMemory, gib, memory, shown
from minillama4.course.widgets.frame import ORANGE, png

GIB = 2**30
H100, H200 = 81_559 * 2**20 - 3e9, 143_771 * 2**20 - 3e9  # bytes that a card has left
TABLE = {  # tokens -> GiB: chunk in bf16, chunk in fp8, all layers full in bf16 (fact sheet, section 8)
    131_072: (7.125, 3.5625, 24),
    262_144: (13.125, 6.5625, 48),
    1_048_576: (49.125, 24.5625, 192),
    10_485_760: (481.125, 240.5625, 1920),
}


# ----------------------------------------------------------------------------------------------------------------------
# Bytes


@pytest.mark.parametrize("preset", ["scout", "maverick"])
@pytest.mark.parametrize("tokens", TABLE)
def test_the_table_of_the_fact_sheet(preset, tokens):
    bf16, fp8, naive = TABLE[tokens]
    assert memory(preset, tokens).total == bf16 * GIB
    assert memory(preset, tokens, dtype="fp8").total == fp8 * GIB
    assert memory(preset, tokens, "full").total == naive * GIB
    text = shown(preset, tokens).text
    assert f"KV cache {bf16:g} GiB" in text and f"all layers full: {naive:,} GiB" in text


def test_the_local_layers_stop_at_one_chunk_and_the_others_grow():
    assert memory("scout", 2**20).local == memory("scout", 10_485_760).local == 1_207_959_552
    assert memory("scout", 4096).local == 1_207_959_552 / 2
    assert memory("scout", 2**20).whole == 48 * GIB == memory("scout", 2**20, "full").whole
    assert memory("scout", 2**20, "full").local == 144 * GIB


@pytest.mark.parametrize("policy", ["chunk", "full"])
@pytest.mark.parametrize("preset, tokens", [("scout", 1024), ("maverick", 65_536), ("scout", 10_485_760)])
def test_as_many_bytes_as_the_models_own_cache_reserves(preset, tokens, policy):
    text = Llama4Config.preset(preset).text
    if policy == "full":
        text = replace(text, chunk_size=None)
    cache = KVCache(text, 1, tokens, "meta", torch.bfloat16)
    local = sum(each.k.nbytes + each.v.nbytes for i, each in enumerate(cache.layers) if i % 4 != 3)
    assert memory(preset, tokens, policy).total == cache.nbytes
    assert memory(preset, tokens, policy).local == local


@pytest.mark.parametrize("preset, values", [("llama-3.1-8b", 32 * 2048), ("deepseek-v3", 61 * 576)])
def test_models_without_local_layers(preset, values):
    for policy in ("chunk", "full"):
        assert memory(preset, 5000, policy).total == 5000 * values * 2
        assert memory(preset, 5000, policy).local == 0
    assert "No layer is local, so both policies are the same." in shown(preset).text


@pytest.mark.parametrize("size, said", [(481.125, "481.125 GiB"), (1920, "1,920 GiB"), (0.1875, "0.1875 GiB")])
def test_gib_are_exact_and_without_idle_zeros(size, said):
    assert gib(int(size * GIB)) == said


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(preset="scuot"), "unknown model 'scuot'; did you mean scout"),
        (dict(policy="half"), "unknown policy 'half'; .*chunk, full"),
        (dict(dtype="int3"), "unknown KV dtype 'int3'; .*bf16, fp8"),
        (dict(weights="int3"), "unknown dtype 'int3'"),
        (dict(context=-1), "context is -1; it must be at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        shown(**arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Cards, words, picture


@pytest.mark.parametrize("policy", ["chunk", "full"])
@pytest.mark.parametrize("tokens", [1024, 2**20, 10_485_760])
def test_cards_hold_weights_and_cache_together(tokens, policy):
    cache = {"chunk": 48 * 1024 * tokens + 144 * 1024 * min(tokens, 8192), "full": 192 * 1024 * tokens}
    size = 2 * 108_641_793_536 + cache[policy]
    text = shown("scout", tokens, policy).text
    assert f"{size / 1e9:,.1f} GB, which {math.ceil(size / H100)} H100 or {math.ceil(size / H200)} H200" in text
    labels = [label.get_text() for label in shown("scout", tokens, policy).picture.axes[1].texts]
    for label, of in zip(labels, ("chunk", "full"), strict=True):
        size = 2 * 108_641_793_536 + cache[of]
        assert label.endswith(f": {math.ceil(size / H100)} H100 or {math.ceil(size / H200)} H200")
        assert label.startswith("▸") == (of == policy)


def test_ten_million_tokens_of_scout():
    text = shown("scout", 10_485_760).text
    assert "481.125 GiB (516.6 GB)" in text and "1,920 GiB, 3.99 times as much" in text
    assert "36 local layers (chunks of 8,192): 1.125 GiB. 12 layers that see the whole context: 480 GiB" in text
    assert "48 KiB for each token" in text and "24 KiB for each token" in shown("scout", dtype="fp8").text
    assert "published no shape" in shown("behemoth-estimate").text and "published" not in text


def test_formats_of_cache_and_weights_are_apart():
    text = shown("scout", 2**20, dtype="fp8", weights="int4").text
    assert "24.5625 GiB" in text and "in fp8" in text
    weights = re.search(r"Weights in int4: ([\d.]+) GB", text)[1]
    assert 55 < float(weights) < 66 and "Weights in bf16: 217.3 GB (202.4 GiB)" in shown().text


def test_both_curves_on_logarithmic_axes_and_this_context_on_the_chosen_one():
    for policy, wanted in (("chunk", 7.125), ("full", 24)):
        axes = shown("scout", 131_072, policy).picture.axes[0]
        assert axes.get_xscale() == axes.get_yscale() == "log"
        chunk, full, point = axes.lines[:3]
        assert list(chunk.get_xdata()) == list(full.get_xdata()) == [2**p for p in range(10, 24)] + [10_485_760]
        for x, one, all_ in zip(chunk.get_xdata(), chunk.get_ydata(), full.get_ydata(), strict=True):
            assert one * GIB == 48 * 1024 * x + 144 * 1024 * min(x, 8192) and all_ * GIB == 192 * 1024 * x
        assert (point.get_xdata()[0], point.get_ydata()[0]) == (131_072, wanted)
        assert point.get_color() == ORANGE and chunk.get_linestyle() != full.get_linestyle()


def test_the_bars_are_weights_and_both_kinds_of_layer_end_to_end():
    bars = shown("scout", 2**20, weights="bf16").picture.axes[1].patches
    widths = [(bar.get_x(), bar.get_width()) for bar in bars]
    weight = 2 * 108_641_793_536 / GIB
    flat = [number for pair in widths for number in pair]
    wanted = [0, weight, 0, weight, weight, 48, weight, 48, weight + 48, 1.125, weight + 48, 144]
    assert flat == pytest.approx(wanted)


@pytest.mark.parametrize("tokens", [1024, 10_485_760])
@pytest.mark.parametrize("preset", PRESETS.values())
def test_the_picture_is_described_and_nothing_is_cut(preset, tokens):
    seen = shown(preset, tokens, "full")
    figure = seen.picture
    assert seen.text.splitlines()[0] in seen.alt and png(figure)[1] <= 900
    for axes in figure.axes:
        box, legend = axes.get_tightbbox(), axes.get_legend().get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert axes.bbox.x0 <= legend.x0 and legend.x1 <= axes.bbox.x1
        assert all(text.get_window_extent().x1 <= axes.bbox.x1 for text in axes.texts)
        assert all(text.get_window_extent().y1 <= legend.y0 for text in axes.texts)
    curves = figure.axes[0]
    points = [curves.transData.transform(line.get_xydata()) for line in curves.lines[:3]]
    assert max(y for line in points for _, y in line) < curves.get_legend().get_window_extent().y0
    assert all(curves.bbox.y0 < y for line in points for _, y in line)


# ----------------------------------------------------------------------------------------------------------------------
# The widget


def test_every_control_changes_what_it_says_and_draws():
    widget = ContextMemory()
    assert widget.says().startswith("Llama 4 Scout, one sequence of 1,048,576 tokens, local layers keep one chunk")
    said, drawn = {widget.says()}, {widget.picture.value}
    moves = dict(context=10_485_760, policy="full", dtype="fp8", weights="int4", preset="llama-3.1-8b")
    for number, (name, value) in enumerate(moves.items(), start=2):
        said.add(widget.drive(**{name: value}))
        drawn.add(widget.picture.value)
        assert len(said) == len(drawn) == number, name
    assert "KV cache 640 GiB" in widget.says()


def test_contexts_are_powers_of_two_from_1k_and_10m():
    assert list(CONTEXTS.values()) == [2**p for p in range(10, 24)] + [10 * 2**20]
    assert list(CONTEXTS)[:2] + list(CONTEXTS)[-2:] == ["1K", "2K", "8M", "10M"]
    with pytest.raises(traitlets.TraitError):
        ContextMemory().drive(context=3)


def test_every_preset_is_shown():
    widget = ContextMemory()
    for label, preset in PRESETS.items():
        assert widget.drive(preset=preset).startswith(f"{label}, one sequence")
