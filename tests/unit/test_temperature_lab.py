"""The temperature lab against losses written out as loops, finite differences and autograd, and as it is driven."""

import json
import math
import warnings

import pytest
import torch
import traitlets

from minillama4 import distill
from minillama4.course.widgets.frame import png
from minillama4.course.widgets.temperature_lab import (
    TEMPERATURES,
    Moment,
    TemperatureLab,
    named,
    parts,
    read_moments,
    shown,
)

VOCABULARY = [" red", " blue", "a", "$x$", "\n", "कौ", "�", "", "a very long token", " ", "ø", "3"]
TEACHER = [0, 40, 120, 900, 300, 450, 777, 1000, 650, 2500, 9999, 800]  # hundredths of a nat below the likeliest
STUDENT = [210, 0, 60, 500, 777, 90, 300, 450, 1200, 130, 640, 305]
SURE = [500, 0, 9999, 1500, 1200, 1700, 1300, 2000, 1650, 2500, 9999, 1800]


def written(folder, **changes):
    tokens = [
        {"before": "a big circle.\n Colour:", "true": 0, "teacher": TEACHER, "student": STUDENT},
        {"before": "two", "true": 2, "teacher": SURE, "student": STUDENT},  # the teacher is sure, and wrong
        {"before": "", "true": 5, "teacher": STUDENT, "student": STUDENT},
    ]
    card = {"teacher": "mini-behemoth", "student": "mini-maverick"}
    file = folder / "tokens.json"
    file.write_text(json.dumps({"card": card, "vocabulary": VOCABULARY, "tokens": tokens} | changes), "utf-8")
    return file


@pytest.fixture
def moments(tmp_path):
    return read_moments(written(tmp_path))


def loss(student: list[float], teacher: list[float], true: int, temperature: float, weight: float, reverse: bool):
    """(hard, soft, mixed) by loops."""

    def softmax(logits, t):
        powers = [math.exp(x / t) for x in logits]
        return [power / sum(powers) for power in powers]

    hard = -math.log(softmax(student, 1.0)[true])
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    first, second = (q, p) if reverse else (p, q)
    soft = temperature**2 * sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))
    return hard, soft, (1 - weight) * hard + weight * soft


# ----------------------------------------------------------------------------------------------------------------------
# Losses and gradients


def test_stored_hundredths_are_logits_up_to_a_constant(moments):
    moment = moments.tokens[0]
    assert moment.teacher_V.dtype == torch.float64 and moment.teacher_V[1].item() == -0.4
    assert (moment.teacher_V[0] - moment.teacher_V[3]).item() == 9.0 and moment.true == 0


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature, weight", [(1.0, 0.5), (0.5, 0.25), (4.0, 1.0), (16.0, 0.0)])
def test_losses_by_loops_and_gradients_by_finite_differences(moments, number, temperature, weight, reverse):
    moment = moments.tokens[number]
    seen = parts(moment, temperature, weight, reverse)
    student, teacher = moment.student_V.tolist(), moment.teacher_V.tolist()
    assert (seen.hard, seen.soft, seen.mixed) == pytest.approx(
        loss(student, teacher, moment.true, temperature, weight, reverse), rel=1e-9
    )
    step = 1e-5
    for token in range(len(student)):
        moved = [[x + sign * step * (i == token) for i, x in enumerate(student)] for sign in (1, -1)]
        up, down = (loss(each, teacher, moment.true, temperature, weight, reverse) for each in moved)
        slopes = [(a - b) / (2 * step) for a, b in zip(up, down, strict=True)]
        closed = (seen.hard_gradient_V[token], seen.soft_gradient_V[token], seen.gradient_V[token])
        assert list(map(float, closed)) == pytest.approx(slopes, abs=2e-8)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_closed_form_is_what_autograd_gives_for_the_loss_of_the_package(moments, temperature, reverse):
    moment = moments.tokens[0]
    student_TV = moment.student_V[None].clone().requires_grad_()
    hard_T = distill.hard_loss(student_TV, torch.tensor([moment.true]))
    soft_T = distill.soft_loss(student_TV, moment.teacher_V[None], temperature, reverse)
    (gradient_TV,) = torch.autograd.grad(distill.mix(hard_T, soft_T, 0.3), student_TV)
    torch.testing.assert_close(parts(moment, temperature, 0.3, reverse).gradient_V, gradient_TV[0])


def test_two_tokens_by_hand():
    """Student 1:1, teacher 3:1: hard log 2; KL forward 0.75 log 1.5 + 0.25 log 0.5, reverse 0.5 log(4 / 3)."""
    moment = Moment("", 1, torch.tensor([math.log(3.0), 0.0]).double(), torch.zeros(2).double())
    seen, back = parts(moment, 1.0, 0.25), parts(moment, 1.0, 0.25, reverse=True)
    assert seen.hard == pytest.approx(math.log(2)) and back.hard == seen.hard
    assert seen.soft == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert back.soft == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    assert seen.hard_gradient_V.tolist() == [0.5, -0.5]
    assert seen.soft_gradient_V.tolist() == pytest.approx([-0.25, 0.25], rel=1e-6)
    assert seen.gradient_V.tolist() == pytest.approx([0.75 * 0.5 - 0.25 * 0.25, -0.75 * 0.5 + 0.25 * 0.25], rel=1e-6)


def test_t_squared_keeps_the_gradient_and_without_it_shrinks(moments):
    """At high temperature T (q - p) goes to (s - t, each less its mean) / V, which is that of matching logits."""
    moment = moments.tokens[0]
    apart = moment.student_V - moment.teacher_V
    limit = (apart - apart.mean()) / len(apart)
    for reverse in (False, True):
        hot = parts(moment, 1000.0, reverse=reverse)
        torch.testing.assert_close(hot.soft_gradient_V, limit, rtol=0.05, atol=0.01)
        assert hot.norm_without == pytest.approx(hot.norm / 1e6)


def test_equal_models_have_no_soft_part(moments):
    for reverse in (False, True):
        seen = parts(moments.tokens[2], 2.0, 0.5, reverse)
        assert seen.soft == 0 and seen.norm == 0 and seen.mixed == pytest.approx(seen.hard / 2)


def test_the_named_tokens_are_those_either_model_likes_and_the_true_one(moments):
    assert named(moments.tokens[0], 3) == [0, 1, 2]  # the teacher's 0, the student's 1, 2 liked by both
    likely_last = Moment("", 10, moments.tokens[0].teacher_V, moments.tokens[0].student_V)
    assert named(likely_last, 3) == [0, 1, 10]


# ----------------------------------------------------------------------------------------------------------------------
# Words and picture


def test_what_is_said_about_a_token(moments):
    text = shown(moments, 0, 2.0, 0.25).text
    sure = 1 / sum(math.exp(-below / 100) for below in TEACHER)  # at temperature 1: what the teacher believes
    assert text.startswith(f"…a big circle.↵ Colour: → “␣red”. Teacher (mini-behemoth) gave it {sure:.1%}, student")
    hard, soft, mixed = loss([-x / 100 for x in STUDENT], [-x / 100 for x in TEACHER], 0, 2.0, 0.25, False)
    assert f"hard {hard:.3f} nats, soft {soft:.3f} = 2² · KL(teacher ‖ student)" in text
    assert f"0.75 · hard + 0.25 · soft = {mixed:.3f}" in text
    assert "KL(student ‖ teacher)" in shown(moments, 0, 2.0, 0.25, True).text
    assert "raises “␣red” most (+0." in text and "disagree" not in text


def test_a_sure_and_wrong_teacher_pulls_against_the_hard_target(moments):
    text = shown(moments, 1).text
    assert "The two parts disagree on “a”: hard +0." in text and "soft -0." in text


def test_bars_are_probabilities_and_pushes_add_up(moments):
    temperature, weight = 2.0, 0.25
    chances, pushes, norms = shown(moments, 0, temperature, weight).picture.axes
    ids = named(moments.tokens[0])
    p = (moments.tokens[0].teacher_V / temperature).softmax(-1)
    widths = [bar.get_width() for bar in chances.patches]
    rows = len(ids) + 1
    assert len(widths) == 2 * rows and [sum(widths[:rows]), sum(widths[rows:])] == pytest.approx([100, 100])
    assert widths[: rows - 1] == pytest.approx((100 * p[ids]).tolist())
    hard, soft = ([bar.get_width() for bar in pushes.patches[i * rows :][:rows]] for i in (0, 1))
    assert [sum(hard), sum(soft)] == pytest.approx([0, 0])  # a shift of all logits changes nothing
    both = [line for line in pushes.lines if line.get_label() == "sum"][0].get_xdata()
    seen = parts(moments.tokens[0], temperature, weight)
    assert list(both[:-1]) == pytest.approx((-seen.gradient_V[ids]).tolist())
    assert hard[0] > 0 and hard[0] == pytest.approx(-0.75 * float(seen.hard_gradient_V[ids[0]]))
    with_t, without = norms.lines[:2]
    at = TEMPERATURES.index(temperature)
    assert with_t.get_ydata()[at] == pytest.approx(4 * without.get_ydata()[at]) == pytest.approx(seen.norm)


@pytest.mark.parametrize("temperature", [TEMPERATURES[0], 1.0, TEMPERATURES[-1]])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_picture_is_described_and_nothing_is_cut_or_unknown(moments, number, temperature, weight):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that the font lacks
        seen = shown(moments, number, temperature, weight)
        figure = seen.picture
        assert seen.text.splitlines()[0] in seen.alt and png(figure)[1] <= 900
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert boxes[0].x1 < boxes[1].x0 and boxes[1].x1 < boxes[2].x0
    chances, pushes, norms = figure.axes
    labels = [label.get_text().removeprefix("▸ ") for label in chances.get_yticklabels()]
    assert set(labels) <= {
        *("␣red", "␣blue", "a", "$x$", "↵", "␣", "ø", "3", "all others", "token 5", "token 6", "token 7", "a very lon…")
    }
    assert sum(label.get_text().startswith("▸") for label in chances.get_yticklabels()) == 1
    for axes in (chances, pushes):
        top = max(bar.get_window_extent().y1 for bar in axes.patches)
        assert top < axes.get_legend().get_window_extent().y0
    legend = norms.get_legend().get_window_extent()
    points = [y for line in norms.lines for _, y in line.get_transform().transform(line.get_xydata())]
    assert max(points) < legend.y0 and legend.x1 <= norms.bbox.x1


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def test_files_that_do_not_fit_are_refused(tmp_path, moments):
    with pytest.raises(ValueError, match="there is no file .*evidence.distill` makes it"):
        read_moments(tmp_path / "none.json")
    with pytest.raises(ValueError, match="has no tokens"):
        read_moments(written(tmp_path, tokens=[]))
    for token in ({"true": 12}, {"teacher": TEACHER[:-1]}):
        bad = {"before": "", "true": 0, "teacher": TEACHER, "student": STUDENT} | token
        with pytest.raises(ValueError, match="the vocabulary has 12 tokens"):
            read_moments(written(tmp_path, tokens=[bad]))
    with pytest.raises(ValueError, match="number is 3; there are tokens 0 to 2"):
        shown(moments, 3)
    with pytest.raises(ValueError, match="temperature is 0"):
        parts(moments.tokens[0], 0.0)
    with pytest.raises(ValueError, match="soft_weight is 1.5"):
        parts(moments.tokens[0], 1.0, 1.5)


# ----------------------------------------------------------------------------------------------------------------------
# The widget


def test_every_control_changes_what_it_says_and_draws(tmp_path):
    widget = TemperatureLab(written(tmp_path))
    said, drawn = {widget.says()}, {widget.picture.value}
    moves = dict(temperature=4.0, soft_weight=0.8, reverse=True, number=1)
    assert set(moves) == set(widget.controls)
    for number, (name, value) in enumerate(moves.items(), start=2):
        said.add(widget.drive(**{name: value}))
        drawn.add(widget.picture.value)
        assert len(said) == len(drawn) == number, name
    widget.drive(soft_weight=3.0)
    assert widget.controls["soft_weight"].value == 1.0
    with pytest.raises(traitlets.TraitError):
        widget.drive(temperature=3.0)
