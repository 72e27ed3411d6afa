"""The report: pages that need no server and no script, a table for a spreadsheet, and the same as JSON.

Everything in it that a learner wrote is escaped here, and only here.
"""

import csv
import io
import json
import shutil
import time
from collections import Counter
from html import escape
from pathlib import Path

from .. import exercise
from .instructor import Copy
from .judge import write
from .table import VERSION, Table, fingerprint

STYLE = """
:root { color-scheme: light dark; --line: #8886; --good: #0b6e4f; --bad: #a4161a; --soft: #8881; }
@media (prefers-color-scheme: dark) { :root { --good: #5ad1a5; --bad: #ff9a8b; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { font-size: 1rem; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 3px solid currentColor; outline-offset: 2px; }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.solved { color: var(--good); } .open { color: var(--bad); }
meter { width: 8rem; max-width: 100%; vertical-align: middle; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .75rem; border-radius: .4rem; }
td, li { overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .2rem 0; }
@media (max-width: 40rem) { /* a row becomes a paragraph */
  thead { position: absolute; left: -99rem; }
  table, tbody, tr, th[scope="row"] { display: block; }
  tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
  th[scope="row"], td, td.number { border: 0; padding: 0; text-align: left; white-space: normal; }
  td { display: inline-block; margin-right: 1.2rem; }
  td::before { content: attr(data-name) ": "; opacity: .75; }
}
"""


def write_all(table: Table, rows: list[dict], left_out: list, copies: dict[str, Copy], seed: str, trusted: bool):
    """index.html, learners/, grades.csv, grades.json; each is replaced whole."""
    out = table.out
    about = {"version": VERSION, "seed": seed, "sandbox": not trusted, "graded": time.strftime("%Y-%m-%d %H:%M:%S")}
    kept = ("key", "learner", "notebook", "file", "status", "points", "of", "exercises", "notes", "cells", "seconds")
    table_rows = [{name: row[name] for name in kept} for row in rows]
    left = [{"file": path, "why": why} for path, why in left_out]
    write(out / "grades.json", json.dumps({**about, "rows": table_rows, "left_out": left}, indent=1) + "\n")
    write(out / "grades.csv", "\ufeff" + _csv(rows))  # the mark makes a spreadsheet read accents
    pages = _by_learner(rows)
    new = out / "learners.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for name, learner_rows in pages.items():
        (new / f"{page_name(name)}.html").write_text(_learner(name, learner_rows), "utf-8")
    shutil.rmtree(out / "learners", ignore_errors=True)
    new.rename(out / "learners")
    write(out / "index.html", _index(rows, pages, left_out, about, copies))


def page_name(learner: str) -> str:
    return f"learner-{fingerprint(learner)[:12]}"


def _by_learner(rows: list[dict]) -> dict[str, list[dict]]:
    pages: dict[str, list[dict]] = {}
    for row in rows:
        pages.setdefault(row["learner"], []).append(row)
    return pages


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(["learner", "notebook", "exercise", "points", "of", "solved", "mistake", "status", "notes"])
    for row in rows:
        for part in row["exercises"]:
            mistake = "" if part["solved"] else part["mistake"]
            values = [row["learner"], row["notebook"], part["id"], part["points"], part["of"]]
            values += ["yes" if part["solved"] else "no", mistake, row["status"], "; ".join(row["notes"])]
            lines.writerow([_cell(value) for value in values])
    return text.getvalue()


def _cell(value):
    """A spreadsheet must not take a learner's words for a formula."""
    if not isinstance(value, str):
        return value
    value = " ".join(value.split())
    return f"'{value}" if value[:1] in ("=", "+", "-", "@", "|", "%") else value


# ----------------------------------------------------------------------------------------------------------------------
# Pages


def _page(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#main">To the content</a>
<main id="main">
<h1>{escape(title)}</h1>
{body}
</main>
</body>
</html>
"""


def _index(rows: list[dict], pages: dict, left_out: list, about: dict, copies: dict[str, Copy]) -> str:
    room = "in the sandbox" if about["sandbox"] else "WITHOUT a sandbox (--trusted)"
    body = [
        f"<p>{len(pages)} learners, {len(rows)} notebooks; graded {escape(about['graded'])} {room}. "
        f"Seed <code>{escape(about['seed'])}</code>: the same seed draws the same numbers again. "
        'As tables: <a href="grades.csv">grades.csv</a>, <a href="grades.json">grades.json</a>.</p>',
        _exercises(rows, copies),
        _mistakes(rows),
        _learners(pages),
        _time(rows),
        _left_out(left_out),
    ]
    return _page("Grades", "\n".join(body))


def _exercises(rows: list[dict], copies: dict[str, Copy]) -> str:
    lines = []
    for name, copy in copies.items():
        for task in copy.tasks:
            parts = [part for row in rows for part in row["exercises"] if part["id"] == task.id]
            if not parts:
                continue
            solved, total = sum(part["solved"] for part in parts), len(parts)
            points = sum(part["points"] for part in parts)
            share = f'min="0" max="{total}" value="{solved}" aria-label="{solved} of {total} solved"'
            title = escape(exercise.find(task.id).card.title)
            lines.append(
                [f"{title}<br><code>{escape(task.id)}</code>", escape(name), f"{solved} of {total}",
                 f"<meter {share}></meter>", f"{points:g} of {task.points * total:g}"]
            )  # fmt: skip
    return _table("exercises", "Exercises", ["Exercise", "Notebook", "*Solved", "Share", "*Points"], lines)


def _mistakes(rows: list[dict]) -> str:
    """A mistake is what the check named; beside it the known wrong answers that behave as these submissions do."""
    counts, like = Counter(), {}
    for row in rows:
        for part in row["exercises"]:
            if not part["solved"]:
                at = part["id"], part["mistake"]
                counts[at] += 1
                like.setdefault(at, Counter()).update([part["like"]] if part["like"] else [])
    lines = []
    for (id, mistake), count in counts.most_common(30):
        known = [f"{name.replace('_', ' ')} ({n})" for name, n in like[id, mistake].most_common(3)]
        lines.append([escape(mistake), f"<code>{escape(id)}</code>", escape(", ".join(known)) or "–", str(count)])
    if not lines:
        return '<h2 id="mistakes">Commonest mistakes</h2><p>Everything is solved.</p>'
    head = ["Mistake", "Exercise", "Behaves as the known wrong answer", "*How many"]
    return _table("mistakes", "Commonest mistakes", head, lines)


def _learners(pages: dict[str, list[dict]]) -> str:
    lines = []
    for name, rows in pages.items():
        points, of = sum(row["points"] for row in rows), sum(row["of"] for row in rows)
        parts = [part for row in rows for part in row["exercises"]]
        first = next((part["mistake"] for part in parts if not part["solved"]), "–")
        notes = sum(len(row["notes"]) for row in rows)
        lines.append(
            [f'<a href="learners/{page_name(name)}.html">{escape(name)}</a>', f"{points:g} of {of:g}",
             f"{sum(part['solved'] for part in parts)} of {len(parts)}", escape(first), str(notes or "–")]
        )  # fmt: skip
    return _table("learners", "Learners", ["Learner", "*Points", "*Solved", "First failure", "*Notes"], lines)


def _time(rows: list[dict]) -> str:
    walls = sorted((row["seconds"]["run"], row["learner"]) for row in rows if "run" in row["seconds"])
    if not walls:
        return ""
    middle, (longest, who) = walls[len(walls) // 2][0], walls[-1]
    own = sum(row["seconds"].get("own", 0.0) for row in rows)
    return (
        f'<h2 id="time">Time</h2><p>Half of the notebooks ran in {middle:.1f} s or less, '
        f"the longest in {longest:.1f} s ({escape(who)}). Their own code took {own:.0f} s of computing in all.</p>"
    )


def _left_out(left_out: list[tuple[str, str]]) -> str:
    if not left_out:
        return '<h2 id="left-out">Files left out</h2><p>None.</p>'
    items = "".join(f"<li><code>{escape(path)}</code>: {escape(why)}</li>" for path, why in left_out)
    return (
        f'<h2 id="left-out">Files left out</h2><details><summary>{len(left_out)} files are nobody\'s graded notebook'
        f"</summary><ul>{items}</ul></details>"
    )


def _learner(name: str, rows: list[dict]) -> str:
    points, of = sum(row["points"] for row in rows), sum(row["of"] for row in rows)
    body = [f'<p><a href="../index.html">All grades</a></p><p>{points:g} of {of:g} points.</p>']
    for row in rows:
        body.append(f"<h2>{escape(row['notebook'])}</h2><p>From <code>{escape(row['file'])}</code></p>")
        if row["notes"]:
            body.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in row['notes'])}</ul>")
        for part in row["exercises"]:
            word, kind = ("solved", "solved") if part["solved"] else ("not yet", "open")
            points = f"{part['points']:g} of {part['of']:g}"
            body.append(f'<h3>{escape(part["id"])}: <span class="{kind}">{word}</span>, {points}</h3>')
            if not part["solved"] and part["like"]:
                body.append(
                    f"<p>It behaves as the known wrong answer <em>{escape(part['like'].replace('_', ' '))}</em>.</p>"
                )
            body.append(f"<pre>{escape(part['text'])}</pre>")
        if row["cells"]:
            said = "".join(f"<li>cell {escape(n)}: {escape(text)}</li>" for n, text in sorted(row["cells"].items()))
            body.append(f"<h3>Cells that failed</h3><ul>{said}</ul>")
    return _page(name, "\n".join(body))


def _table(id: str, title: str, head: list[str], lines: list[list[str]]) -> str:
    """lines: HTML of each cell; the first names its row. A "*" in the head marks a column of numbers."""
    kinds = [' class="number"' if name[0] == "*" else "" for name in head]
    names = [escape(name.lstrip("*")) for name in head]
    columns = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(names, kinds, strict=True))
    body = ""
    for first, *rest in lines:
        cells = zip(names[1:], kinds[1:], rest, strict=True)
        shown = "".join(f'<td{kind} data-name="{name}">{cell}</td>' for name, kind, cell in cells)
        body += f'<tr><th scope="row">{first}</th>{shown}</tr>'
    return (
        f'<h2 id="{id}">{title}</h2><div class="scroll" tabindex="0" role="region" aria-labelledby="{id}">'
        f"<table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Feedback


def write_feedback(folder: Path, found: list, rows: list[dict]):
    """FOLDER/<learner>/<notebook>.ipynb: their own cells, and after each answer what the check said."""
    for submission, row in zip(found, rows, strict=True):
        target = folder / submission.key / f"{submission.copy.name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        write(target, json.dumps(_annotated(submission, row), indent=1, ensure_ascii=False) + "\n")


def _annotated(submission, row: dict) -> dict:
    cells = [_markdown(f"# {submission.copy.name}: {row['points']:g} of {row['of']:g} points", row["notes"])]
    left = {part["id"]: part for part in row["exercises"]}
    checks = {task.id for task in submission.copy.tasks}
    for cell in submission.notebook["cells"] if submission.notebook else []:
        if cell["grade_id"] in checks:
            part = left.pop(cell["grade_id"], None)
            cells += [_code(cell["source"])] + ([_said(part)] if part else [])
        elif cell["type"] == "code":
            cells.append(_code(cell["source"]))
        else:
            kind = cell["type"] if cell["type"] in ("markdown", "raw") else "raw"
            cells.append({"cell_type": kind, "metadata": {}, "source": cell["source"]})
    cells += [_said(part) for part in left.values()]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _said(part: dict) -> dict:
    return _markdown(f"**{part['id']}: {part['points']:g} of {part['of']:g} points**", [], part["text"])


def _markdown(title: str, notes: list[str], text: str = "") -> dict:
    """The words of learners stand as code, so that none of them is markup."""
    lines = [title, *(f"    {note}" for note in notes)]
    if text:
        lines += ["", *(f"    {line}" for line in text.split("\n"))]
    return {"cell_type": "markdown", "metadata": {}, "source": "\n".join([lines[0], "", *lines[1:]])}


def _code(source: str) -> dict:
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": source}
