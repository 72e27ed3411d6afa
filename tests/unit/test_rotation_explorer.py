"""The explorer against angles turned step by step, against a whole softmax, and driven as a learner drives it."""

import cmath
import math
import re
import time

import pytest
import torch

from minillama4.course.widgets.frame import png
from minillama4.course.widgets.rotation_explorer import (
    KEYS,
    RotationExplorer,
    attended,
    crowds,
    logits,
    margin_for_half,
    rotation,
    shown,
)


def radians(pair: int, scaled: bool) -> float:
    """Of one token: theta 500,000, 128 channels; Scout divides pairs 35 to 63 by 16 (fact sheet, section 1.3)."""
    return 500_000 ** (-2 * pair / 128) / (16 if scaled and pair >= 35 else 1)


def heat(keys: int) -> float:
    return 1 + 0.1 * math.log(1 + keys // 8192)  # the last of them asks: its position is keys - 1


# ----------------------------------------------------------------------------------------------------------------------
# Rotation


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("pair", [0, 20, 34, 35, 40, 63])
def test_the_angle_is_what_so_many_single_steps_turn(pair, scaled):
    step = cmath.exp(1j * radians(pair, scaled))
    turned = 1
    for _ in range(777):
        turned *= step
    angle = math.degrees(cmath.phase(turned)) % 360
    assert abs((rotation(pair, 777, scaled).angle - angle + 180) % 360 - 180) < 1e-6
    assert rotation(pair, 1, scaled).wavelength == pytest.approx(2 * math.pi / radians(pair, scaled))


def test_wavelengths_of_the_fact_sheet():
    assert round(rotation(34, 1).wavelength) == 6695 == round(rotation(34, 1, False).wavelength)
    assert round(rotation(35, 1, False).wavelength) == 8219 and rotation(35, 1).wavelength > 130_000
    stretched = [pair for pair in range(64) if rotation(pair, 1).wavelength != rotation(pair, 1, False).wavelength]
    assert stretched == list(range(35, 64))


def test_precise_at_ten_million_tokens():
    """A float32 product would be off by half a radian."""
    exact = math.fmod(10_485_760 * radians(0, True), 2 * math.pi)
    assert rotation(0, 10_485_760).angle == pytest.approx(math.degrees(exact), abs=1e-3)


@pytest.mark.parametrize("scaled", [True, False])
def test_known_angles_as_found_by_trying_every_distance(scaled):
    """For slow and fast pairs: is there a distance in training whose angle is within the step of one token?"""
    for pair in (3, 34, 45, 52, 58, 63):
        step = radians(pair, scaled)
        tried = torch.arange(262_144, dtype=torch.float64) * step % (2 * math.pi)
        for distance in (100, 262_143, 2**20, 2**22, 10_485_760):
            angle = distance * step % (2 * math.pi)
            gap = (tried - angle).abs()
            known = bool(torch.minimum(gap, 2 * math.pi - gap).min() <= 0.5001 * step)
            one = rotation(pair, distance, scaled)
            assert one.knows(one.in_training) == known, (pair, distance)


def test_a_chunk_ends_at_8191_and_training_at_262143():
    one = rotation(50, 8191)
    assert one.turned == pytest.approx(one.in_chunk) and rotation(50, 262_143).turned == pytest.approx(one.in_training)


def test_words_about_a_distance():
    text = shown(63, 2**20, True).text
    assert "Pair 63 (channels 126 and 127) turns once in 40,947,128 tokens with Scout's scaling" in text
    assert "(2,559,196 without it)" in text and "so that this distance never occurs" in text
    assert "There the pair takes angles from 0 to 0.1°" in text and "its angle would be new" in text
    near = shown(20, 100, True).text
    assert "(the same without it)" in near and "so that this distance occurs" in near
    assert "takes every angle" in near and "its angle would be known" in near
    assert "so that this distance never occurs" in shown(20, 8192).text


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(pair=64), "pair is 64; rotary pairs run from 0 to 63"),
        (dict(pair=-1), "pair is -1"),
        (dict(distance=-1), "distance is -1; it must be at least 0"),
        (dict(keys=1000), "keys is 1000; drawn were 16, 32"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        shown(**arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Temperature


@pytest.mark.parametrize("margin", [0.0, 3.5, 10.0, 20.0])
@pytest.mark.parametrize("keys", [16, 4096, 8192, 2**17, 2**20])
@pytest.mark.parametrize("tuned", [True, False])
def test_share_and_entropy_are_those_of_the_whole_softmax(tuned, keys, margin):
    z = torch.cat([torch.tensor([margin], dtype=torch.float64), logits()[: keys - 1]])
    p = (z * (heat(keys) if tuned else 1)).softmax(0)
    one = attended(keys, margin, tuned)
    assert one.share == pytest.approx(float(p[0]), rel=1e-5)
    assert one.entropy == pytest.approx(float(torch.special.entr(p).sum()) / math.log(2), rel=1e-4, abs=1e-6)


def test_temperature_begins_with_the_8192nd_token():
    for keys in KEYS:
        same = attended(keys, 8.0, True) == attended(keys, 8.0, False)
        assert same == (keys < 8192), keys
    assert [round(crowds()[True][keys].heat, 6) for keys in (4096, 8192, 262_144, 2**20)] == [
        1.0,
        1.069315,
        1.349651,
        1.485981,
    ]


def test_a_crowd_drowns_the_needle_and_temperature_lifts_it():
    flat = [attended(keys, 12.0, False).share for keys in KEYS]
    assert flat == sorted(flat, reverse=True) and flat[0] > 0.999 and flat[-1] < 0.1
    assert attended(2**20, 12.0, True).share > 0.9
    assert attended(2**20, 12.0, True).entropy < attended(2**20, 12.0, False).entropy
    assert attended(2**20, 1.0, True).share < 1e-3  # what does not stand out is not found


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize("keys", [1024, 2**20])
def test_the_margin_for_half_gives_half(keys, tuned):
    assert attended(keys, margin_for_half(keys, tuned), tuned).share == pytest.approx(0.5)


def test_without_temperature_the_margin_grows_with_the_log_of_the_keys():
    """A mean of exp(N(0, 1)) is exp(1/2)."""
    for keys in (2**12, 2**16, 2**20):
        assert margin_for_half(keys, False) == pytest.approx(math.log(keys) + 0.5, abs=0.06)
    assert margin_for_half(2**20, True) < 10.5


def test_words_about_a_needle():
    text = shown(keys=2**20, margin=12.0).text
    found = re.search(r"it gets ([\d.]+)% without .* and ([\d.]+)% with it \(factor ([\d.]+)\)", text)
    flat, tuned, factor = found.groups()
    assert float(flat) < 10 and float(tuned) > 90 and factor == "1.486"
    assert "1,048,576 keys, their logits drawn from N(0, 1), but for a needle at 12" in text
    assert "of 20 if all keys got the same" in text
    assert "less than 0.1% without" in shown(keys=2**20, margin=1.0).text


def test_drawing_the_keys_is_quick_repeatable_and_leaves_the_notebooks_numbers_alone():
    before, drawn = torch.get_rng_state(), crowds()
    crowds.cache_clear()
    start = time.process_time()
    assert crowds() == drawn
    assert time.process_time() - start < 0.5
    assert torch.equal(before, torch.get_rng_state())


# ----------------------------------------------------------------------------------------------------------------------
# Picture and widget


def points(line) -> dict:
    return dict(zip(map(int, line.get_xdata()), map(float, line.get_ydata()), strict=True))


def test_the_circle_shows_the_hand_and_what_is_covered():
    circle = shown(60, 2**21, False).picture.axes[0]
    training, chunk, hand, tip = circle.lines[:4]
    turned = 2**21 * radians(60, False)
    assert (tip.get_xdata()[0], tip.get_ydata()[0]) == pytest.approx((0.88 * math.cos(turned), 0.88 * math.sin(turned)))
    assert (hand.get_xdata()[1], hand.get_ydata()[1]) == (tip.get_xdata()[0], tip.get_ydata()[0])
    for arc, farthest in ((training, 262_143), (chunk, 8191)):
        x, y = float(arc.get_xdata()[-1]), float(arc.get_ydata()[-1])
        assert math.atan2(y, x) == pytest.approx(farthest * radians(60, False), rel=1e-3)
    full = shown(3, 100).picture.axes[0].lines[1]
    assert float(full.get_ydata()[-1]) == pytest.approx(0, abs=1e-5) and min(full.get_xdata()) < -0.99


def test_the_wavelengths_of_all_pairs_with_this_one_marked():
    scaled, plain, point = shown(50, scaled=False).picture.axes[1].lines[:3]
    for pair in range(64):
        assert points(scaled)[pair] == pytest.approx(2 * math.pi / radians(pair, True))
        assert points(plain)[pair] == pytest.approx(2 * math.pi / radians(pair, False))
    assert points(point) == {50: pytest.approx(2 * math.pi / radians(50, False))}
    levels = [line.get_ydata()[0] for line in shown().picture.axes[1].lines[3:]]
    assert levels == [8192, 262_144, 10_485_760]


def test_share_and_entropy_are_drawn_over_all_numbers_of_keys():
    _, _, shares, entropies = shown(keys=2**16, margin=9.0).picture.axes
    for axes, of in ((shares, lambda one: 100 * one.share), (entropies, lambda one: one.entropy)):
        assert points(axes.lines[0]) == {keys: pytest.approx(of(attended(keys, 9.0, True))) for keys in KEYS}
        assert points(axes.lines[1]) == {keys: pytest.approx(of(attended(keys, 9.0, False))) for keys in KEYS}
        assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()
        marked = [points(line) for line in axes.lines if line.get_marker() == "o"]
        assert marked == [{2**16: pytest.approx(of(attended(2**16, 9.0, on)))} for on in (False, True)]


@pytest.mark.parametrize("pair, distance, keys, margin", [(0, 1, 16, 0.0), (63, 10_485_760, 2**20, 20.0)])
def test_the_picture_is_described_and_nothing_is_cut(pair, distance, keys, margin):
    seen = shown(pair, distance, True, keys, margin)
    figure = seen.picture
    assert seen.text.splitlines()[0] in seen.alt and png(figure)[1] <= 900
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[:i])
    for axes in figure.axes[1:]:
        ticks = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert not any(left.overlaps(right) for left, right in zip(ticks, ticks[1:], strict=False))
    circle = figure.axes[0]
    rim = circle.transData.transform((1.3, 0))[0]
    assert rim < circle.get_legend().get_window_extent().x0


def test_every_control_changes_what_it_says_and_draws():
    widget = RotationExplorer()
    said, drawn = {widget.says()}, {widget.picture.value}
    moves = dict(pair=50, distance=1024, scaled=False, keys=2**20, margin=12.0)
    for number, (name, value) in enumerate(moves.items(), start=2):
        said.add(widget.drive(**{name: value}))
        drawn.add(widget.picture.value)
        assert len(said) == len(drawn) == number, name
    assert "Pair 63 " in widget.drive(pair=99)  # the slider ends there
