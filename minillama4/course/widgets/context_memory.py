"""Context memory: what the KV cache of one sequence takes, from 1K to 10M tokens, and how many cards hold it.

Llama 4's local layers never need more than one chunk of keys and values, so that only its global layers grow. Beside
this stands what a cache costs that keeps everything in all layers, as a server without chunked caches would. The
arithmetic is that of `minillama4.budget`. GiB is 2^30 bytes, GB is 10^9.
"""

from dataclasses import dataclass, replace

import ipywidgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ...budget import KV_BYTES, kv_bytes, pick, shape, weight_bytes
from ...roofline import GPUS
from .cost_calculator import LIGHT, NAMES, SHOWN_FORMATS, cards
from .frame import BLUE, GREY, ORANGE, RED, Shown, View

SHOWN = ("scout", "maverick", "behemoth-estimate", "deepseek-v3", "llama-3.1-8b", "llama-3.1-405b")
PRESETS = {NAMES[key]: key for key in SHOWN}
CONTEXTS = {f"{2**p}K": 2 ** (p + 10) for p in range(10)} | {f"{m}M": m * 2**20 for m in (1, 2, 4, 8, 10)}
POLICIES = {"local layers keep one chunk": "chunk", "all layers keep everything": "full"}
TEN_MILLION = CONTEXTS["10M"]

GIB = 2**30
LOOKS = {"chunk": dict(color=BLUE, linestyle="-"), "full": dict(color=RED, linestyle="--")}


@dataclass(frozen=True)
class Memory:
    """Bytes of the KV cache of one sequence."""

    local: int  # in the local layers
    whole: int  # in the layers that see the whole context

    @property
    def total(self) -> int:
        return self.local + self.whole


def memory(preset: str, context: int, policy: str = "chunk", dtype: str = "bf16") -> Memory:
    """The cache of `context` tokens; a local layer counts a full chunk, its worst, as soon as it has seen one.

    policy: "chunk" (local layers keep one chunk) or "full" (all layers keep everything). dtype: a key of `KV_BYTES`.
    ValueError: an unknown name, or a negative context.
    """
    pick("policy", policy, dict.fromkeys(POLICIES.values()))
    s = shape(preset)
    full = kv_bytes(replace(s, local_layers=0, chunk=0), context, dtype=dtype)
    whole = full // s.layers * (s.layers - s.local_layers)
    return Memory((full if policy == "full" else kv_bytes(s, context, dtype=dtype)) - whole, whole)


def shown(
    preset: str = "scout", context: int = 2**20, policy: str = "chunk", dtype: str = "bf16", weights: str = "bf16"
) -> Shown:
    """What a context costs in memory, in words and as a picture. weights: a key of `FORMATS`; else as `memory`."""
    s, name = shape(preset), next((label for label, key in PRESETS.items() if key == preset), preset)
    both = {each: memory(preset, context, each, dtype) for each in POLICIES.values()}
    now, weight = pick("policy", policy, both), weight_bytes(preset, weights)
    label = next(label for label, each in POLICIES.items() if each == policy)
    ratio = both["full"].total / both["chunk"].total
    lines = [
        f"{name}, one sequence of {context:,} tokens, {label}: KV cache {gib(now.total)} ({now.total / 1e9:,.1f} GB) "
        f"in {dtype}.",
        _layers(s.local_layers, s.layers, s.chunk, now, s.kv_values * KV_BYTES[dtype]),
        f"One chunk in local layers: {gib(both['chunk'].total)}; all layers full: {gib(both['full'].total)}, "
        f"{ratio:.3g} times as much."
        if s.local_layers
        else "No layer is local, so both policies are the same.",
        f"Weights in {weights}: {weight / 1e9:,.1f} GB ({weight / GIB:,.1f} GiB). With the cache "
        f"{(weight + now.total) / 1e9:,.1f} GB, which {_needed(weight + now.total)} can hold.",
        f"Assumed: both split evenly over the cards, {GPUS['h100'].reserve / 1e9:g} GB of each kept free. Bytes alone: "
        "whether a model makes use of so long a context is another question.",
    ]
    text = "\n".join(lines + ([f"Note: {s.note}."] if s.note else []))
    figure = Figure(figsize=(9, 3.4))
    curves, bars = figure.subplots(1, 2, width_ratios=(1, 1))
    figure.subplots_adjust(left=0.085, right=0.975, top=0.91, bottom=0.15, wspace=0.19)
    _curves(curves, preset, dtype, context, policy, now)
    _bars(bars, both, weight, policy)
    alt = (
        "Curves: GiB of KV cache against tokens of context, both axes logarithmic, with local layers capped at a chunk "
        f"and with all layers full. Bars: weights and cache, with the cards they need. {text}"
    )
    return Shown(text, figure, alt.replace("\n", " "))


def gib(size: int) -> str:
    """Exact to 0.0001 GiB, without idle zeros: "49.125 GiB"."""
    return f"{size / GIB:,.4f}".rstrip("0").rstrip(".") + " GiB"


def _layers(local: int, layers: int, chunk: int, now: Memory, per_token: int) -> str:
    grows = f"{layers - local} layers that see the whole context: {gib(now.whole)}"
    grows += f", {per_token * (layers - local) / 1024:,.4g} KiB for each token"
    return f"{local} local layers (chunks of {chunk:,}): {gib(now.local)}. {grows}." if local else f"{grows}."


def _needed(size: float) -> str:
    return " or ".join(f"{cards(size, gpu)} {gpu.upper()}" for gpu in GPUS)


def _curves(axes: Axes, preset: str, dtype: str, context: int, policy: str, now: Memory):
    ends = {"chunk": "local layers: one chunk", "full": "all layers full"}
    contexts = list(CONTEXTS.values())
    for each, look in LOOKS.items():
        sizes = [memory(preset, tokens, each, dtype).total / GIB for tokens in contexts]
        axes.plot(contexts, sizes, label=ends[each], **look)
    axes.plot(context, now.total / GIB, "o", color=ORANGE, markeredgecolor="black", markersize=8, label="this context")
    top, low = 5e5, 1e-2
    for count, gpu in ((1, "h100"), (8, "h200")):
        size = count * GPUS[gpu].memory / GIB
        axes.axhline(size, color=GREY, linestyle=":", linewidth=1)
        axes.text(1100, size * 1.15, f"{count} {gpu.upper()}", color="#404040", fontsize="small")
    axes.set(title=f"KV cache of one sequence, GiB, {dtype}", xlabel="tokens of context", xscale="log", yscale="log")
    axes.set(xlim=(800, 1.3 * TEN_MILLION), ylim=(low, top))
    axes.xaxis.set_major_locator(FixedLocator([2**10, 2**13, 2**17, 2**20, TEN_MILLION]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _short(tokens)))
    axes.yaxis.set_major_locator(FixedLocator([10.0**power for power in range(-2, 5)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.legend(loc="upper left", frameon=False, fontsize="small", ncols=2, columnspacing=1)


def _short(tokens: float) -> str:
    return next((label for label, each in CONTEXTS.items() if each == tokens), f"{tokens:,.0f}")


def _bars(axes: Axes, both: dict[str, Memory], weight: int, policy: str):
    """Weights and cache end to end, for both policies. The hatch tells the parts apart without their colours."""
    rows, left = range(len(both)), [0.0] * len(both)
    parts = (
        ("weights", LIGHT, "", [weight] * len(both)),
        ("KV, global layers", BLUE, "", [each.whole for each in both.values()]),
        ("KV, local layers", ORANGE, "///", [each.local for each in both.values()]),
    )
    for label, colour, hatch, sizes in parts:
        width = [size / GIB for size in sizes]
        axes.barh(rows, width, 0.5, left, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)
        left = [start + more for start, more in zip(left, width, strict=True)]
    for row, (each, size) in enumerate(both.items()):
        mark = "▸ " if each == policy else ""
        words = "one chunk in local layers" if each == "chunk" else "all layers full"
        said = f"{mark}{words}: {_needed(weight + size.total)}"
        axes.text(0.012 * max(left), row - 0.3, said, va="bottom", fontsize="small")
    axes.set(title="weights + KV cache, GiB", yticks=[], ylim=(1.5, -0.9), xlim=(0, 1.06 * max(left)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,g}"))
    axes.legend(loc="upper left", frameon=False, fontsize="small", ncols=3, columnspacing=1, handlelength=1.4)


class ContextMemory(View):
    """Choose a model, a length of context, what the cache keeps, and the formats of the cache and of the weights."""

    def __init__(self, preset: str = "scout"):
        controls = {
            "preset": ipywidgets.Dropdown(options=PRESETS, value=preset, description="preset"),
            "policy": ipywidgets.Dropdown(options=POLICIES, description="cache"),
            "dtype": ipywidgets.Dropdown(options=list(KV_BYTES), description="cache in"),
            "weights": ipywidgets.Dropdown(options=SHOWN_FORMATS, description="weights in"),
            "context": ipywidgets.SelectionSlider(options=CONTEXTS, value=2**20, description="context"),
        }
        for name in ("preset", "policy"):
            controls[name].layout.width = "320px"
        for name in ("dtype", "weights"):
            controls[name].layout.width = "200px"
        controls["context"].layout.width = "648px"
        super().__init__(shown, controls, ("preset policy", "dtype weights", "context"))
