"""Schedule explorer: how the weight of the soft targets moves over training, and what that did on held-out text.

It replays stored runs and trains nothing. A run has a schedule (hard only, soft only, a fixed mix, a ramp by step, the
teacher's confidence), a share of the documents, and a seed; at some of its steps it has a mean soft weight, over the
steps since the one before, and held-out scores. Lines are means over the seeds, bands go from the worst to the best
one. Llama 4's own schedule is unpublished.
"""

import math
from dataclasses import dataclass

import ipywidgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ...budget import pick
from ..evidence import study
from .frame import BLUE, GREY, RED, Shown, View

SCHEDULES = {  # label -> arm of the study
    "hard only": "hard",
    "soft only": "soft",
    "fixed mix": "fixed",
    "ramp by step": "ramp",
    "by the teacher's confidence": "confidence",
}
MEASURES = {  # label -> name in a curve
    "loss on answers": "answer_loss",
    "loss on captions": "caption_loss",
    "answers right": "answer_right",
}
NAMES = {arm: label for label, arm in SCHEDULES.items()}
WORDS = {name: label for label, name in MEASURES.items()}


@dataclass(frozen=True)
class Run:
    """One training run, as the evidence stores it."""

    arm: str  # a value of SCHEDULES
    data: float  # share of the pool of documents
    seed: int
    steps: tuple[int, ...]  # ascending
    soft_weight: tuple[float | None, ...]  # mean since the step before; None where there is none
    scores: dict[str, tuple[float, ...]]  # name of MEASURES -> one a step, on held-out text

    def __post_init__(self):
        if list(self.steps) != sorted(set(self.steps)) or len(self.steps) < 2:
            raise ValueError(f"steps is {list(self.steps)}; there must be at least 2, each above the one before")
        for name, values in {"soft_weight": self.soft_weight, **self.scores}.items():
            if len(values) != len(self.steps):
                raise ValueError(f"{name} has {len(values)} values; {len(self.steps)} steps want as many")
        if any(weight is not None and not 0 <= weight <= 1 for weight in self.soft_weight):
            raise ValueError(f"soft_weight is {list(self.soft_weight)}; weights are 0 to 1")


def read_runs(rows: list[dict] | None = None) -> list[Run]:
    """The runs that schedules are compared by: rows with a curve that no control has changed.

    rows: of the study's result; by default the stored ones. ValueError: no such row, or one that makes no sense.
    """
    if rows is None:
        try:
            rows = study.load("distill")["rows"]
        except FileNotFoundError:
            raise ValueError(
                "there are no results; `python -m minillama4.course.evidence.distill` makes them"
            ) from None
    runs = [
        Run(
            row["arm"],
            float(row["data"]),
            row["seed"],
            tuple(row["curve"]["steps"]),
            tuple(row["curve"]["soft_weight"]),
            {name: tuple(row["curve"][name]) for name in WORDS},
        )
        for row in rows
        if row["arm"] in NAMES and row.get("control") is None and "curve" in row
    ]
    if not any(run.arm == "hard" for run in runs):
        raise ValueError("no row has arm 'hard' and a curve; every schedule is compared with it")
    return runs


@dataclass(frozen=True)
class Band:
    """Seeds of one schedule on one share of the documents: at each step, mean, lowest and highest."""

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    seeds: int


def of(runs: list[Run], arm: str, data: float) -> list[Run]:
    """By seed. ValueError: there is no such run, or two have scores at different steps."""
    pick("schedule", arm, NAMES)
    found = sorted((run for run in runs if (run.arm, run.data) == (arm, data)), key=lambda run: run.seed)
    if not found:
        raise ValueError(f"no run has schedule {arm!r} on {data:.0%} of the documents; the study has not made it yet")
    if len({run.steps for run in found}) > 1:
        raise ValueError(f"runs of {arm!r} on {data:.0%} were scored at different steps; they must agree")
    return found


def band(runs: list[Run], arm: str, data: float, measure: str) -> Band:
    """How a score went. ValueError: as in `of`, or an unknown measure."""
    pick("measure", measure, WORDS)
    found = of(runs, arm, data)
    columns = list(zip(*(run.scores[measure] for run in found), strict=True))
    mean = tuple(sum(column) / len(column) for column in columns)
    return Band(found[0].steps, mean, tuple(map(min, columns)), tuple(map(max, columns)), len(found))


def gains(runs: list[Run], arm: str, data: float, measure: str) -> dict[int, float]:
    """Seed -> how much better than hard targets alone the schedule ended: same seed, so same start and same batches.

    Above 0 is better, for a loss as for a share. Seeds that one of both lacks are left out.
    """
    sign = 1 if measure == "answer_right" else -1
    ends = {run.seed: run.scores[measure][-1] for run in of(runs, arm, data)}
    hard = {run.seed: run.scores[measure][-1] for run in of(runs, "hard", data)}
    return {seed: sign * (ends[seed] - hard[seed]) for seed in ends if seed in hard}


def weights(runs: list[Run], arm: str, data: float) -> tuple[float, ...]:
    """Mean soft weight over the seeds at each step; not a number where no step was before."""
    columns = zip(*(run.soft_weight for run in of(runs, arm, data)), strict=True)
    return tuple(math.nan if None in column else sum(column) / len(column) for column in columns)


# ----------------------------------------------------------------------------------------------------------------------
# In words and as a picture.


def shown(runs: list[Run], arm: str = "ramp", data: float = 1.0, measure: str = "answer_loss") -> Shown:
    """One schedule beside the others, on one share of the documents. ValueError: as in `band`."""
    now, hard = band(runs, arm, data, measure), band(runs, "hard", data, measure)
    others = [each for each in NAMES if any((run.arm, run.data) == (each, data) for run in runs)]
    ends = {each: band(runs, each, data, measure).mean[-1] for each in others}
    best = max(ends, key=ends.get) if measure == "answer_right" else min(ends, key=ends.get)
    soft = [weight for weight in weights(runs, arm, data) if not math.isnan(weight)]
    lines = [
        f"Schedule: {NAMES[arm]}, on {data:.0%} of the documents, {_many(now.seeds, 'seed')}. Mean soft weight: "
        f"{soft[0]:.2f} in the first part of training, {soft[-1]:.2f} in the last.",
        f"Held-out, {WORDS[measure]}, after {now.steps[-1]:,} steps: {_spread(now, measure)}"
        + ("." if arm == "hard" else f"; hard only: {_spread(hard, measure)}."),
        _on_the_way({arm: now, "hard": hard}, measure),
        _compared(gains(runs, arm, data, measure), arm, measure),
        f"Best mean of all schedules here: {NAMES[best]}, {_said(ends[best], measure)}.",
        "Scored along the way on a part of the held-out documents; in brackets, the lowest and the highest seed.",
    ]
    text = "\n".join(line for line in lines if line)
    figure = Figure(figsize=(9, 4.2))
    above, below = figure.subplots(2, 1, height_ratios=(2, 5), sharex=True)
    figure.subplots_adjust(left=0.085, right=0.985, top=0.93, bottom=0.12, hspace=0.22)  # quicker than a layout engine
    _weights(above, runs, arm, data, others)
    _scores(below, runs, arm, data, measure, others)
    alt = f"Above: soft weight over training. Below: {WORDS[measure]}, held-out, over training. {text}"
    return Shown(text, figure, alt.replace("\n", " "))


def _on_the_way(bands: dict[str, Band], measure: str) -> str:
    """Which means were better before the end: there, stopping early would have been worth something."""
    words = []
    for arm, seen in bands.items():
        best = (max if measure == "answer_right" else min)(seen.mean)
        if best != seen.mean[-1]:
            words.append(f"{NAMES[arm]} {_said(best, measure)} at step {seen.steps[seen.mean.index(best)]:,}")
    return f"Better before the end than at it: {', '.join(words)}." if words else ""


def _compared(gained: dict[int, float], arm: str, measure: str) -> str:
    if arm == "hard" or not gained:
        return ""
    better, values = sum(gain > 0 for gain in gained.values()), list(gained.values())
    mean = sum(values) / len(values)
    spread = f" ({_said(min(values), measure, True)} to {_said(max(values), measure, True)})" if len(values) > 1 else ""
    verdict = {0: "better in none", len(values): "better in every one"}.get(better, f"better in {better}, so not clear")
    return (
        f"Gain over hard only, seed by seed: {_said(mean, measure, True)}{spread}; of {_many(len(values), 'seed')} "
        f"{verdict}."
    )


def _said(value: float, measure: str, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if measure == "answer_right":
        return f"{100 * value:{sign}.1f}" + (" points" if signed else "%")
    return f"{value:{sign}.3f}"


def _spread(seen: Band, measure: str) -> str:
    low, high = _said(seen.low[-1], measure), _said(seen.high[-1], measure)
    return _said(seen.mean[-1], measure) + (f" ({low} to {high})" if seen.seeds > 1 else "")


def _many(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _weights(axes: Axes, runs: list[Run], arm: str, data: float, others: list[str]):
    """A stair for each part of training, since what is stored is a mean over it."""
    for each in [*(other for other in others if other != arm), arm]:
        look = dict(color=BLUE, linewidth=2.2) if each == arm else dict(color=GREY, linewidth=1, alpha=0.6)
        axes.plot(of(runs, each, data)[0].steps, weights(runs, each, data), drawstyle="steps-pre", **look)
    axes.set(title="weight of the soft targets (the rest is hard)", ylim=(-0.08, 1.08), yticks=[0, 0.5, 1])
    axes.tick_params(labelbottom=False)


def _scores(axes: Axes, runs: list[Run], arm: str, data: float, measure: str, others: list[str]):
    """One scale for all shares of the documents, so that they can be compared."""
    share = measure == "answer_right"
    for number, each in enumerate(other for other in others if other not in (arm, "hard")):
        seen = band(runs, each, data, measure)
        label = "other schedules" if number == 0 else None
        axes.plot(seen.steps, seen.mean, color=GREY, linewidth=1, alpha=0.6, label=label)
    for each, colour, style in (("hard", RED, "--"), (arm, BLUE, "-"))[arm == "hard" :]:
        seen = band(runs, each, data, measure)
        axes.fill_between(seen.steps, seen.low, seen.high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(seen.steps, seen.mean, color=colour, linestyle=style, marker="o", markersize=4, label=NAMES[each])
    values = [value for run in runs for value in run.scores[measure]]
    axes.set(title=f"held-out: {WORDS[measure]}" + ("" if share else ", nats"), xlabel="training step")
    if share:
        axes.set_ylim(-0.03, 1.35)  # room for the legend
        axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    else:
        low, high = min(values), max(values)
        axes.set(yscale="log", ylim=(low / 1.1, high * 1.1 * (high / low) ** 0.25))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda nats, _: f"{nats:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper right", frameon=False, fontsize="small", ncols=3, columnspacing=1)


class ScheduleExplorer(View):
    """Choose a schedule, how many of the documents the students had, and what is scored."""

    def __init__(self, rows: list[dict] | None = None):
        """rows: of the study's result; by default the stored ones."""
        self.runs = read_runs(rows)
        present = {label: arm for label, arm in SCHEDULES.items() if any(run.arm == arm for run in self.runs)}
        shares = sorted({run.data for run in self.runs}, reverse=True)
        controls = {
            "arm": ipywidgets.Dropdown(options=present, value=list(present.values())[-1], description="schedule"),
            "data": ipywidgets.Dropdown(options={f"{s:.0%} of them": s for s in shares}, description="documents"),
            "measure": ipywidgets.Dropdown(options=MEASURES, description="score"),
        }
        controls["arm"].layout.width = "320px"
        for name in ("data", "measure"):
            controls[name].layout.width = "250px"
        super().__init__(self._show, controls, ("arm data measure",))

    def _show(self, **values) -> Shown:
        return shown(self.runs, **values)
