"""Fit explorer: "fits on a single H100" taken apart, into weights, KV cache and what must stay free.

All formats of the weights stand side by side, since the claim is one about a format; beside them the longest context
that each leaves room for, with local layers that keep one chunk and with all layers full. What the cache of one
sequence takes at any length is in `context_memory`; the arithmetic is that of `minillama4.budget`. GB is 10^9 bytes,
GiB is 2^30.
"""

from dataclasses import dataclass, replace

import ipywidgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ...budget import FORMATS, KV_BYTES, OTHERS, Model, longest_context, pick, shape, weight_bytes
from ...config import PRESETS
from ...roofline import GPUS
from .context_memory import CONTEXTS, POLICIES, gib, memory
from .cost_calculator import LIGHT, NAMES, cards
from .frame import BLUE, GREY, ORANGE, RED, Shown, View

MODELS = {NAMES[key]: key for key in ("scout", "maverick", "behemoth-estimate", "llama-3.1-8b", "llama-3.1-70b")}
MODELS |= {OTHERS["llama-2-7b"].name: "llama-2-7b"}
LABELS = {key: label for label, key in MODELS.items()}
BATCHES = tuple(2**power for power in range(9))  # sequences
RELEASED = {  # tokens of context that a model was released for; nothing is published of Behemoth
    "scout": PRESETS["scout"].text.max_positions,
    "maverick": PRESETS["maverick"].text.max_positions,
    "llama-3.1-8b": 131_072,
    "llama-3.1-70b": 131_072,
    "llama-2-7b": 4096,
}
ENDS = {  # how the picture shows a policy
    "chunk": ("local: one chunk", dict(marker="o", color=BLUE, markeredgecolor="black", markersize=9)),
    "full": ("all full", dict(marker="D", color="white", markeredgecolor=RED, markersize=5)),
}


@dataclass(frozen=True)
class Fit:
    """One model on one card. Bytes, but for `longest`."""

    text: int  # weights of the language model
    vision: int  # weights of the encoder with its projector
    cache: int  # of all sequences
    reserve: float  # for the CUDA context and activations
    memory: int  # of the card
    longest: int  # tokens that each sequence may have; 0 if none fits

    @property
    def weights(self) -> int:
        return self.text + self.vision

    @property
    def needed(self) -> float:
        return self.weights + self.cache + self.reserve

    @property
    def fits(self) -> bool:
        return self.needed <= self.memory


def fit(
    model: str, dtype: str, context: int, batch: int = 1, kv_dtype: str = "bf16", policy: str = "chunk",
    gpu: str = "h100",
) -> Fit:  # fmt: skip
    """`batch` sequences of `context` tokens each. dtype, kv_dtype, policy, gpu: keys of `FORMATS`, `KV_BYTES`, `ENDS`
    and `GPUS`. ValueError: an unknown name, or a number out of range."""
    card = pick("GPU", gpu, GPUS)
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1 sequence")
    cache = batch * memory(model, context, policy, kv_dtype).total
    weights, text = weight_bytes(model, dtype), weight_bytes(replace(shape(model), vision=0, projector=0), dtype)
    room = (card.memory - card.reserve - weights) / batch  # bytes of cache that each sequence may have
    longest = longest_context(_cached_as(model, policy), room, kv_dtype)
    return Fit(text, weights - text, cache, card.reserve, card.memory, longest)


def _cached_as(model: Model, policy: str):
    s = shape(model)
    return replace(s, local_layers=0, chunk=0) if policy == "full" else s


# ----------------------------------------------------------------------------------------------------------------------
# In words and as a picture.


def shown(
    model: str = "scout", dtype: str = "int4", context: int = 2**17, batch: int = 1, kv_dtype: str = "bf16",
    policy: str = "chunk", gpu: str = "h100",
) -> Shown:  # fmt: skip
    """Whether a model fits, in every format, and what is left for its context. Arguments as of `fit`."""
    every = {  # format -> policy -> Fit
        each: {way: fit(model, each, context, batch, kv_dtype, way, gpu) for way in ENDS} for each in FORMATS
    }
    now = pick("policy", policy, pick("dtype", dtype, every))
    card, name = GPUS[gpu], LABELS.get(model, model)
    local = bool(shape(model).local_layers)
    lines = [
        f"{name} on one {card.name}, weights in {dtype} ({FORMATS[dtype].note}), {_sequences(batch)} of "
        f"{context:,} tokens{f', {_words(policy)}' if local else ''}: {_verdict(now, gpu)}.",
        f"Needed: weights {_gb(now.weights)}{_of_vision(now)} + KV cache {_gb(now.cache)} ({gib(now.cache)}, "
        f"{kv_dtype}) + {now.reserve / 1e9:g} GB for the CUDA context and activations = {_gb(now.needed)}, of "
        f"{_gb(now.memory)} ({now.memory / 2**30:.1f} GiB).",
        _longest(every[dtype], batch, local),
        _formats(every),
        _released(model, kv_dtype, policy, now, gpu),
        "Assumed: every sequence has a cache of its own, at its full length; local layers count a full chunk, their "
        "worst. Embedding, norms, routers and vision have 16 bits in every format.",
        f"Note: {shape(model).note}." if shape(model).note else "",
    ]
    text = "\n".join(filter(None, lines))
    figure = Figure(figsize=(9, 3.7))
    bars, ends = figure.subplots(1, 2, width_ratios=(11, 10))
    figure.subplots_adjust(left=0.118, right=0.985, top=0.91, bottom=0.1, wspace=0.05)
    _bars(bars, {each: fits[policy] for each, fits in every.items()}, dtype, card.name.split()[0])
    _ends(ends, every, context)
    alt = (
        f"Bars: weights, KV cache and reserve of {name} in each format, against the card's memory. Points: the longest "
        f"context that each format leaves room for, for both ways to cache. {text}"
    )
    return Shown(text, figure, alt.replace("\n", " "))


def _words(policy: str) -> str:
    return next(label for label, key in POLICIES.items() if key == policy)


def _sequences(batch: int) -> str:
    return f"{batch} sequence" + "s" * (batch > 1)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _of_vision(now: Fit) -> str:
    return f" (text {_gb(now.text)}, vision {_gb(now.vision)})" if now.vision else ""


def _verdict(now: Fit, gpu: str) -> str:
    if now.fits:
        return "fits"
    needed = f"weights and cache take {cards(now.weights + now.cache, gpu)} {gpu.upper()}"
    why = "a shorter context would fit" if now.longest else "no context would fit"
    return f"does not fit, {why}; {needed}"


def _longest(ways: dict[str, Fit], batch: int, local: bool) -> str:
    chunk, full = ways["chunk"].longest, ways["full"].longest
    each = f" for each of {batch} sequences" if batch > 1 else ""
    if not chunk:
        return "Longest context that fits: none, since weights and reserve leave no room for a token."
    if not local:
        return f"Longest context that fits{each}: {chunk:,} tokens. No layer is local, so all keep everything."
    without = f"{full:,} if all layers keep everything" if full else "none if all layers keep everything"
    return f"Longest context that fits{each}: {chunk:,} tokens with one chunk in local layers; {without}."


def _formats(every: dict[str, dict[str, Fit]]) -> str:
    """The claim, format by format: which of them leave room for any context at all."""
    weights = {dtype: f"{dtype} {ways['chunk'].weights / 1e9:,.1f} GB" for dtype, ways in every.items()}
    holds = [dtype for dtype, ways in every.items() if ways["chunk"].longest]
    others = [weights[dtype] for dtype in weights if dtype not in holds]
    if not holds:
        return f'"Fits on a single card" holds in no format here: {", ".join(others)}.'
    said = f'"Fits on a single card" holds in {", ".join(weights[dtype] for dtype in holds)}'
    if not others:
        return f"{said}: in every format."
    only = " Only int4 formats do." if all(dtype.startswith("int4") for dtype in holds) else ""
    return f"{said}; not in {', '.join(others)}.{only}"


def _released(model: str, kv_dtype: str, policy: str, now: Fit, gpu: str) -> str:
    tokens = RELEASED.get(model)
    if not tokens:
        return ""
    cache = memory(model, tokens, policy, kv_dtype).total
    many = cards(now.weights + cache, gpu)
    return (
        f"It was released for up to {tokens:,} tokens: for one such sequence {gib(cache)} ({cache / 1e9:,.1f} GB) of "
        f"KV cache, and {many} {gpu.upper()} to hold it with these weights."
    )


def _bars(axes: Axes, fits: dict[str, Fit], dtype: str, card: str):
    """A row a format. The hatch tells the parts apart without their colours; the words say what the line decides."""
    parts = (
        ("weights", LIGHT, "", [each.weights for each in fits.values()]),
        ("KV cache", BLUE, "", [each.cache for each in fits.values()]),
        ("reserve", GREY, "////", [each.reserve for each in fits.values()]),
    )
    left, rows = [0.0] * len(fits), range(len(fits))
    for label, colour, hatch, sizes in parts:
        width = [size / 1e9 for size in sizes]
        axes.barh(rows, width, 0.6, left, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)
        left = [start + more for start, more in zip(left, width, strict=True)]
    held = next(iter(fits.values())).memory / 1e9
    widest = max(*left, held)
    for row, (end, each) in enumerate(zip(left, fits.values(), strict=True)):
        axes.text(end + 0.012 * widest, row, f"{end:,.0f}, {'fits' if each.fits else 'no'}", va="center",
                  fontsize="small", bbox=dict(color="white", pad=0.5))  # fmt: skip
    axes.plot([held] * 2, [-0.6, len(fits)], color="black", linestyle="--", linewidth=1.2, label=f"one {card}")
    axes.set(title="needed, GB", ylim=(len(fits) - 0.5, -1.35), xlim=(0, 1.32 * widest))
    axes.set_yticks(rows, [f"▸ {each}" if each == dtype else each for each in fits])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,g}"))
    axes.legend(loc="upper left", frameon=False, fontsize="small", ncols=4, columnspacing=0.9, handlelength=1.3)


def _ends(axes: Axes, every: dict[str, dict[str, Fit]], context: int):
    """Two points a row, or the word that there is none. Each number stands on the outer side of its point."""
    longest = {way: [ways[way].longest for ways in every.values()] for way in ENDS}
    for way, (label, look) in ENDS.items():
        rows = [row for row, tokens in enumerate(longest[way]) if tokens]
        axes.plot([longest[way][row] for row in rows], rows, linestyle="", label=label, **look)
    for row, (chunk, full) in enumerate(zip(*longest.values(), strict=True)):
        if chunk:
            axes.annotate(f"{chunk:,}", (chunk, row), (8, 0), textcoords="offset points", va="center", size="small",
                          bbox=dict(color="white", pad=0.5))  # fmt: skip
        else:
            axes.text(4, row, "fits at no context", va="center", fontsize="small", color="#404040")
        if 0 < full < chunk:
            axes.annotate(f"{full:,}", (full, row), (-7, 0), textcoords="offset points", va="center", ha="right",
                          size="small")  # fmt: skip
    axes.plot(
        [context] * 2, [-0.6, len(every)], color=ORANGE, linestyle=":", linewidth=2, label="this context", zorder=0
    )
    axes.set(title="longest context that fits, tokens", xscale="log", xlim=(2, 2**28), yticks=[])
    axes.set_ylim(len(every) - 0.5, -1.35)
    axes.xaxis.set_major_locator(FixedLocator([2**5, *(CONTEXTS[each] for each in ("1K", "32K", "1M", "10M"))]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _short(tokens)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(loc="upper left", frameon=False, fontsize="small", ncols=3, columnspacing=0.9, handletextpad=0.4)


def _short(tokens: float) -> str:
    return next((label for label, each in CONTEXTS.items() if each == tokens), f"{tokens:,.0f}")


class FitExplorer(View):
    """Choose a model, the formats of weights and cache, a context, how many sequences at once, and a card."""

    def __init__(self, model: str = "scout"):
        controls = {
            "model": ipywidgets.Dropdown(options=MODELS, value=model, description="model"),
            "dtype": ipywidgets.Dropdown(options=list(FORMATS), value="int4", description="weights in"),
            "gpu": ipywidgets.Dropdown(options={gpu.upper(): gpu for gpu in GPUS}, description="card"),
            "policy": ipywidgets.Dropdown(options=POLICIES, description="cache"),
            "kv_dtype": ipywidgets.Dropdown(options=list(KV_BYTES), description="cache in"),
            "context": ipywidgets.SelectionSlider(options=CONTEXTS, value=2**17, description="context"),
            "batch": ipywidgets.SelectionSlider(options=BATCHES, description="batch"),
        }
        for name, width in dict(
            model=300, dtype=250, gpu=190, policy=300, kv_dtype=250, context=420, batch=420
        ).items():
            controls[name].layout.width = f"{width}px"
        super().__init__(shown, controls, ("model dtype gpu", "policy kv_dtype", "context batch"))
