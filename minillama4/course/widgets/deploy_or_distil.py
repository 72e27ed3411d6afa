"""Deploy or distil calculator: serve a teacher of Behemoth's size, or let it teach a student and serve that.

Both answer the same traffic. The teacher needs more cards to be held and more time for each token; the student has to
be taught and trained first. The arithmetic is that of `minillama4.budget`, `roofline` and `train_cost`: bounds, of
which real serving and training reach a share. Behemoth's shape is an estimate, and so is all that follows from it.
Money is in dollars, M is a million, T is 10^12.
"""

import math
from dataclasses import dataclass, fields

import ipywidgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...budget import FORMATS, kv_bytes, pick, shape, weight_bytes
from ...roofline import GPUS, decode_bound, prefill_bound
from ...train_cost import training_cost
from .cost_calculator import LIGHT, NAMES, SHOWN_FORMATS, cards
from .frame import BLUE, ORANGE, RED, Shown, View

TEACHER = "behemoth-estimate"
PUBLISHED = {  # student -> what the model card says: M H100 hours of its own training, 10^12 tokens that it saw
    "maverick": dict(hours=2.38, taught=22.0),
    "scout": dict(hours=5.0, taught=40.0),
}
STUDENTS = {NAMES[key]: key for key in PUBLISHED}
BATCHES = tuple(2**power for power in range(11))  # sequences
CONTEXTS = {f"{2**power // 1024}K": 2**power for power in range(10, 21)}  # tokens
FIELDS = {  # name -> (label, least, most, step, what it is)
    "price": ("$ per GPU hour", 0.01, 1000, 0.1, "dollars for one GPU for one hour"),
    "reached": ("% of bound", 1, 100, 5, "share of the roofline that serving and training reach"),
    "read": ("read M a day", 0, 1e9, 1000, "tokens of prompts, millions a day"),
    "written": ("write M a day", 0.001, 1e9, 1000, "tokens of answers, millions a day"),
    "taught": ("taught T", 0, 1000, 1, "tokens that the student learns from, 10^12; Maverick saw about 22"),
    "extra": ("extra passes %", 0, 100, 5, "share of them that the teacher has to read only for the student"),
    "students": (
        "students",
        1,
        100,
        1,
        "students that share the teacher's passes, and its training where that is charged",
    ),
    "hours": ("its GPU hours M", 0, 1000, 0.1, "GPU hours of the student's own training, millions"),
    "teacher_tokens": ("teacher saw T", 0, 1000, 1, "tokens that the teacher was trained on, 10^12"),
    "days": ("days in service", 1, 3650, 30, "how long the model is served before the next one replaces it"),
    "gap": (
        "better by $/M",
        0,
        1e6,
        1,
        "what the teacher's answers are worth more, dollars per million tokens written",
    ),
}


@dataclass(frozen=True)
class Plan:
    """Everything that is assumed; see `FIELDS` for units. ValueError: an unknown name, or a number out of range."""

    student: str = "maverick"
    dtype: str = "fp8"  # of all weights; a key of `FORMATS`
    gpu: str = "h100"
    context: int = 8192  # tokens of a prompt, and of each sequence that is decoded
    batch: int = 64  # sequences that a replica decodes at once
    price: float = 2.5
    reached: float = 50.0
    read: float = 20_000.0
    written: float = 5000.0
    taught: float = PUBLISHED["maverick"]["taught"]
    extra: float = 100.0
    students: int = 1
    hours: float = PUBLISHED["maverick"]["hours"]
    teacher_tokens: float = 30.0
    days: int = 365
    gap: float = 0.0

    def __post_init__(self):
        for what, name, table in (
            ("student", self.student, PUBLISHED), ("dtype", self.dtype, FORMATS), ("GPU", self.gpu, GPUS)
        ):  # fmt: skip
            pick(what, name, table)
        for name, (_, least, most, *_) in FIELDS.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} to {most:g}")

    def gpu_dollars(self, seconds: float) -> float:
        return seconds / 3600 * self.price


@dataclass(frozen=True)
class Serving:
    """One model under the plan's traffic. Bounds, but for what is said to be at the share that is reached."""

    weights: int  # bytes
    cache: int  # bytes of KV of a whole batch
    gpus: int  # that hold both: one replica
    floor: float  # seconds a replica takes at least for one token of one sequence alone
    rate: float  # tokens/s at most that a replica writes for a whole batch
    busy: float  # GPU seconds a day that the traffic takes, at the share reached
    replicas: int
    dollars: float  # a day, of all replicas, busy or not
    per_million: float  # dollars per million tokens written, reading included, at this traffic
    full_use: float  # the same, if no replica ever waited


def serving(model: str, plan: Plan) -> Serving:
    """What it takes to answer the traffic with a model: whole replicas, at least one, each with equal shares of all."""
    weights, cache = weight_bytes(model, plan.dtype), kv_bytes(model, plan.context, plan.batch)
    gpus = cards(weights + cache, plan.gpu)
    alone = decode_bound(model, plan.dtype, plan.context, 1, plan.gpu)
    together = decode_bound(model, plan.dtype, plan.context, plan.batch, plan.gpu)
    prompt = prefill_bound(model, plan.dtype, plan.context, plan.gpu)
    bound = 1e6 * (plan.read * prompt.seconds / plan.context + plan.written * together.seconds / plan.batch)
    busy = bound / (plan.reached / 100)  # the bounds are of one card; over n cards a step is n times as short
    replicas = math.ceil(busy / (86_400 * gpus))
    dollars = plan.gpu_dollars(86_400 * replicas * gpus)
    return Serving(
        weights, cache, gpus, alone.seconds / gpus, together.tokens_per_second * gpus, busy, replicas,
        dollars, dollars / plan.written, plan.gpu_dollars(busy) / plan.written,
    )  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Dollars of both ways, over the plan's days."""

    teacher: Serving
    student: Serving
    passes: float  # the student's share of the teacher's forward passes
    training: float  # of the student
    teacher_training: float  # the student's share of it
    days: int

    @property
    def saving(self) -> float:
        """A day, by serving the student."""
        return self.teacher.dollars - self.student.dollars

    def first(self, charged: bool) -> float:
        """What is paid before the student serves. charged: with the teacher's own training, as if it only taught."""
        return self.passes + self.training + charged * self.teacher_training

    def break_even(self, charged: bool = False) -> float:
        """Days until the student has paid back what was paid first; infinite if it never does."""
        return self.first(charged) / self.saving if self.saving > 0 else math.inf

    def won(self, charged: bool = False) -> float:
        """What distilling has saved when the days are over; below 0, what it has cost more."""
        return self.saving * self.days - self.first(charged)


def choice(plan: Plan) -> Choice:
    """Both ways under one plan. Teacher passes and training are compute-bound, over sequences of the context's length.

    A teacher that is run for its student computes the forward pass, head included, and nothing backward.
    """
    length, rate = plan.context, GPUS[plan.gpu].flops * plan.reached / 100
    forward = training_cost(TEACHER, length, trained=()).total / length  # FLOPs a token
    learning = training_cost(TEACHER, length).total / length
    return Choice(
        serving(TEACHER, plan),
        serving(plan.student, plan),
        plan.gpu_dollars(1e12 * plan.taught * plan.extra / 100 * forward / rate) / plan.students,
        plan.gpu_dollars(1e6 * 3600 * plan.hours),
        plan.gpu_dollars(1e12 * plan.teacher_tokens * learning / rate) / plan.students,
        plan.days,
    )


# ----------------------------------------------------------------------------------------------------------------------
# In words and as a picture.


def shown(plan: Plan, charged: bool = False) -> Shown:
    """What both ways cost. charged: whether the verdict lets the student pay for the teacher's own training."""
    models = {NAMES[key]: serving(key, plan) for key in (TEACHER, *PUBLISHED)}
    both, name = choice(plan), NAMES[plan.student]
    lines = [_serving_line(label, each) for label, each in models.items()]
    text = "\n".join(lines + _teaching_lines(both, plan, name) + _verdict(both, plan, name, charged) + _assumed(plan))
    figure = Figure(figsize=(9, 3.3))
    bars, curves = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.02, right=0.985, top=0.9, bottom=0.15, wspace=0.19)  # quicker than a layout engine
    _bars(bars, models, name)
    _curves(curves, both, plan)
    alt = (
        "Bars: dollars per million tokens written, for Behemoth (estimate), Maverick and Scout. Lines: dollars spent "
        f"against days, serving the teacher or its student. {text}"
    )
    return Shown(text, figure, alt.replace("\n", " "))


def _serving_line(label: str, s: Serving) -> str:
    hosts = math.ceil(s.gpus / 8)
    held = (
        f"{(s.weights + s.cache) / 1e9:,.0f} GB with the cache, so {_many(s.gpus, 'GPU')} ({_many(hosts, 'host')} of 8)"
    )
    speed = f"at least {s.floor * 1e3:.3g} ms a token alone, at most {s.rate:,.0f} tokens/s in a batch"
    cost = f"{money(s.per_million)} per M written ({money(s.full_use)} if never idle)"
    return (
        f"{label}: weights {s.weights / 1e9:,.0f} GB, {held}; {speed}; {_many(s.replicas, 'replica')}, "
        f"{_many(s.replicas * s.gpus, 'GPU')}, {money(s.dollars)} a day: {cost}."
    )


def _teaching_lines(both: Choice, plan: Plan, name: str) -> list[str]:
    shared = f", shared by {plan.students} students" if plan.students > 1 else ""
    return [
        f"Paid first for {name}: teacher passes (forward only, estimate{shared}) {money(both.passes)}, its own "
        f"training {money(both.training)}. The teacher's own training (estimate{shared}): "
        f"{money(both.teacher_training)}.",
    ]


def _verdict(both: Choice, plan: Plan, name: str, charged: bool) -> list[str]:
    if both.saving <= 0:
        first = f"{name} costs no less to serve than the teacher here, so it never pays back."
    else:
        days = [f"{both.break_even(each):,.0f} days" for each in (False, True)]
        first = (
            f"{name} saves {money(both.saving)} a day and has paid back after {days[0]}; with the teacher's own "
            f"training charged as well, after {days[1]} (estimates)."
        )
    won, charge = both.won(charged), " (teacher's training charged)" if charged else ""
    per_million = won / (plan.written * plan.days)
    if won <= 0:
        second = (
            f"In {plan.days:,} days distilling costs {money(-won)} more{charge}: serve the teacher, even if its "
            "answers are no better."
        )
    else:
        serve = plan.gap > per_million
        second = (
            f"In {plan.days:,} days distilling saves {money(won)}{charge}. Serving the teacher pays if its answers are "
            f"worth more than {money(per_million)} per M tokens above the student's; at {money(plan.gap)}, "
            + ("serve the teacher." if serve else f"distil and serve {name}.")
        )
    return [first, second]


def _assumed(plan: Plan) -> list[str]:
    g = GPUS[plan.gpu]
    return [
        f"Assumed, beside the fields: {g.bandwidth / 1e12:g} TB/s and {g.flops / 1e12:g} TFLOP/s in bf16 for every "
        f"format ({g.note}), {g.reserve / 1e9:g} GB of each GPU kept free, even routing, a bf16 KV cache, perfect "
        "division over GPUs, no time to send anything between them. Half of that rate is what Meta says of Behemoth's "
        "own training (390 TFLOP/s a GPU, in fp8). Traffic, price and days are examples. Published: GPU hours and "
        "tokens of Maverick (2.38M, about 22T) and Scout (5.0M, about 40T). Not published: what Behemoth saw (30T is "
        "the size of the mixture), and how many passes were extra (Meta says that passes were amortised for most "
        "data). Whoever serves the teacher has paid for its training as well; to charge it to the student alone is "
        "the harshest view.",
        f"Note: Behemoth is {shape(TEACHER).note}.",
    ]


def money(dollars: float) -> str:
    """ "$1.23M"; three digits, with a minus in front."""
    size, sign = abs(dollars), "-" if dollars < 0 else ""
    for unit, each in (("", 1.0), ("K", 1e3), ("M", 1e6), ("B", 1e9), ("T", 1e12)):
        if float(f"{size / each:.3g}") < 1000 or unit == "T":
            break
    number = f"{size:.2f}" if not unit and size >= 0.1 or not size else f"{size / each:.3g}"
    return f"{sign}${number}{unit}"


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


def _bars(axes: Axes, models: dict[str, Serving], student: str):
    """At this traffic; what is paid for replicas that wait is hatched."""
    costs = [each.per_million for each in models.values()]
    for row, (label, each) in enumerate(models.items()):
        colour = RED if row == 0 else BLUE if label == student else LIGHT
        axes.barh(row, each.full_use, 0.5, color=colour)
        idle = each.per_million - each.full_use
        if idle > 0.02 * max(costs):  # a thinner bar shows only crumbs of the hatch
            axes.barh(row, idle, 0.5, each.full_use, color="white", edgecolor=colour, hatch="///", linewidth=0)
        words = f"{label}: {money(each.per_million)}, {_many(each.gpus, 'GPU')} a replica"
        axes.text(0.008 * max(costs), row - 0.3, words, va="bottom", fontsize="small")
    axes.set(title="$ per M tokens written (hatched: idle)", yticks=[], ylim=(2.5, -0.75), xlim=(0, 1.08 * max(costs)))
    axes.xaxis.set_major_formatter(lambda dollars, _: money(dollars).removesuffix(".00"))
    axes.locator_params(axis="x", nbins=4)


def _curves(axes: Axes, both: Choice, plan: Plan):
    days = [0, plan.days]
    worth = plan.gap * plan.written
    lines = [("serve the teacher", 0.0, both.teacher.dollars, dict(color=RED, linestyle="-"))]
    if plan.gap:
        lines.append(("less what it is better by", 0.0, both.teacher.dollars - worth, dict(color=RED, linestyle=":")))
    lines += [
        ("distil, serve the student", both.first(False), both.student.dollars, dict(color=BLUE, linestyle="-")),
        ("teacher's training charged", both.first(True), both.student.dollars, dict(color=BLUE, linestyle="--")),
    ]
    for label, first, daily, look in lines:
        axes.plot(days, [first + daily * day for day in days], label=label, **look)
    reached = [day for day in (both.break_even(False), both.break_even(True)) if day <= plan.days]
    if reached:
        axes.plot(reached, [both.teacher.dollars * day for day in reached], "o", color=ORANGE, markeredgecolor="black",
                  markersize=8, label="paid back")  # fmt: skip
    ends = [first + daily * day for _, first, daily, _ in lines for day in days]
    axes.set(title="dollars spent", xlabel="days in service", xlim=(0, plan.days))
    axes.set_ylim(min(*ends, 0), max(ends) + 0.45 * (max(ends) - min(*ends, 0)))  # room for the legend
    axes.yaxis.set_major_formatter(lambda dollars, _: money(dollars).removesuffix(".00"))
    axes.locator_params(nbins=5)
    axes.legend(loc="upper left", frameon=False, fontsize="small", ncols=2, columnspacing=1)


class DeployOrDistil(View):
    """Choose the student, the cards and the traffic, what teaching takes, and what a better answer is worth."""

    def __init__(self):
        start = {field.name: field.default for field in fields(Plan)}
        controls = {
            "student": ipywidgets.Dropdown(options=STUDENTS, description="student"),
            "dtype": ipywidgets.Dropdown(options=SHOWN_FORMATS, value=start["dtype"], description="weights in"),
            "gpu": ipywidgets.Dropdown(options={gpu.upper(): gpu for gpu in GPUS}, description="card"),
            "context": ipywidgets.SelectionSlider(options=CONTEXTS, value=start["context"], description="context"),
            "batch": ipywidgets.SelectionSlider(options=BATCHES, value=start["batch"], description="batch"),
        }
        for name, (label, least, most, step, meaning) in FIELDS.items():
            whole = isinstance(start[name], int)
            kind = ipywidgets.BoundedIntText if whole else ipywidgets.BoundedFloatText
            controls[name] = kind(start[name], min=least, max=most, step=step, description=label, tooltip=meaning)
            controls[name].layout.width, controls[name].style.description_width = "208px", "104px"
        words = "charge the teacher's own training to the student"
        controls["charged"] = ipywidgets.Checkbox(False, description=words, indent=False)
        for name in ("student", "dtype", "gpu"):
            controls[name].layout.width = "270px"
        for name in ("context", "batch"):
            controls[name].layout.width = "410px"
        rows = ("student dtype gpu", "context batch", "read written price reached", "taught extra students hours")
        super().__init__(self._show, controls, (*rows, "teacher_tokens days gap", "charged"))

    def _show(self, charged, **fields) -> Shown:
        return shown(Plan(**fields), charged)

    def react(self, event):
        """A student comes with what is published of it."""
        if isinstance(event, dict) and event["owner"] is self.controls["student"]:
            for name, value in PUBLISHED[event["new"]].items():
                self.controls[name].value = value
