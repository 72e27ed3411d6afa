"""What a learner meets: `check`, `hint`, `progress`, and `minillama4 check NOTEBOOK`."""

import json
import pkgutil
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minillama4 import cli
from minillama4.course import checking, checks, exercise, notebooks, split
from minillama4.course.checking import CheckFailed, Progress, check, hint, progress

ROOT = Path(__file__).resolve().parents[2]
ID = "test-double"
DOUBLE = """
import torch

from minillama4.course.exercise import Card, normal, runs, same
from minillama4.course.observe import call

CARD = Card("00", "Double", difficulty=1, importance=2, minutes=3, trains="nothing")
HINTS = ("Think.", "Think of a number.", "Two.")
ANSWERED_BY = ("torch.add",)
drawn = []


def draw(rng):
    drawn.append(normal(rng, rng.randint(2, 9)))
    return {"x": drawn[-1]}


def observe(function, inputs):
    return call("one", function, inputs["x"] * torch.ones(len(inputs["x"])))


def judge(inputs, observed):
    x = inputs["x"]
    given = f"x [tokens] = [{len(x)}]"
    yield from runs(observed, "one", x.shape, given)
    yield same("each value is doubled", observed["one/value"], 2 * x, given, "What is twice 3?",
               {"squares": (x * x, "Is twice 3 the same as 3 times 3?")})
    yield same("the last step", observed["one/value"], 2 * x, given, "?")
"""


@pytest.fixture
def double(tmp_path, monkeypatch):
    """One more exercise: a file in a folder of checks is all that it takes."""
    folder = tmp_path / "checks"
    folder.mkdir()
    (folder / "test_double.py").write_text(DOUBLE)
    (folder / "_shared.py").write_text("")
    monkeypatch.setattr(checks, "__path__", [*checks.__path__, str(folder)])
    yield exercise.find(ID).module
    del sys.modules[f"{checks.__name__}.test_double"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Outside any learner's folder, with nothing done yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Progress, "_memory", {})


@pytest.fixture
def work(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    (folder / "exercises").mkdir(parents=True)
    (folder / checking.MARKER).touch()
    monkeypatch.chdir(folder / "exercises")
    return folder


def twice(x):
    return 2 * x


def message(function, id: str = ID, **options) -> str:
    with pytest.raises(CheckFailed) as failed:
        check(id, function, **options)
    return str(failed.value)


# ----------------------------------------------------------------------------------------------------------------------
# check


def test_a_right_function_is_solved_and_told_what_is_right(double, capsys):
    assert check(ID, twice) is None
    assert capsys.readouterr().out == (
        f"{ID}: solved\n  ✓ it runs\n  ✓ it returns a tensor of float32\n  ✓ the shape is right\n"
        "  ✓ the inputs are left as they were\n  ✓ each value is doubled\n  ✓ the last step\n  ✓ it is your own\n"
    )


def test_a_failing_step_says_what_was_given_came_out_and_was_expected_and_asks(double, capsys):
    said = message(lambda x: 3 * x, seed=1)
    x = exercise.find(ID).draw(random.Random(1))["x"]
    assert said == (
        f"{ID}: not yet\n  ✓ it runs\n  ✓ it returns a tensor of float32\n  ✓ the shape is right\n"
        "  ✓ the inputs are left as they were\n  ✗ each value is doubled\n"
        f"      given     x [tokens] = [{len(x)}]\n"
        f"      came out  {3 * x[0]:.5g} at [0]; {len(x)} of {len(x)} values differ\n"
        f"      expected  {2 * x[0]:.5g}\n"
        "    What is twice 3?"
    )
    assert capsys.readouterr().out == ""


def test_nothing_is_judged_after_the_first_step_that_fails(double):
    steps = checking.verdict(exercise.find(ID), lambda x: 3 * x, random.Random(1))
    assert [step.passed for step in steps] == [True] * 4 + [False]


def test_a_known_mistake_gets_its_own_question(double):
    assert message(lambda x: x * x).endswith("\n    Is twice 3 the same as 3 times 3?")


def test_a_notebook_shows_the_message_without_a_traceback_into_the_checker(double):
    with pytest.raises(CheckFailed) as failed:
        check(ID, lambda x: x)
    assert failed.value._render_traceback_() == [str(failed.value)]


def test_every_run_and_every_set_of_a_run_is_on_new_inputs(double):
    check(ID, twice)
    check(ID, twice)
    assert len(double.drawn) == 2 * checking.DRAWS
    assert len({tuple(x.tolist()) for x in double.drawn}) == len(double.drawn)


def test_a_function_that_is_right_once_has_to_be_right_again(double):
    calls = []

    def once(x):
        calls.append(x)
        return 2 * x if len(calls) == 1 else 3 * x

    assert "✗ each value is doubled" in message(once)


def test_a_seed_draws_the_same_inputs_again(double):
    check(ID, twice, seed=5)
    check(ID, twice, seed=5)
    first, second = double.drawn[:2], double.drawn[2:]
    assert all(map(torch.equal, first, second)) and not torch.equal(*first)


def test_drawing_neither_follows_nor_moves_the_notebooks_own_random_numbers(double):
    for _ in range(2):
        random.seed(0), torch.manual_seed(0)
        before = random.getstate(), torch.get_rng_state()
        check(ID, twice)
        assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert not torch.equal(double.drawn[0], double.drawn[2])


def test_a_call_of_the_answer_itself_is_told_so_kindly(double):
    said = message(lambda x: torch.add(x, x))
    assert "✗ it is your own" in said and "torch.add gives the right answer; the exercise is what it does." in said


def test_a_mistake_comes_before_the_question_whose_work_it_is(double):
    assert "✗ each value is doubled" in message(lambda x: torch.add(x, 1))


def test_an_error_in_the_function_is_a_message_and_no_traceback(double):
    said = message(lambda x: x.no_such_thing)
    assert "✗ it runs" in said and "`said = message(lambda x: x.no_such_thing)`: AttributeError" in said


@pytest.fixture(params=["no_grad", "inference_mode", "float64", "bfloat16", "meta"])
def switched(request):
    """A learner's notebook in which something was switched, and stays so."""
    dtype = torch.get_default_dtype()
    if request.param == "meta":
        torch.set_default_device("meta")
    elif hasattr(torch, request.param) and isinstance(getattr(torch, request.param), torch.dtype):
        torch.set_default_dtype(getattr(torch, request.param))
    else:
        mode = getattr(torch, request.param)()
        mode.__enter__()
    now = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )
    yield
    after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    try:
        assert (*after, torch.get_default_device()) == now
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)
        if request.param in ("no_grad", "inference_mode"):
            mode.__exit__(None, None, None)


def test_a_check_does_not_depend_on_what_the_notebook_has_switched(double, switched, capsys):
    def rms_norm(x, weight, eps):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).type_as(x) * weight

    check("start-rms-norm", rms_norm)
    assert "✓ the gradient reaches the weight" in capsys.readouterr().out
    check(ID, twice)


@pytest.mark.parametrize("id, near", [
    ("start-rms-nrom", "did you mean start-rms-norm?"),
    ("rms-norm", "did you mean start-rms-norm?"),
    ("xyzzy", "start-rms-norm, test-double"),
    ("-shared", "start-rms-norm, test-double"),
    (twice, "start-rms-norm, test-double"),
])  # fmt: skip
def test_an_unknown_exercise_names_the_nearest(double, id, near):
    with pytest.raises(ValueError, match=re.escape(near)):
        check(id, twice)
    with pytest.raises(ValueError, match=re.escape(near)):
        hint(id)
    assert Progress.here().read() == {}


def test_a_value_in_place_of_the_function_is_told_so():
    with pytest.raises(ValueError, match="takes your function itself, and got Tensor"):
        check("start-rms-norm", torch.ones(2))


# ----------------------------------------------------------------------------------------------------------------------
# hint, progress


def test_hints_go_a_step_further_each_time_and_stay_at_the_last(double, capsys):
    for _ in range(4):
        hint(ID)
    assert capsys.readouterr().out.splitlines() == [
        "Hint 1 of 3: Think.",
        "Hint 2 of 3: Think of a number.",
        "Hint 3 of 3. It was the last: Two.",
        "Hint 3 of 3. It was the last: Two.",
    ]


def line(capsys) -> str:
    progress()
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+ of \d+ solved", out[-1]) and len(out) == len(exercise.ids()) + 1
    return next(row for row in out if ID in row)


def test_progress_counts_tries_and_keeps_the_day_of_the_first_solution(double, work, capsys, monkeypatch):
    assert line(capsys) == f"00  {ID:<32} -"
    for _ in range(2):
        message(lambda x: x)
    assert line(capsys) == f"00  {ID:<32} tried 2 times"
    for day in ("2026-11-24", "2026-11-25"):
        monkeypatch.setattr(checking.time, "strftime", lambda _, day=day: day)
        check(ID, twice)
    capsys.readouterr()
    assert line(capsys) == f"00  {ID:<32} solved 2026-11-24"
    message(lambda x: x)
    assert line(capsys) == f"00  {ID:<32} solved 2026-11-24"


def test_progress_is_kept_in_the_learners_folder_wherever_inside_it(double, work, monkeypatch):
    check(ID, twice)
    monkeypatch.chdir(work)
    hint(ID)
    assert json.loads((work / "progress.json").read_text())[ID] | {"solved": ""} == {
        "tries": 1,
        "hints": 1,
        "solved": "",
    }
    assert {file.name for file in work.rglob("*") if file.is_file()} == {checking.MARKER, "progress.json"}
    assert f"{ID:<32} solved" in checking.progress_text(work) and Progress._memory == {}


def test_elsewhere_progress_is_in_memory_only(double, tmp_path, capsys):
    before = set(tmp_path.rglob("*"))
    check(ID, twice)
    capsys.readouterr()
    assert "solved" in line(capsys)
    assert {file for file in set(tmp_path.rglob("*")) - before if "__pycache__" not in str(file)} == set()


@pytest.mark.parametrize("broken", ["{ broken", "", "[]", '{"test-double": 3}', "\xff"])
def test_a_broken_progress_file_is_kept_aside_and_the_check_goes_on(double, work, broken):
    file = work / "progress.json"
    for number in ("", "-2"):
        file.write_text(broken, encoding="latin-1")
        check(ID, twice)
        assert (work / f"progress.broken{number}.json").read_text("latin-1") == broken
        assert json.loads(file.read_text())[ID]["tries"] == 1


@pytest.mark.parametrize("stop", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_what_was_there(double, work, monkeypatch, stop):
    check(ID, twice)
    before = (work / "progress.json").read_text()

    def fails(*_):
        raise stop

    monkeypatch.setattr(checking.os, "replace", fails)
    with pytest.raises(type(stop)):
        hint(ID)
    assert (work / "progress.json").read_text() == before
    assert {file.name for file in work.iterdir()} == {checking.MARKER, "progress.json", "exercises"}


# ----------------------------------------------------------------------------------------------------------------------
# minillama4 check NOTEBOOK


def graded(id: str, *outputs, count: int | None = 1) -> SimpleNamespace:
    return SimpleNamespace(
        metadata=SimpleNamespace(nbgrader=SimpleNamespace(grade_id=id), get=lambda *_: {"grade": True}),
        outputs=list(outputs),
        execution_count=count,
    )


def said(text: str) -> SimpleNamespace:
    return SimpleNamespace(output_type="stream", text=text)


def raised(ename: str, evalue: str) -> SimpleNamespace:
    return SimpleNamespace(output_type="error", ename=ename, evalue=evalue)


@pytest.mark.parametrize("cells, code, lines", [
    ([graded("a", said("a: sol"), said("ved\n  ✓ it runs\n"))], 0, ["a: solved", "  ✓ it runs", "1 of 1 solved"]),
    ([graded("a", said("a: solved\n")), graded("b", raised("CheckFailed", "b: not yet\n  ✗ x"))], 1,
     ["a: solved", "b: not yet", "  ✗ x", "1 of 2 solved"]),
    ([graded("a", raised("NameError", "no f"))], 1, ["a: not yet", "  ✗ NameError: no f", "0 of 1 solved"]),
    ([graded("a", said("a: solved\n"), raised("DeadKernelError", "died"))], 1,
     ["a: not yet", "  ✗ DeadKernelError: died", "0 of 1 solved"]),
    ([graded("a", count=None)], 1, ["a: its check did not run", "0 of 1 solved"]),  # after a dead kernel
    ([graded("a")], 1, ["a: its check did not run", "0 of 1 solved"]),  # a cell that someone emptied
    ([graded("a", said("b: solved\n"))], 1, ["a: its check did not run", "0 of 1 solved"]),
])  # fmt: skip
def test_the_exit_code_is_0_only_if_every_check_of_the_file_passed(cells, code, lines, monkeypatch, tmp_path, capsys):
    (tmp_path / "a.ipynb").touch()
    monkeypatch.setattr(notebooks, "run", lambda path: cells)
    assert cli.main(["check", "a.ipynb"]) == code
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("text, words", [
    (None, "is no file; give a notebook such as work/exercises/00_start_here.ipynb"),
    ("{ broken", "is not a notebook"),
])  # fmt: skip
def test_a_file_that_cannot_be_checked_is_one_line(text, words, tmp_path, capsys):
    if text is not None:
        (tmp_path / "a.ipynb").write_text(text)
    assert cli.main(["check", "a.ipynb"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and words in err


def test_a_notebook_without_checks_is_told_so(monkeypatch, tmp_path, capsys):
    (tmp_path / "a.ipynb").touch()
    monkeypatch.setattr(notebooks, "run", lambda path: [])
    assert cli.main(["check", "a.ipynb"]) == 2
    assert "has no checks" in capsys.readouterr().err


BROKEN = """def rms_norm(x, weight, eps):
    size = x.square().mean(-1, keepdim=True)
    return x / (size + epsilon).sqrt() * weight"""


def test_a_real_notebook_is_run_and_its_errors_name_the_learners_line(work, capsys):
    """Solved, unsolved and broken in one file, so that one kernel is enough."""
    source = json.loads((ROOT / "solutions/00_start_here.ipynb").read_text("utf-8"))
    stubs = json.loads(split.split(ROOT / "solutions/00_start_here.ipynb"))
    answer, graded = (next(c for c in source["cells"] if c["id"] == id) for id in ("rms-norm-answer", "rms-norm-check"))
    stub = next(cell for cell in stubs["cells"] if cell["id"] == "rms-norm-answer")
    cells = [next(cell for cell in source["cells"] if cell["id"] == "setup")]
    for number, code in enumerate((answer["source"], stub["source"], BROKEN)):
        cells.append(json.loads(json.dumps(answer)) | {"source": code, "id": f"answer-{number}"})
        cells.append(json.loads(json.dumps(graded)) | {"id": f"check-{number}"})
    file = work / "exercises/00_start_here.ipynb"
    file.write_text(json.dumps(source | {"cells": cells}))
    before = file.read_bytes()

    assert cli.main(["check", str(file)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("start-rms-norm: solved\n") and out.endswith("1 of 3 solved\n")
    assert "the function is not written yet" in out
    assert "line 3 of your cell, `return x / (size + epsilon).sqrt() * weight`: NameError" in out
    assert file.read_bytes() == before
    assert json.loads((work / "progress.json").read_text())["start-rms-norm"]["tries"] == 3


# ----------------------------------------------------------------------------------------------------------------------
# Every exercise of the course


def solved_cells() -> dict[str, list[dict]]:
    return {
        file.name: json.loads(file.read_text("utf-8"))["cells"] for file in sorted((ROOT / "solutions").glob("*.ipynb"))
    }


def test_ids_are_the_grade_ids_of_the_solved_notebooks():
    found = {
        cell["metadata"]["nbgrader"]["grade_id"]: (name, "".join(cell["source"]))
        for name, cells in solved_cells().items()
        for cell in cells
        if cell["metadata"].get("nbgrader", {}).get("grade")
    }
    assert sorted(found) == exercise.ids()
    for id, (name, source) in found.items():
        assert re.fullmatch(rf'check\("{id}", \w+\)', source), source
        assert name.startswith(exercise.find(id).card.lesson)


@pytest.mark.parametrize("id", exercise.ids())
def test_an_exercise_has_all_that_a_learner_and_a_grader_need(id):
    one = exercise.find(id)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", id) and exercise.find(id).module.__doc__
    assert one.card.difficulty in range(1, 6) and one.card.importance in range(1, 6)
    assert 0 < one.card.minutes <= 90 and one.card.title and one.card.trains
    assert len(one.hints) == 3 and len(set(one.hints)) == 3 and all(len(hint.split()) >= 5 for hint in one.hints)
    assert all(callable(pkgutil.resolve_name(name)) for name in one.module.ANSWERED_BY)


@pytest.mark.parametrize("id", exercise.ids())
def test_the_card_stands_under_the_title_in_the_task_and_the_hints_are_offered(id):
    card = exercise.find(id).card
    (cells,) = [cells for name, cells in solved_cells().items() if name.startswith(card.lesson)]
    texts = ["".join(cell["source"]) for cell in cells]
    (task,) = [text for text in texts if text.startswith(f"## {card.title}\n")]
    assert f"\n\n{card.line()}\n\n" in task
    assert any(f'# hint("{id}")' in text for text in texts)


@pytest.mark.parametrize("id", exercise.ids())
def test_what_was_observed_can_be_sent_as_text_and_is_judged_without_the_function(id):
    """What a grader relies on: between `observe` and `judge` there are numbers and strings alone."""
    one = exercise.find(id)
    inputs = one.draw(random.Random(0))
    for function in (lambda *arguments: arguments[0], lambda *arguments: 1 / 0):
        observed = one.observe(function, inputs)
        sent = json.loads(json.dumps({key: (value.tolist(), str(value.dtype)) for key, value in observed.items()}))
        received = {key: np.array(value, dtype) for key, (value, dtype) in sent.items()}
        assert one.steps(inputs, received) == one.steps(inputs, observed)
