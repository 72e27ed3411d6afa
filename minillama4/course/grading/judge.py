"""The instructor's check on arrays from a sandbox. Runs in the kernel of a graded notebook, and calls nothing of a
learner's.

    graded("start-rms-norm", "zoe-1a2b3c4d.json", seed="2026")

The file holds the arrays of each draw, or the reason why there are none. The inputs are drawn again from the seed.
"""

import json
import os
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import checking, exercise
from ..exercise import Exercise, Step
from .wire import decode

GONE = re.compile(r"([\w.]+) is not there while you are graded: it would answer the exercise")
QUESTIONS = {
    "took too long": "Which loop of yours does not end, or does far more work than the answer needs?",
    "process died": "Which line ends the whole process, or needs more memory than there is?",
    "does not run": "Does the notebook run from top to bottom after Kernel > Restart?",
}


@dataclass(frozen=True)
class Verdict:
    id: str
    passed: list[str]  # names of the steps that are right
    failed: Step | None

    @property
    def text(self) -> str:
        """What the learner's own check would have printed."""
        if self.failed is None:
            return "\n".join([f"{self.id}: solved", *map(checking._tick, self.passed)])
        return "\n".join([f"{self.id}: not yet", *map(checking._tick, self.passed), *checking._cross(self.failed)])


def graded(id: str, file: str, seed: str) -> None:
    """Print the verdict, or raise it, as the check in a learner's notebook does; and keep its parts beside `file`."""
    entry = json.loads(Path(file).read_text("utf-8"))["exercises"][id]
    verdict = judge(exercise.find(id), entry, seed)
    parts = {"passed": verdict.passed, "failed": asdict(verdict.failed) if verdict.failed else None}
    write(Path(f"{file.removesuffix('.json')}.{id}.verdict"), json.dumps({**parts, "text": verdict.text}))
    if verdict.failed is not None:
        raise checking.CheckFailed(verdict.text)
    print(verdict.text)


def judge(checked: Exercise, entry: dict, seed: str) -> Verdict:
    """entry: {"draws": [observation, ...]} and, where the observing ended early, "failed": why and "kind": how."""
    passed: dict[str, None] = {}
    draws = entry["draws"]
    for draw in range(checking.DRAWS):
        if draw >= len(draws):
            return Verdict(checked.id, list(passed), _none(entry))
        inputs = checked.draw(draw_rng(seed, checked.id, draw))
        try:
            observed = decode(draws[draw]) | {"borrowed": _nothing()}
            steps = checked.steps(inputs, observed)
        except Exception:  # names, types or shapes that no `observe` writes
            return Verdict(checked.id, list(passed), FORGED)
        for step in steps:
            if not step.passed:
                return Verdict(checked.id, list(passed), _own_work(step))
            passed[step.name] = None
    return Verdict(checked.id, list(passed), None)


def draw_rng(seed: str, id: str, draw: int) -> random.Random:
    """The same for all learners, and again for an appeal."""
    return random.Random(f"{seed}/{id}/{draw}")


FORGED = Step(
    "it can be judged", False, "your function", "something else than what the check writes", "the check's own arrays",
    "What in your notebook changes how checks, torch or Python work?", "forged",
)  # fmt: skip


def _none(entry: dict) -> Step:
    kind, said = entry.get("kind") or "does not run", entry.get("failed") or "it was not reached"
    step = Step("it runs", False, "your notebook, from top to bottom", said, "a function that returns", QUESTIONS[kind],
                kind)  # fmt: skip
    return _own_work(step)


def _own_work(step: Step) -> Step:
    """A call of what is taken away while grading is the same mistake as in a learner's notebook, where it works."""
    gone = GONE.search(step.came_out)
    return exercise._own_work(gone[1]) if gone and not step.passed else step


def _nothing():
    import numpy

    return numpy.array("")


def write(file: Path, text: str):
    """Whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
