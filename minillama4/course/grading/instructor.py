"""The instructor's copy of a notebook: which exercises it holds, how they are called, and what they are worth.

It is the solved notebook of `solutions/`, or any nbgrader source notebook. A submission is matched with it by cell ids.
"""

import ast
import json
from dataclasses import dataclass
from pathlib import Path

from .. import exercise


@dataclass(frozen=True)
class Task:
    id: str  # of the exercise, which is the grade_id of its check
    points: float
    expression: str  # what `check("id", expression)` is given: the learner's function
    answer: int  # where in the copy its answer stands


@dataclass(frozen=True)
class Copy:
    name: str  # "00_start_here"
    cells: tuple[dict, ...]  # id, grade_id, kind ("check", "answer" or "", where a learner may write), type, source
    tasks: tuple[Task, ...]

    @property
    def points(self) -> float:
        return sum(task.points for task in self.tasks)


def copies(folder: Path) -> dict[str, Copy]:
    """Name -> copy, of all notebooks with checks in `folder` and below it.

    ValueError: there is none, two have the same name or exercise, or a check cannot be graded.
    """
    found: dict[str, Copy] = {}
    owner: dict[str, str] = {}
    for file in sorted(Path(folder).rglob("*.ipynb")):
        if ".ipynb_checkpoints" in file.parts:
            continue
        copy = read(file)
        if not copy.tasks:
            continue
        if copy.name in found:
            raise ValueError(f"two notebooks in {folder} are called {file.name}")
        for task in copy.tasks:
            if task.id in owner:
                raise ValueError(f"the exercise {task.id} is in {owner[task.id]} and in {copy.name}")
            owner[task.id] = copy.name
        found[copy.name] = copy
    if not found:
        raise ValueError(f"{folder} holds no notebook with checks; --copies takes the folder of the solved notebooks")
    return found


def read(file: Path) -> Copy:
    try:
        cells = json.loads(file.read_text("utf-8"))["cells"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not a notebook: {error}") from None
    known, rows, tasks, answer = set(exercise.ids()), [], [], None
    for number, cell in enumerate(cells):
        meta, source = cell["metadata"].get("nbgrader", {}), "".join(cell["source"])
        kind = "check" if meta.get("grade") else "answer" if meta.get("solution") else ""
        rows.append(
            {"id": cell.get("id", ""), "grade_id": meta.get("grade_id", ""), "kind": kind, "type": cell["cell_type"],
             "source": source}
        )  # fmt: skip
        if cell["cell_type"] != "code":
            continue
        if kind == "answer":
            answer = number
        elif kind == "check":
            where = f"{file.name}, cell {number} ({meta.get('grade_id')})"
            id, expression = _called(source, where)
            if id not in known or id != meta.get("grade_id"):
                raise ValueError(f"{where} checks {id!r}, which must be its grade_id and one of {', '.join(known)}")
            if answer is None:
                raise ValueError(f"{where} has no answer before it")
            tasks.append(Task(id, float(meta.get("points", 0)), expression, answer))
    return Copy(file.stem, tuple(rows), tuple(tasks))


def _called(source: str, where: str) -> tuple[str, str]:
    """("start-rms-norm", "rms_norm") of `check("start-rms-norm", rms_norm)`."""
    try:
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except SyntaxError:
        calls = []
    for call in calls:
        if isinstance(call.func, ast.Name) and call.func.id == "check" and len(call.args) >= 2:
            if isinstance(call.args[0], ast.Constant):
                return str(call.args[0].value), ast.unparse(call.args[1])
    raise ValueError(f'{where} is a check cell without a line check("id", function)')
