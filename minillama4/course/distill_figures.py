"""The pictures and tables of lesson 04 and its study, drawn on private figures, each with its words (alt text)."""

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..distill import soft_loss
from .evidence.distill import ARMS, RECIPE, TENTH, plan
from .widgets.frame import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, Shown

STYLES = {
    "hard": (GREY, "o-"),
    "soft": (BLUE, "s-"),
    "fixed": (ORANGE, "^--"),
    "ramp": (GREEN, "D--"),
    "confidence": (PURPLE, "v:"),
}
NAMES = {  # as the lesson calls the arms
    "hard": "hard targets only",
    "soft": "soft only",
    "fixed": "half and half",
    "ramp": "soft, then hard",
    "confidence": "by confidence",
}
DATA = {1.0: f"{RECIPE['pool']:,} documents", TENTH: f"{round(TENTH * RECIPE['pool']):,} documents"}
SHORT = {  # of teachers, where there is little room
    "mini-behemoth": "mini-\nbehemoth",
    "under-trained": "under-\ntrained",
    "of the student's size": "student's\nsize",
    "read no more than the student": "same 400\ndocuments",
}
MEASURES = {"answer_right": "answers right", "caption_loss": "loss on captions (nats)"}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of Student, two-sided 95 %, by number of values


def main_rows(report: dict, arm: str, data: float) -> list[dict]:
    """One a seed, in their order, of what no control has changed."""
    found = [r for r in report["rows"] if r["arm"] == arm and r.get("data") == data and r.get("control") is None]
    return sorted(found, key=lambda row: row["seed"])


def control_rows(report: dict, kind: str) -> list[dict]:
    """In the order of the study's plan."""
    order = [(job["top_k"], job["temperature"], job["teacher"]) for job in plan(RECIPE) if job.get("control") == kind]
    found = [row for row in report["rows"] if row.get("control") == kind]
    return sorted(found, key=lambda row: order.index((row["top_k"], row["temperature"], row["teacher"])))


def value(row: dict, measure: str) -> float:
    """At the end of the run, on all held-out documents."""
    return {
        "answer_right": row["answers"]["right"][0],
        "answer_loss": row["answers"]["loss"][0],
        "caption_loss": row["captions"]["loss"][0],
    }[measure]


def interval(values: list[float]) -> tuple[float, float]:
    """(mean, half of its 95 % interval) over two to five seeds, after Student. ValueError: other numbers of seeds."""
    if len(values) not in T95:
        raise ValueError(f"{len(values)} values were given; an interval over seeds needs {min(T95)} to {max(T95)}")
    mean = sum(values) / len(values)
    spread = (sum((x - mean) ** 2 for x in values) / (len(values) - 1)) ** 0.5
    return mean, T95[len(values)] * spread / len(values) ** 0.5


def gained(report: dict, arm: str, data: float, measure: str) -> tuple[float, float]:
    """(mean, half of the 95 % interval) of what it has over hard targets, seed by seed: same start, same batches."""
    pairs = zip(main_rows(report, arm, data), main_rows(report, "hard", data), strict=True)
    return interval([value(one, measure) - value(other, measure) for one, other in pairs])


def curves(report: dict) -> Shown:
    """Held-out scores over training by arm: the line is the mean of the seeds, the bars go from worst to best."""
    figure, words = Figure(figsize=(9, 6.2), layout="constrained"), []
    for row, (data, title) in zip(figure.subplots(2, 2, sharex=True), DATA.items(), strict=True):
        for axes, (measure, label) in zip(row, MEASURES.items(), strict=True):
            for arm in ARMS:
                steps, seeds = _curve(report, arm, data, measure)
                colour, style = STYLES[arm]
                means = [sum(values) / len(values) for values in seeds]
                axes.plot(steps, means, style, color=colour, markersize=4, label=NAMES[arm])
                axes.vlines(steps, *zip(*((min(v), max(v)) for v in seeds), strict=True), color=colour, linewidth=1)
                shown = "{:.0%}" if measure == "answer_right" else "{:.2f}"
                ends = " to ".join(shown.format(x) for x in (means[0], means[-1]))
                words.append(f"{title}, {NAMES[arm]}, {label}: {ends}")
            axes.set(title=f"{label}, {title}", xlabel="step" if data == TENTH else "")
            if measure == "answer_right":
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
                axes.set_ylim(0, 1)
            else:
                axes.set_ylim(top=1.6)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    alt = f"Four charts over the steps of training, from step {steps[0]} to step {steps[-1]}. "
    return Shown(table(report), figure, alt + "; ".join(words) + ".")


def _curve(report: dict, arm: str, data: float, measure: str) -> tuple[list[int], list[list[float]]]:
    """(steps, at each the values of the seeds); the untrained start is left out."""
    rows = main_rows(report, arm, data)
    return rows[0]["curve"]["steps"][1:], list(zip(*(row["curve"][measure][1:] for row in rows), strict=True))


def table(report: dict) -> str:
    """The arms on all data and on a tenth: means over seeds with 95 % intervals, and what they have over hard."""
    lines = [f"{'':20}{'answers right':>20}{'over hard':>16}{'loss on captions':>22}{'over hard':>18}"]
    for data, title in DATA.items():
        lines.append(title)
        for arm in ARMS:
            cells = []
            for measure, form in (("answer_right", "{:.1%}"), ("caption_loss", "{:.3f}")):
                mean, half = interval([value(row, measure) for row in main_rows(report, arm, data)])
                cells.append(form.format(mean) + " ± " + form.format(half))
                mean, half = gained(report, arm, data, measure)
                sign = form.replace(":", ":+")
                cells.append("" if arm == "hard" else sign.format(mean) + " ± " + form.format(half))
            lines.append(f"  {NAMES[arm]:18}{cells[0]:>20}{cells[1]:>16}{cells[2]:>22}{cells[3]:>18}")
    return "\n".join(lines)


def costs(report: dict) -> str:
    """FLOPs of a soft run and its teacher: student, the teacher's passes, the teacher's training, shared or not."""
    lines = [
        f"{'10^12 FLOPs':36}{'student':>9}{'passes':>9}{'teaching':>10}{'of 1 pupil':>12}{'of 100':>9}{'no charge':>11}"
    ]
    rows = {title: main_rows(report, "soft", data)[0] for data, title in DATA.items()}
    rows |= {f"teacher {row['teacher']}": row for row in control_rows(report, "teacher")}
    rows["teacher reads every batch"] = next(row for row in control_rows(report, "top-k") if row["top_k"] == "all")
    for name, row in rows.items():
        own, passes, training = (row["flops"][part] / 1e12 for part in ("own", "teacher_passes", "teacher_training"))
        # Passes are cached once for all pupils of the same documents; so they are shared as the training is.
        shares = [(passes + training) / pupils for pupils in (1, 100)]
        totals = [own + share for share in shares] + [own]
        lines.append(
            f"{name:36}{own:9.1f}{passes:9.1f}{training:10.1f}{totals[0]:12.1f}{totals[1]:9.1f}{totals[2]:11.1f}"
        )
    return "\n".join(lines)


def controls(report: dict) -> Shown:
    """What k, temperature and teacher change, soft targets on the tenth, one seed: bars with 95 % intervals."""
    hard, soft = (main_rows(report, arm, TENTH)[0] for arm in ("hard", "soft"))
    everything = next(row for row in control_rows(report, "top-k") if row["top_k"] == "all")
    groups = {
        "tokens kept": [(str(r["top_k"]), r) for r in _by_k([*control_rows(report, "top-k"), soft])],
        "temperature, all kept": [("1", everything)]
        + [(f"{row['temperature']:g}", row) for row in control_rows(report, "temperature")],
        "teacher": [("mini-behemoth", soft), *((row["teacher"], row) for row in control_rows(report, "teacher"))],
    }
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    grid = figure.subplots(2, 3, sharex="col", sharey="row", width_ratios=[len(rows) for rows in groups.values()])
    words = []
    for column, (title, rows) in enumerate(groups.items()):
        for axes, (part, score) in zip(grid[:, column], (("answers", "right"), ("captions", "loss")), strict=True):
            means, lows, highs = zip(*(row[part][score] for _, row in rows), strict=True)
            spread = [[m - low for m, low in zip(means, lows, strict=True)],
                      [high - m for m, high in zip(means, highs, strict=True)]]  # fmt: skip
            axes.bar(range(len(rows)), means, yerr=spread, color=BLUE, width=0.6, capsize=3)
            axes.axhline(hard[part][score][0], color=RED, linestyle="--", label="hard targets only")
            axes.set_xticks(range(len(rows)), [SHORT.get(name, name) for name, _ in rows], fontsize=8)
        grid[0, column].set(title=title, ylim=(0, 1))
        grid[0, column].yaxis.set_major_formatter(PercentFormatter(1.0))
        scores = [f"{name} {r['answers']['right'][0]:.0%} and {r['captions']['loss'][0]:.2f}" for name, r in rows]
        words.append(f"{title}: " + ", ".join(scores))
    grid[0, 0].set(ylabel="answers right")
    grid[1, 0].set(ylabel="loss on captions (nats)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", frameon=False)
    alone = f"{hard['answers']['right'][0]:.0%} and {hard['captions']['loss'][0]:.2f}"
    alt = "Bars of the share of answers that are right, and of the loss on captions. " + "; ".join(words)
    return Shown("; ".join(words), figure, f"{alt}. A dashed line: hard targets only, {alone}.")


def _by_k(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: float("inf") if row["top_k"] == "all" else row["top_k"])


def two_humps() -> Shown:
    """The best student of one hump for a teacher of two, once by forward and once by reverse KL.

    The student's logits are a parabola over 41 places: it has a centre and a width, and all of these are tried.
    """
    place = torch.linspace(-5, 5, 41)
    humps = torch.stack([-((place - 2.5) ** 2), -((place + 2.5) ** 2) - 0.4])  # the left one is a little lower
    teacher_V = torch.logsumexp(humps, 0)
    centre, width = (each.flatten() for each in torch.meshgrid(place, torch.linspace(0.5, 6, 56), indexing="ij"))
    students = -(((place - centre[:, None]) / width[:, None]) ** 2)  # [students, 41]
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes, words = figure.subplots(), []
    axes.bar(place.tolist(), teacher_V.softmax(-1).tolist(), 0.25, color="lightgrey", label="teacher")
    for name, reverse, colour, style in (("forward KL", False, BLUE, "o-"), ("reverse KL", True, ORANGE, "s-")):
        q = students[soft_loss(students, teacher_V.expand_as(students), reverse=reverse).argmin()].softmax(-1)
        mean = float((q * place).sum())
        spread = float((q * (place - mean) ** 2).sum().sqrt())
        axes.plot(place.tolist(), q.tolist(), style, color=colour, markersize=3, label=f"student, {name}")
        words.append(f"{name}: centre {mean:.1f}, standard deviation {spread:.1f}")
    axes.set(xlabel="words, in some order", ylabel="probability", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    alt = "A teacher with two humps, and the best student with one. " + "; ".join(words) + "."
    return Shown("\n".join(words), figure, alt)
