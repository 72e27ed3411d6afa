"""The picture and the table of the study of fewer bits, drawn on a private figure, with its words (alt text)."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .evidence.quantise import PARTS, job
from .widgets.frame import BLUE, GREEN, GREY, ORANGE, RED, Shown

BITS = (8, 6, 5, 4, 3, 2)
GROUPS = (32, 64, 128, "matrix")
MARKS = {4: (BLUE, "o"), 3: (ORANGE, "s"), 2: (RED, "D")}  # bits -> colour and marker, in the chart of parts
MANY = 16  # times: the planted outliers
TEXTBOOK = (4, 3, 2)  # bits that were also tried with the textbook's scale
PACKED = "all that int4 packs"


def row_of(report: dict, bits: int | None, group: int | str = 128, **changes) -> dict:
    """The row of `evidence.quantise.job` with these settings. ValueError: there is none."""
    wanted = job(bits, group, **changes)
    for row in report["rows"]:
        if wanted.items() <= row.items():
            return row
    raise ValueError(
        f"no row has bits {bits}, group {group}, {changes}; plan() of evidence.quantise lists what there is"
    )


def with_outliers(report: dict, group: int | str) -> list[dict]:
    """Rows of 4 bits with planted outliers: one a draw of their channels, of which a whole matrix has one."""
    return [row_of(report, 4, group, outlier=MANY, seed=seed) for seed in range(1 if group == "matrix" else 3)]


def right(rows: dict | list[dict]) -> float:
    """Share of the answers, of all rows together."""
    rows = [rows] if isinstance(rows, dict) else rows
    return sum(row["right"] for row in rows) / sum(row["asked"] for row in rows)


def fewer_bits(report: dict) -> Shown:
    """Left: answers right against bits a weight. Right: if only one part is rounded. report: `evidence.quantise`."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, beside = figure.subplots(1, 2, width_ratios=(1.1, 1))
    words = _by_bits(left, report) + _by_part(beside, report)
    for axes, axis in ((left, left.yaxis), (beside, beside.xaxis)):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="both", color="lightgrey", linewidth=0.5)
        axes.set_axisbelow(True)
    return Shown(table(report), figure, "Two charts of the share of answers that are right. " + "; ".join(words) + ".")


def _by_bits(axes, report: dict) -> list[str]:
    """Draw the left chart; say it."""
    lines = {
        "groups of 128": ([[row_of(report, bits)] for bits in BITS], BLUE, "o-"),
        "4 bits, other groups": ([[row_of(report, 4, group)] for group in GROUPS], GREEN, "^:"),
        "3 bits, other groups": ([[row_of(report, 3, group)] for group in GROUPS], ORANGE, "s:"),
        "4 bits, other groups, outliers planted": ([with_outliers(report, group) for group in GROUPS], RED, "D--"),
    }
    words = []
    for name, (points, colour, style) in lines.items():
        widths = [rows[0]["bits_a_weight"] for rows in points]
        axes.plot(widths, list(map(right, points)), style, color=colour, markersize=5, label=name)
        for width, rows in zip(widths, points, strict=True):
            ends = (min(row["low"] for row in rows), max(row["high"] for row in rows))
            axes.plot([width, width], ends, color=colour, linewidth=1)
        said = (f"{right(rows):.1%} at {width:.2f}" for width, rows in zip(widths, points, strict=True))
        words.append(f"{name}: " + ", ".join(said) + " bits")
    guess = report["card"]["guess"]
    axes.axhline(guess, color=GREY, linestyle="--", linewidth=1)
    axes.text(8.4, guess - 0.015, "best guess without the picture", ha="right", va="top", fontsize=8, color="#555555")
    axes.set(xlabel="bits a weight, with its share of the scales", ylabel="answers right", ylim=(-0.03, 1.05))
    axes.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.52))
    return [*words, f"best guess without the picture: {guess:.0%}"]


def by_part(report: dict) -> dict[str, dict[int, dict]]:
    """Part -> bits -> the row in which nothing else is rounded; the part that suffers most comes first."""
    found = {part: {bits: row_of(report, bits, parts=[part]) for bits in MARKS} for part in PARTS}
    return dict(sorted(found.items(), key=lambda item: item[1][2]["right"]))


def _by_part(axes, report: dict) -> list[str]:
    """Draw the right chart; say it."""
    groups = {PACKED: {bits: row_of(report, bits) for bits in MARKS}} | by_part(report)
    for place, rows in enumerate(groups.values()):
        for shift, (bits, row) in zip((-0.22, 0, 0.22), rows.items(), strict=True):
            colour, mark = MARKS[bits]
            axes.plot([row["low"], row["high"]], [place + shift] * 2, color=colour, linewidth=1.5)
            axes.plot(right(row), place + shift, mark, color=colour, markersize=5, label=f"{bits} bits" * (place == 0))
    names = [f"{name}\n{rows[4]['weights'] / 1000:,.0f}K weights" for name, rows in groups.items()]
    axes.set_yticks(range(len(groups)), names, fontsize=8)
    axes.set(xlabel="answers right, nothing else rounded", ylim=(len(groups) - 0.5, -0.5))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[:3], labels[:3], frameon=False, fontsize=8, loc="lower left")
    return [
        f"only {name}: " + ", ".join(f"{right(row):.1%} with {bits} bits" for bits, row in rows.items())
        for name, rows in groups.items()
    ]


def table(report: dict) -> str:
    """A line a row: bits with scales, answers right, how many of them lost and won, KL, relative error of weights."""
    head = f"{'':44}{'bits':>6}{'answers right':>22}{'lost':>6}{'won':>5}{'KL (nats)':>11}{'error':>7}"
    lines = [head, _line("as it ships", [row_of(report, None)])]
    lines += [_line(f"{bits} bits, groups of 128", [row_of(report, bits)]) for bits in BITS]
    for bits in (4, 3):
        for group in (32, 64, "row", "matrix"):
            shared = f"groups of {group}" if isinstance(group, int) else f"one scale a {group}"
            lines.append(_line(f"{bits} bits, {shared}", [row_of(report, bits, group)]))
    lines += [
        _line(f"{bits} bits, scale of the textbook", [row_of(report, bits, scale="textbook")]) for bits in TEXTBOOK
    ]
    for part, rows in by_part(report).items():
        lines += [_line(f"{bits} bits, {part} only", [row]) for bits, row in rows.items()]
    lines += [_line(f"{bits} bits, every matrix", [row_of(report, bits, parts=list(PARTS))]) for bits in (4, 3)]
    lines.append(_line(f"outliers of {MANY} times, not rounded", [row_of(report, None, outlier=MANY)]))
    lines.append(_line("  8 bits, groups of 128", [row_of(report, 8, outlier=MANY)]))
    for group in GROUPS:
        rows = with_outliers(report, group)
        shared = f"groups of {group}, mean of 3 draws" if isinstance(group, int) else f"one scale a {group}"
        lines.append(_line(f"  4 bits, {shared}", rows))
    return "\n".join(lines)


def _line(name: str, rows: list[dict]) -> str:
    """Means of the rows, and the lowest and highest end of their intervals."""

    def mean(value: str) -> float:
        return sum(row.get(value, 0) for row in rows) / len(rows)

    interval = f"{right(rows):.1%} ({min(r['low'] for r in rows):.1%}-{max(r['high'] for r in rows):.1%})"
    counts = f"{mean('lost'):6.0f}{mean('won'):5.0f}{mean('kl'):11.2g}"
    return f"{name:44}{mean('bits_a_weight') or 16:6.2f}{interval:>22}{counts}{mean('error'):7.1%}"
