"""Balance lab: does a router spread its tokens, and what do two cures for its collapse do to load and loss?

It replays stored training runs and trains nothing. A run has a cure (none; "aux", the auxiliary loss of Switch
Transformer; "bias", the sign update of DeepSeek-V3) and a strength (the coefficient of the loss; the rate of the
update). At each stored step it has the load of one layer: the share of the tokens that each expert got, which sums
to 1. What Llama 4 itself used for load balance is unpublished.
"""

import json
from dataclasses import dataclass
from math import log2
from pathlib import Path

import ipywidgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evidence import study
from .frame import BLUE, GREY, ORANGE, RED, Shown, View

RESULTS = study.RESULTS / "moe.json"
CURES = {"none": "none", "auxiliary loss": "aux", "bias update": "bias"}  # label -> as stored
STRENGTH = {"aux": "coefficient", "bias": "rate"}  # what the number is called
DEAD = 0.1  # of an even share: an expert with less learns next to nothing
NAMES = {stored: label for label, stored in CURES.items()}

EVEN = dict(color="black", linestyle="--", linewidth=1)
ROOM = 1.3  # of an axis, above what it shows, for the legend
LEGEND = dict(frameon=False, ncols=3, fontsize="small", handlelength=1.4, columnspacing=1)


@dataclass(frozen=True)
class Run:
    """One training run, as the evidence stores it."""

    cure: str  # "none", "aux" or "bias"
    strength: float  # coefficient of the loss, or step of the bias; of no meaning for "none"
    seed: int
    steps: tuple[int, ...]  # of training, when the load was stored, ascending
    load: tuple[tuple[float, ...], ...]  # [steps, experts], each row sums to 1
    facts: int  # known at the end
    sums: float  # share of the held-out sums that are right at the end
    dead: int  # experts of all layers that have less than DEAD of an even share at the end, on fresh text

    def __post_init__(self):
        if self.cure not in NAMES:
            raise ValueError(f"cure is {self.cure!r}; it must be one of {', '.join(NAMES)}")
        if not self.steps or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps is {list(self.steps)}; there must be some, each above the one before")
        if len(self.load) != len(self.steps) or len({len(shares) for shares in self.load}) != 1:
            sizes = [len(shares) for shares in self.load]
            raise ValueError(f"load has rows of {sizes} experts; {len(self.steps)} steps want as many, equally long")
        for step, shares in zip(self.steps, self.load, strict=True):
            if min(shares) < 0 or abs(sum(shares) - 1) > 1e-4 * self.experts:  # they are rounded
                raise ValueError(f"load at step {step} sums to {sum(shares):.4g}; shares of all tokens sum to 1")

    @property
    def experts(self) -> int:
        return len(self.load[0])


def read_runs(file: Path | str = RESULTS) -> list[Run]:
    """The runs of the evidence's arm "balance". ValueError: no such file, none in it, or a run that makes no sense."""
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}; `python -m minillama4.course.evidence.moe` makes it")
    rows = [row for row in json.loads(Path(file).read_text())["rows"] if row["arm"] == "balance"]
    if not rows:
        raise ValueError(
            f"{file} has no row of the arm 'balance'; `python -m minillama4.course.evidence.moe` adds them"
        )
    return [
        Run(
            row["cure"],
            float(row["strength"]),
            row["seed"],
            tuple(row["steps"]),
            tuple(map(tuple, row["load"])),
            row["facts_known"],
            row["sums_right"],
            row["dead"],
        )
        for row in rows
    ]


def entropy(shares: tuple[float, ...]) -> float:
    """-sum p log2 p, in bits: log2 of the experts where the load is even, 0 where one expert has it all."""
    return sum(-share * log2(share) for share in shares if share > 0)


def strengths(runs: list[Run], cure: str) -> list[float]:
    """What was tried of a cure, ascending. It begins with 0, which is no cure at all."""
    return sorted({0.0} | {run.strength for run in runs if run.cure == cure != "none"})


def find(runs: list[Run], cure: str, strength: float) -> Run:
    """The run with this cure, of lowest seed; strength 0 is the run without one. ValueError: it was never trained."""
    wanted = (cure, strength) if strength and cure != "none" else ("none", 0.0)
    found = [run for run in runs if (run.cure, run.strength) == wanted]
    if not found:
        raise ValueError(f"no run has cure {cure!r} of strength {strength:g}; tried were {strengths(runs, cure)}")
    return min(found, key=lambda run: run.seed)


def shown(run: Run, step: int, without: Run | None = None) -> Shown:
    """The load of a run at one of its steps, and its entropy over all of them.

    without: the run without a cure to compare with. ValueError: nothing was stored at `step`.
    """
    if step not in run.steps:
        raise ValueError(f"step is {step}; the load was stored at {', '.join(map(str, run.steps))}")
    shares = run.load[run.steps.index(step)]
    even, bits, most = 1 / run.experts, entropy(shares), max(shares)
    dead = [expert for expert, share in enumerate(shares) if share < DEAD * even]
    strength = f", {STRENGTH[run.cure]} {run.strength:g}" if run.cure in STRENGTH else ""
    compared = f" (without a cure {without.facts:,} and {without.sums:.0%})" if without and without is not run else ""
    text = (
        f"Cure: {NAMES[run.cure]}{strength}. Step {step} of {run.steps[-1]}, seed {run.seed}.\n"
        f"Dead in the last layer (less than a tenth of an even share): {len(dead)} of {run.experts} experts. Expert "
        f"{shares.index(most)} gets {most:.0%} of the tokens; even would be {100 * even:.3g}%.\n"
        f"Load entropy: {bits:.2f} of {log2(run.experts):.2f} bits, as if {2**bits:.1f} experts shared the work "
        "evenly.\n"
        f"At the end of the run: {run.dead} dead in all layers, {run.facts:,} facts known and {run.sums:.0%} of sums "
        f"right{compared}."
    )
    figure = Figure(figsize=(9, 3.1))
    bars, curve = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.subplots_adjust(left=0.065, right=0.99, top=0.9, bottom=0.16, wspace=0.2)  # quicker than a layout engine
    _bars(bars, run, shares, dead, step)
    _curve(curve, run, step, bits, without if without is not run else None)
    alt = f"Bars: the share of each expert. Curve: load entropy over training. {text}"
    return Shown(text, figure, alt.replace("\n", " "))


def _bars(axes: Axes, run: Run, shares: tuple[float, ...], dead: list[int], step: int):
    """One scale for all steps of a run: otherwise each move of the slider would hide how the bars change."""
    even, every = 100 / run.experts, -(-run.experts // 8)  # each tick takes a millisecond or two
    top = max(100 * max(map(max, run.load)), 2 * even)
    axes.bar(range(run.experts), [100 * share for share in shares], color=BLUE)
    axes.axhline(even, label=f"even share, {even:.3g}%", **EVEN)
    if dead:
        axes.plot(dead, [0.03 * top] * len(dead), "x", color=RED, label="dead")
    axes.set(xlabel="expert", ylabel="% of tokens", title=f"load at step {step}", xticks=range(0, run.experts, every))
    axes.set(xlim=(-0.7, run.experts - 0.3), ylim=(0, ROOM * top))
    axes.locator_params(axis="y", nbins=4)
    axes.legend(loc="upper right", **LEGEND)


def _curve(axes: Axes, run: Run, step: int, bits: float, without: Run | None):
    highest = log2(run.experts)
    axes.axhline(highest, **EVEN)
    if without is not None:
        axes.plot(without.steps, [entropy(s) for s in without.load], color=GREY, linestyle=":", label="without a cure")
    axes.plot(run.steps, [entropy(shares) for shares in run.load], color=BLUE, label="this run")
    axes.plot(step, bits, "o", color=ORANGE, markeredgecolor="black", markersize=8, label="this step")
    axes.set(xlabel="training step", ylabel="bits", title="load entropy (dashed: even)", ylim=(0, ROOM * highest))
    axes.locator_params(nbins=4)
    axes.legend(loc="upper right", **LEGEND)


class BalanceLab(View):
    """Choose a cure and its strength, and walk through the training steps. It begins with the end of no cure at all."""

    def __init__(self, file: Path | str = RESULTS):
        self.runs = read_runs(file)
        present = {label: cure for label, cure in CURES.items() if any(run.cure == cure for run in self.runs)}
        if "none" not in present or len(present) == 1:
            raise ValueError(f"{file} has runs with cure {', '.join(present)}; wanted are 'none' and one more")
        steps = find(self.runs, "none", 0).steps
        tried = strengths(self.runs, next(cure for cure in present.values() if cure != "none"))
        controls = {
            "cure": ipywidgets.Dropdown(options=present, value="none", description="cure"),
            "strength": ipywidgets.SelectionSlider(options=_labelled(tried), description="strength", disabled=True),
            "step": ipywidgets.SelectionSlider(options=steps, value=steps[-1], description="step"),
        }
        super().__init__(self._show, controls, ("cure strength", "step"))

    def _show(self, cure, strength, step) -> Shown:
        return shown(find(self.runs, cure, strength), step, find(self.runs, "none", 0))

    def react(self, event):
        """Offer what was stored: of a cure its strengths, of a run its steps."""
        cure, strength, step = self.controls.values()
        strength.disabled = cure.value == "none"
        if strength.disabled:
            strength.value = 0.0
        elif isinstance(event, dict) and event["owner"] is cure:  # begin in the middle of what was tried
            tried = strengths(self.runs, cure.value)
            strength.options, strength.value = _labelled(tried), tried[len(tried) // 2]
        stored = find(self.runs, cure.value, strength.value).steps
        if step.options != stored:
            nearest = min(stored, key=lambda other: abs(other - step.value))
            step.options, step.value = stored, nearest


def _labelled(tried: list[float]) -> list[tuple[str, float]]:
    return [(f"{strength:g}", strength) for strength in tried]
