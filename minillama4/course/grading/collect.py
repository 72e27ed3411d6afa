"""From one submission to its arrays: the sandbox, as often as it takes to give every exercise its chance.

A cell that ends the process costs that cell alone: the rest runs again without it. What an exercise's own function does
(ends the process, fills the memory, never returns) costs that exercise.
"""

import json
import re
import shutil
import threading
from pathlib import Path

from .. import checking, exercise
from . import view
from .judge import GONE
from .plan import Plan
from .sandbox import Sandbox
from .wire import MOST_BYTES, clean, decode

MOST_STARTS = 8  # of the sandbox, for one submission


class Rooms:
    """Sandboxes with what they need: inputs drawn once, and a view of the package for each set of exercises."""

    def __init__(self, sandbox: Sandbox, folder: Path, inputs: Path):
        self.sandbox, self.folder, self.inputs = sandbox, folder, inputs
        self.lock, self.views = threading.Lock(), {}

    def view(self, exercises: tuple[str, ...]) -> Path:
        with self.lock:
            if exercises not in self.views:
                self.views[exercises] = view.build(self.folder / f"job-view-{len(self.views)}", exercises)
                _readable(self.views[exercises])
            return self.views[exercises]

    def run(self, key: str, made: Plan, slot: int) -> dict:
        """{"exercises": {id: {"draws": [...], "failed", "kind"}}, "cells": {number: error}, "notes", "cpu", "own"}"""
        ids = tuple(task.id for task in made.copy.tasks)
        entry = {"exercises": {id: {"draws": []} for id in ids}, "cells": {}, "notes": [], "cpu": 0.0, "own": 0.0}
        self._run(key, made, ids, slot, entry)
        for id in ids:  # a function that answers another exercise of this notebook may be just what this one works with
            if len(ids) > 1 and _missed(entry["exercises"][id]) - answers(id):
                entry["exercises"][id] = {"draws": []}
                self._run(key, made, (id,), slot, entry)
        entry["notes"] = list(dict.fromkeys(entry["notes"]))
        return entry

    def _run(self, key: str, made: Plan, ids: tuple[str, ...], slot: int, entry: dict):
        skip, broken_starts, exercises = set(), 0, entry["exercises"]
        shown = self.view(ids)
        for _ in range(MOST_STARTS):
            todo = [id for id in ids if len(exercises[id]["draws"]) < checking.DRAWS and "failed" not in exercises[id]]
            if not todo:
                return
            for id in todo:
                exercises[id]["draws"] = []
            progress = Progress(todo, entry)
            job = self._job(key, made, todo, skip)
            try:
                outcome = self.sandbox.run(job, shown, slot, progress.line)
            finally:
                shutil.rmtree(job, ignore_errors=True)
            # Seen from outside a little late, so for an honest end what it says itself.
            entry["cpu"] += min(max(outcome.cpu, progress.cpu), outcome.cpu + 1)
            if progress.ended and not outcome.ended:
                return
            why = outcome.ended or f"the process died{_how(outcome.code)}"
            kind = "took too long" if "took more" in why else "process died"
            if progress.cell is not None:
                skip.add(progress.cell)
                entry["cells"][str(progress.cell)] = why
                entry["notes"].append(f"cell {progress.cell} was left out: {why}")
            elif progress.exercise is not None:
                exercises[progress.exercise] |= {"failed": f"while your function ran, {why}", "kind": kind}
            else:
                broken_starts += 1
                if broken_starts == 3:
                    raise ValueError(f"the sandbox does not start: {outcome.said or why}")
        for id in ids:
            if len(exercises[id]["draws"]) < checking.DRAWS:
                exercises[id].setdefault("failed", f"the notebook ended the process {MOST_STARTS} times")
                exercises[id].setdefault("kind", "process died")

    def _job(self, key: str, made: Plan, todo: list[str], skip: set[int]) -> Path:
        job = self.folder / f"job-{key}"
        shutil.rmtree(job, ignore_errors=True)
        job.mkdir()
        cells = [cell for cell in made.cells if cell["number"] not in skip]
        names = {id: made.names[id] for id in todo}
        table = {"cells": cells, "exercises": todo, "names": names, "draws": checking.DRAWS}
        table["seconds"] = self.sandbox.seconds
        (job / "job.json").write_text(json.dumps(table), "utf-8")
        for id in todo:
            for draw in range(checking.DRAWS):
                shutil.copyfile(self.inputs / f"{id}-{draw}.pt", job / f"{id}-{draw}.pt")
        _readable(job)
        return job


class Progress:
    """Reads what a room writes, as it comes. All of it may be a learner's invention."""

    def __init__(self, todo: list[str], entry: dict):
        self.todo, self.entry = set(todo), entry
        self.cell = self.exercise = None
        self.ended, self.cpu = False, 0.0

    def line(self, line: bytes):
        if len(line) > 2 * MOST_BYTES:
            return
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(row, dict):
            return
        id, exercises = row.get("exercise"), self.entry["exercises"]
        if row.get("at") == "cell" and type(row.get("cell")) is int:
            self.cell, self.exercise = row["cell"], None
        elif row.get("at") == "observe" and isinstance(id, str) and id in self.todo:
            self.cell, self.exercise = None, id
        elif "observed" in row and isinstance(id, str) and id in self.todo:
            draws = exercises[id]["draws"]
            if row.get("draw") == len(draws) < checking.DRAWS and "failed" not in exercises[id]:
                try:
                    decode(row["observed"])
                except (ValueError, RecursionError, MemoryError):
                    exercises[id] |= {"failed": "what came out are no arrays", "kind": "does not run"}
                else:
                    draws.append(row["observed"])
        elif isinstance(row.get("failed"), str) and row["failed"] in self.todo:
            said = clean(str(row.get("error")))
            kind = "took too long" if said.startswith("it took more than") else "does not run"
            exercises[row["failed"]] |= {"failed": said, "kind": kind}
        elif type(row.get("cell")) is int and "error" in row and len(self.entry["cells"]) < 1000:
            self.entry["cells"][str(row["cell"])] = clean(str(row["error"]), 400)
        elif type(row.get("again")) is int:
            self.entry["cells"].pop(str(row["again"]), None)
            self.entry["notes"].append(f"cell {row['again']} needs one that stands below it, and ran a second time")
        elif isinstance(row.get("seconds"), float) and 0 <= row["seconds"] < 1e6:
            self.entry["own"] += row["seconds"]
        elif row.get("end") is True:
            self.ended = True
            if isinstance(row.get("cpu"), float):
                self.cpu = row["cpu"]


def answers(id: str) -> set[str]:
    """Names, as an empty function says them, of what would answer the exercise."""
    names = set()
    for name in exercise.find(id).module.ANSWERED_BY:
        if name.startswith("minillama4."):
            file, qualname = view._source(name)
            within = file.relative_to(view.PACKAGE).with_suffix("")
            name = ".".join(["minillama4", *within.parts, qualname])
        names.add(name)
    return names


def _missed(row: dict) -> set[str]:
    """Names of functions that were gone when the learner's code called them."""
    said = [row.get("failed", "")]
    for draw in row["draws"]:
        said += [value.get("text", "") for value in draw.values()]
    return {found for text in said for found in re.findall(GONE, text)}


def _how(code: int | None) -> str:
    signals = {134: " (abort)", 137: " (killed)", 139: " (segmentation fault)", 152: " (CPU time)"}
    return signals.get(code, f" (exit code {code})" if code is not None and code >= 0 else "")


def _readable(folder: Path):
    """For the ordinary user that a sandbox of root's runs as, whatever the umask."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
