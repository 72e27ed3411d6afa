"""`make exercises`: from solved notebooks to the ones that learners get.

    solutions/NN_*.ipynb  ->  exercises/NN_*.ipynb

Solution regions become stubs and outputs go; cards, tasks, checks and hints stay. The result is also an nbgrader
assignment (metadata schema 3): cell by cell what nbgrader itself would release. One source, so nothing can drift.
"""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
# However it is written: a slip of the pen must not show the solution.
MARKER = re.compile(r"#\s*(BEGIN|END) SOLUTION", re.IGNORECASE)
STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")
KINDS = {  # what a cell's `nbgrader` metadata says -> may a learner (edit, delete) it
    "answer": {"grade": False, "solution": True, "locked": False},
    "check": {"grade": True, "solution": False, "locked": True},
    "text": {"grade": False, "solution": False, "locked": True},
}


def main(arguments: list[str]) -> int:
    """Split every notebook of `solutions/`, or those named; nothing is written unless all of them can be."""
    files = [Path(name) for name in arguments] or sorted(Path("solutions").glob("*.ipynb"))
    try:
        if not files:
            raise ValueError("there is no solutions/*.ipynb here; run it in the course's own folder")
        for file, text in [(file, split(file)) for file in files]:
            target = Path("exercises") / file.name
            write(target, text)
            print(f"{file} -> {target}")
    except (ValueError, OSError) as error:
        print(f"exercises: {error}", file=sys.stderr)
        return 2
    return 0


def split(file: Path) -> str:
    """The learner's notebook, as the text of its file.

    ValueError, naming the cell: a region that does not end, an answer without a region, wrong nbgrader metadata, an id
    twice, an answer without a check after it.
    """
    try:
        notebook = json.loads(file.read_text("utf-8"))
        notebook["cells"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not a notebook: {error}") from None
    seen, waiting = set(), None
    for number, cell in enumerate(notebook["cells"]):
        where = f"{file.name}, cell {number} ({cell.get('id', '')})"
        meta = cell["metadata"].get("nbgrader")
        kind = _kind(meta, seen, where) if meta else None
        source = "".join(cell["source"])
        if MARKER.search(source) and kind != "answer":
            raise ValueError(f"{where} has a solution region, and its nbgrader metadata does not say `solution`")
        if kind == "answer":
            if waiting:
                raise ValueError(f"{waiting} is an answer that no check follows")
            waiting, source = where, _stub(source, where)
        elif kind == "check":
            waiting = None
        cell["source"] = source.splitlines(keepends=True)
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
        if meta:
            if kind != "answer":
                cell["metadata"] |= {"deletable": False, "editable": False}
            else:
                cell["metadata"]["deletable"] = False
            meta |= {"checksum": checksum(cell, source), "cell_type": cell["cell_type"]}
    if waiting:
        raise ValueError(f"{waiting} is an answer that no check follows")
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _kind(meta: dict, seen: set[str], where: str) -> str:
    flags = {name: meta.get(name) for name in ("grade", "solution", "locked")}
    kind = next((kind for kind, wanted in KINDS.items() if wanted == flags), None)
    if kind is None or meta.get("schema_version") != 3 or meta.get("task"):
        raise ValueError(f"{where} has nbgrader metadata {meta}; it must have schema_version 3, task false and be one "
                         f"of {KINDS}")  # fmt: skip
    id = meta.get("grade_id", "")
    if not re.fullmatch(r"[a-zA-Z0-9_-]+", id) or id in seen:
        raise ValueError(f"{where}: grade_id {id!r} must be new and made of letters, digits, _ and -")
    if kind == "check" and not (isinstance(meta.get("points"), (int, float)) and meta["points"] > 0):
        raise ValueError(f"{where} is a check and needs points above 0")
    seen.add(id)
    return kind


def _stub(source: str, where: str) -> str:
    """The source with each region replaced, at its own depth, by the stub."""
    kept, inside, regions = [], False, 0
    for line in source.splitlines():
        if MARKER.search(line) and line.strip() not in (BEGIN, END):
            raise ValueError(f"{where}: {line.strip()!r}; write {BEGIN} and {END}, each on a line of its own")
        if BEGIN in line:
            if inside:
                raise ValueError(f"{where}: {BEGIN} inside a region")
            inside, regions = True, regions + 1
            indent = line[: len(line) - len(line.lstrip())]
            kept += [indent + stub for stub in STUB]
        elif END in line:
            if not inside:
                raise ValueError(f"{where}: {END} without {BEGIN}")
            inside = False
        elif not inside:
            kept.append(line)
    if inside or not regions:
        raise ValueError(f"{where}: an answer needs {BEGIN} and {END}, each on a line of its own")
    return "\n".join(kept)


def solution_lines(file: Path) -> set[str]:
    """Lines of the regions, stripped: what may not be found in an exercise."""
    lines = set()
    for cell in json.loads(file.read_text("utf-8"))["cells"]:
        inside = False
        for line in map(str.strip, "".join(cell["source"]).splitlines()):
            inside = (inside or BEGIN in line) and END not in line
            if inside and BEGIN not in line and line:
                lines.add(line)
    return lines


def checksum(cell: dict, source: str) -> str:
    """nbgrader's own: the MD5 of everything about a cell that grading relies on."""
    meta = cell["metadata"]["nbgrader"]
    parts = [
        source,
        cell["cell_type"],
        *(str(meta[flag]) for flag in ("grade", "solution", "locked")),
        meta["grade_id"],
    ]
    if meta["grade"]:
        parts.append(str(float(meta["points"])))
    return hashlib.md5("".join(parts).encode(), usedforsecurity=False).hexdigest()


def write(target: Path, text: str):
    """Whole or not at all."""
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_name(target.name + ".new")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
