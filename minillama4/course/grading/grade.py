"""`minillama4 grade SUBMISSIONS --out report/`: a class's notebooks to verdicts and a report. Read this file first."""

import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from tqdm import tqdm

from .. import checking, exercise
from ..lab import find_root
from . import intake, judge, known, nbval_run, report
from .collect import Rooms
from .instructor import Copy, copies
from .plan import Plan, plan
from .sandbox import Sandbox
from .table import Table, fingerprint
from .view import PACKAGE
from .wire import decode

SECONDS = 60.0  # for one cell, and for one look at a function
MEMORY = 4  # GB, of all processes of a submission together


@dataclass(frozen=True)
class Options:
    submissions: Path
    out: Path
    seed: str | None = None
    jobs: int = 0  # 0: as many as there are processors
    trusted: bool = False
    copies: Path | None = None  # None: solutions/ of this clone
    feedback: Path | None = None
    seconds: float = SECONDS
    memory: int = MEMORY


def grade(options: Options) -> int:
    """Grade all that is there, and write the report; 0. ValueError: what cannot be graded as it is, in one line."""
    start = time.monotonic(), _cpu()
    root = find_root()
    source = options.copies or root / "solutions"
    known_copies = copies(source)
    found, left_out = intake.collect(options.submissions, known_copies)
    table = Table(options.out)
    hide = [root, source, options.submissions, options.out, *filter(None, [options.feedback])]
    sandbox = Sandbox(options.seconds, options.memory * 2**30, hide, options.trusted)
    if options.feedback and options.feedback.exists() and not options.feedback.is_dir():
        raise ValueError(f"{options.feedback} is a file; --feedback takes a folder")
    with table:
        seed = table.seed(options.seed)
        print(f"{len(found)} submissions of {len({s.learner for s in found})} learners, seed {seed}", flush=True)
        run = Run(table, sandbox, known_copies, seed, options.jobs or os.cpu_count() or 1)
        try:
            rows = run.rows(found)
        except KeyboardInterrupt:  # sandboxes die with this process; nothing that is done is lost
            print("minillama4: stopped; the same command goes on from here", file=sys.stderr, flush=True)
            os._exit(130)
        table.forget({submission.key for submission in found})
        seconds, cpu = time.monotonic() - start[0], _cpu() - start[1]
        report.write_all(table, rows, left_out, known_copies, seed, options.trusted)
        if options.feedback:
            report.write_feedback(options.feedback, found, rows)
        solved = sum(part["solved"] for row in rows for part in row["exercises"])
        total = sum(len(row["exercises"]) for row in rows)
        own = sum(row["seconds"].get("own", 0.0) for row in rows if row["key"] in run.new)
        print(f"{solved} of {total} exercises solved; {len(left_out)} files left out (the report says why)")
        if run.new:
            each = (cpu + run.cpu - own) / len(run.new)
            print(f"{len(run.new)} graded in {seconds:.0f} s: {each:.1f} s of CPU for each, beside its own code's")
        print(f"{options.out / 'index.html'}")
    return 0


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Run:
    def __init__(self, table: Table, sandbox: Sandbox, known_copies: dict[str, Copy], seed: str, jobs: int):
        self.table, self.sandbox, self.copies, self.seed, self.jobs = table, sandbox, known_copies, seed, jobs
        self.base = _sources()
        self.graded = table.run / "graded"
        self.new: set[str] = set()  # keys of the rows that this run made
        self.cpu = 0.0  # of the sandboxes, which nobody waits for as for a child

    def rows(self, found: list) -> list[dict]:
        done, todo, waiting = {}, [], []
        prints = {s.key: self._print(s) for s in found}
        for submission in found:
            row = self.table.row(submission.key, prints[submission.key])
            if row is not None:
                done[submission.key] = row
            elif submission.notebook is None:
                done[submission.key] = self._finish(submission, _unreadable(submission), prints)
            else:
                todo.append(submission)
        if todo:
            needed = {s.copy.name for s in todo}
            with self._inputs(needed) as inputs:
                rooms = Rooms(self.sandbox, self.table.run, inputs)
                expected = self._instructors_own(needed, rooms)
                waiting = self._observe(todo, rooms, prints)
            self._judge(waiting, expected, prints, done)
        return [done[submission.key] for submission in found]

    def _print(self, submission) -> str:
        copy = json.dumps([submission.copy.cells, submission.file.path, submission.unreadable])
        return fingerprint(self.base, self.seed, copy, submission.learner, submission.file.data)

    def _finish(self, submission, row: dict, prints: dict[str, str]) -> dict:
        row = {"fingerprint": prints[submission.key], "key": submission.key, "learner": submission.learner,
               "notebook": submission.copy.name, "file": submission.file.path} | row  # fmt: skip
        row["points"] = sum(part["points"] for part in row["exercises"])
        row["of"] = submission.copy.points
        self.table.finish(submission.key, row)
        self.new.add(submission.key)
        return row

    # ------------------------------------------------------------------------------------------------------------------
    # In the sandbox

    def _inputs(self, needed: set[str]):
        return Inputs(
            self.table.run / "job-inputs", [t.id for name in needed for t in self.copies[name].tasks], self.seed
        )

    def _instructors_own(self, needed: set[str], rooms: Rooms) -> dict[str, dict[str, str]]:
        """Notebook -> exercise -> what its check prints, from the instructor's copy through the same sandbox."""
        expected = {}
        for name in sorted(needed):
            copy = self.copies[name]
            notebook = {"kernel": "", "cells": [{**row, "grade": row["kind"] == "check"} for row in copy.cells]}
            entry = rooms.run("instructor", plan(notebook, copy), 0)
            self.cpu += entry["cpu"]
            expected[name] = {}
            for task in copy.tasks:
                verdict = judge.judge(exercise.find(task.id), entry["exercises"][task.id], self.seed)
                if verdict.failed is not None:
                    text = " ".join(verdict.text.split())
                    raise ValueError(f"the instructor's copy of {name} does not pass its own check: {text}")
                expected[name][task.id] = verdict.text
        return expected

    def _observe(self, todo: list, rooms: Rooms, prints: dict[str, str]) -> list[tuple]:
        """(submission, plan, arrays) of each, in places that run side by side."""
        ready, work = [], []
        for submission in todo:
            made = plan(submission.notebook, submission.copy)
            entry = self.table.arrays(submission.key, prints[submission.key])
            (work if entry is None else ready).append((submission, made, entry))
        places: SimpleQueue = SimpleQueue()
        for place in range(self.jobs):
            places.put(place)

        def one(submission, made: Plan) -> tuple:
            place, start = places.get(), time.monotonic()
            try:
                entry = rooms.run(submission.key, made, place)
            finally:
                places.put(place)
            entry |= {"fingerprint": prints[submission.key], "wall": time.monotonic() - start}
            self.table.keep_arrays(submission.key, entry)
            return submission, made, entry

        pool = ThreadPoolExecutor(self.jobs)
        try:
            running = [pool.submit(one, submission, made) for submission, made, _ in work]
            for done in tqdm(as_completed(running), "running", len(running), unit="notebook", disable=None):
                ready.append(done.result())
                self.cpu += ready[-1][2]["cpu"]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
        return ready

    # ------------------------------------------------------------------------------------------------------------------
    # Outside it

    def _judge(self, waiting: list[tuple], expected: dict, prints: dict[str, str], done: dict[str, dict], tries=2):
        """nbval over all of their graded notebooks in one run; a row is finished as its notebook ends.

        A kernel may die as it starts (seen once in some thousand); what nbval did not confirm is judged once more.
        """
        by_file, cells = {}, {}
        for submission, made, entry in waiting:
            file = self.graded / f"{submission.key}.ipynb"
            for old in self.graded.glob(f"{submission.key}.*.verdict"):
                old.unlink()
            nbval_run.notebook(
                file, submission.copy, f"{submission.key}.json", self.seed, expected[submission.copy.name]
            )
            by_file[file.name], cells[file.name] = (submission, made, entry), {}
        lines = self.graded / "cells.jsonl"
        lines.unlink(missing_ok=True)
        bank = known.Bank(_bank())
        at, odd = 0, []
        files = [self.graded / name for name in by_file]
        bar = tqdm(total=len(by_file), desc="judging", unit="notebook", disable=None)
        with bar, nbval_run.NbvalRun(files, lines, self.jobs) as run:
            ended = False
            while not ended:
                ended = run.ended()  # before reading, so that the last lines are read
                text = lines.read_bytes()[at:] if lines.exists() else b""
                text = text[: text.rfind(b"\n") + 1]
                at += len(text)
                for line in map(json.loads, text.splitlines()):
                    seen = cells[line["notebook"]]
                    seen[line["cell"]] = line
                    submission, made, entry = by_file[line["notebook"]]
                    if len(seen) < 1 + len(submission.copy.tasks):
                        continue
                    row = self._row(submission, made, entry, list(seen.values()), bank)
                    if row is None:
                        odd.append(submission.key)
                    else:
                        done[submission.key] = self._finish(submission, row, prints)
                    bar.update()
                time.sleep(0 if ended else 0.2)
        missing = [submission.key for submission, _, _ in by_file.values() if submission.key not in done]
        if missing and tries > 1:
            return self._judge([each for each in waiting if each[0].key in missing], expected, prints, done, tries - 1)
        if missing:
            log = (self.graded / "nbval.log").read_text("utf-8", "replace").strip().splitlines()
            raise ValueError(
                f"nbval did not confirm {', '.join((odd or missing)[:3])} ({len(missing)} in all): "
                f"{' '.join(log[-3:])[:400]}; all of it in {self.graded / 'nbval.log'}"
            )

    def _row(self, submission, made: Plan, entry: dict, cells: list[dict], bank: known.Bank) -> dict | None:
        """None: nbval and the judge's own words disagree, which is no learner's doing."""
        cells = sorted(cells, key=lambda line: int(line["cell"].rpartition(" ")[2]))
        if not cells[0]["passed"]:
            return None
        parts = []
        for task, line in zip(submission.copy.tasks, cells[1:], strict=True):
            file = self.graded / f"{submission.key}.{task.id}.verdict"
            verdict = json.loads(file.read_text("utf-8")) if file.exists() else None
            if verdict is None or (verdict["failed"] is None) != line["passed"]:
                return None
            failed = verdict["failed"] or {}
            parts.append(
                {"id": task.id, "points": task.points if line["passed"] else 0.0, "of": task.points,
                 "solved": line["passed"], "text": verdict["text"], "step": failed.get("name", ""),
                 "mistake": failed.get("mistake") or failed.get("name", ""),
                 "like": self._like(bank, task.id, entry) if failed else ""}
            )  # fmt: skip
        seconds = {"run": entry["wall"], "cpu": entry["cpu"], "own": entry["own"],
                   "judge": sum(line["seconds"] for line in cells)}  # fmt: skip
        return {
            "status": "graded",
            "exercises": parts,
            "notes": [*submission.notes, *made.notes, *entry["notes"]],
            "cells": entry["cells"],
            "seconds": seconds,
        }

    def _like(self, bank: known.Bank, id: str, entry: dict) -> str:
        """The named wrong solution that behaves as this one, on the first draw; or ""."""
        draws, checked = entry["exercises"][id]["draws"], exercise.find(id)
        if not draws:
            return ""
        inputs = checked.draw(judge.draw_rng(self.seed, id, 0))
        return bank.match(checked, inputs, decode(draws[0]))


class Inputs:
    """What each check draws for this seed, as files for the sandbox; gone afterwards."""

    def __init__(self, folder: Path, ids: list[str], seed: str):
        self.folder, self.ids, self.seed = folder, ids, seed

    def __enter__(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for id in self.ids:
            for draw in range(checking.DRAWS):
                inputs = exercise.find(id).draw(judge.draw_rng(self.seed, id, draw))
                torch.save(inputs, self.folder / f"{id}-{draw}.pt")
        return self.folder

    def __exit__(self, *error):
        shutil.rmtree(self.folder, ignore_errors=True)


def _unreadable(submission) -> dict:
    parts = [
        {"id": task.id, "points": 0.0, "of": task.points, "solved": False, "text": submission.unreadable, "step": "",
         "mistake": "cannot be read", "like": ""}
        for task in submission.copy.tasks
    ]  # fmt: skip
    return {"status": "unreadable", "exercises": parts, "notes": [submission.unreadable, *submission.notes],
            "cells": {}, "seconds": {}}  # fmt: skip


def _sources() -> str:
    """All of the package's code: a check that has changed makes other verdicts."""
    files = sorted(PACKAGE.rglob("*.py"))
    return fingerprint(*(str(file.relative_to(PACKAGE)) for file in files), *(file.read_bytes() for file in files))


def _bank() -> Path | None:
    folder = PACKAGE.parent / "tests" / "wrong_solutions"
    return folder if folder.is_dir() else None
