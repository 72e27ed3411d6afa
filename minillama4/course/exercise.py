"""What an exercise is: a file in `checks/` with three functions that never meet in one process when it matters.

    draw(rng) -> inputs                    fresh shapes and values at every run
    observe(function, inputs) -> arrays    the only part that runs a learner's code
    judge(inputs, observed) -> steps       from fundamental to subtle, each against an independent computation

A notebook calls all three in a row (`checking.py`); a grader calls `observe` in a sandbox and the others outside it.
The file's name is the exercise's id with "_" for "-", and it also holds `CARD`, `HINTS` and `ANSWERED_BY`.
"""

import importlib
import pkgutil
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from types import ModuleType

import numpy as np
import torch

from .observe import NOT_WRITTEN, borrowing, fresh_torch


@dataclass(frozen=True)
class Card:
    """What a learner reads before starting."""

    lesson: str  # "02"
    title: str
    difficulty: int  # 1 to 5
    importance: int  # 1 to 5
    minutes: int
    trains: str

    def line(self) -> str:
        """The first line under the exercise's heading in its notebook."""
        worth = f"Difficulty {self.difficulty}/5 · importance {self.importance}/5"
        return f"{worth} · {self.minutes} minutes · {self.trains}"


@dataclass(frozen=True)
class Step:
    """One thing that a check looked at."""

    name: str  # what is right when it passes: "each token has its own mean square"
    passed: bool
    given: str = ""
    came_out: str = ""
    expected: str = ""
    question: str = ""  # leads to the mistake without naming the answer
    mistake: str = ""  # which known mistake this is, if it is one: wrong solutions are rejected by this name


@dataclass(frozen=True)
class Exercise:
    id: str
    module: ModuleType

    @property
    def card(self) -> Card:
        return self.module.CARD

    @property
    def hints(self) -> tuple[str, str, str]:
        return self.module.HINTS

    def draw(self, rng: random.Random) -> dict:
        with fresh_torch():
            return self.module.draw(rng)

    def observe(self, function, inputs: dict) -> dict[str, np.ndarray]:
        """What the module's `observe` wrote down, and under "borrowed" the answer that the function calls, or ""."""
        with fresh_torch(), borrowing(self.module.ANSWERED_BY) as lenders:
            observed = self.module.observe(function, inputs)
        return observed | {"borrowed": np.array(lenders[0] if lenders else "")}

    def steps(self, inputs: dict, observed: dict[str, np.ndarray]) -> list[Step]:
        """Up to and with the first that failed: what comes after it would only repeat the same mistake."""
        seen = []
        with fresh_torch():
            for step in self.module.judge(inputs, observed):
                seen.append(step)
                if not step.passed:
                    return seen
        return [*seen, _own_work(str(observed["borrowed"]))]


def _own_work(lender: str) -> Step:
    return Step(
        "it is your own", not lender, "your function", f"a call of {lender}", "the steps inside it",
        f"{lender} gives the right answer; the exercise is what it does. Can you write it without?", "borrowed",
    )  # fmt: skip


def find(id: str) -> Exercise:
    """ValueError: no such exercise (with the nearest ids)."""
    known = ids()
    if id not in known:
        near = get_close_matches(str(id), known, n=3, cutoff=0.4)
        raise ValueError(f"there is no exercise {id!r}; " + (f"did you mean {' or '.join(near)}?" if near else
                         f"there are {', '.join(known)}"))  # fmt: skip
    from . import checks

    return Exercise(id, importlib.import_module(f"{checks.__name__}.{id.replace('-', '_')}"))


def ids() -> list[str]:
    from . import checks

    names = (name for _, name, _ in pkgutil.iter_modules(checks.__path__))
    return sorted(name.replace("_", "-") for name in names if not name.startswith("_"))


def every_exercise() -> list[Exercise]:
    """All of them, by lesson."""
    return sorted((find(id) for id in ids()), key=lambda exercise: (exercise.card.lesson, exercise.id))


# ----------------------------------------------------------------------------------------------------------------------
# For `draw`


def normal(rng: random.Random, *shape: int) -> torch.Tensor:
    """Standard normal values, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.getrandbits(62)))


def different(rng: random.Random, low: int, high: int, count: int) -> list[int]:
    """`count` sizes that all differ, so that a mixed-up axis cannot go unnoticed."""
    return rng.sample(range(low, high + 1), count)


# ----------------------------------------------------------------------------------------------------------------------
# For `judge`


def runs(observed: dict, call: str, shape: Iterable[int], given: str, dtype: str = "float32") -> Iterator[Step]:
    """What must hold of any call before its values are worth a look. Its value is `observed[f"{call}/value"]`.

    dtype: of the tensor ("int64", "bool"), or the name of another type: "float".
    """
    error = str(observed[f"{call}/error"])
    of_tensor = str(getattr(torch, dtype, "")) == f"torch.{dtype}"  # and not `torch.float`, a name of torch.float32
    wanted = f"a tensor of {dtype}" if of_tensor else f"a value of type {dtype}"
    if error == NOT_WRITTEN:
        yield Step(
            "it is written", False, given, error, wanted,
            "What does the function get, and what is the first thing to work out from it?", "not written",
        )  # fmt: skip
    yield Step(
        "it runs", not error, given, error, wanted,
        "What does the line shown above work on: which shapes, types and values?" if "`" in error else
        "What does this message say about how your function is called, or what it returns?", "raises",
    )  # fmt: skip
    kind, shape = str(observed[f"{call}/type"]), list(shape)
    yield Step(
        f"it returns {wanted}", kind == dtype, given, kind, wanted,
        "Does every path through your function end in `return`?" if kind == "NoneType" else
        "What type do the values have that you return?", "type",
    )  # fmt: skip
    got = list(observed[f"{call}/value"].shape)
    yield Step(
        "the shape is right", got == shape, given, str(got), str(shape),
        "Write the shape behind each line of your function. Where does it first differ?", "shape",
    )  # fmt: skip
    changed = str(observed[f"{call}/changed"])
    yield Step(
        "the inputs are left as they were", not changed, given, f"argument {changed} was changed", "no change",
        "Which of your lines ends in an underscore (`mul_`) or assigns into an argument (`x[...] =`, `x +=`)?",
        "changes its input",
    )  # fmt: skip


def same(
    name: str,
    got: np.ndarray,
    want,
    given: str,
    question: str,
    mistakes: dict[str, tuple] | None = None,
    tolerance: float = 1e-4,
) -> Step:
    """All values equal: whole numbers and truth values exactly, others within `tolerance` of the largest one expected.

    mistakes: name -> (what that mistake gives, its question). Of those that give exactly what came out, the first is
    what the learner is asked about; if there is none, `question`.
    """
    want = _array(want)
    passed, mistake = close(got, want, tolerance), ""
    if not passed:
        for known, (wrong, asks) in (mistakes or {}).items():
            if close(got, _array(wrong), tolerance):
                mistake, question = known, asks
                break
    came_out, expected = ("", "") if passed else _first_difference(got, want, tolerance)
    return Step(name, passed, given, came_out, expected, question, mistake)


def as_published(name: str, observed: dict, number: int, given: str) -> Iterator[Step]:
    """Of a count that was right for small models: the whole number that is known of a released one."""
    yield from runs(observed, name, (), given, dtype="int")
    yield same(
        name, observed[f"{name}/value"], number, given,
        "Small models came out right. Is there a number in your function that belongs to one model only, or a "
        "float, which holds whole numbers only so far?",
    )  # fmt: skip


def close(got: np.ndarray, want: np.ndarray, tolerance: float) -> bool:
    return got.dtype.kind in NUMBERS and got.shape == want.shape and not _apart(got, want, tolerance).any()


NUMBERS = "biufc"  # kinds of numpy's dtypes; what else may be there is words: see `observe.call`


def _apart(got: np.ndarray, want: np.ndarray, tolerance: float) -> np.ndarray:
    """Where they differ. Infinite values and NaN are equal to themselves alone."""
    if want.dtype.kind in "biu":
        return got != want
    got, want = got.astype(np.complex128), want.astype(np.complex128)
    scale = np.abs(want[np.isfinite(want)]).max(initial=1e-30)
    with np.errstate(invalid="ignore", over="ignore"):
        near = np.abs(got - want) <= tolerance * scale
    return ~(near | (got == want) | (np.isnan(got) & np.isnan(want)))


def _array(value) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach()
    return (value.double() if value.is_floating_point() else value.resolve_conj()).numpy()


def _first_difference(got: np.ndarray, want: np.ndarray, tolerance: float) -> tuple[str, str]:
    """(came out, expected): where they first differ, and how many do."""
    if got.dtype.kind not in NUMBERS:
        return str(got)[:400], f"numbers of shape {list(want.shape)}"
    if got.shape != want.shape:
        return f"shape {list(got.shape)}", f"shape {list(want.shape)}"
    differs = _apart(got, want, tolerance)
    where = tuple(int(i) for i in np.argwhere(differs)[0])
    place = f" at {list(where)}" if where else ""
    count = f"; {int(differs.sum())} of {got.size} values differ" if got.size > 1 else ""
    return f"{_number(got[where])}{place}{count}", _number(want[where])


def _number(value: np.generic) -> str:
    return f"{value:.5g}" if value.dtype.kind in "fc" else str(value)
