"""The schedule explorer on a handful of runs written here, whose means and gains one can work out by hand."""

import copy
import math

import pytest
import traitlets
from matplotlib.colors import to_hex

from minillama4.course.evidence import study
from minillama4.course.widgets import schedule_explorer
from minillama4.course.widgets.frame import BLUE, RED, png
from minillama4.course.widgets.schedule_explorer import ScheduleExplorer, band, gains, read_runs, shown, weights

STEPS = [0, 100, 300]


def row(arm, data, seed, end, weight, **changes):
    """A run whose loss on answers goes 8, 2, end."""
    curve = {
        "steps": STEPS,
        "answer_loss": [8.0, 2.0, end],
        "caption_loss": [6.0, 3.0, 2 * end],
        "answer_right": [0.0, 0.25, 1 - end],
        "soft_weight": [None, *weight],
    }
    return {"arm": arm, "data": data, "seed": seed, "control": None, "curve": curve} | changes


ROWS = [
    row("hard", 1.0, 0, 0.50, [0.0, 0.0]),
    row("hard", 1.0, 1, 0.60, [0.0, 0.0]),
    row("ramp", 1.0, 1, 0.40, [0.75, 0.25]),
    row("ramp", 1.0, 0, 0.40, [0.75, 0.25]),
    row("confidence", 1.0, 0, 0.55, [0.2, 0.6]),
    row("confidence", 1.0, 1, 0.58, [0.3, 0.8]),
    row("soft", 1.0, 0, 0.7, [1.0, 1.0]),
    row("hard", 0.1, 0, 0.90, [0.0, 0.0]),
    row("ramp", 0.1, 0, 0.80, [0.75, 0.25]),
    row("soft", 0.1, 0, 0.01, [1.0, 1.0], control="top-k"),  # not a main row
    {"arm": "teacher", "train_steps": 9, "curve": {}},
    row("hard", 0.1, 7, 0.01, [0.0, 0.0], control="teacher"),
]


@pytest.fixture
def runs():
    return read_runs(ROWS)


# ----------------------------------------------------------------------------------------------------------------------
# Runs and what is made of them


def test_only_main_rows_with_a_curve_count(runs):
    assert [(run.arm, run.data, run.seed) for run in runs] == [(r["arm"], r["data"], r["seed"]) for r in ROWS[:9]]


def test_the_stored_rows_are_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="there are no results; .*evidence.distill` makes them"):
        read_runs()
    study.store(tmp_path / "distill.json", {"card": {}, "rows": ROWS})
    assert read_runs() == read_runs(ROWS)


def test_mean_and_spread_over_the_seeds(runs):
    seen = band(runs, "hard", 1.0, "answer_loss")
    assert seen.steps == (0, 100, 300) and seen.seeds == 2
    assert seen.mean == pytest.approx((8, 2, 0.55)) and seen.low == (8, 2, 0.5) and seen.high == (8, 2, 0.6)
    assert band(runs, "hard", 0.1, "caption_loss").mean[-1] == pytest.approx(1.8)


def test_gains_are_between_equal_seeds_and_above_0_is_better(runs):
    assert gains(runs, "ramp", 1.0, "answer_loss") == pytest.approx({0: 0.10, 1: 0.20})
    assert gains(runs, "ramp", 1.0, "answer_right") == pytest.approx({0: 0.10, 1: 0.20})
    assert gains(runs, "confidence", 1.0, "answer_loss") == pytest.approx({0: -0.05, 1: 0.02})
    assert gains(runs, "soft", 1.0, "answer_loss") == pytest.approx({0: -0.2})  # seed 1 is not there yet
    assert set(gains(runs, "hard", 1.0, "answer_loss").values()) == {0}


def test_weights_are_means_and_none_before_the_first_step(runs):
    first, *rest = weights(runs, "confidence", 1.0)
    assert math.isnan(first) and rest == pytest.approx([0.25, 0.7])


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(steps=[0, 300, 100]), "each above the one before"),
        (dict(steps=[0]), "at least 2"),
        (dict(answer_loss=[1.0]), "answer_loss has 1 values; 3 steps want as many"),
        (dict(soft_weight=[None, 0.5]), "soft_weight has 2 values"),
        (dict(soft_weight=[None, 0.5, 1.5]), "weights are 0 to 1"),
    ],
)
def test_rows_that_make_no_sense_are_refused(change, said):
    rows = copy.deepcopy(ROWS)
    rows[0]["curve"] |= change
    with pytest.raises(ValueError, match=said):
        read_runs(rows)


def test_questions_that_make_no_sense_are_refused(runs):
    with pytest.raises(ValueError, match="no row has arm 'hard'"):
        read_runs(ROWS[2:7])
    with pytest.raises(ValueError, match="unknown schedule 'rmap'; did you mean ramp"):
        shown(runs, "rmap")
    with pytest.raises(ValueError, match="unknown measure 'loss'"):
        shown(runs, measure="loss")
    with pytest.raises(ValueError, match="no run has schedule 'soft' on 10% of the documents"):
        shown(runs, "soft", 0.1)
    odd = read_runs([*ROWS, row("soft", 1.0, 2, 0.7, [1.0, 1.0]) | {"curve": ROWS[0]["curve"] | {"steps": [0, 9, 10]}}])
    with pytest.raises(ValueError, match="scored at different steps"):
        shown(odd, "soft")


# ----------------------------------------------------------------------------------------------------------------------
# Words and picture


def test_what_is_said(runs):
    text = shown(runs, "ramp").text
    for part in (
        "Schedule: ramp by step, on 100% of the documents, 2 seeds.",
        "0.75 in the first part of training, 0.25 in the last",
        "loss on answers, after 300 steps: 0.400 (0.400 to 0.400); hard only: 0.550 (0.500 to 0.600).",
        "Gain over hard only, seed by seed: +0.150 (+0.100 to +0.200); of 2 seeds better in every one.",
        "Best mean of all schedules here: ramp by step, 0.400.",
    ):
        assert part in text
    shares = shown(runs, "ramp", measure="answer_right").text
    assert "60.0% (60.0% to 60.0%); hard only: 45.0% (40.0% to 50.0%)" in shares
    assert "+15.0 points (+10.0 points to +20.0 points)" in shares and "ramp by step, 60.0%" in shares


def test_what_does_not_help_is_said_too(runs):
    assert "-0.015 (-0.050 to +0.020); of 2 seeds better in 1, so not clear" in shown(runs, "confidence").text
    assert "seed by seed: -0.200; of 1 seed better in none." in shown(runs, "soft").text
    assert "Gain" not in shown(runs, "hard").text and "hard only:" not in shown(runs, "hard").text
    assert "ramp by step, 0.800" in shown(runs, "hard", 0.1).text


def test_a_schedule_that_was_better_before_the_end_is_named(runs):
    """Hard targets on few documents overfit: then the end alone would flatter all that it is compared with."""
    later = read_runs([*ROWS, row("fixed", 0.1, 0, 3.0, [0.5, 0.5])])
    assert "Better before the end than at it: fixed mix 2.000 at step 100." in shown(later, "fixed", 0.1).text
    assert "fixed mix 25.0% at step 100" in shown(later, "fixed", 0.1, "answer_right").text
    assert "before the end" not in shown(runs, "ramp").text


def test_lines_are_the_means_with_bands_and_hard_only_beside(runs):
    above, below = shown(runs, "confidence").picture.axes
    chosen = [line for line in above.lines if to_hex(line.get_color()) == BLUE]
    assert len(above.lines) == 4 and chosen == [above.lines[-1]] and chosen[0].get_drawstyle() == "steps-pre"
    assert list(chosen[0].get_ydata())[1:] == pytest.approx([0.25, 0.7])
    lines = {line.get_label(): line for line in below.lines}
    assert list(lines["hard only"].get_ydata()) == pytest.approx([8, 2, 0.55])
    assert list(lines["by the teacher's confidence"].get_ydata()) == pytest.approx([8, 2, 0.565])
    assert lines["hard only"].get_linestyle() != lines["by the teacher's confidence"].get_linestyle()
    bands = {to_hex(each.get_facecolor()[0][:3]): each.get_paths()[0].vertices[:, 1] for each in below.collections}
    assert {min(bands[RED]), min(bands[BLUE])} == {0.5, 0.55}
    assert len(shown(runs, "hard").picture.axes[1].collections) == 1


def test_both_shares_of_the_documents_have_one_scale(runs):
    for measure in ("answer_loss", "answer_right"):
        limits = {shown(runs, "ramp", data, measure).picture.axes[1].get_ylim() for data in (1.0, 0.1)}
        assert len(limits) == 1


@pytest.mark.parametrize("measure", schedule_explorer.MEASURES.values())
@pytest.mark.parametrize("arm", ["hard", "confidence"])
def test_the_picture_is_described_and_nothing_is_cut_or_hidden(runs, arm, measure):
    seen = shown(runs, arm, measure=measure)
    figure = seen.picture
    assert seen.text.splitlines()[0] in seen.alt and png(figure)[1] <= 900
    above, below = figure.axes
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert below.get_tightbbox().y1 < above.get_tightbbox().y0
    legend = below.get_legend().get_window_extent()
    assert below.bbox.x0 <= legend.x0
    points = [y for line in below.lines for _, y in below.transData.transform(line.get_xydata())]
    assert below.bbox.y0 <= min(points) and max(points) < legend.y0


# ----------------------------------------------------------------------------------------------------------------------
# The widget


def test_every_control_changes_what_it_says_and_draws():
    widget = ScheduleExplorer(ROWS)
    assert list(widget.controls["arm"].options) == [
        "hard only",
        "soft only",
        "ramp by step",
        "by the teacher's confidence",
    ]
    said, drawn = {widget.says()}, {widget.picture.value}
    moves = dict(arm="ramp", data=0.1, measure="answer_right")
    assert set(moves) == set(widget.controls)
    for number, (name, value) in enumerate(moves.items(), start=2):
        said.add(widget.drive(**{name: value}))
        drawn.add(widget.picture.value)
        assert len(said) == len(drawn) == number, name
    assert widget.drive(arm="soft").startswith("no run has schedule 'soft' on 10%") and widget.picture.value == ""
    with pytest.raises(traitlets.TraitError):
        widget.drive(arm="fixed")
