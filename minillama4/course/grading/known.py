"""Which of the named wrong solutions behaves as a submission does: what the report calls the commonest mistakes.

The bank is `tests/wrong_solutions/`, a file an exercise. Its functions are the instructor's own and run right here.
"""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np

from ..exercise import Exercise, close

TOLERANCE = 1e-4


class Bank:
    def __init__(self, folder: Path | None):
        self.folder, self.seen = folder, {}

    def behaviour(self, checked: Exercise, inputs: dict) -> dict[str, dict[str, np.ndarray]]:
        """Name -> what it does on these inputs, for each wrong solution. The same inputs in one run."""
        if checked.id not in self.seen:
            self.seen[checked.id] = {
                name: checked.observe(function, inputs) for name, function in self._wrong(checked.id).items()
            }
        return self.seen[checked.id]

    def match(self, checked: Exercise, inputs: dict, observed: dict[str, np.ndarray]) -> str:
        """The name of the wrong solution that does the same in every call, or ""."""
        for name, theirs in self.behaviour(checked, inputs).items():
            if all(key in observed and _same(key, observed[key], theirs[key]) for key in theirs if key != "borrowed"):
                return name
        return ""

    def _wrong(self, id: str) -> dict:
        file = self.folder / f"{id.replace('-', '_')}.py" if self.folder else None
        if file is None or not file.is_file():
            return {}
        sys.path.insert(0, str(file.parent))  # a bank imports its marks from beside it
        try:
            spec = importlib.util.spec_from_file_location(f"minillama4_bank_{file.stem}", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(file.parent))
        return {name: value for name, value in vars(module).items() if getattr(value, "wrong", None)}


def _same(key: str, got: np.ndarray, want: np.ndarray) -> bool:
    if want.dtype.kind in "biufc":
        return close(got, want, TOLERANCE)
    if key.endswith("/type") or key.endswith("/changed"):
        return str(got) == str(want)
    return _raised(got) == _raised(want)  # the words quote a line of the learner's own


def _raised(said: np.ndarray) -> str:
    if said.dtype.kind != "U" or said.ndim:
        return ""
    found = re.search(r"(\w+(Error|Exception|Iteration|Exit))\b", str(said))
    return found[1] if found else str(said)
