"""The cost calculator against published sizes and against sums written out here, and driven as a learner drives it."""

import math
import random
import re

import pytest
import traitlets
from matplotlib.colors import to_hex

from minillama4.course.widgets import cost_calculator
from minillama4.course.widgets.cost_calculator import BATCHES, CostCalculator, cards, design, shown, sizes
from minillama4.course.widgets.frame import BLUE, png

TOTALS = {  # published, or counted by Hugging Face's classes
    "scout": 108_641_793_536,
    "maverick": 401_583_781_376,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_419_200,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
}
H100, H200 = 81_559 * 2**20 - 3e9, 143_771 * 2**20 - 3e9  # bytes for weights


def numbers(text: str) -> list[int]:
    """The numbers of at least a million in a text."""
    return [int(found.replace(",", "")) for found in re.findall(r"\d{1,3}(?:,\d{3}){2,}", text)]


def of(preset: str, dtype: str = "bf16", gpu: str = "h200", batch: int = 8, **fields):
    return shown(design(preset, **fields), "it", dtype, gpu, batch)


def line(axes, label: str):
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return dict(zip(map(int, found.get_xdata()), found.get_ydata(), strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# From fields to a model


@pytest.mark.parametrize("preset", TOTALS)
def test_a_preset_s_own_fields_give_its_published_total(preset):
    """So the fields are enough: layers, widths, experts, and which layers have them."""
    assert numbers(of(preset, **sizes(preset)).text)[0] == TOTALS[preset]


def test_the_estimate_of_behemoth_has_its_two_published_sizes_and_says_that_it_is_one():
    text = of("behemoth-estimate", **sizes("behemoth-estimate")).text
    total, active = numbers(text)[:2]
    assert total == pytest.approx(2e12, rel=0.01) and active == pytest.approx(288e9, rel=0.01)
    assert "published no shape" in text


def test_17b_active_in_both_llama_4():
    assert numbers(of("scout").text)[1] == 17_172_894_720 and numbers(of("maverick").text)[1] == 17_184_691_200


def test_the_fields_of_the_presets():
    maverick, deepseek, dense = sizes("maverick"), sizes("deepseek-v3"), sizes("llama-3.1-8b")
    assert (maverick["interleave"], maverick["first_dense"], maverick["experts"], maverick["top_k"]) == (2, 0, 128, 1)
    assert (deepseek["interleave"], deepseek["first_dense"], deepseek["experts"], deepseek["top_k"]) == (1, 3, 256, 8)
    assert dense["experts"] == 0 and dense["dense_width"] == 14_336
    assert set(maverick) == set(cost_calculator.FIELDS)


def test_every_preset_lies_inside_the_ranges_of_the_fields():
    """A field that clamped would show another model."""
    for preset in cost_calculator.PRESETS.values():
        for name, value in sizes(preset).items():
            _, least, most, _, _ = cost_calculator.FIELDS[name]
            assert least <= value <= most, (preset, name)


@pytest.mark.parametrize("seed", range(5))
def test_the_total_of_any_sizes_is_the_sum_of_the_matrices(seed):
    """Written out layer by layer for Llama 4's parts, with 40 + 8 heads of 128."""
    draw = random.Random(seed)
    layers, hidden, experts = draw.randint(4, 60), 128 * draw.randint(1, 60), draw.randint(3, 70)
    wide, expert_width, top_k, shared = (
        128 * draw.randint(1, 99),
        128 * draw.randint(1, 99),
        draw.randint(1, 3),
        seed % 3,
    )
    interleave, first_dense = draw.randint(1, 4), draw.randint(0, 5)
    total = active = 2 * 202_048 * hidden + hidden
    for layer in range(layers):
        both = hidden * (2 * 5120 + 2 * 1024) + 2 * hidden
        if layer >= first_dense and (layer + 1) % interleave == 0:
            one = 3 * hidden * expert_width
            total += both + hidden * experts + (experts + shared) * one
            active += both + hidden * experts + (top_k + shared) * one
        else:
            total, active = total + both + 3 * hidden * wide, active + both + 3 * hidden * wide
    total += 850_960_896 + 4096 * hidden  # vision stays, its projector ends in the hidden size
    fields = dict(layers=layers, hidden=hidden, experts=experts, top_k=top_k, shared=shared, dense_width=wide)
    fields |= dict(interleave=interleave, first_dense=first_dense, expert_width=expert_width)
    assert numbers(of("scout", **fields).text)[:2] == [total, active]


@pytest.mark.parametrize(
    "preset, fields, said",
    [
        ("scout", dict(top_k=17), "top_k is 17; with 16 experts it must be 1 to 16"),
        ("llama-3.1-8b", dict(experts=4), "expert_width is 0; 32 layers have experts"),
        ("mixtral-8x7b", dict(interleave=2), "dense_width is 0; 16 layers have no experts"),
        ("mixtral-8x7b", dict(experts=0), "dense_width is 0; 32 layers have no experts"),
        ("scout", dict(layers=0), "layers is 0; it must be 1 to 500"),
        ("scout", dict(shared=-1), "shared is -1; it must be 0 to 8"),
        ("scout", dict(depth=3), "unknown field 'depth'"),
        ("scuot", {}, "unknown model 'scuot'; did you mean scout"),
    ],
)
def test_sizes_that_make_no_model_are_refused(preset, fields, said):
    with pytest.raises(ValueError, match=said):
        design(preset, **fields)


def test_an_unknown_card_or_format_is_refused():
    with pytest.raises(ValueError, match="unknown GPU 'a100'; .*h100"):
        of("scout", gpu="a100")
    with pytest.raises(ValueError, match="unknown dtype 'int3'; .*int4"):
        of("scout", dtype="int3")
    with pytest.raises(ValueError, match="tokens is 0"):
        of("scout", batch=0)


# ----------------------------------------------------------------------------------------------------------------------
# Memory and cards


def test_weights_by_format_are_bits_times_parameters():
    embedding, attention, expert = 202_048 * 5120, 62_914_560 * 48, 125_829_120 * 48
    sixteen = embedding + 48 * 10_240 + 5120 + 3_932_160 + 850_960_896 + 20_971_520  # at 16 bits in every format
    wanted = {
        "bf16": 2 * 108_641_793_536,
        "fp8": 2 * sixteen + embedding + attention + 17 * expert,
        "fp8-mixed": 2 * (sixteen + embedding + attention + expert) + 16 * expert,
        "int4-meta": 2 * (sixteen + embedding + attention) + 17 * expert * 4.25 / 8,
        "int4": 2 * sixteen + (embedding + attention + 17 * expert) * 4.25 / 8,
    }
    text = of("scout").text
    for fmt, size in wanted.items():
        needs = f"{math.ceil(size / H100)} H100 or {math.ceil(size / H200)} H200"
        assert f"{fmt} {size / 1e9:,.1f} GB ({needs})" in text
    bars = of("scout", dtype="fp8").picture.axes[0]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([size / 1e9 for size in wanted.values()])
    assert [to_hex(bar.get_facecolor()) == BLUE for bar in bars.patches] == [False, True, False, False, False]
    assert [label.get_text() for label in bars.get_yticklabels()] == list(wanted)


def test_scout_fits_one_h100_in_int4_only_and_maverick_never():
    text, maverick = of("scout").text, of("maverick").text
    assert re.search(r"bf16 217.3 GB \(3 H100 or 2 H200\)", text)
    assert re.search(r"int4-meta 66\.\d GB \(1 H100 or 1 H200\)", text)
    assert " fp8 1" in text and not re.search(r" fp8 [\d.]+ GB \(1 H100", text)
    assert "(1 H100" not in maverick and "bf16 803.2 GB (10 H100 or 6 H200)" in maverick


def test_cards_are_filled_but_for_the_reserve():
    assert [cards(weights, "h100") for weights in (1, H100, H100 + 1, 3 * H100)] == [1, 1, 2, 3]
    assert cards(H100 + 1, "h200") == 1 and cards(H200 + 1, "h200") == 2


# ----------------------------------------------------------------------------------------------------------------------
# A batch, and the roofline


@pytest.mark.parametrize("preset, experts, top_k", [("scout", 16, 1), ("mixtral-8x7b", 8, 2), ("maverick", 128, 1)])
def test_experts_touched_as_drawn_at_random(preset, experts, top_k):
    draw, batch, times = random.Random(0), 16, 3000
    drawn = [{e for _ in range(batch) for e in draw.sample(range(experts), top_k)} for _ in range(times)]
    (said,) = re.findall(rf"16 tokens touches ([\d.]+) of {experts} experts", of(preset, batch=batch).text)
    assert float(said) == pytest.approx(sum(map(len, drawn)) / times, abs=0.15)


def test_the_numbers_that_the_lesson_names():
    """Facts, section 6, and performance anchors 3.7: Scout on an H200."""
    assert "8 tokens touches 6.5 of 16" in of("scout").text and "64 tokens touches 15.7" in of("scout", batch=64).text
    assert "A batch of 1 token touches 1.0 of 16" in of("scout", batch=1).text
    said = of("scout").text
    assert "at least 436 µs on an H200 141 GB with bf16 weights, bound by bytes" in said
    assert "with every expert on every token 995 µs, 2.3 times as long" in said
    assert "5.22 ms on an H200 141 GB with bf16 weights, bound by FLOPs" in of("scout", batch=8192).text
    assert "116 µs" in of("scout", "int4").text


@pytest.mark.parametrize("gpu, bandwidth", [("h100", 3.35e12), ("h200", 4.3e12)])
def test_the_roofs_are_bytes_over_bandwidth_and_flops_over_rate(gpu, bandwidth):
    axes = of("scout", gpu=gpu, batch=64).picture.axes[1]
    expert = 3 * 5120 * 8192
    by_bytes, by_flops = line(axes, "chosen experts: bytes"), line(axes, "chosen experts: FLOPs")
    every = line(axes, "every expert")
    for tokens in BATCHES:
        touched = 16 - 16 * (15 / 16) ** tokens
        moved = 2 * (touched + 1) * expert + 12 * tokens * 5120
        assert by_bytes[tokens] == pytest.approx(moved / bandwidth)
        assert by_flops[tokens] == pytest.approx(tokens * 2 * 2 * expert / 790e12)
        assert every[tokens] == pytest.approx(max(17 * 2 * expert / bandwidth, tokens * 17 * 2 * expert / 790e12))
    assert line(axes, "this batch") == {64: max(by_bytes[64], by_flops[64])}
    assert axes.get_xscale() == axes.get_yscale() == "log" and gpu.upper() in axes.get_title()


def test_the_format_moves_the_bytes_and_not_the_flops():
    bf16, int4 = (of("scout", dtype).picture.axes[1] for dtype in ("bf16", "int4"))
    assert line(bf16, "chosen experts: FLOPs") == line(int4, "chosen experts: FLOPs")
    ratio = line(bf16, "chosen experts: bytes")[1] / line(int4, "chosen experts: bytes")[1]
    assert ratio == pytest.approx(16 / 4.25, rel=0.01)


def test_a_dense_model_has_no_roofline_and_says_why():
    seen = of("llama-3.1-405b")
    assert "No layer has experts" in seen.text and "126 layers, all dense" in seen.text
    assert [text.get_text() for text in seen.picture.axes[1].texts] == ["no layer has experts"]
    assert not seen.picture.axes[1].lines


def test_every_assumption_is_said():
    said = of("scout", "int4-meta", "h100").text
    for part in (
        "even routing",
        "62.9M parameters a layer",
        "3 GB of each kept free",
        "KV cache comes on top",
        "790 TF",
    ):
        assert part in said
    assert "3.35 TB/s" in said and "4.3 TB/s" in of("scout").text
    assert "routed and shared experts, as Meta's code does it" in said
    assert "second token" in of("deepseek-v3").text  # what its count leaves out


# ----------------------------------------------------------------------------------------------------------------------
# The picture


def test_the_picture_is_described_and_fits_a_notebook_column():
    seen = of("maverick")
    for part in ("bf16 803.2 GB (10 H100 or 6 H200)", "8 tokens touches 7.8 of 128 experts", "bound by bytes"):
        assert part in seen.text and part in seen.alt
    assert png(seen.picture)[1] <= 900


@pytest.mark.parametrize("preset", cost_calculator.PRESETS.values())
def test_no_label_is_cut_and_the_legend_lies_above_the_curves(preset):
    figure = of(preset, "fp8-mixed", "h100").picture
    figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    bars, roofs = figure.axes
    assert all(text.get_window_extent().x1 <= bars.bbox.x1 for text in bars.texts)
    if legend := roofs.get_legend():
        box = legend.get_window_extent()
        assert roofs.bbox.x0 <= box.x0 and box.x1 <= roofs.bbox.x1
        curves = [curve.get_transform().transform(curve.get_xydata()) for curve in roofs.lines]
        under = [y for points in curves for x, y in points if box.x0 <= x <= box.x1]
        assert max(under) < box.y0


# ----------------------------------------------------------------------------------------------------------------------
# The widget


@pytest.fixture
def calculator() -> CostCalculator:
    return CostCalculator()


def test_it_begins_with_scout(calculator):
    said = calculator.says()
    assert said.startswith("Llama 4 Scout: 48 layers, 48 of them with 16 experts; a token takes 1 routed + 1 shared.")
    assert numbers(said)[:2] == [108_641_793_536, 17_172_894_720]
    assert 'alt="Llama 4 Scout. Bars: gigabytes' in calculator.picture.value


def test_a_preset_fills_every_field(calculator):
    for preset, total in TOTALS.items():
        said = calculator.drive(preset=preset)
        assert {name: calculator.controls[name].value for name in cost_calculator.FIELDS} == sizes(preset)
        assert numbers(said)[0] == total and " with layers" not in said.splitlines()[0]


def test_each_field_counts_and_is_named_as_changed(calculator):
    before = numbers(calculator.drive(preset="maverick"))[:2]
    changes = dict(layers=47, hidden=4096, dense_width=8192, experts=8, expert_width=4096, top_k=2, shared=0)
    for name, value in changes.items():
        said = calculator.drive(**{name: value})
        assert f"{cost_calculator.FIELDS[name][0]} {value:,}" in said.partition(":")[0]
        now = numbers(said)[:2]
        assert now != before, name
        before = now
    assert said.startswith("Llama 4 Maverick with layers 47, width 4,096, dense width 8,192, experts 8,")


def test_which_layers_have_experts(calculator):
    assert "48 layers, 24 of them with 128 experts, 24 dense" in calculator.drive(preset="maverick")
    assert "48 layers, 48 of them with 128 experts;" in calculator.drive(interleave=1)
    assert "48 layers, 22 of them with 128 experts, 26 dense" in calculator.drive(interleave=2, first_dense=4)


def test_batch_format_and_card_change_what_it_says_and_draws(calculator):
    seen = {calculator.picture.value}
    assert "64 tokens touches 15.7" in calculator.drive(batch=64)
    seen.add(calculator.picture.value)
    assert "with int4 weights" in calculator.drive(dtype="int4")
    seen.add(calculator.picture.value)
    assert "an H100 80 GB" in calculator.drive(gpu="h100")
    seen.add(calculator.picture.value)
    assert len(seen) == 4


def test_fields_are_clamped_and_what_makes_no_model_is_said(calculator):
    calculator.drive(layers=10_000)
    assert calculator.controls["layers"].value == 500
    assert calculator.drive(preset="mixtral-8x7b", experts=1).startswith("top_k is 2; with 1 experts")
    assert calculator.picture.value == ""
    assert calculator.drive(top_k=1).startswith("Mixtral 8x7B with experts 1, top-k 1:")
    with pytest.raises(traitlets.TraitError):
        calculator.drive(batch=3)
