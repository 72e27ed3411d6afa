"""The picture of lesson 02's study, drawn on a private figure, with its words (alt text) and its tables."""

from operator import itemgetter

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .evidence.irope import RATES, RECIPE
from .widgets.frame import BLUE, GREY, ORANGE, RED, Shown


def _rows(report: dict, arm: str, **settings) -> list[dict]:
    """Rows of an arm at the study's rate and steps, one a seed; `start` is None but for the arm that begins trained."""
    wanted = {"rate": RATES.get(arm, RATES["iRoPE"]), "train_steps": RECIPE["train_steps"], "start": None, "arm": arm}
    return [row for row in report["rows"] if all(row.get(name) == value for name, value in (wanted | settings).items())]


def _by_length(rows: list[dict], change: str, value) -> dict[int, list[float]]:
    """Tokens -> `value` of what each seed found there."""
    points = [point for row in rows for point in row["lengths"][change]]
    return {n: [value(p) for p in points if p["tokens"] == n] for n in dict.fromkeys(p["tokens"] for p in points)}


def _found(point: dict) -> float:
    return point["right"] / point["asked"]


def _means(seeds: dict[int, list[float]]) -> dict[int, float]:
    return {tokens: sum(values) / len(values) for tokens, values in seeds.items()}


def found_by_length(report: dict) -> Shown:
    """Share of the pairs found, and the margin of the needle, by length of context. report: of `evidence.irope`."""
    lines = {
        "iRoPE": (_rows(report, "iRoPE"), "as trained", BLUE, "o-"),
        "iRoPE, temperature off": (_rows(report, "iRoPE"), "temperature off", ORANGE, "s--"),
        "all RoPE, begun from iRoPE's weights": (_rows(report, "all RoPE", start="iRoPE"), "as trained", RED, "D-"),
        "local only": (_rows(report, "local only"), "as trained", GREY, "^-"),
    }
    figure = Figure(figsize=(9, 3.7), layout="constrained")
    (left, right), words = figure.subplots(1, 2), []
    for name, (rows, change, colour, style) in lines.items():
        seeds = _by_length(rows, change, _found)
        means = _means(seeds)
        left.plot(*zip(*means.items(), strict=True), style, color=colour, markersize=5, label=name)
        left.vlines(list(seeds), [min(shares) for shares in seeds.values()], [max(shares) for shares in seeds.values()],
                    color=colour, linewidth=2)  # fmt: skip
        words.append(f"{name}: " + ", ".join(f"{share:.0%} at {n:,}" for n, share in means.items()))
        if name.startswith("iRoPE"):
            margins = list(_means(_by_length(rows, change, itemgetter("margin"))).items())
            right.plot(*zip(*margins, strict=True), style, color=colour, markersize=5, label=name)
            words.append("margin: " + ", ".join(f"{margin:.1f} at {n:,}" for n, margin in (margins[0], margins[-1])))
    left.set(ylabel="pairs found", ylim=(-0.03, 1.05))
    left.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.set(ylabel="margin of the needle (nats)", ylim=(0, 21))
    for axes in (left, right):
        axes.set_xscale("log", base=4)
        axes.set(xlabel="tokens of context; trained on 64", xticks=[64, 1024, 16_384, 262_144])
        axes.set_xticklabels(["64", "1K", "16K", "256K"])
    left.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(0.17, 0.4))
    return Shown(tables(report), figure, "Two charts against the length of the context. " + "; ".join(words) + ".")


def tables(report: dict) -> str:
    """Who learned the task; what was found by length; what breaks it."""
    lines = [f"{'who learned it, at its exam of 64 tokens':44}{'rate':>6}{'seeds':>7}{'learned':>9}{'right':>12}"]
    groups = {}
    for row in report["rows"]:
        name = row["arm"] + (", begun from iRoPE" if row.get("start") else "")
        name += f", {row['train_steps']:,} steps" if row["train_steps"] != RECIPE["train_steps"] else ""
        groups.setdefault((name, row["rate"]), []).append(row)
    for (name, rate), rows in groups.items():
        ends = dict.fromkeys(f"{end(r['history']['accuracy'][-1] for r in rows):.0%}" for end in (min, max))
        lines.append(f"{name:44}{rate:6}{len(rows):7}{sum(r['learned'] for r in rows):9}{'-'.join(ends):>12}")

    lines += ["", f"{'found, of all pairs asked':44}{'64':>8}{'1K':>8}{'16K':>8}{'64K':>8}{'256K':>8}{'1M':>8}"]
    for arm in (*RATES, "all RoPE from iRoPE", "NoPE every 2", "NoPE above one RoPE", "RoPE scaled", "chunk 8"):
        rows = _rows(report, "all RoPE", start="iRoPE") if arm.endswith("from iRoPE") else _rows(report, arm)
        for change in rows[0]["lengths"]:
            means = _means(_by_length(rows, change, _found))
            shares = [f"{means[n]:8.0%}" if n in means else "" for n in (64, 1024, 16_384, 65_536, 262_144, 1_048_576)]
            name = arm + ("" if change == "as trained" else f", {change}")
            lines.append(f"{name + f', {len(rows)} seed' + 's' * (len(rows) > 1):44}{''.join(shares)}")

    split, crowd = ([row[test]["as trained"] for row in _rows(report, "iRoPE")] for test in ("split", "crowd"))
    lines += ["", "iRoPE at 4,096 tokens, three seeds, of 384 pairs:"]
    for name in split[0]:
        lines.append(f"  {name.replace('after', 'cut by a chunk border after token'):40}{_sum(split, name):6}")
    for near in crowd[0]:
        lines.append(f"  {near + ' keys that differ in one symbol':40}{_sum(crowd, near):6}")
    return "\n".join(lines)


def _sum(tests: list[dict], name: str) -> int:
    return sum(test[name]["right"] for test in tests)
