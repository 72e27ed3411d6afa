"""Rotation and temperature explorer: what a rotary pair tells of a distance, and what softmax makes of many keys.

Above, one rotary pair of Scout: its angle at a distance, beside the angles that distances inside a chunk (8,192
positions) and inside the training length (262,144) have shown it. Frequencies are the model's own. Below, one query
over n random keys and a needle whose logit stands out by a margin: the needle's share of the attention and the
entropy, with and without the model's own temperature. Both are sums over keys that were drawn, not a formula for them.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import ipywidgets
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

from ...attention import inverse_frequencies, temperature
from ...config import Llama4Config
from .frame import BLUE, GREEN, GREY, ORANGE, RED, Shown, View

SCOUT = Llama4Config.preset("scout").text
PLAIN = replace(SCOUT, rope_scaling=None)
PAIRS, CHUNK = SCOUT.head_dim // 2, SCOUT.chunk_size
TRAINED = 262_144  # tokens of the longest sequences in training, as Meta says
DISTANCES = {f"{2**p:,}": 2**p for p in range(24)} | {"10,485,760": SCOUT.max_positions}  # in tokens
KEYS = tuple(2**p for p in range(4, 21))  # the needle is one of them
MARGINS = tuple(half / 2 for half in range(41))  # of a logit, in standard deviations of the others
TURN = 2 * math.pi

WITH, WITHOUT = dict(color=BLUE, linestyle="-"), dict(color=RED, linestyle="--")


# ----------------------------------------------------------------------------------------------------------------------
# Rotation


@dataclass(frozen=True)
class Rotation:
    """What one rotary pair does over a distance."""

    wavelength: float  # tokens of one full turn
    turned: float  # turns over the distance
    in_chunk: float  # turns over the farthest distance inside a chunk
    in_training: float  # turns over the farthest distance inside the training length

    @property
    def angle(self) -> float:
        """Degrees, 0 to 360."""
        return 360 * (self.turned % 1)

    def knows(self, farthest: float) -> bool:
        """Is the angle among those of all distances up to one that takes `farthest` turns?"""
        return farthest >= 1 or self.turned % 1 <= farthest


def rotation(pair: int, distance: int, scaled: bool = True) -> Rotation:
    """Scout's pair (channels 2 pair and 2 pair + 1) over `distance` tokens. ValueError: no such pair, or less than 0.

    scaled: with `rope_scaling`, which makes pairs 35 to 63 turn 16 times slower.
    """
    if not 0 <= pair < PAIRS:
        raise ValueError(f"pair is {pair}; rotary pairs run from 0 to {PAIRS - 1}")
    if distance < 0:
        raise ValueError(f"distance is {distance}; it must be at least 0 tokens")
    turns = float(inverse_frequencies(SCOUT if scaled else PLAIN)[pair]) / TURN  # per token
    return Rotation(1 / turns, distance * turns, (CHUNK - 1) * turns, (TRAINED - 1) * turns)


# ----------------------------------------------------------------------------------------------------------------------
# Temperature


@dataclass(frozen=True)
class Attended:
    """One query's softmax over n keys, one of them the needle."""

    share: float  # of the needle
    entropy: float  # bits: log2 n if all keys get the same, 0 if one gets all


@dataclass(frozen=True)
class Crowd:
    """Sums over the logits of n - 1 random keys, each multiplied by `heat`; the needle joins them later."""

    heat: float  # what multiplies every logit of this query
    exp: float  # sum of exp(z)
    exp_times: float  # sum of z exp(z)

    def joined(self, margin: float) -> Attended:
        """Add a key whose logit lies `margin` above the mean of the others.

        Entropy: -sum p ln p with p = exp(z) / Z is ln Z - (sum of z exp(z)) / Z.
        """
        needle = self.heat * margin
        total = self.exp + math.exp(needle)
        entropy = math.log(total) - (self.exp_times + needle * math.exp(needle)) / total
        return Attended(math.exp(needle) / total, entropy / math.log(2))


def logits(seed: int = 0) -> Tensor:
    """[keys - 1] float64: q.k / sqrt(dim) of keys that have nothing to do with the query, N(0, 1)."""
    return torch.randn(KEYS[-1] - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@lru_cache(maxsize=1)
def crowds() -> dict[bool, dict[int, Crowd]]:
    """Is temperature on -> number of keys -> the sums over all of them but the needle. The last token asks."""
    drawn = logits()
    heats = temperature(torch.tensor(KEYS) - 1, SCOUT).tolist()
    tuned = {}
    for keys, heat in zip(KEYS, heats, strict=True):
        tuned[keys] = _crowd(drawn[: keys - 1], heat)
    return {True: tuned, False: {keys: _crowd(drawn[: keys - 1], 1.0) for keys in KEYS}}


def _crowd(drawn: Tensor, heat: float) -> Crowd:
    z = drawn * heat
    weight = z.exp()
    return Crowd(heat, float(weight.sum()), float(z @ weight))


def attended(keys: int, margin: float, tuned: bool = True) -> Attended:
    """The softmax of the query at position keys - 1. ValueError: a number of keys that was not drawn.

    margin: the needle's logit above the mean of the others, in their standard deviations; tuned: with temperature.
    """
    if keys not in KEYS:
        raise ValueError(f"keys is {keys}; drawn were {', '.join(map(str, KEYS))}")
    return crowds()[tuned][keys].joined(margin)


def margin_for_half(keys: int, tuned: bool = True) -> float:
    """The margin at which the needle gets as much attention as all the others together."""
    crowd = crowds()[tuned][keys]
    return math.log(crowd.exp) / crowd.heat


# ----------------------------------------------------------------------------------------------------------------------
# Words and pictures


def shown(pair: int = 40, distance: int = 2**17, scaled: bool = True, keys: int = 2**17, margin: float = 10.0) -> Shown:
    """Both halves. ValueError: as `rotation` and `attended`."""
    now, other = rotation(pair, distance, scaled), rotation(pair, distance, not scaled)
    tuned, flat = attended(keys, margin, True), attended(keys, margin, False)
    text = "\n".join([*_rotation_words(pair, distance, scaled, now, other), *_softmax_words(keys, margin, tuned, flat)])
    figure = Figure(figsize=(9, 5.2))
    figure.subplots_adjust(left=0.075, right=0.985, top=0.94, bottom=0.095, wspace=0.2, hspace=0.46)
    circle, waves, shares, entropies = figure.subplots(2, 2).flat
    _circle(circle, pair, distance, now)
    _waves(waves, pair, distance, scaled, now)
    _share(shares, keys, margin, tuned, flat)
    _entropy(entropies, keys, margin, tuned, flat)
    alt = (
        "Four panels: the pair's angle on a circle with the angles that a chunk and training cover; the wavelength of "
        "each pair with and without scaling; the needle's share of attention and the entropy against the number of "
        f"keys, with and without temperature. {text}"
    )
    return Shown(text, figure, alt.replace("\n", " "))


def _rotation_words(pair: int, distance: int, scaled: bool, now: Rotation, other: Rotation) -> list[str]:
    same = now.wavelength == other.wavelength
    compared = "the same" if same else f"{other.wavelength:,.0f}"
    scaling = ("with", "without") if scaled else ("without", "with")
    occurs = "so that this distance occurs" if distance < CHUNK else "so that this distance never occurs"
    return [
        f"Pair {pair} (channels {2 * pair} and {2 * pair + 1}) turns once in {_tokens(now.wavelength)} tokens "
        f"{scaling[0]} Scout's scaling ({compared} {scaling[1]} it).",
        f"At distance {distance:,} it has turned {_turns(now.turned)}: it stands at {now.angle:.1f}°.",
        f"Local layers compare tokens at most {CHUNK - 1:,} apart, {occurs}. There the pair "
        f"takes {_covered(now.in_chunk)}.",
        f"If they saw everything and were trained on {TRAINED:,} tokens, it would take {_covered(now.in_training)}; "
        f"at this distance its angle would be {'known' if now.knows(now.in_training) else 'new'}.",
    ]


def _softmax_words(keys: int, margin: float, tuned: Attended, flat: Attended) -> list[str]:
    heat = crowds()[True][keys].heat
    return [
        f"Attention over {keys:,} keys, their logits drawn from N(0, 1), but for a needle at {margin:g}: it gets "
        f"{_percent(flat.share)} without temperature and {_percent(tuned.share)} with it (factor {heat:.3f}).",
        f"Entropy {flat.entropy:.2f} bits without, {tuned.entropy:.2f} with, of {math.log2(keys):.0f} if all keys got "
        f"the same. For half of the attention the needle needs a margin of {margin_for_half(keys, False):.1f} without, "
        f"{margin_for_half(keys, True):.1f} with.",
    ]


def _tokens(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2f}"


def _turns(turned: float) -> str:
    return f"{turned:,.4f} of a turn" if turned < 1 else f"{turned:,.1f} times"


def _covered(turns: float) -> str:
    return "every angle" if turns >= 1 else f"angles from 0 to {360 * turns:.1f}°"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "less than 0.1%"


def _circle(axes: Axes, pair: int, distance: int, now: Rotation):
    for turns, radius, colour, words in (
        (now.in_training, 1.16, GREEN, f"trained: {TRAINED:,}"),
        (now.in_chunk, 1.0, BLUE, f"a chunk: {CHUNK:,}"),
    ):
        arc = torch.linspace(0, TURN * min(turns, 1), 90)
        axes.plot(radius * arc.cos(), radius * arc.sin(), color=colour, linewidth=5, solid_capstyle="butt", label=words)
    hand = TURN * (now.turned % 1)
    axes.plot([0, 0.88 * math.cos(hand)], [0, 0.88 * math.sin(hand)], color=ORANGE, linewidth=3, label="this distance")
    axes.plot(0.88 * math.cos(hand), 0.88 * math.sin(hand), "o", color=ORANGE, markeredgecolor="black", markersize=8)
    axes.plot([0, 1.3], [0, 0], color=GREY, linewidth=0.8, linestyle=":")
    _title(axes, f"pair {pair} at distance {distance:,}: {now.angle:.1f}°")
    axes.set(xlim=(-1.35, 3.4), ylim=(-1.3, 1.3), aspect="equal")
    axes.set_axis_off()
    axes.legend(loc="center right", frameon=False, fontsize="small", handlelength=1.2, title="angles of")


def _waves(axes: Axes, pair: int, distance: int, scaled: bool, now: Rotation):
    for config, words, look in ((SCOUT, "with scaling", WITH), (PLAIN, "without", WITHOUT)):
        axes.plot(range(PAIRS), TURN / inverse_frequencies(config), label=words, **look)
    axes.plot(pair, now.wavelength, "o", color=ORANGE, markeredgecolor="black", markersize=8, label="this pair")
    for tokens, words in ((CHUNK, "a chunk"), (TRAINED, "training"), (SCOUT.max_positions, "10M")):
        axes.axhline(tokens, color=GREY, linestyle=":", linewidth=1)
        axes.text(0, tokens * 1.25, words, fontsize="small", color="#404040")
    _title(axes, "tokens of one full turn")
    axes.set(xlabel="rotary pair", yscale="log", ylim=(2, 3e9), xlim=(-1, PAIRS))
    axes.set_xticks((0, 20, 35, 50, 63))
    _powers(axes, (10, 1e4, 1e7))
    axes.legend(loc="upper left", frameon=False, fontsize="small", ncols=3, columnspacing=1)


def _share(axes: Axes, keys: int, margin: float, tuned: Attended, flat: Attended):
    _both(axes, margin, lambda one: 100 * one.share)
    for one in (flat, tuned):
        axes.plot(keys, 100 * one.share, "o", color=ORANGE, markeredgecolor="black", markersize=7)
    _title(axes, f"% of attention on a needle of margin {margin:g}")
    axes.set(ylim=(-5, 128), yticks=(0, 50, 100))
    axes.legend(loc="upper left", frameon=False, fontsize="small", ncols=3, columnspacing=1)


def _entropy(axes: Axes, keys: int, margin: float, tuned: Attended, flat: Attended):
    _both(axes, margin, lambda one: one.entropy)
    axes.plot(KEYS, [math.log2(n) for n in KEYS], color=GREY, linestyle=":")
    axes.text(70, 7.2, "if even", fontsize="small", color="#404040", ha="right")
    for one in (flat, tuned):
        axes.plot(keys, one.entropy, "o", color=ORANGE, markeredgecolor="black", markersize=7)
    _title(axes, "entropy of the attention, bits")
    axes.set(ylim=(-1, 23), yticks=(0, 10, 20))


def _both(axes: Axes, margin: float, what):
    for on, words, look in ((True, "with temperature", WITH), (False, "without", WITHOUT)):
        axes.plot(KEYS, [what(attended(keys, margin, on)) for keys in KEYS], label=words, **look)
    axes.set(xlabel="keys", xscale="log", xlim=(12, 1.4 * KEYS[-1]))
    axes.xaxis.set_major_locator(FixedLocator([2**4, 2**13, 2**17, 2**20]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda keys, _: _short(keys)))
    axes.xaxis.set_minor_locator(NullLocator())


def _title(axes: Axes, words: str):
    axes.set_title(words, y=1)  # a given height spares the search for one, a tenth of the time to draw


def _short(keys: float) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if keys >= size:
            return f"{keys / size:g}{unit}"
    return f"{keys:g}"


def _powers(axes: Axes, ticks: tuple[float, ...]):
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())


class RotationExplorer(View):
    """Choose a rotary pair, a distance, and scaling or none; then how many keys there are, and how clear the needle."""

    def __init__(self):
        crowds()  # draws the keys, once; after that a move only adds the needle
        controls = {
            "pair": ipywidgets.IntSlider(40, 0, PAIRS - 1, description="rotary pair"),
            "distance": ipywidgets.SelectionSlider(options=DISTANCES, value=2**17, description="distance"),
            "scaled": ipywidgets.Checkbox(True, description="Scout's scaling", indent=False),
            "keys": ipywidgets.SelectionSlider(
                options={f"{keys:,}": keys for keys in KEYS}, value=2**17, description="keys"
            ),
            "margin": ipywidgets.SelectionSlider(
                options={f"{margin:g}": margin for margin in MARGINS}, value=10.0, description="margin"
            ),
        }
        for name in ("pair", "distance", "keys", "margin"):
            controls[name].layout.width, controls[name].style.description_width = "340px", "80px"
        controls["scaled"].layout.width = "150px"
        super().__init__(shown, controls, ("pair distance scaled", "keys margin"))
