"""A submission, read as data: which of its cells run in the sandbox, and where the answers are.

Check cells are dropped, because the instructor's own decide. All else runs in the learner's order: their answers,
helpers and imports. Answers are found by grade_id, else by cell id, else by the name that the instructor's check calls.
"""

import ast
import json
from dataclasses import dataclass, field

from .instructor import Copy

MOST_CELLS = 2_000
MOST_SOURCE = 2_000_000  # characters in all cells


class Unreadable(ValueError):
    """Not a notebook that can be graded; the message is for the learner and the instructor."""


@dataclass
class Plan:
    copy: Copy
    cells: list[dict] = field(default_factory=list)  # number, source, tasks (ids of those that it answers)
    names: dict[str, str] = field(default_factory=dict)  # exercise -> the expression that gives the function
    notes: list[str] = field(default_factory=list)  # what was unusual, for the report


def parse(data: bytes) -> dict:
    """The notebook as plain data. Unreadable: everything that is not a whole notebook of format 4."""
    try:
        notebook = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Unreadable("the file is not text in UTF-8, so it is not a notebook") from None
    except RecursionError:
        raise Unreadable("the file is nested far deeper than any notebook") from None
    except ValueError as error:
        where = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "a number in it"
        raise Unreadable(f"the file is broken JSON ({where}); it may have been cut off while it was saved") from None
    if not isinstance(notebook, dict) or not isinstance(notebook.get("nbformat"), int):
        raise Unreadable("the file is JSON, but no notebook")
    if notebook["nbformat"] != 4:
        raise Unreadable(
            f"the notebook has format {notebook['nbformat']}, and format 4 is graded; "
            "opening and saving it in JupyterLab brings it up to date"
        )
    cells = notebook.get("cells")
    if not isinstance(cells, list) or len(cells) > MOST_CELLS:
        raise Unreadable("the notebook has no list of cells, or far too many of them")
    total = 0
    for number, cell in enumerate(cells):
        source = cell.get("source", "") if isinstance(cell, dict) else None
        if isinstance(source, list) and all(isinstance(line, str) for line in source):
            source = "".join(source)
        if not isinstance(source, str):
            raise Unreadable(f"cell {number} of the notebook has no text")
        total += len(source)
        meta = _table(_table(cell.get("metadata")).get("nbgrader"))
        cells[number] = {
            "type": _text(cell.get("cell_type")),
            "id": _text(cell.get("id")),
            "grade_id": _text(meta.get("grade_id")),
            "grade": bool(meta.get("grade")),
            "source": source,
        }
    if total > MOST_SOURCE:
        raise Unreadable(f"the notebook has {total:,} characters of code and text; at most {MOST_SOURCE:,} are graded")
    kernel = _table(_table(notebook.get("metadata")).get("kernelspec"))
    return {"cells": cells, "kernel": _text(kernel.get("name"))}


def _table(value) -> dict:
    return value if isinstance(value, dict) else {}


def _text(value) -> str:
    return value if isinstance(value, str) else ""


def ids(notebook: dict) -> set[str]:
    """Cell ids and grade_ids, by which a renamed file is known again."""
    return {value for cell in notebook["cells"] for value in (cell["id"], cell["grade_id"]) if value}


def plan(notebook: dict, copy: Copy) -> Plan:
    """What the sandbox runs of it, and what the report says about it."""
    made = Plan(copy)
    checks = {row["grade_id"]: row for row in copy.cells if row["kind"] == "check"}
    check_by_id = {row["id"]: row for row in checks.values() if row["id"]}
    answers = {task.id: copy.cells[task.answer] for task in copy.tasks}
    seen_checks, found, order = set(), {id: [] for id in answers}, []
    for number, cell in enumerate(notebook["cells"]):
        check = checks.get(cell["grade_id"]) or (None if cell["grade_id"] else check_by_id.get(cell["id"]))
        if check is not None:
            if check["grade_id"] in seen_checks:
                made.notes.append(f"the check cell {check['grade_id']} is there more than once")
            elif cell["source"].strip() != check["source"].strip() or cell["type"] != check["type"]:
                made.notes.append(f"the check cell {check['grade_id']} was edited; the instructor's own was run")
            seen_checks.add(check["grade_id"])
            continue
        if cell["grade"]:
            made.notes.append(f"cell {number} says that it is graded, and is none of the course's; it was left out")
            continue
        mine = [id for id, row in answers.items() if _same(cell, row)]
        for id in mine:
            found[id].append(number)
        if mine and cell["type"] != "code":
            made.notes.append(f"the answer to {', '.join(mine)} is a {cell['type']} cell, so it does not run")
        if cell["type"] == "code":
            made.cells.append({"number": number, "source": cell["source"], "tasks": mine})
            order += mine
    for id in checks:
        if id not in seen_checks:
            made.notes.append(f"the check cell {id} was deleted; the instructor's own was run")
    for task in copy.tasks:
        made.names[task.id] = task.expression
        if len(found[task.id]) > 1:
            made.notes.append(f"{len(found[task.id])} cells answer {task.id} (a copied cell?); the last one counts")
        _by_name(made, task, found[task.id])
    first = list(dict.fromkeys(order))
    if first != [task.id for task in sorted(copy.tasks, key=lambda task: task.answer) if task.id in first]:
        made.notes.append("the answers stand in another order than in the course")
    if notebook["kernel"] not in ("", "python3"):
        made.notes.append(f"the notebook asks for the kernel {notebook['kernel'][:60]!r}; it was run with this Python")
    return made


def _same(cell: dict, row: dict) -> bool:
    return cell["grade_id"] == row["grade_id"] if cell["grade_id"] else bool(row["id"]) and cell["id"] == row["id"]


def _by_name(made: Plan, task, found: list[int]):
    """Find an answer without its ids by the function's name, and a renamed function by the answer's ids."""
    if not task.expression.isidentifier():
        return
    mine = [cell for cell in made.cells if task.id in cell["tasks"]]
    defines = [cell for cell in made.cells if task.expression in _defined(cell["source"])]
    if not found and defines:
        defines[-1]["tasks"] = [*defines[-1]["tasks"], task.id]
        made.notes.append(
            f"the answer to {task.id} has lost its ids; cell {defines[-1]['number']} defines {task.expression}"
        )
    elif not found:
        made.notes.append(f"there is no answer to {task.id}")
    elif mine and not defines:
        others = {other.expression for other in made.copy.tasks}
        own = [name for name in _defined(mine[-1]["source"]) if name not in others]
        if len(own) == 1:
            made.names[task.id] = own[0]
            made.notes.append(f"{task.expression} was renamed to {own[0]}")


def _defined(source: str) -> list[str]:
    """Names of the functions and classes that a cell defines at its top level."""
    lines = [" " * (len(line) - len(line.lstrip())) + "pass" if line.lstrip()[:1] in ("%", "!") else line
             for line in source.split("\n")]  # fmt: skip
    try:
        tree = ast.parse("\n".join(lines))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [node.name for node in tree.body if isinstance(node, kinds)]
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return names
