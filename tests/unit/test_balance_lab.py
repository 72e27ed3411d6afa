"""The balance lab on a handful of runs written here, whose load one can work out by hand."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import traitlets
from matplotlib.colors import to_hex

from minillama4.course.widgets import balance_lab
from minillama4.course.widgets.balance_lab import BalanceLab, Run
from minillama4.course.widgets.frame import BLUE, png

EVEN, HALF, ALONE = (0.25,) * 4, (0.5, 0.0, 0.5, 0.0), (0.01, 0.0, 0.97, 0.02)  # 4 experts; entropy 2 bits, 1 bit, ...
ROWS = [
    {
        "cure": "none",
        "strength": 0.0,
        "steps": [0, 50, 99],
        "load": [EVEN, HALF, ALONE],
        "facts_known": 2500,
        "sums_right": 0.91,
        "dead": 5,
    },
    {
        "cure": "aux",
        "strength": 0.1,
        "steps": [0, 50, 99],
        "load": [EVEN, EVEN, EVEN],
        "facts_known": 2250,
        "sums_right": 0.5,
        "dead": 0,
    },
    {
        "cure": "aux",
        "strength": 0.001,
        "steps": [0, 50, 99],
        "load": [EVEN, HALF, HALF],
        "facts_known": 2400,
        "sums_right": 0.25,
        "dead": 2,
    },
    {
        "cure": "bias",
        "strength": 0.01,
        "steps": [0, 60],
        "load": [EVEN, HALF],
        "facts_known": 2300,
        "sums_right": 1.0,
        "dead": 1,
    },
]


@pytest.fixture
def results(tmp_path):
    """As the evidence writes it: with other arms, and more fields than the lab reads."""
    rows = [{"arm": "balance", "experts": 4, "seed": 0, "ms_per_step": 80.0} | row for row in ROWS]
    file = tmp_path / "moe.json"
    file.write_text(json.dumps({"card": {}, "rows": [{"arm": "experts", "experts": 4, "seed": 0}, *rows]}))
    return file


@pytest.fixture
def runs(results) -> list[Run]:
    return balance_lab.read_runs(results)


@pytest.fixture
def lab(results) -> BalanceLab:
    return BalanceLab(results)


def heights(shown) -> list[float]:
    return [bar.get_height() for bar in shown.picture.axes[0].patches]


def curve(shown, label: str) -> list[tuple]:
    (line,) = [line for line in shown.picture.axes[1].lines if line.get_label() == label]
    return [(int(x), round(float(y), 6)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# What is read


def test_only_the_arm_balance_is_read_with_its_numbers(runs):
    assert [(run.cure, run.strength, run.dead) for run in runs] == [
        ("none", 0.0, 5),
        ("aux", 0.1, 0),
        ("aux", 0.001, 2),
        ("bias", 0.01, 1),
    ]
    assert runs[0].load == (EVEN, HALF, ALONE) and runs[0].experts == 4 and runs[3].steps == (0, 60)


def test_no_file_and_no_runs_say_which_command_makes_them(tmp_path):
    with pytest.raises(ValueError, match="no file .*none.json; `python -m minillama4.course.evidence.moe` makes it"):
        balance_lab.read_runs(tmp_path / "none.json")
    (tmp_path / "moe.json").write_text(json.dumps({"card": {}, "rows": [{"arm": "experts"}]}))
    with pytest.raises(ValueError, match="no row of the arm 'balance'"):
        balance_lab.read_runs(tmp_path / "moe.json")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"cure": "loss"}, "cure is 'loss'; it must be one of none, aux, bias"),
        ({"steps": (0, 50, 50)}, r"steps is \[0, 50, 50\]"),
        ({"steps": (0, 50)}, r"load has rows of \[4, 4, 4\] experts; 2 steps want as many"),
        ({"load": (EVEN, HALF, (0.5, 0.5))}, r"rows of \[4, 4, 2\] experts"),
        ({"load": (EVEN, HALF, (0.5, 0.4, 0.0, 0.0))}, "load at step 99 sums to 0.9; shares of all tokens sum to 1"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(runs, change, said):
    with pytest.raises(ValueError, match=said):
        replace(runs[0], **change)


def test_a_lab_needs_the_run_without_a_cure_and_one_with(tmp_path):
    for cures in (["none"], ["aux", "bias"]):
        rows = [{"arm": "balance", "seed": 0} | row for row in ROWS if row["cure"] in cures]
        (tmp_path / "moe.json").write_text(json.dumps({"rows": rows}))
        with pytest.raises(ValueError, match=f"has runs with cure .*{cures[-1]}.*; wanted are 'none' and one more"):
            BalanceLab(tmp_path / "moe.json")


# ----------------------------------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize("shares", [EVEN, HALF, ALONE, (0.0, 1.0), tuple(np.full(16, 1 / 16))])
def test_entropy_is_that_of_the_shares_in_bits(shares):
    kept = np.array([share for share in shares if share])
    assert balance_lab.entropy(shares) == pytest.approx(-(kept * np.log(kept)).sum() / np.log(2))


def test_strengths_begin_with_no_cure(runs):
    assert balance_lab.strengths(runs, "aux") == [0.0, 0.001, 0.1]
    assert balance_lab.strengths(runs, "bias") == [0.0, 0.01] and balance_lab.strengths(runs, "none") == [0.0]


def test_of_strength_0_and_of_no_cure_there_is_one_run(runs):
    assert {id(balance_lab.find(runs, cure, 0.0)) for cure in ("none", "aux", "bias")} == {id(runs[0])}
    assert balance_lab.find(runs, "none", 0.1) is runs[0] and balance_lab.find(runs, "aux", 0.1) is runs[1]
    with pytest.raises(ValueError, match=r"no run has cure 'aux' of strength 0.01; tried were \[0.0, 0.001, 0.1\]"):
        balance_lab.find(runs, "aux", 0.01)


def test_of_several_seeds_the_lowest_is_shown(runs):
    others = [replace(runs[1], seed=seed) for seed in (2, 1)]
    assert balance_lab.find([*others, *runs], "aux", 0.1).seed == 0
    assert balance_lab.find(others, "aux", 0.1).seed == 1


# ----------------------------------------------------------------------------------------------------------------------
# What is shown


def test_the_bars_are_the_shares_of_that_step(runs):
    for step, shares in zip(runs[0].steps, (EVEN, HALF, ALONE), strict=True):
        seen = balance_lab.shown(runs[0], step)
        assert heights(seen) == pytest.approx([100 * share for share in shares])
        assert f"load at step {step}" == seen.picture.axes[0].get_title()
        assert {to_hex(bar.get_facecolor()) for bar in seen.picture.axes[0].patches} == {BLUE}
    with pytest.raises(ValueError, match="step is 7; the load was stored at 0, 50, 99"):
        balance_lab.shown(runs[0], 7)


def test_the_even_line_lies_at_one_share_of_all(runs):
    (line,) = [line for line in balance_lab.shown(runs[1], 0).picture.axes[0].lines if "even" in line.get_label()]
    assert list(line.get_ydata()) == [25, 25] and line.get_label() == "even share, 25%"


def test_dead_experts_are_those_below_a_tenth_of_an_even_share_and_crossed_out(runs):
    seen = balance_lab.shown(runs[0], 99)  # ALONE: a tenth of an even share is 2.5 %
    (crosses,) = [line for line in seen.picture.axes[0].lines if line.get_label() == "dead"]
    assert list(crosses.get_xdata()) == [0, 1, 3] and "3 of 4 experts" in seen.text
    seen = balance_lab.shown(runs[0], 0)
    assert "dead" not in [line.get_label() for line in seen.picture.axes[0].lines] and "0 of 4 experts" in seen.text


def test_the_scale_of_the_bars_stays_over_the_steps_of_a_run(runs):
    tops = {balance_lab.shown(runs[0], step).picture.axes[0].get_ylim()[1] for step in runs[0].steps}
    assert len(tops) == 1 and tops.pop() > 97
    assert balance_lab.shown(runs[1], 0).picture.axes[0].get_ylim()[1] > 50  # even bars do not touch the legend


def test_the_curve_is_the_entropy_of_every_step_and_a_point_marks_this_one(runs):
    alone = round(-sum(p * np.log2(p) for p in (0.01, 0.97, 0.02)), 6)
    seen = balance_lab.shown(runs[2], 50, runs[0])
    assert curve(seen, "this run") == [(0, 2), (50, 1), (99, 1)] and curve(seen, "this step") == [(50, 1)]
    assert curve(seen, "without a cure") == [(0, 2), (50, 1), (99, alone)]
    labels = [line.get_label() for line in balance_lab.shown(runs[0], 50, runs[0]).picture.axes[1].lines]
    assert "without a cure" not in labels  # it is this run


def test_the_text_says_cure_step_dead_entropy_and_loss(runs):
    said = balance_lab.shown(runs[2], 50, runs[0]).text
    assert "auxiliary loss, coefficient 0.001. Step 50 of 99, seed 0" in said
    assert "2 of 4 experts. Expert 0 gets 50% of the tokens; even would be 25%" in said
    assert "1.00 of 2.00 bits, as if 2.0 experts shared" in said
    assert "2 dead in all layers, 2,400 facts known and 25% of sums right (without a cure 2,500 and 91%)" in said
    assert "bias update, rate 0.01." in balance_lab.shown(runs[3], 0).text
    said = balance_lab.shown(runs[0], 99, runs[0]).text
    assert said.startswith("Cure: none. Step 99") and said.endswith(
        "5 dead in all layers, 2,500 facts known and 91% of sums right."
    )


def test_the_picture_is_described_and_fits_a_notebook_column(runs):
    seen = balance_lab.shown(runs[0], 50)
    assert seen.text.replace("\n", " ") in seen.alt and "\n" not in seen.alt
    assert png(seen.picture)[1] <= 900


@pytest.mark.parametrize("experts", [4, 16, 64])
def test_no_label_is_cut_and_no_legend_lies_on_the_data(experts):
    load = [tuple(row) for row in np.random.default_rng(0).dirichlet([0.3] * experts, 3)]
    run = Run("bias", 0.001, 0, (0, 1000, 1999), tuple(load), 2000, 0.9, 3)
    figure = balance_lab.shown(run, 1000, replace(run, cure="none", load=tuple(load[::-1]))).picture
    figure.draw_without_rendering()
    for axes in figure.axes:
        box, shown = axes.get_tightbbox(), figure.bbox
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= shown.x1 and box.y1 <= shown.y1
        legend = axes.get_legend().get_window_extent()
        assert axes.bbox.x0 <= legend.x0 and legend.x1 <= axes.bbox.x1
        highest = max([p.get_window_extent().y1 for p in axes.patches] + [x.get_window_extent().y1 for x in axes.lines])
        assert legend.y0 > highest


# ----------------------------------------------------------------------------------------------------------------------
# The widget


def test_it_begins_with_the_end_of_no_cure(lab):
    assert {name: control.value for name, control in lab.controls.items()} == {
        "cure": "none",
        "strength": 0,
        "step": 99,
    }
    assert lab.says().startswith("Cure: none. Step 99 of 99") and lab.controls["strength"].disabled
    assert lab.says().replace("\n", " ") in lab.picture.value


def test_a_cure_offers_its_own_strengths_and_0(lab):
    assert "auxiliary loss, coefficient 0.001." in lab.drive(cure="aux")
    strength = lab.controls["strength"]
    assert [value for _, value in strength.options] == [0, 0.001, 0.1] and not strength.disabled
    assert "coefficient 0.1. Step 99" in lab.drive(strength=0.1)
    assert lab.drive(strength=0.0).startswith("Cure: none.")
    with pytest.raises(traitlets.TraitError):
        lab.drive(strength=0.01)  # was never trained
    assert "bias update, rate 0.01." in lab.drive(cure="bias") and strength.options[1] == ("0.01", 0.01)
    assert lab.drive(cure="none").startswith("Cure: none.") and strength.value == 0 and strength.disabled


def test_the_step_slider_offers_what_the_run_stored_and_stays_near(lab):
    lab.drive(step=50, cure="bias")
    assert lab.controls["step"].options == (0, 60) and lab.controls["step"].value == 60
    assert "Step 0 of 60" in lab.drive(step=0)
    assert "Step 0 of 99" in lab.drive(cure="aux", strength=0.1)
    assert lab.controls["step"].options == (0, 50, 99)


def test_each_step_shows_its_own_load(lab):
    pictures = {step: (lab.drive(step=step), lab.picture.value)[1] for step in (0, 50, 99)}
    assert len(set(pictures.values())) == 3
    said = [lab.drive(step=step) for step in (0, 50, 99)]
    assert [re.search(r"([\d.]+) of 2.00 bits", text)[1] for text in said] == ["2.00", "1.00", "0.22"]


def test_every_slider_has_two_stops_at_least(lab):
    """A slider in the browser cannot be drawn from a stop to itself."""
    for cure in ("none", "aux", "bias", "none"):
        lab.drive(cure=cure)
        assert min(len(lab.controls[name].options) for name in ("strength", "step")) >= 2
