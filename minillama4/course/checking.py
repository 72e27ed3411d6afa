"""What a learner calls in a notebook: `check`, `hint`, `progress`. And `minillama4 check NOTEBOOK` for a whole file."""

import itertools
import json
import os
import random
import time
from pathlib import Path

from .exercise import Exercise, Step, every_exercise, find

MARKER = ".minillama4-work"  # the folder that holds it, `work/`, keeps a learner's progress
DRAWS = 2  # sets of inputs that a function is tried on


class CheckFailed(AssertionError):
    """A step failed. In a notebook it shows its message alone: the traceback would lead into the checker."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def check(id: str, function, seed: int | None = None) -> None:
    """Try `function` on freshly drawn inputs and print what is right; CheckFailed at the first thing that is not.

    seed: draws the same inputs again. ValueError: no such exercise.
    """
    exercise = find(id)
    if not callable(function):
        raise ValueError(f"check({id!r}, ...) takes your function itself, and got {type(function).__name__}")
    store = Progress.here()
    store.add(id, "tries")
    rng = random.Random(seed)  # None: from the system, so that every run is on new inputs
    passed: dict[str, None] = {}
    for _ in range(DRAWS):
        for step in verdict(exercise, function, rng):
            if not step.passed:
                raise CheckFailed("\n".join([f"{id}: not yet", *map(_tick, passed), *_cross(step)]))
            passed[step.name] = None
    store.add(id, "solved", time.strftime("%Y-%m-%d"))
    print("\n".join([f"{id}: solved", *map(_tick, passed)]))


def verdict(exercise: Exercise, function, rng: random.Random) -> list[Step]:
    """All steps for one set of inputs, up to and with the first that fails."""
    inputs = exercise.draw(rng)
    return exercise.steps(inputs, exercise.observe(function, inputs))


def _tick(name: str) -> str:
    return f"  ✓ {name}"


def _cross(step: Step) -> list[str]:
    rows = [f"  ✗ {step.name}"]
    rows += [f"      {key:<9} {text}" for key, text in
             (("given", step.given), ("came out", step.came_out), ("expected", step.expected)) if text]  # fmt: skip
    return [*rows, f"    {step.question}"]


def hint(id: str) -> None:
    """Print the next of the exercise's three hints, each a step further than the one before."""
    hints = find(id).hints
    number = min(len(hints), Progress.here().add(id, "hints"))
    last = ". It was the last" if number == len(hints) else ""
    print(f"Hint {number} of {len(hints)}{last}: {hints[number - 1]}")


def progress() -> None:
    """Print all exercises with what you have solved."""
    print(progress_text())


def progress_text(work: Path | None = None) -> str:
    """A line an exercise. work: the learner's folder, if it is not the current one or above it."""
    done = (Progress(work) if work else Progress.here()).read()
    lines = []
    for exercise in every_exercise():
        row = done.get(exercise.id, {})
        tries = f"tried {row['tries']} time{'s' * (row['tries'] != 1)}" if "tries" in row else "-"
        state = f"solved {row['solved']}" if "solved" in row else tries
        lines.append(f"{exercise.card.lesson}  {exercise.id:<32} {state}")
    solved = sum("solved" in done.get(exercise.id, {}) for exercise in every_exercise())
    return "\n".join([*lines, f"{solved} of {len(lines)} solved"])


class Progress:
    """Tries, hints and solutions in `progress.json` of the learner's folder; elsewhere in memory only."""

    _memory: dict = {}

    def __init__(self, folder: Path | None):
        self.file = folder / "progress.json" if folder else None

    @classmethod
    def here(cls) -> "Progress":
        here = Path.cwd()
        return cls(next((folder for folder in (here, *here.parents) if (folder / MARKER).exists()), None))

    def read(self) -> dict[str, dict]:
        """Id -> row."""
        if self.file is None:
            return self._memory
        try:
            table = json.loads(self.file.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            table = None
        if isinstance(table, dict) and all(isinstance(row, dict) for row in table.values()):
            return table
        self._put_aside()
        return {}

    def _put_aside(self):
        """Keep a file that was broken by hand, and each one before it: nothing is lost."""
        numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        names = (self.file.with_name(f"progress.broken{number}.json") for number in numbers)
        self.file.replace(next(file for file in names if not os.path.lexists(file)))

    def add(self, id: str, key: str, value: str | None = None) -> int | str:
        """Count `key` up by one, or set it to `value` if it is not yet set; returns what it is now."""
        table = self.read()
        row = table.setdefault(id, {})
        row[key] = row.get(key, 0) + 1 if value is None else row.get(key, value)
        if self.file is not None:
            temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}.new")
            try:
                temporary.write_text(json.dumps(table, indent=1), encoding="utf-8")
                os.replace(temporary, self.file)
            finally:
                temporary.unlink(missing_ok=True)
        return row[key]


def check_notebook(path: str | Path) -> int:
    """Run a notebook from top to bottom and print what each of its checks says; 0 if all of them passed.

    Each cell has 60 seconds. The notebook itself is left as it is. ValueError: no notebook, or one without checks.
    """
    from .notebooks import run  # needs Jupyter, which importing this must not

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a notebook such as work/exercises/00_start_here.ipynb")
    cells = [cell for cell in run(path) if cell.metadata.get("nbgrader", {}).get("grade")]
    if not cells:
        raise ValueError(f"{path} has no checks; the notebooks in work/exercises have")
    solved = 0
    for cell in cells:
        id = cell.metadata.nbgrader.grade_id
        printed = "".join(output.text for output in cell.outputs if output.output_type == "stream").strip()
        error = next((output for output in cell.outputs if output.output_type == "error"), None)
        if error is not None:
            said = error.evalue if error.ename == "CheckFailed" else f"{id}: not yet\n  ✗ {error.ename}: {error.evalue}"
        elif f"{id}: solved" in printed.splitlines():
            said, solved = printed, solved + 1
        else:  # the kernel died before, or someone emptied the cell
            said = f"{id}: its check did not run"
        print(said)
    print(f"{solved} of {len(cells)} solved")
    return 0 if solved == len(cells) else 1
