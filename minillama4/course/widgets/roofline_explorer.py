"""Roofline explorer: what binds decoding and a prompt, and how a dense 7B in this or another format would fare.

A step that computes few FLOPs for each byte that it reads waits for memory, one that computes many for arithmetic; the
roof is the lesser of the two. One token of one sequence uses each weight once; a batch shares the weights that it
reads, and so does a long prompt. The bounds are those of `minillama4.roofline`; measured points come from the stored
report of `minillama4 bench gpu`, and as long as there is none, the widget says so.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, fields, replace

import ipywidgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ...budget import FORMATS, OTHERS, Shape, pick, shape
from ...roofline import GPUS, Bound, Gpu, decode_bound, prefill_bound
from ..evidence import study
from .cost_calculator import LIGHT
from .fit_explorer import LABELS, MODELS, fit
from .frame import BLUE, GREEN, GREY, ORANGE, Shown, View

BESIDE = {OTHERS[key].name: key for key in ("llama-2-7b", "llama-3.1-8b")}
BATCHES = tuple(2**power for power in range(10))  # sequences that are decoded at once
PROMPTS = {f"{2**p}" if p < 10 else f"{2 ** (p - 10)}K": 2**p for p in range(7, 18)}
CONTEXTS = {"none": 0} | {label: tokens for label, tokens in PROMPTS.items() if tokens >= 1024} | {"1M": 2**20}
COMPARABLE = 1.25  # times as long, or less: a quarter more is where we stop to call two latencies comparable


# ----------------------------------------------------------------------------------------------------------------------
# Bounds.


def intensity(bound: Bound) -> float:
    """FLOPs for each byte read."""
    return bound.flops / bound.bytes


def attainable(bound: Bound) -> float:
    """FLOP/s at most: a point on the roof."""
    return bound.flops / bound.seconds


def turning_batch(model: Shape, dtype: str, context: int, gpu: str) -> int | None:
    """Sequences from which on compute binds decoding; None: not up to the largest of BATCHES."""
    batches = range(1, BATCHES[-1] + 1)
    binds = bisect_left(batches, 1, key=lambda n: decode_bound(model, dtype, context, n, gpu).bound_by == "compute")
    return batches[binds] if binds < len(batches) else None


def verdict(ratio: float) -> str:
    """ratio: its time by that of the dense model."""
    return "faster" if ratio < 1 / COMPARABLE else "comparable" if ratio <= COMPARABLE else "slower"


# ----------------------------------------------------------------------------------------------------------------------
# Measured points.


@dataclass(frozen=True)
class Point:
    """One measured row. bytes, flops: what one token must at least read and compute, counted and not profiled."""

    name: str
    model: str
    dtype: str
    tokens_per_second: float
    bytes: float
    flops: float

    def __post_init__(self):
        shape(self.model)  # refuses a name that it does not know
        pick("dtype", self.dtype, FORMATS)
        for name in ("tokens_per_second", "bytes", "flops"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(f"{name} of the measured point {self.name!r} is {value!r}; it must be above 0")

    @property
    def reached(self) -> float:
        """FLOP/s."""
        return self.tokens_per_second * self.flops

    def share(self, roof: Gpu) -> float:
        """Of the tokens/s that a roof allows."""
        return self.tokens_per_second * max(self.bytes / roof.bandwidth, self.flops / roof.flops)


@dataclass(frozen=True)
class Report:
    """What was measured on one card."""

    gpu: str  # a key of `GPUS`
    provenance: str
    roof: Gpu  # as measured in the same run; what was not is that of `GPUS`
    points: tuple[Point, ...]


def stored() -> dict | None:
    """The committed report of `minillama4 bench gpu`; None: there is none yet."""
    try:
        return study.load("bench_gpu")
    except FileNotFoundError:
        return None


def read(report: dict | None) -> Report | None:
    """The points of a report; None: there is none, or nothing in it. ValueError: it lacks a key, or says nonsense."""
    if not report or not report.get("points"):
        return None
    try:
        card = report["card"]
        gpu, provenance = card["gpu"], f"{card['device']}, {card['date']}"
        names = [field.name for field in fields(Point)]
        points = tuple(Point(**{name: each[name] for name in names}) for each in report["points"])
    except KeyError as error:
        raise ValueError(f"the report of bench gpu lacks {error}; run `minillama4 bench gpu` again") from None
    measured = {name: report.get("roofline", {}).get(name) for name in ("bandwidth", "flops")}
    roof = replace(pick("GPU", gpu, GPUS), **{name: value for name, value in measured.items() if value})
    return Report(gpu, provenance, roof, points)


# ----------------------------------------------------------------------------------------------------------------------
# In words and as a picture.


@dataclass(frozen=True)
class Side:
    """One of the two models, in one format, with what binds it."""

    name: str
    dtype: str
    decode: Bound
    prompt: Bound
    fits: bool  # on the card, as it decodes

    @property
    def label(self) -> str:
        return f"{self.name}, {self.dtype}"


def side(model: str, dtype: str, batch: int, context: int, prompt: int, gpu: str) -> Side:
    """ValueError: an unknown name, or a number out of range."""
    s = shape(model)
    decode, fits = decode_bound(s, dtype, context, batch, gpu), fit(model, dtype, context, batch, gpu=gpu).fits
    return Side(LABELS.get(model, model), dtype, decode, prefill_bound(s, dtype, prompt, gpu), fits)


def shown(
    model: str = "scout", dtype: str = "int4", gpu: str = "h100", batch: int = 1, context: int = 0, prompt: int = 8192,
    beside: str = "llama-2-7b", beside_dtype: str = "bf16", report: dict | None = None,
) -> Shown:  # fmt: skip
    """What binds a model and a dense one beside it. dtype, gpu: keys of `FORMATS` and `GPUS`.

    batch: sequences that are decoded at once. context: tokens that each has already. prompt: tokens of a prompt that
    is read in one pass. report: of `minillama4 bench gpu`. ValueError: an unknown name, or a number out of range.
    """
    card, measured, s, other = pick("GPU", gpu, GPUS), read(report), shape(model), shape(beside)
    this = side(model, dtype, batch, context, prompt, gpu)
    that = side(beside, beside_dtype, batch, context, prompt, gpu)
    steps = {  # format -> seconds of a step of both
        each: tuple(decode_bound(one, each, context, batch, gpu).seconds for one in (s, other)) for each in FORMATS
    }
    lines = [
        f"{card.name}: {card.bandwidth / 1e12:g} TB/s, {card.flops / 1e12:g} TFLOP/s ({card.note}). Below "
        f"{ridge(card):,.0f} FLOPs a byte memory binds, above it compute.",
        _side_words(this, batch, context, prompt),
        _turning(turning_batch(s, dtype, context, gpu)),
        _side_words(that, batch, context, prompt),
        _comparison(this, that, steps),
        _measured_words(measured, model, gpu),
        "Assumed: bf16 arithmetic in every format, a bf16 KV cache, even routing; dequantising and launches are free.",
        f"Note: {s.note}." if s.note else "",
    ]
    text = "\n".join(filter(None, lines))
    figure = Figure(figsize=(9, 3.9))
    roof, bars = figure.subplots(1, 2, width_ratios=(11, 8))
    figure.subplots_adjust(left=0.075, right=0.985, top=0.92, bottom=0.13, wspace=0.31)
    trail = (
        [decode_bound(s, dtype, context, each, gpu) for each in BATCHES],
        [prefill_bound(s, dtype, each, gpu) for each in PROMPTS.values()],
    )
    points = [each for each in measured.points if each.model == model] if measured and measured.gpu == gpu else []
    _roof(roof, card, trail, this, that, points, measured.roof if points else None)
    _bars(bars, steps, dtype, that)
    alt = (
        "Roofline, both axes logarithmic: FLOP/s at most against FLOPs for each byte, with points for decoding and "
        f"for a prompt. Bars: time of a step of decoding at least, by format. {text}"
    )
    return Shown(text, figure, alt.replace("\n", " "))


def ridge(card: Gpu) -> float:
    """FLOPs a byte at which both bind."""
    return card.flops / card.bandwidth


def _side_words(one: Side, batch: int, context: int, prompt: int) -> str:
    d, p = one.decode, one.prompt
    after = f"after {context:,} tokens" if context else "without context"
    each = f", {number(d.tokens_per_second / batch)} for each sequence" if batch > 1 else ""
    return (
        f"{one.label}: decoding at batch {batch} {after} reads {_si(d.bytes, 'B')} and computes {_si(d.flops, 'FLOP')} "
        f"a step, {number(intensity(d))} FLOPs a byte, so {d.bound_by} binds: at least {ms(d.seconds)}, at most "
        f"{number(d.tokens_per_second)} tokens/s{each}. A prompt of {prompt:,} tokens: {number(intensity(p))} FLOPs a "
        f"byte, so {p.bound_by} binds: at least {ms(p.seconds)}, at most {number(p.tokens_per_second)} tokens/s."
        + ("" if one.fits else " Weights, cache and reserve do not fit this card: a bound on paper.")
    )


def _turning(batch: int | None) -> str:
    if batch == 1:
        return "Compute binds its decoding at any batch."
    if batch is None:
        return f"Memory binds its decoding at every batch up to {BATCHES[-1]}."
    return f"Its decoding turns at a batch of {batch}: below, memory binds, from there on compute."


def _comparison(this: Side, that: Side, steps: dict[str, tuple[float, float]]) -> str:
    ratio, same = this.decode.seconds / that.decode.seconds, steps[this.dtype][0] / steps[this.dtype][1]
    said = f'"Comparable latency to a dense 7B": a step takes {ratio:.2f} times that of {that.label}: {verdict(ratio)}'
    if this.dtype != that.dtype:
        said += f". With both in {this.dtype}: {same:.2f} times, {verdict(same)}"
    limits = f"up to {COMPARABLE:g} times counts as comparable here, below {1 / COMPARABLE:g} times as faster"
    return f"{said} ({limits}). A claim of this kind needs the format of both sides, the batch and the context."


def _measured_words(measured: Report | None, model: str, gpu: str) -> str:
    if measured is None:
        return "Measured: not measured yet."
    where = f"Measured on {measured.provenance}"
    points = [each for each in measured.points if each.model == model]
    if measured.gpu != gpu:
        return f"{where}: choose card {measured.gpu.upper()} to see it."
    if not points:
        return f"{where}: not this model, but {', '.join(sorted({each.model for each in measured.points}))}."
    said = (
        f"{p.name}, {p.dtype}: {number(p.tokens_per_second)} tokens/s, {p.share(measured.roof):.0%} of its bound"
        for p in points
    )
    roof = f"{measured.roof.bandwidth / 1e12:.3g} TB/s and {measured.roof.flops / 1e12:.3g} TFLOP/s"
    return f"{where}, under a roof of {roof}: {'; '.join(said)}."


def ms(seconds: float) -> str:
    return f"{seconds:,.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def number(value: float) -> str:
    """Three digits, or the whole number where that has more: "3.76", "391", "23,077"."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _si(value: float, unit: str) -> str:
    """ "8.58 GB"; three digits, but for a thousand and more of the largest prefix."""
    prefix, size = next(((p, each) for p, each in (("T", 1e12), ("G", 1e9)) if value >= each), ("M", 1e6))
    return f"{number(value / size)} {prefix}{unit}"


def _roof(
    axes: Axes, card: Gpu, trail: tuple[list[Bound], ...], this: Side, that: Side, points: list[Point], roof: Gpu | None
):
    """Small marks: every batch and every prompt of the first model; large ones: those that are chosen."""
    left, right = 0.4, 1e6

    def under(g: Gpu, look: dict):
        at = [left, ridge(g), right]
        axes.plot(at, [min(g.bandwidth * each, g.flops) for each in at], **look)

    under(card, dict(color="black", linewidth=1.5))
    if roof:
        under(roof, dict(color=GREY, linestyle="--", linewidth=1.2, label="roof as measured"))
    axes.plot([ridge(card)] * 2, [1e11, card.flops], color=GREY, linestyle=":", linewidth=1)
    for words, side_of in (("memory binds ", "right"), (" compute binds", "left")):
        axes.text(ridge(card), 1.6e11, words, ha=side_of, fontsize="small", color="#404040")
    for mark, one, bound, what in (
        ("o", this, this.decode, "decoding"), ("^", this, this.prompt, "prompt"),
        ("s", that, that.decode, "decoding"), ("D", that, that.prompt, "prompt"),
    ):  # fmt: skip
        first = one is this
        look = dict(color=BLUE, markeredgecolor="black") if first else dict(color="none", markeredgecolor=ORANGE)
        axes.plot(*_on_roof([bound]), mark, markersize=8 if first else 10, markeredgewidth=1 if first else 2,
                  label=f"{one.name}: {what}", **look)  # fmt: skip
    ranges = f"batch {BATCHES[0]} to {BATCHES[-1]}", f"prompt of {' to '.join((*PROMPTS,)[:: len(PROMPTS) - 1])}"
    for bounds, mark, label in zip(trail, "o^", ranges, strict=True):
        axes.plot(*_on_roof(bounds), mark, color=BLUE, markersize=3, label=label)
    if points:
        axes.plot([each.flops / each.bytes for each in points], [each.reached for each in points], "X", color=GREEN,
                  markeredgecolor="black", markersize=8, label="measured")  # fmt: skip
    axes.set(title=f"FLOP/s at most, {card.name.split()[0]}", xlabel="FLOPs for each byte read", xscale="log")
    axes.set(yscale="log", xlim=(left, right), ylim=(1e11, 3e15))
    axes.xaxis.set_major_locator(FixedLocator([1, 10, 100, 1000, 10_000, 100_000]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda each, _: f"{each:g}" if each < 1000 else f"{each / 1000:g}K"))
    axes.yaxis.set_major_locator(FixedLocator([1e11, 1e12, 1e13, 1e14, 1e15]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda each, _: _si(each, "").replace(" ", "")))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.08), frameon=False, fontsize="small", labelspacing=0.4)


def _on_roof(bounds: list[Bound]) -> tuple[list[float], list[float]]:
    return [intensity(each) for each in bounds], [attainable(each) for each in bounds]


def _bars(axes: Axes, steps: dict[str, tuple[float, float]], dtype: str, that: Side):
    """A row a format: the first model's step as a bar, the other's in the same format as a square on it."""
    rows = range(len(steps))
    unit, each_second = ("ms", 1e3) if max(map(max, steps.values())) < 1 else ("s", 1)
    mine, other = ([pair[which] * each_second for pair in steps.values()] for which in (0, 1))
    axes.barh(rows, mine, 0.6, color=[BLUE if each == dtype else LIGHT for each in steps])
    line, widest = that.decode.seconds * each_second, max(*mine, *other)
    axes.plot([line] * 2, [-0.6, len(steps)], color="black", linestyle="--", linewidth=1.2, label=that.label)
    axes.plot(other, rows, "s", color="white", markeredgecolor=ORANGE, markeredgewidth=2, markersize=8,
              label=f"{that.name}, same format: ×", clip_on=False)  # fmt: skip
    for row, (step, beside) in enumerate(zip(mine, other, strict=True)):
        axes.text(max(step, beside) + 0.035 * widest, row, f"{step / beside:.2f}×", va="center",
                  fontsize="small", bbox=dict(color="white", pad=0.5))  # fmt: skip
    axes.set(title=f"decoding: {unit} a step, at least", ylim=(len(steps) - 0.5, -2.1), xlim=(0, 1.25 * widest))
    axes.set_yticks(rows, [f"▸ {each}" if each == dtype else each for each in steps])
    axes.tick_params(axis="y", length=0, pad=8)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,g}"))
    axes.legend(loc="upper left", frameon=False, fontsize="small", handletextpad=0.6, labelspacing=0.3)


class RooflineExplorer(View):
    """Choose a model and its format, a card, batch, context and prompt, and the dense model to stand beside it."""

    def __init__(self, model: str = "scout", report: dict | None = None):
        """report: of `minillama4 bench gpu`; by default the stored one, if there is one."""
        self.report = stored() if report is None else report
        controls = {
            "model": ipywidgets.Dropdown(options=MODELS, value=model, description="model"),
            "dtype": ipywidgets.Dropdown(options=list(FORMATS), value="int4", description="weights in"),
            "gpu": ipywidgets.Dropdown(options={gpu.upper(): gpu for gpu in GPUS}, description="card"),
            "beside": ipywidgets.Dropdown(options=BESIDE, description="beside it"),
            "beside_dtype": ipywidgets.Dropdown(options=list(FORMATS), description="weights in"),
            "batch": ipywidgets.SelectionSlider(options=BATCHES, description="batch"),
            "context": ipywidgets.SelectionSlider(options=CONTEXTS, description="context"),
            "prompt": ipywidgets.SelectionSlider(options=PROMPTS, value=8192, description="prompt"),
        }
        widths = dict(model=300, dtype=250, gpu=190, beside=300, beside_dtype=250, batch=290, context=290, prompt=290)
        for name, width in widths.items():
            controls[name].layout.width = f"{width}px"
        super().__init__(self._show, controls, ("model dtype gpu", "beside beside_dtype", "batch context prompt"))

    def _show(self, **values) -> Shown:
        return shown(report=self.report, **values)
