"""Each check accepts right answers and rejects wrong ones with the message written for that mistake.

A bank is a file of this folder with the exercise's name. References come out of `solutions/`, and so do the mutants.
"""

import importlib.util
import itertools
import json
import random
import re
import signal
from functools import cache
from pathlib import Path

import mutants
import pytest

from minillama4.course import checking, exercise

ROOT = Path(__file__).resolve().parents[2]
EXERCISES = exercise.ids()
DRAWS = [pytest.param(range(2), id="2 draws"), pytest.param(range(2, 10), id="8 more draws", marks=pytest.mark.slow)]
SECONDS = 10  # for one answer; a mutant may loop for ever


@cache
def bank(id: str):
    file = Path(__file__).with_name(id.replace("-", "_") + ".py")
    spec = importlib.util.spec_from_file_location(f"bank_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers(id: str) -> dict:
    """Name -> function, of a bank."""
    return {name: value for name, value in vars(bank(id)).items() if hasattr(value, "wrong")}


@cache
def reference(id: str) -> tuple[str, str, str]:
    """(code before it, source of the answer, name of the function) from the solved notebook."""
    for file in sorted((ROOT / "solutions").glob("*.ipynb")):
        before, answer = [], ""
        for cell in json.loads(file.read_text("utf-8"))["cells"]:
            meta, source = cell["metadata"].get("nbgrader", {}), "".join(cell["source"])
            if cell["cell_type"] != "code":
                continue
            if meta.get("grade_id") == id:
                return "\n".join(before), answer, re.search(r"check\([^,]+, (\w+)\)", source)[1]
            if meta.get("solution"):
                before, answer = [*before, answer], source
            elif not meta:
                before.append(source)
    raise AssertionError(f"no notebook in solutions/ has a check with grade_id {id}")


def run(id: str, function, draws) -> exercise.Step | None:
    """The step at which the function fails, if it does."""

    def too_long(signum, frame):
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    for seed in draws:
        signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)  # again each second: a check calls the function several times
        try:
            last = checking.verdict(exercise.find(id), function, random.Random(seed))[-1]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if not last.passed:
            return last
    return None


@cache
def names_of(before: str) -> dict:
    namespace = {}
    exec(before, namespace)
    return namespace


def build(before: str, source: str, name: str):
    namespace = dict(names_of(before))
    exec(compile(source, "<answer>", "exec"), namespace)
    return namespace[name]


def _built(before: str, source: str, name: str):
    """None: it is not a function any more, and there is nothing to check."""
    try:
        return build(before, source, name)
    except Exception:
        return None


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("id", EXERCISES)
def test_the_reference_and_another_right_answer_pass(id, draws):
    rights = {name: function for name, function in answers(id).items() if function.wrong is None}
    assert rights, "the bank needs a right answer that goes another way"
    for name, function in {"the reference": build(*reference(id)), **rights}.items():
        failed = run(id, function, draws)
        assert failed is None, f"{name} fails at {failed}"


@pytest.mark.parametrize("id", EXERCISES)
def test_the_bank_holds_at_least_six_wrong_answers(id):
    assert sum(function.wrong is not None for function in answers(id).values()) >= 6


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize(
    ("id", "name"), [(id, name) for id in EXERCISES for name, f in answers(id).items() if f.wrong is not None]
)
def test_a_wrong_answer_gets_the_message_written_for_it(id, name, draws, kill_rate):
    function = answers(id)[name]
    kill_rate["wrong"].setdefault((id, name), False)
    failed = run(id, function, draws)
    assert failed is not None, "accepted"
    assert function.wrong == (failed.mistake or failed.name), f"rejected for another reason: {failed}"
    assert failed.question.endswith("?") and failed.given and failed.came_out and failed.expected
    kill_rate["wrong"][id, name] = True


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("id", EXERCISES)
def test_every_mutant_of_the_reference_is_rejected(id, draws, kill_rate):
    before, source, name = reference(id)
    equivalent, survivors = dict(bank(id).EQUIVALENT), []
    for change, text in mutants.mutants(source):
        what = change.partition(": ")[2]
        function = _built(before, text, name)
        if function is None:
            continue
        rejected = run(id, function, draws) is not None
        if rejected or what not in equivalent:
            kill_rate["mutants"][id, text] = rejected
            survivors += [] if rejected else [change]
        else:
            kill_rate["equivalent"][id, text] = True
    assert not survivors, "accepted, and not listed in EQUIVALENT with a reason:\n" + "\n".join(survivors)


@pytest.mark.parametrize("id", EXERCISES)
def test_a_change_of_the_reference_leaves_one_that_can_be_called(id):
    """Else "every mutant is rejected" would say nothing."""
    before, source, name = reference(id)
    callables = (text for _, text in mutants.mutants(source) if callable(_built(before, text, name)))
    assert len(list(itertools.islice(callables, 4))) == 4


@pytest.mark.parametrize("id", EXERCISES)
def test_an_equivalent_mutant_has_a_reason_and_still_exists(id):
    changes = {change.partition(": ")[2] for change, _ in mutants.mutants(reference(id)[1])}
    for change, reason in bank(id).EQUIVALENT.items():
        assert change in changes and len(reason.split()) >= 4, change
