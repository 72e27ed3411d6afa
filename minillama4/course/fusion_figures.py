"""The pictures of lesson 01's study, drawn on private figures, each with its words (alt text), and its tables."""

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .widgets.frame import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, Shown

STYLES = {  # arm -> colour, line and marker
    "joint": (BLUE, "o-"),
    "encoder-free": (GREY, "s-"),
    "frozen": (ORANGE, "^--"),
    "unfrozen": (GREEN, "D--"),
    "unfrozen, with text": (PURPLE, "v--"),
}
CELLS = ("attribute, en", "attribute, hi", "place, en", "place, hi", "count, en", "count, hi")
CHARGES = {"frozen parts free": False, "frozen parts charged in full": True}


def _rows(report: dict, arm: str) -> list[dict]:
    """The main runs of an arm, one a seed; of a part, its whole runs."""
    rows = [row for row in report["rows"] if row["arm"] == arm and not row.get("sweep")]
    return [row for row in rows if row["seed"] != 9]


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def _spent(row: dict, charged: bool) -> list[float]:
    """TFLOPs at each point of a row's curve."""
    before = row["parts_flops"] if charged else 0
    return [(flops + before) / 1e12 for flops in row["curve"]["flops"]]


def accuracy_by_flops(report: dict) -> Shown:
    """Held-out accuracy on pictures against training FLOPs, twice: frozen parts free, and charged in full.

    report: of `evidence.fusion`. Lines are means over seeds, bars reach from the lowest seed to the highest.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    words, guess = [], report["card"]["guessed"]["all"]
    for axes, (title, charged) in zip(figure.subplots(1, 2, sharey=True), CHARGES.items(), strict=True):
        for arm, (colour, style) in STYLES.items():
            rows = _rows(report, arm)
            spent = [_mean(point) for point in zip(*(_spent(row, charged) for row in rows), strict=True)]
            seeds = list(zip(*(row["curve"]["all"] for row in rows), strict=True))  # [points][seeds]
            means = [_mean(point) for point in seeds]
            axes.plot(spent, means, style, color=colour, markersize=4.5, label=arm)
            axes.vlines(spent, list(map(min, seeds)), list(map(max, seeds)), color=colour, linewidth=1.5)
            words.append(f"{title}, {arm}: {means[0]:.0%} at {spent[0]:.1f} to {means[-1]:.0%} at {spent[-1]:.1f}")
        axes.axhline(guess, color="black", linewidth=1, linestyle=":", label="question only, no picture")
        axes.set(title=title, xlabel="training FLOPs (10¹²)", xlim=(0, None), ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.axes[0].set_ylabel("answers right, held-out pictures")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False,
                  fontsize=8, columnspacing=1)  # fmt: skip
    alt = f"Two line charts of accuracy against training FLOPs in 10^12; guessing gives {guess:.0%}. "
    return Shown(equal_flops_table(report), figure, alt + "; ".join(words) + ".")


def reached(row: dict, flops: float, charged: bool) -> float | None:
    """Accuracy of a run when it had spent so many TFLOPs, on a line between its points; None before the first."""
    spent, right = _spent(row, charged), row["curve"]["all"]
    if flops < spent[0]:
        return None
    points = list(zip(spent, right, strict=True))
    for (x1, y1), (x2, y2) in zip(points, points[1:], strict=False):
        if flops <= x2:
            return y1 + (y2 - y1) * (flops - x1) / (x2 - x1)
    return right[-1]


def equal_flops_table(report: dict) -> str:
    """Accuracy at four equal budgets, with the frozen parts free and charged; the mean of the seeds."""
    whole = report["card"]["flops"] / 1e12
    budgets = [whole * share for share in (0.25, 0.5, 0.75, 1.0)]
    lines = [f"{'right at equal training FLOPs (10^12):':50}" + "".join(f"{budget:8.2f}" for budget in budgets)]
    for title, charged in CHARGES.items():
        for arm in STYLES:
            rows = _rows(report, arm)
            if charged and not rows[0]["parts_flops"]:
                continue  # nothing to charge: the line above holds
            found = [[reached(row, budget, charged) for row in rows] for budget in budgets]
            shares = ["" if None in seeds else f"{_mean(seeds):.0%}" for seeds in found]
            name = arm + (f", {title}" if rows[0]["parts_flops"] else "")
            lines.append(f"{name:50}" + "".join(f"{share:>8}" for share in shares))
    return "\n".join(lines)


def by_kind_and_language(report: dict) -> str:
    """Two tables of the ends of the main runs: accuracy by kind and language, and what each arm cost."""
    heads = (cell.replace("attribute", "attr.") for cell in CELLS)
    lines = [f"{'right, of 600 questions':28}{'seeds':>6}{'all':>9}" + "".join(f"{head:>11}" for head in heads)]
    for arm in STYLES:
        rows = _rows(report, arm)
        cells = [_ends(row["pictures_right"][cell] for row in rows) for cell in CELLS]
        ends = _ends(row["pictures_right"]["all"] for row in rows)
        lines.append(f"{arm:28}{len(rows):6}{ends:>9}" + "".join(f"{cell:>11}" for cell in cells))
    guess = report["card"]["guessed"]
    shares = "".join(f"{guess[cell]:11.0%}" for cell in CELLS)
    lines.append(f"{'who reads the question only':28}{'':6}{guess['all']:9.0%}{shares}")

    heads = ("trained", "of", "10^12 FLOP", "parts", "MB a step", "seconds", "pictures", "texts", "a picture")
    lines += ["", f"{'cost; parts: 10^12 before':28}" + "".join(f"{head:>11}" for head in heads)]
    for arm in STYLES:
        rows = _rows(report, arm)
        first, values = rows[0], {name: _mean(r[name] for r in rows) for name in ("seconds", "pictures", "texts")}
        cells = (
            f"{first['trained_parameters']:,}", f"{first['parameters']:,}",
            f"{_mean(row['curve']['flops'][-1] for row in rows) / 1e12:.2f}",
            f"{_mean(row['parts_flops'] for row in rows) / 1e12:.2f}",
            f"{sum(first['bytes'].values()) / 1e6:.0f}", *(f"{value:,.0f}" for value in values.values()),
            f"{first['tokens_per_picture']} tokens",
        )  # fmt: skip
        lines.append(f"{arm:28}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def _ends(values) -> str:
    values = list(values)
    return "-".join(dict.fromkeys(f"{end(values):.0%}" for end in (min, max)))


def forgetting_of_text(report: dict) -> Shown:
    """Loss on held-out text against training FLOPs: what learning from pictures costs the text.

    A late arm begins where its language model ended. "text alone" is that model's own training.
    """
    figure = Figure(figsize=(6.8, 3.9), layout="constrained")
    axes, words = figure.subplots(), []
    heads = ("loss before", "after", "right before", "after")
    lines = [f"{'answers about told scenes':34}" + "".join(f"{head:>14}" for head in heads)]
    for arm, (colour, style) in {"text alone": (RED, "x-"), **STYLES}.items():
        rows = _rows(report, arm)
        spent = [_mean(point) for point in zip(*(row["curve"]["flops"] for row in rows), strict=True)]
        losses = [_mean(point) for point in zip(*(row["curve"]["text_loss"] for row in rows), strict=True)]
        ends = {"text_after": [row.get("text_after", row.get("text")) for row in rows]}
        late = rows[0].get("parts_flops", 0) > 0
        if late:
            ends["text_before"] = [row["text_before"] for row in rows]
            spent, losses = [0.0, *spent], [_mean(end["loss"] for end in ends["text_before"]), *losses]
        axes.plot([flops / 1e12 for flops in spent], losses, style, color=colour, markersize=4.5, label=arm)
        loss, right = (
            {when: _mean(end[what] for end in found) for when, found in ends.items()} for what in ("loss", "all")
        )
        before = (f"{loss['text_before']:.3f}", f"{right['text_before']:.0%}") if late else ("untrained", "")
        lines.append(f"{arm:34}{before[0]:>14}{loss['text_after']:14.3f}{before[1]:>14}{right['text_after']:14.0%}")
        words.append(f"{arm}: from {before[0]} to {loss['text_after']:.2f}")
    axes.set(xlabel="training FLOPs of the arm itself (10¹²)", ylabel="loss on held-out text (nats a token)")
    axes.set(xlim=(-0.05, None), ylim=(0, 2))
    axes.legend(frameon=False, fontsize=8)
    alt = "Line chart of the loss on held-out text against training FLOPs. " + "; ".join(words) + "."
    return Shown("\n".join(lines), figure, alt)
