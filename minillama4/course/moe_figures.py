"""Pictures of lesson 03, drawn on private figures, each with its words (alt text)."""

from functools import partial

import torch
from matplotlib.figure import Figure

from ..moe import MoE
from .evidence.specialise import by_layer
from .widgets.frame import BLUE, GREY, ORANGE, RED, Shown


@torch.no_grad()
def score_curve(moe: MoE) -> Shown:
    """How much of an expert's output is left at each score: score on the input, on the output, and s squared."""
    hidden = moe.router.weight.shape[1]
    x_TD = torch.randn(400, hidden, generator=torch.Generator().manual_seed(1))  # any tokens
    expert_T = torch.arange(400) % len(moe.router.weight)
    full = moe.experts(x_TD, expert_T).norm()
    score = torch.linspace(0, 1, 41)
    left = torch.stack([moe.experts(s * x_TD, expert_T).norm() / full for s in score])

    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(score, score, color=ORANGE, label="score on the output: s")
    axes.plot(score, left, color=BLUE, linewidth=2.5, label="score on the input: Llama 4")
    axes.plot(score, score**2, color=GREY, linestyle="--", label="s²")
    axes.set(xlabel="score s = sigmoid(logit)", ylabel="what is left of the output", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False)
    text = (
        f"at s = 0.5, scaling the input leaves less than 0.3 of the output: {bool(left[20] < 0.3)}\n"
        f"everywhere within 0.06 of s²: {bool((left - score**2).abs().max() < 0.06)}"
    )
    alt = (
        "Line chart: what is left of an expert's output against the score. Scaling the output gives a straight line; "
        "scaling the input, as Llama 4 does, bends below it, near the square of the score."
    )
    return Shown(text, figure, alt)


def what_experts_tell(result: dict) -> Shown:
    """How much of a label the expert tells: trained and never trained. result: of `evidence.specialise`."""
    labels = {
        "modality": "picture or word",
        "kind of text token": "kind of text token",
        "language, on words": "language of a word",
        "language | token": "language, given\nthe token",
    }
    groups = {"trained": ("trained", BLUE), "never trained": ("untrained", GREY)}
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes, words = figure.subplots(), []
    for i, (measure, name) in enumerate(labels.items()):
        for j, (group, (weights, colour)) in enumerate(groups.items()):
            layers = by_layer(result, weights, measure, "share_of_label").mean(1)  # over seeds, of each layer
            mean = layers.mean()
            axes.bar(i + 0.4 * j - 0.2, mean, 0.36, color=colour, label=group if i == 0 else None)
            axes.plot([i + 0.4 * j - 0.2] * 2, [layers.min(), layers.max()], color="black", linewidth=1.5)
            words.append(f"{name.replace(chr(10), ' ')}, {group}: {mean:.0%}")
    axes.set(xticks=range(len(labels)), xticklabels=labels.values(), ylabel="share of the label's bits", ylim=(0, 0.7))
    axes.legend(frameon=False)
    alt = "Bar chart of the share of a label that the expert tells, chance taken off. " + "; ".join(words) + "."
    return Shown("", figure, alt)


SIZES = (1, 4, 16, 64)


def _as(form: str, value: float, _) -> str:
    return form.format(value)


def what_experts_buy(report: dict) -> Shown:
    """Facts, sums and time against the number of experts at equal active size. report: of `evidence.moe`."""
    runs = [[r for r in report["rows"] if r["arm"] == "experts" and r["experts"] == e] for e in SIZES]
    dense = [
        next(r for r in report["rows"] if r.get("dense") == width and r["arm"] == "dense") for width in (320, 1088)
    ]
    panels = (
        ("facts known, of 16,384", "facts_known", "{:,.0f}"),
        ("loss on facts (nats)", "fact_loss", "{:.1f}"),
        ("held-out sums right", "sums_right", "{:.0%}"),
        ("milliseconds a step, one core", "ms_per_step", "{:.0f}"),
    )
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    words = []
    for axes, (title, value, form) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        means = [sum(r[value] for r in seeds) / len(seeds) for seeds in runs]
        if value != "sums_right":  # where runs are anywhere between 0 and 1, a mean says nothing
            axes.plot(range(4), means, color=BLUE, linewidth=2)
        for x, seeds in enumerate(runs):
            axes.plot([x] * len(seeds), [r[value] for r in seeds], "o", color=BLUE, markersize=5)
        for x, row in enumerate(dense, start=1):  # as many weights in all as 4 and as 16 experts
            axes.plot(x, row[value], "D", color=RED, markersize=7)
        axes.set(xlabel="routed experts", xticks=range(4), xticklabels=SIZES)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=-0.04 * axes.get_ylim()[1])
        axes.yaxis.set_major_formatter(partial(_as, form))
        seen = (" ".join(form.format(r[value]) for r in seeds) for seeds in runs)
        words.append(f"{title}: " + ", ".join(f"{e} experts {said}" for e, said in zip(SIZES, seen, strict=True)))
        words.append("dense of the same total " + ", ".join(form.format(row[value]) for row in dense))
    figure.axes[0].plot([], [], "o-", color=BLUE, label="experts, three seeds")
    figure.axes[0].plot([], [], "D", color=RED, linestyle="none", label="dense, same total, one seed")
    figure.axes[0].legend(frameon=False, loc="lower right", fontsize=8)
    return Shown(runs_table(report), figure, "Four charts against the number of experts. " + "; ".join(words) + ".")


COLUMNS = (  # of a row's values: heading, how each is written, and how wide
    ("facts known", "facts_known", "{:,}", 16),
    ("loss on facts", "fact_loss", "{:.3f}", 18),
    ("sums right", "sums_right", "{:.0%}", 14),
    ("ms a step", "ms_per_step", "{:.0f}", 13),
)


def runs_table(report: dict) -> str:
    """One line an arm: the smallest and the largest of its seeds."""
    names = {
        "experts": "{experts} experts",
        "other rate": "{experts} experts, other rate",
        "dense": "dense, width {dense}",
    }
    groups = {}
    for row in report["rows"]:
        if row["arm"] not in ("sweep", "balance"):
            name = names.get(row["arm"], f"{row['arm']}, {{experts}} experts").format(**row)
            groups.setdefault(name, []).append(row)
    lines = [f"{'':30}{'rate':>6}{'seeds':>7}" + "".join(f"{heading:>{width}}" for heading, _, _, width in COLUMNS)]
    for name, rows in groups.items():
        line = f"{name:30}{rows[0]['rate']:6}{len(rows):7}"
        for _, value, form, width in COLUMNS:
            ends = dict.fromkeys(form.format(end(row[value] for row in rows)) for end in (min, max))
            line += f"{'-'.join(ends):>{width}}"
        lines.append(line)
    return "\n".join(lines)
