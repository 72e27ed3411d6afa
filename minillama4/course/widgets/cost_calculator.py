"""Count and cost calculator: what a model of some sizes weighs, how many cards hold it, and what its experts cost.

A preset fills the fields; move any of them and see what follows. The arithmetic is that of `minillama4.budget` and
`minillama4.roofline`; here it becomes words and a picture. The roofline is of one layer with experts, bf16 arithmetic:
the bytes that the touched experts bind, the FLOPs of the chosen ones, and all experts computed for every token, as
Meta's and Hugging Face's code do.
"""

import math
from dataclasses import replace

import ipywidgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ...budget import FORMATS, Shape, count, pick, shape, weight_bytes
from ...roofline import GPUS, MoeTimes, moe_layer_times
from .frame import BLUE, GREEN, ORANGE, RED, Shown, View

PRESETS = {
    "Llama 4 Scout": "scout",
    "Llama 4 Maverick": "maverick",
    "Behemoth (estimate)": "behemoth-estimate",
    "Mixtral 8x7B": "mixtral-8x7b",
    "DeepSeek-V3": "deepseek-v3",
    "Llama 3.1 8B": "llama-3.1-8b",
    "Llama 3.1 70B": "llama-3.1-70b",
    "Llama 3.1 405B": "llama-3.1-405b",
}
NAMES = {key: label for label, key in PRESETS.items()}
SHOWN_FORMATS = ("bf16", "fp8", "fp8-mixed", "int4-meta", "int4")
BATCHES = tuple(2**power for power in range(14))  # tokens in one forward pass: 1 to 8,192
FIELDS = {  # name -> (label, least, most, step, what it is)
    "layers": ("layers", 1, 500, 1, "layers of the decoder"),
    "hidden": ("width", 128, 65_536, 128, "hidden size: channels of the residual stream"),
    "dense_width": ("dense width", 0, 262_144, 128, "inner width of the feed-forward of a layer without experts"),
    "interleave": ("MoE every", 1, 100, 1, "every n-th layer has experts: 1 in Scout, 2 in Maverick"),
    "first_dense": ("dense first", 0, 100, 1, "so many first layers have no experts: 3 in DeepSeek-V3"),
    "experts": ("experts", 0, 1024, 1, "routed experts of a layer that has them; 0: a dense model"),
    "expert_width": ("expert width", 0, 262_144, 128, "inner width of one expert, routed or shared"),
    "top_k": ("top-k", 1, 64, 1, "routed experts that each token takes"),
    "shared": ("shared", 0, 8, 1, "experts that every token takes beside the routed ones"),
}

LIGHT = "#bcd9ea"
# (name in a picture, which time, how drawn)
ROOFS = (
    ("chosen experts: bytes", lambda times: times.sparse_memory, dict(color=BLUE, linestyle="-")),
    ("chosen experts: FLOPs", lambda times: times.sparse_compute, dict(color=GREEN, linestyle="--")),
    ("every expert", lambda times: times.dense, dict(color=RED, linestyle="-.")),
)


def sizes(preset: str) -> dict[str, int]:
    """What the fields say of a preset. The rhythm of its layers with experts is regular, or some dense ones begin."""
    s = shape(preset)
    interleave, first_dense = 1, 0
    if s.moe_layers and s.layers % s.moe_layers == 0:
        interleave = s.layers // s.moe_layers
    elif s.moe_layers:
        first_dense = s.layers - s.moe_layers
    return {
        "layers": s.layers,
        "hidden": s.hidden,
        "dense_width": s.dense_width,
        "interleave": interleave,
        "first_dense": first_dense,
        "experts": s.experts,
        "expert_width": s.expert_width,
        "top_k": s.per_token,
        "shared": s.shared,
    }


def design(preset: str, **fields: int) -> Shape:
    """The preset with other sizes: any of `FIELDS`. ValueError: sizes that make no model.

    A layer has experts if it is not among the `first_dense` and `(layer + 1) % interleave == 0`, counted from 0. What
    has no field stays: vocabulary, vision, and the heads, so that attention grows in proportion to the width.
    """
    base, f = shape(preset), sizes(preset) | fields
    for name, value in fields.items():
        least, most = pick("field", name, FIELDS)[1:3]
        if not least <= value <= most:
            raise ValueError(f"{name} is {value}; it must be {least} to {most}")
    if f["experts"] and f["top_k"] > f["experts"]:
        raise ValueError(f"top_k is {f['top_k']}; with {f['experts']} experts it must be 1 to {f['experts']}")
    moe_layers = sum((layer + 1) % f["interleave"] == 0 for layer in range(f["first_dense"], f["layers"]))
    moe_layers = moe_layers if f["experts"] else 0
    if moe_layers and not f["expert_width"]:
        raise ValueError(f"expert_width is 0; {moe_layers} layers have experts, which need a width above 0")
    if moe_layers < f["layers"] and not f["dense_width"]:
        raise ValueError(f"dense_width is 0; {f['layers'] - moe_layers} layers have no experts and need one above 0")
    return replace(
        base,
        layers=f["layers"],
        hidden=f["hidden"],
        attention=base.attention * f["hidden"] // base.hidden,
        norms=base.norms + 2 * (f["hidden"] - base.hidden),
        projector=base.projector * f["hidden"] // base.hidden,
        dense_width=f["dense_width"],
        moe_layers=moe_layers,
        experts=f["experts"],
        expert_width=f["expert_width"],
        per_token=f["top_k"],
        shared=f["shared"],
        local_layers=0,  # of the cache, which is not counted here
        chunk=0,
    )


def cards(weights: float, gpu: str) -> int:
    """GPUs of a kind that hold so many bytes of weights between them, each with its reserve kept free."""
    return math.ceil(weights / (GPUS[gpu].memory - GPUS[gpu].reserve))


def shown(model: Shape, name: str, dtype: str = "bf16", gpu: str = "h200", batch: int = 8) -> Shown:
    """What a model weighs and costs, in words and as a picture.

    name: what to call it. dtype, gpu: a key of `FORMATS` and one of `GPUS`, for the roofline. batch: tokens in one
    forward pass, of all sequences together. ValueError: an unknown name, or no tokens.
    """
    counts, card, stored = count(model), pick("GPU", gpu, GPUS), pick("dtype", dtype, FORMATS)
    weights = {fmt: weight_bytes(model, fmt) for fmt in SHOWN_FORMATS}
    times = [moe_layer_times(tokens, model, gpu, dtype) for tokens in BATCHES] if model.moe_layers else []
    now = moe_layer_times(batch, model, gpu, dtype) if model.moe_layers else None
    memory = "; ".join(f"{fmt} {size / 1e9:,.1f} GB ({_needed(size)})" for fmt, size in weights.items())
    batch_lines = _batch_lines(now, model, dtype, card.name)
    lines = [
        f"{name}: {_layers(model)}.",
        f"Parameters: {counts.total:,} in all, {counts.active:,} active for a text token "
        f"({counts.active / counts.total:.1%}). Decoding reads {counts.active_read / 1e9:.2f}B of these, since of the "
        "embedding a token takes one row.",
        f"Weights: {memory}.",
        *batch_lines,
        f"Assumed: even routing. The preset's heads, so that attention ({model.attention / 1e6:,.1f}M parameters a "
        f"layer) goes in proportion to the width. Cards hold weights alone, with {card.reserve / 1e9:g} GB of each "
        f"kept free; the KV cache comes on top. {dtype}: {stored.note}; embedding, norms, routers and vision "
        f"have 16 bits in every format. {card.bandwidth / 1e12:g} TB/s, {card.flops / 1e12:g} TFLOP/s: {card.note}. "
        "No time for launches, or for sending tokens between cards.",
    ]
    text = "\n".join(lines + ([f"Note: {model.note}."] if model.note else []))
    figure = Figure(figsize=(9, 3.3))
    bars, roofs = figure.subplots(1, 2, width_ratios=(4, 5))
    figure.subplots_adjust(left=0.1, right=0.99, top=0.9, bottom=0.15, wspace=0.22)  # quicker than a layout engine
    _memory(bars, weights, dtype)
    _roofline(roofs, times, now, f"one MoE layer, {dtype}, {card.name.split()[0]}")
    alt = (
        f"{name}. Bars: gigabytes of weights by format. {memory}. Curves: time of one MoE layer against tokens, "
        f"for the bytes and the FLOPs of the chosen experts, and for every expert. {' '.join(batch_lines)}"
    )
    return Shown(text, figure, alt)


def _layers(model: Shape) -> str:
    if not model.moe_layers:
        return f"{model.layers} layers, all dense"
    dense = f", {model.layers - model.moe_layers} dense" if model.moe_layers < model.layers else ""
    return (
        f"{model.layers} layers, {model.moe_layers} of them with {model.experts} experts{dense}; a token takes "
        f"{model.per_token} routed + {model.shared} shared"
    )


def _needed(weights: float) -> str:
    return " or ".join(f"{cards(weights, gpu)} {gpu.upper()}" for gpu in GPUS)


def _batch_lines(now: MoeTimes | None, model: Shape, dtype: str, card: str) -> list[str]:
    if now is None:
        return ["No layer has experts: every token takes all weights, at any batch."]
    bound_by = "bytes" if now.sparse_memory >= now.sparse_compute else "FLOPs"
    tokens = f"{now.tokens:,} token" + "s" * (now.tokens > 1)
    return [
        f"A batch of {tokens} touches {now.touched:.1f} of {model.experts} experts in a layer, on average.",
        f"Such a layer takes at least {_time(now.sparse)} on an {card} with {dtype} weights, bound by {bound_by}; with "
        f"every expert on every token {_time(now.dense)}, {now.dense / now.sparse:.1f} times as long.",
    ]


def _time(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _memory(axes: Axes, weights: dict[str, int], dtype: str):
    gigabytes = [size / 1e9 for size in weights.values()]
    axes.barh(range(len(weights)), gigabytes, color=[BLUE if fmt == dtype else LIGHT for fmt in weights])
    for row, size in enumerate(weights.values()):
        axes.text(size / 1e9, row, f" {size / 1e9:,.0f} GB: {_needed(size)}", va="center", fontsize="small")
    axes.set(yticks=range(len(weights)), yticklabels=list(weights), xticks=[], title="weights, and cards to hold them")
    axes.set(xlim=(0, 2.8 * max(gigabytes)), ylim=(len(weights) - 0.5, -0.5))  # room for the words


def _roofline(axes: Axes, times: list[MoeTimes], now: MoeTimes | None, title: str):
    if now is None:
        axes.text(0.5, 0.5, "no layer has experts", ha="center")
        axes.set_axis_off()
        return
    for label, of, style in ROOFS:
        axes.plot(BATCHES, [of(each) for each in times], label=label, **style)
    axes.plot(now.tokens, now.sparse, "o", color=ORANGE, markeredgecolor="black", markersize=8, label="this batch")
    lowest, highest = min(each.sparse_compute for each in times), max(each.dense for each in times)
    axes.set(title=title, xlabel="tokens in the batch", xscale="log", xlim=(0.8, 1.25 * BATCHES[-1]))
    axes.set(yscale="log", ylim=(lowest / 2, highest * 50))  # room for the legend
    axes.xaxis.set_major_locator(FixedLocator(BATCHES[::3]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: _time(seconds)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.legend(loc="upper left", frameon=False, fontsize="small", ncols=2, columnspacing=1)


class CostCalculator(View):
    """Choose a preset, or any sizes; a format of the weights, a card, and how many tokens one forward pass has."""

    def __init__(self, preset: str = "scout"):
        start = sizes(preset)
        controls = {"preset": ipywidgets.Dropdown(options=PRESETS, value=preset, description="preset")}
        for name, (label, least, most, step, meaning) in FIELDS.items():
            controls[name] = ipywidgets.BoundedIntText(
                start[name], min=least, max=most, step=step, description=label, tooltip=meaning
            )
            controls[name].layout.width, controls[name].style.description_width = "162px", "84px"
        controls |= {
            "dtype": ipywidgets.Dropdown(options=SHOWN_FORMATS, description="weights in"),
            "gpu": ipywidgets.Dropdown(options={gpu.upper(): gpu for gpu in GPUS}, value="h200", description="card"),
            "batch": ipywidgets.SelectionSlider(options=BATCHES, value=8, description="tokens"),
        }
        for name in ("preset", "dtype", "gpu"):
            controls[name].layout.width = "270px"
        controls["batch"].layout.width = "560px"
        rows = ("preset dtype gpu", "layers hidden dense_width interleave first_dense")
        super().__init__(self._show, controls, (*rows, "experts expert_width top_k shared", "batch"))

    def _show(self, preset, dtype, gpu, batch, **fields) -> Shown:
        standard = sizes(preset)
        changed = [f"{FIELDS[name][0]} {value:,}" for name, value in fields.items() if value != standard[name]]
        name = NAMES[preset] + (f" with {', '.join(changed)}" if changed else "")
        return shown(design(preset, **fields), name, dtype, gpu, batch)

    def react(self, event):
        """A preset fills the fields."""
        if isinstance(event, dict) and event["owner"] is self.controls["preset"]:
            for name, value in sizes(event["new"]).items():
                self.controls[name].value = value
