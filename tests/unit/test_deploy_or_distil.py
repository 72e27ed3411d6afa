"""The deploy-or-distil calculator against sums written out here from published sizes, and as it is driven."""

import math

import pytest
import traitlets

from minillama4.course.widgets import deploy_or_distil
from minillama4.course.widgets.deploy_or_distil import DeployOrDistil, Plan, choice, money, serving, shown
from minillama4.course.widgets.frame import png

H100 = 81_559 * 2**20 - 3e9  # bytes that a card has left
BANDWIDTH, FLOPS = 3.35e12, 790e12  # of an H100
ATTENTION, EXPERT, VOCAB = (
    2 * 5120 * (40 + 8) * 128,
    3 * 5120 * 8192,
    202_048 * 5120,
)  # of Scout: a layer, one, a matrix
PAIRS = 12 * (8192 * 8193 // 2) + 36 * (8192 * 8193 // 2)  # a prompt of one chunk, whether or not a layer is local


def scout_step(batch: int) -> float:
    """Bytes that one step of decoding reads: fp8 matrices, 16-bit norms and routers, a bf16 cache of 8,192 tokens."""
    touched = 16 * (1 - (15 / 16) ** batch)
    sixteen = 2 * (48 * 5120 * 16 + 97 * 5120)
    return 48 * (ATTENTION + EXPERT * (1 + touched)) + VOCAB + sixteen + batch * 8192 * 192 * 1024


def scout_prompt_flops() -> float:
    layer = ATTENTION + 2 * EXPERT + 5120 * 16
    return 8192 * 2 * 48 * layer + 2 * (2 * 40 * 128) * PAIRS


# ----------------------------------------------------------------------------------------------------------------------
# Serving


@pytest.mark.parametrize("dtype, terabytes, gpus", [("bf16", 4.0, 49), ("fp8", 2.0, 25)])
def test_cards_that_hold_behemoth(dtype, terabytes, gpus):
    seen = serving("behemoth-estimate", Plan(dtype=dtype, batch=1, context=1024))
    assert seen.weights == pytest.approx(terabytes * 1e12, rel=0.002)
    assert seen.gpus == math.ceil((seen.weights + seen.cache) / H100) == gpus


def test_speed_and_price_of_scout_by_hand():
    plan = Plan(read=3000.0, written=1000.0, reached=40.0, price=3.0)
    seen = serving("scout", plan)
    assert seen.cache == 64 * 1.5 * 2**30 and seen.gpus == 3  # 110.6 GB + 103.1 GB on cards of 82.5 GB
    assert seen.floor == pytest.approx(scout_step(1) / BANDWIDTH / 3)
    assert seen.rate == pytest.approx(64 * 3 / (scout_step(64) / BANDWIDTH))
    answer = scout_step(64) / BANDWIDTH / 64 / 0.4  # GPU seconds a token
    prompt = scout_prompt_flops() / FLOPS / 8192 / 0.4
    busy = 3e9 * prompt + 1e9 * answer
    assert seen.busy == pytest.approx(busy)
    assert seen.replicas == math.ceil(busy / 86_400 / 3)
    assert seen.dollars == pytest.approx(seen.replicas * 3 * 24 * 3.0)
    assert seen.per_million == pytest.approx(seen.dollars / 1000)
    assert seen.full_use == pytest.approx(busy / 3600 * 3 / 1000) and seen.full_use < seen.per_million


def test_a_replica_is_bought_whole_however_little_is_asked():
    seen = serving("behemoth-estimate", Plan(read=0.0, written=0.001, price=2.0))
    assert seen.replicas == 1 and seen.dollars == pytest.approx(27 * 24 * 2.0)
    assert seen.per_million > 1e5 * seen.full_use


def test_what_speeds_up_serving():
    """Each assumption moves the cost the way it should, and only in its own part."""
    base, model = Plan(), "behemoth-estimate"
    now = serving(model, base)
    assert serving(model, Plan(batch=128)).rate > 1.5 * now.rate
    assert serving(model, Plan(gpu="h200")).gpus < now.gpus and serving(model, Plan(gpu="h200")).busy < now.busy
    half = serving(model, Plan(reached=25.0))
    assert half.busy == pytest.approx(2 * now.busy) and (half.rate, half.floor) == (now.rate, now.floor)
    read = serving(model, Plan(read=2 * base.read)).busy - now.busy
    assert read == pytest.approx(now.busy - serving(model, Plan(read=0.0)).busy)


# ----------------------------------------------------------------------------------------------------------------------
# Teaching and break-even


def teacher_forward() -> float:
    """FLOPs of one token in a sequence of 8,192: the estimate's own sizes, summed here."""
    layers, width = 92, 16_384
    seen = deploy_or_distil.shape("behemoth-estimate")
    assert (seen.layers, seen.hidden, seen.experts, seen.shared) == (layers, width, 16, 1)
    expert = 3 * width * seen.expert_width
    attention = 2 * width**2 + 2 * width * 8 * 128
    matrices = layers * (attention + 2 * expert + width * 16) + 202_048 * width
    return 2 * matrices + layers * 2 * (2 * width) * (8193 / 2)


def test_teaching_is_a_forward_pass_and_shared():
    plan = Plan(taught=10.0, extra=30.0, students=4, reached=50.0, price=2.0, teacher_tokens=7.0)
    seen = choice(plan)
    hours = teacher_forward() * 3e12 / (FLOPS / 2) / 3600
    assert seen.passes == pytest.approx(2.0 * hours / 4, rel=1e-6)
    # Backward is twice as much as forward, as nothing before the text is trained but its own embedding.
    assert seen.teacher_training == pytest.approx(2.0 * 3 * teacher_forward() * 7e12 / (FLOPS / 2) / 3600 / 4, rel=1e-6)
    assert seen.training == pytest.approx(2.38e6 * 2.0)  # not shared: it is this student's own
    assert choice(Plan(extra=0.0)).passes == 0


def test_behemoths_forward_pass_is_more_than_mavericks_whole_training():
    """2 · 288e9 against 6 · 17e9 FLOPs a token, which is why amortised passes matter."""
    seen = choice(Plan())
    assert 3 < seen.passes / seen.training < 5


def test_break_even_is_where_both_ways_have_cost_the_same():
    seen = choice(Plan(extra=20.0))
    for charged in (False, True):
        day = seen.break_even(charged)
        first = seen.passes + seen.training + (seen.teacher_training if charged else 0)
        assert first + seen.student.dollars * day == pytest.approx(seen.teacher.dollars * day)
        assert seen.won(charged) == pytest.approx((365 - day) * seen.saving)
    assert seen.break_even(True) > seen.break_even(False)


def test_the_quality_gap_at_which_serving_the_teacher_pays():
    seen, plan = choice(Plan(extra=20.0)), Plan(extra=20.0)
    wanted = seen.won() / (plan.written * plan.days)
    below, above = (shown(Plan(extra=20.0, gap=wanted * factor)).text for factor in (0.99, 1.01))
    assert "distil and serve Llama 4 Maverick." in below and "serve the teacher." not in below
    assert "serve the teacher." in above and f"worth more than {money(wanted)} per M" in above
    # At exactly this gap, both ways are worth the same over the whole time.
    teacher = seen.teacher.dollars * plan.days - wanted * plan.written * plan.days
    assert teacher == pytest.approx(seen.first(False) + seen.student.dollars * plan.days)


def test_little_traffic_never_pays_for_teaching():
    text = shown(Plan(read=10.0, written=1.0)).text
    assert "distilling costs $28.4M more: serve the teacher, even if its answers are no better" in text


def test_a_student_that_costs_as_much_never_pays_back():
    class Same:
        dollars = 5.0

    seen = deploy_or_distil.Choice(Same, Same, 1.0, 1.0, 1.0, 365)
    assert seen.break_even() == math.inf and seen.won() == -2.0 and seen.won(True) == -3.0


# ----------------------------------------------------------------------------------------------------------------------
# Words and picture


@pytest.mark.parametrize(
    "dollars, said",
    [(0, "$0.00"), (0.314, "$0.31"), (0.0123, "$0.0123"), (18.137, "$18.14"), (999.999, "$1K"), (1234, "$1.23K"),
     (22.9e6, "$22.9M"), (-5e5, "-$500K"), (1.5e9, "$1.5B"), (4.2e16, "$4.2e+04T")],
)  # fmt: skip
def test_money(dollars, said):
    assert money(dollars) == said


def test_estimates_and_assumptions_are_said():
    text = shown(Plan()).text
    for part in (
        "Behemoth (estimate): weights 2,003 GB",
        "27 GPUs (4 hosts of 8)",
        "teacher passes (forward only, estimate)",
        "The teacher's own training (estimate)",
        "Meta published no shape",
        "3.35 TB/s and 790 TFLOP/s",
        "even routing",
        "Traffic, price and days are examples",
        "(2.38M, about 22T)",
        "(5.0M, about 40T)",
    ):
        assert part in text
    assert "shared by 3 students" in shown(Plan(students=3)).text
    assert "(teacher's training charged)" in shown(Plan(), True).text


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(gap=30.0, extra=20.0), Plan(read=10.0, written=1.0, student="scout"), Plan(days=3650)]
)
def test_the_picture_is_described_and_nothing_is_cut_or_hidden(plan):
    seen = shown(plan)
    figure = seen.picture
    assert "Behemoth (estimate)" in seen.alt and "\n" not in seen.alt and png(figure)[1] <= 900
    bars, curves = figure.axes
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert bars.get_tightbbox().x1 < curves.get_tightbbox().x0
    assert all(text.get_window_extent().x1 <= bars.bbox.x1 for text in bars.texts)
    legend = curves.get_legend().get_window_extent()
    assert curves.bbox.x0 <= legend.x0 and legend.x1 <= curves.bbox.x1
    ends = [y for line in curves.lines for _, y in curves.transData.transform(line.get_xydata())]
    assert max(ends) < legend.y0 and min(ends) >= curves.bbox.y0 - 1


def test_the_lines_are_what_was_spent_and_the_points_lie_on_them():
    plan = Plan(extra=20.0, gap=5.0)
    seen, axes = choice(plan), shown(plan).picture.axes[1]
    lines = {line.get_label(): [y for _, y in line.get_xydata()] for line in axes.lines}
    assert lines["serve the teacher"] == pytest.approx([0, 365 * seen.teacher.dollars])
    assert lines["less what it is better by"][1] == pytest.approx(365 * (seen.teacher.dollars - 5.0 * plan.written))
    student = [seen.first(False), seen.first(False) + 365 * seen.student.dollars]
    assert lines["distil, serve the student"] == pytest.approx(student)
    assert lines["teacher's training charged"] == pytest.approx([y + seen.teacher_training for y in student])
    assert lines["paid back"] == pytest.approx([seen.break_even() * seen.teacher.dollars])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(student="behemoth"), "unknown student 'behemoth'.*maverick, scout"),
        (dict(dtype="int3"), "unknown dtype 'int3'"),
        (dict(gpu="a100"), "unknown GPU 'a100'"),
        (dict(price=0.0), "price is 0.0; it must be 0.01 to 1000"),
        (dict(reached=101.0), "reached is 101.0; it must be 1 to 100"),
        (dict(written=0.0), "written is 0.0"),
        (dict(students=0), "students is 0"),
        (dict(batch=0), "batch is 0"),
        (dict(context=0), "context is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        shown(Plan(**arguments))


# ----------------------------------------------------------------------------------------------------------------------
# The widget


def test_every_control_changes_what_it_says_and_draws():
    widget = DeployOrDistil()
    said, drawn = {widget.says()}, {widget.picture.value}
    moves = dict(dtype="bf16", gpu="h200", context=16_384, batch=128, read=10_000.0, written=6000.0, price=3.0)
    moves |= dict(reached=60.0, taught=30.0, extra=40.0, students=2, hours=3.0, teacher_tokens=35.0, days=500, gap=1.0)
    moves |= dict(charged=True, student="scout")
    assert set(moves) == set(widget.controls)
    for number, (name, value) in enumerate(moves.items(), start=2):
        said.add(widget.drive(**{name: value}))
        drawn.add(widget.picture.value)
        assert len(said) == len(drawn) == number, name


def test_a_student_comes_with_what_is_published_of_it_and_fields_are_clamped():
    widget = DeployOrDistil()
    assert "Paid first for Llama 4 Scout" in widget.drive(student="scout")
    assert (widget.controls["hours"].value, widget.controls["taught"].value) == (5.0, 40.0)
    widget.drive(student="maverick", reached=500.0)
    assert (widget.controls["hours"].value, widget.controls["taught"].value) == (2.38, 22.0)
    assert widget.controls["reached"].value == 100.0
    with pytest.raises(traitlets.TraitError):
        widget.drive(batch=3)
