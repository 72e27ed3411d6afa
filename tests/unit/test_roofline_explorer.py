"""The roofline explorer against a study's tables, against bytes and FLOPs counted here, and as it is driven.

What is measured is made up: no stored report is read, and none is written.
"""

import json
import math
import re
from dataclasses import replace

import pytest
import traitlets

from minillama4.budget import shape
from minillama4.course.evidence import study
from minillama4.course.widgets.frame import png
from minillama4.course.widgets.roofline_explorer import (
    BATCHES,
    BESIDE,
    CONTEXTS,
    MODELS,
    PROMPTS,
    RooflineExplorer,
    attainable,
    intensity,
    ms,
    number,
    read,
    ridge,
    shown,
    side,
    stored,
    turning_batch,
    verdict,
)
from minillama4.roofline import GPUS, decode_bound, prefill_bound

FLOPS, BANDWIDTH = 790e12, {"h100": 3.35e12, "h200": 4.3e12}
SCOUT = 16_138_408_960 - 496_640  # parameters of the matrices that one token takes: without embedding and norms


def report(**changes) -> dict:
    """As `minillama4 bench gpu` would write it. 8 GB and 30 GFLOP a token, 4 TB/s: at most 500 tokens/s."""
    points = [
        {"name": "decode, batch 1", "model": "scout", "dtype": "int4", "tokens_per_second": 325.0, "bytes": 8e9,
         "flops": 30e9},
        {"name": "prompt of 8K", "model": "scout", "dtype": "int4", "tokens_per_second": 13_000, "bytes": 7e6,
         "flops": 35e9},
    ]  # fmt: skip
    card = {"device": "NVIDIA H200", "gpu": "h200", "date": "2026-01-31"}
    return {"card": card, "roofline": {"bandwidth": 4e12, "flops": 700e12}, "points": points} | changes


# ----------------------------------------------------------------------------------------------------------------------
# Bounds


@pytest.mark.parametrize(
    "gpu, model, dtype, context, said",
    [
        ("h100", "scout", "int4-meta", 0, "230"),
        ("h100", "scout", "bf16", 0, "104"),
        ("h200", "scout", "int4", 0, "501"),
        ("h200", "scout", "int4", 131_072, "265"),
        ("h200", "llama-2-7b", "bf16", 0, "325"),
        ("h100", "llama-3.1-8b", "bf16", 131_072, "104"),
        ("h200", "llama-3.1-8b", "int4-head16", 0, "904"),
        ("h200", "maverick", "int4", 1_048_576, "70.1"),
    ],
)
def test_decoding_as_the_table_has_it(gpu, model, dtype, context, said):
    seen = side(model, dtype, 1, context, 8192, gpu)
    assert number(seen.decode.tokens_per_second) == said and seen.decode.bound_by == "memory"


@pytest.mark.parametrize("prompt, rate", [(2048, 25_310), (8192, 23_077), (131_072, 16_014)])
def test_a_prompt_as_the_table_has_it(prompt, rate):
    seen = side("scout", "bf16", 1, 0, prompt, "h200").prompt
    assert seen.tokens_per_second == pytest.approx(rate, rel=1e-4) and seen.bound_by == "compute"
    assert f"at most {seen.tokens_per_second:,.0f} tokens/s" in shown("scout", "bf16", "h200", prompt=prompt).text


def test_intensity_by_hand():
    alone = decode_bound("scout", "bf16")
    assert intensity(alone) == pytest.approx(2 * SCOUT / (2 * (SCOUT + 496_640)))  # each weight once: 1 FLOP a byte
    sixteenth = 16 * (1 - (15 / 16) ** 64)  # experts that 64 tokens touch
    read_once = 3_019_898_880 + 6_039_797_760 + 3_932_160 + 1_034_485_760 + 496_640 + 48 * sixteenth * 125_829_120
    assert intensity(decode_bound("scout", "bf16", batch=64)) == pytest.approx(64 * 2 * SCOUT / (2 * read_once))
    # A dense model reads the same weights for all 64: 64 times the intensity, which experts do not reach.
    dense = [intensity(decode_bound("llama-2-7b", batch=batch)) for batch in (1, 64)]
    assert dense[1] == pytest.approx(64 * dense[0]) and intensity(decode_bound("scout", batch=64)) < 11


@pytest.mark.parametrize("gpu", BANDWIDTH)
def test_every_point_lies_on_the_roof_and_inside_the_picture(gpu):
    assert ridge(GPUS[gpu]) == pytest.approx(FLOPS / BANDWIDTH[gpu])
    for model in map(shape, (*MODELS.values(), *BESIDE.values())):
        for dtype in ("bf16", "int4-meta", "int4"):
            bounds = [decode_bound(model, dtype, c, b, gpu) for c in (0, 8192, 2**20) for b in BATCHES[::3]]
            bounds += [prefill_bound(model, dtype, prompt, gpu) for prompt in (*PROMPTS.values(),)[::2]]
            for bound in bounds:
                roof = min(BANDWIDTH[gpu] * bound.flops / bound.bytes, FLOPS)
                assert attainable(bound) == pytest.approx(roof)
                assert (bound.bound_by == "memory") == (intensity(bound) <= ridge(GPUS[gpu]))
                assert 0.4 < intensity(bound) < 1e6 and 1e11 < roof < 3e15


@pytest.mark.parametrize(
    "model, dtype, context, gpu", [("llama-2-7b", "bf16", 0, "h100"), ("scout", "int4", 0, "h100"),
                                   ("llama-3.1-70b", "fp8", 1024, "h200")],
)  # fmt: skip
def test_the_batch_from_which_compute_binds(model, dtype, context, gpu):
    found = turning_batch(shape(model), dtype, context, gpu)
    binds = [decode_bound(model, dtype, context, batch, gpu).bound_by for batch in (found - 1, found)]
    assert binds == ["memory", "compute"]
    if model == "llama-2-7b":  # 1 FLOP a byte for each sequence, and a little less for its norms
        assert found == math.ceil(FLOPS / BANDWIDTH[gpu]) == 236


def test_caches_keep_memory_the_limit_at_any_batch():
    """Each sequence reads its own cache: what is added to a batch is no more intense than that."""
    for model in ("scout", "llama-2-7b"):
        assert turning_batch(shape(model), "bf16", 8192, "h100") is None
    assert "Memory binds its decoding at every batch up to 512." in shown(context=8192).text
    assert "turns at a batch of 415: below, memory" in shown().text
    weak = replace(GPUS["h100"], flops=1e9)
    assert turning_batch(shape("scout"), "bf16", 0, weak) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Comparable to a dense 7B?


@pytest.mark.parametrize(
    "dtype, beside, beside_dtype, context, times, judged",  # from the tables: bytes of both, or tokens/s of both
    [
        ("int4-meta", "llama-2-7b", "bf16", 0, 14.53 / 13.21, "comparable"),
        ("int4", "llama-2-7b", "bf16", 0, 8.58 / 13.21, "faster"),
        ("int4", "llama-2-7b", "int4", 0, 8.58 / 3.51, "slower"),
        ("bf16", "llama-2-7b", "bf16", 0, 32.28 / 13.21, "slower"),
        ("int4-meta", "llama-3.1-8b", "int4-head16", 0, 14.53 / 4.76, "slower"),
        ("int4", "llama-3.1-8b", "bf16", 131_072, 104.1 / 206.4, "faster"),
        ("int4", "llama-3.1-8b", "int4", 131_072, 158.3 / 206.4, "faster"),
    ],
)
def test_the_claim_is_judged_by_the_format_of_both_sides(dtype, beside, beside_dtype, context, times, judged):
    text = shown("scout", dtype, context=context, beside=beside, beside_dtype=beside_dtype).text
    (said, label, word) = re.search(r"a step takes ([\d.]+) times that of (.+?): (\w+)", text).groups()
    assert float(said) == pytest.approx(times, abs=0.011) and word == judged
    assert label.endswith(f", {beside_dtype}")
    assert (f"With both in {dtype}" in text) == (dtype != beside_dtype)


@pytest.mark.parametrize(
    "ratio, word",
    [(0.79, "faster"), (0.8, "comparable"), (1, "comparable"), (1.25, "comparable"), (1.26, "slower")],
)
def test_verdict(ratio, word):
    assert verdict(ratio) == word


def test_a_bound_on_paper_is_said_to_be_one():
    assert shown(dtype="bf16").text.count("do not fit this card") == 1
    assert shown(dtype="int4").text.count("do not fit this card") == 0
    assert shown(dtype="int4", batch=512, context=8192).text.count("do not fit this card") == 2


@pytest.mark.parametrize("value, said", [(3.757, "3.76"), (390.5, "390"), (23_077.1, "23,077"), (99.94, "99.9")])
def test_numbers(value, said):
    assert number(value) == said


def test_times():
    assert [ms(each) for each in (0.00256, 0.355, 6.07)] == ["2.56 ms", "355 ms", "6.07 s"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(model="scuot"), "unknown model 'scuot'; did you mean scout"),
        (dict(dtype="int3"), "unknown dtype 'int3'"),
        (dict(beside_dtype="int3"), "unknown dtype 'int3'"),
        (dict(gpu="a100"), "unknown GPU 'a100'"),
        (dict(batch=0), "batch is 0"),
        (dict(context=-1), "context is -1"),
        (dict(prompt=0), "context is 0; a prompt has at least 1 token"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        shown(**arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Measured points


def test_as_long_as_nothing_is_measured_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    assert stored() is None and "Measured: not measured yet." in RooflineExplorer().says()
    assert read(report(points=[])) is None
    (tmp_path / "bench_gpu.json").write_text(json.dumps(report()))
    assert stored() == report() and "Measured on NVIDIA H200, 2026-01-31" in RooflineExplorer().says()


def test_measured_points_stand_under_the_roof_of_their_own_run():
    text = shown(gpu="h200", report=report()).text
    assert "Measured on NVIDIA H200, 2026-01-31, under a roof of 4 TB/s and 700 TFLOP/s" in text
    assert "decode, batch 1, int4: 325 tokens/s, 65% of its bound" in text  # 325 of 4e12 / 8e9
    assert "prompt of 8K, int4: 13,000 tokens/s, 65% of its bound" in text  # 13,000 of 700e12 / 35e9
    figure = shown(gpu="h200", report=report()).picture
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["measured"] == [[30e9 / 8e9, 325 * 30e9], [35e9 / 7e6, 13_000 * 35e9]]
    assert lines["roof as measured"] == [[0.4, 1.6e12], [175, 700e12], [1e6, 700e12]]
    without = report(roofline={})
    assert (
        read(without).roof == GPUS["h200"]
        and "roof of 4.3 TB/s and 790 TFLOP/s" in shown(gpu="h200", report=without).text
    )


def test_points_of_another_card_or_model_are_not_drawn():
    for arguments, said in (
        (dict(gpu="h100"), "Measured on NVIDIA H200, 2026-01-31: choose card H200 to see it."),
        (dict(gpu="h200", model="maverick"), "2026-01-31: not this model, but scout."),
    ):
        seen = shown(report=report(), **arguments)
        assert said in seen.text
        assert not {"measured", "roof as measured"} & {line.get_label() for line in seen.picture.axes[0].lines}


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(flops=0), "flops of the measured point 'decode' is 0; it must be above 0"),
        (dict(bytes=math.nan), "bytes of the measured point 'decode' is nan"),
        (dict(tokens_per_second="fast"), "tokens_per_second of the measured point 'decode' is 'fast'"),
        (dict(model="scuot"), "unknown model 'scuot'"),
        (dict(dtype="int3"), "unknown dtype 'int3'"),
        (dict(bytes=None, drop="bytes"), "lacks 'bytes'; run `minillama4 bench gpu` again"),
    ],
)
def test_a_report_that_makes_no_sense_is_refused(change, said):
    point = dict(name="decode", model="scout", dtype="int4", tokens_per_second=1.0, bytes=1.0, flops=1.0) | change
    point.pop(point.pop("drop", None), None)
    with pytest.raises(ValueError, match=said):
        read(report(points=[point]))
    assert re.search(said, RooflineExplorer(report=report(points=[point])).says())


def test_a_report_without_its_card_is_refused():
    with pytest.raises(ValueError, match="lacks 'date'"):
        read(report(card={"device": "NVIDIA H200", "gpu": "h200"}))
    with pytest.raises(ValueError, match="unknown GPU 'a100'"):
        read(report(card={"device": "x", "gpu": "a100", "date": "y"}))


# ----------------------------------------------------------------------------------------------------------------------
# Picture and widget


def test_points_and_bars_are_the_numbers():
    roof, bars = shown(batch=8, context=1024, prompt=512).picture.axes
    lines = {line.get_label(): line.get_xydata() for line in roof.lines}
    scout, dense = decode_bound("scout", "int4", 1024, 8), prefill_bound("llama-2-7b", "bf16", 512)
    assert lines["Llama 4 Scout: decoding"].tolist() == [[intensity(scout), attainable(scout)]]
    assert lines["Llama 2 7B: prompt"].tolist() == [[intensity(dense), attainable(dense)]]
    assert lines["batch 1 to 512"][3].tolist() == [intensity(scout), attainable(scout)]
    assert len(lines["batch 1 to 512"]) == 10 and len(lines["prompt of 128 to 128K"]) == 11
    mine = [bar.get_width() for bar in bars.containers[0]]
    other = {line.get_label(): line.get_xdata() for line in bars.lines}
    assert mine[-1] == pytest.approx(scout.seconds * 1e3)
    assert (
        other["Llama 2 7B, bf16"][0]
        == other["Llama 2 7B, same format: ×"][0]
        == pytest.approx(decode_bound("llama-2-7b", "bf16", 1024, 8).seconds * 1e3)
    )
    ratios = [each / square for each, square in zip(mine, other["Llama 2 7B, same format: ×"], strict=True)]
    assert [label.get_text() for label in bars.texts] == [f"{ratio:.2f}×" for ratio in ratios]
    assert bars.get_title() == "decoding: ms a step, at least"


def test_long_steps_are_in_seconds():
    bars = shown("llama-2-7b", "bf16", batch=64, context=131_072).picture.axes[1]
    step = decode_bound("llama-2-7b", "bf16", 131_072, 64).seconds
    assert bars.containers[0][0].get_width() == pytest.approx(step) and step > 1
    assert bars.lines[0].get_xdata()[0] == pytest.approx(step) and bars.get_title() == "decoding: s a step, at least"


@pytest.mark.parametrize(
    "arguments",
    [
        dict(),
        dict(gpu="h200", report=report(), batch=64, context=8192, prompt=131_072),
        dict(model="behemoth-estimate", dtype="int4-head16", beside="llama-3.1-8b", beside_dtype="int4"),
        dict(model="llama-2-7b", dtype="bf16", beside_dtype="int4-head16", context=2**20, batch=512),
    ],
)
def test_the_picture_is_described_and_nothing_is_cut(arguments):
    seen = shown(**arguments)
    figure = seen.picture
    assert seen.text.splitlines()[0] in seen.alt and "\n" not in seen.alt and png(figure)[1] <= 900
    for axes in figure.axes:
        box, legend = axes.get_tightbbox(), axes.get_legend().get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert axes.bbox.x0 <= legend.x0 and legend.x1 <= axes.bbox.x1
        words = [label.get_window_extent() for label in axes.texts]
        assert all(axes.bbox.x0 <= each.x0 and each.x1 <= axes.bbox.x1 for each in words)
        assert not any(each.overlaps(legend) for each in words)
        for line in axes.lines:
            drawn = line.get_marker() not in ("None", None)
            points = axes.transData.transform(line.get_xydata()) if drawn else []
            assert not any(legend.contains(*point) for point in points)
            assert all(axes.bbox.contains(*point) for point in points)
    roof, bars = figure.axes
    assert roof.get_tightbbox().x1 < bars.get_tightbbox().x0


def test_every_control_changes_what_it_says_and_draws():
    widget = RooflineExplorer()
    said, drawn = {widget.says()}, {widget.picture.value}
    moves = dict(batch=8, context=8192, prompt=128, beside_dtype="int4", dtype="int4-meta", gpu="h200")
    moves |= dict(beside="llama-3.1-8b", model="maverick")
    assert set(moves) == set(widget.controls)
    for count, (name, value) in enumerate(moves.items(), start=2):
        said.add(widget.drive(**{name: value}))
        drawn.add(widget.picture.value)
        assert len(said) == len(drawn) == count, name
    with pytest.raises(traitlets.TraitError):
        widget.drive(batch=3)


def test_what_can_be_chosen():
    assert list(PROMPTS.items())[:4] == [("128", 128), ("256", 256), ("512", 512), ("1K", 1024)]
    assert list(PROMPTS.items())[-1] == ("128K", 131_072) and (BATCHES[0], BATCHES[-1]) == (1, 512)
    assert list(CONTEXTS)[:2] + list(CONTEXTS)[-2:] == ["none", "1K", "128K", "1M"]
