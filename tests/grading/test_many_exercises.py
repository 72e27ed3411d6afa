"""A notebook with several exercises, of a course that the grader has never seen."""

import json

import classroom
import pytest

CHECK = """
import torch

from ..exercise import Card, normal, runs, same
from ..observe import call

CARD = Card("07", "{title}", difficulty=1, importance=1, minutes=1, trains="nothing")
HINTS = ("one", "two", "three")
ANSWERED_BY = ({answered},)
SIZE = 5


def draw(rng):
    return {{"x": normal(rng, 3, SIZE)}}


def observe(function, inputs):
    return call("it", function, prepared(inputs["x"]))


def prepared(x):
    return x + 1


def judge(inputs, observed):
    x = prepared(inputs["x"]).double()
    norm = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    yield from runs(observed, "it", {shape}, "x [3, 5]")
    yield same("the values are right", observed["it/value"], {truth}, "x [3, 5]", "What is asked for?")
"""
NORM = CHECK.format(title="Norm", answered='"minillama4.model.RMSNorm"', shape="[3, SIZE]", truth="norm")
SUM = CHECK.format(
    title="Sum of the norm", answered='"torch.nn.functional.softplus"', shape="[3]", truth="norm.sum(-1)"
)

OWN = "def norm(x):\n    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()"
LOANED = "def norm(x):\n    made = RMSNorm(5, 1e-6)\n    torch.nn.init.ones_(made.weight)\n    return made(x).detach()"
TOTAL = f"{LOANED.replace('def norm', 'def inner')}\n\n\ndef total(x):\n    return inner(x).sum(-1)"
WRONG = "def total(x):\n    return x.sum(-1)"


def cell(kind: str, id: str, source: str) -> dict:
    flags = {"answer": (False, True, False), "check": (True, False, True)}[kind]
    meta = dict(zip(("grade", "solution", "locked"), flags, strict=True), grade_id=id, schema_version=3, task=False)
    meta |= {"points": 2} if kind == "check" else {}
    return {"cell_type": "code", "id": f"cell-{id}", "metadata": {"nbgrader": meta}, "outputs": [],
            "execution_count": None, "source": source}  # fmt: skip


def notebook(norm: str, total: str) -> dict:
    imports = "import torch\nfrom minillama4.course import check\nfrom minillama4.model import RMSNorm"
    cells = [classroom.code(imports), cell("answer", "more-norm-answer", norm),
             cell("check", "more-norm", 'check("more-norm", norm)'), cell("answer", "more-sum-answer", total),
             cell("check", "more-sum", 'check("more-sum", total)')]  # fmt: skip
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


CLASS = {
    "both right": (notebook(OWN, TOTAL), [True, True]),
    "the second wrong": (notebook(OWN, WRONG), [True, False]),
    "the first borrowed": (notebook(LOANED, TOTAL), [False, True]),
    "the first cell exits": (notebook("import os; os._exit(0)", TOTAL), [False, True]),
    "the first function exits": (notebook("import os\ndef norm(x): os._exit(0)", TOTAL), [False, True]),
    "the first function loops": (notebook("def norm(x):\n    while True: pass", TOTAL), [False, True]),
    "the same name for both": (
        notebook(OWN, TOTAL + "\ndef norm(x):\n    return 0"), [True, True],
    ),
    "answers moved to the end": (
        (lambda n: n | {"cells": n["cells"][1:] + n["cells"][:1]})(notebook(OWN + "\nnorm(torch.ones(2))", TOTAL)),
        [True, True],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    root = classroom.free_copy(tmp_path_factory.mktemp("clone"))
    for name, text in (("more_norm", NORM), ("more_sum", SUM)):
        (root / "minillama4" / "course" / "checks" / f"{name}.py").write_text(text)
    classroom.save(notebook(OWN, TOTAL), root / "solutions" / "07_more.ipynb")
    return root


@pytest.fixture(scope="module")
def report(sandbox, course, tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    for learner, (made, _) in CLASS.items():
        classroom.save(made, folder / "class" / learner / "07_more.ipynb")
    return classroom.grade(folder / "class", folder / "report", "--seconds", 6, "-j", 2, root=course)


@pytest.mark.parametrize("learner", CLASS)
def test_each_exercise_gets_its_own_verdict(report, learner):
    row = report.rows[learner]
    assert [part["solved"] for part in row["exercises"]] == CLASS[learner][1], row
    assert row["points"] == 2 * sum(CLASS[learner][1]) and row["of"] == 4


def test_a_function_that_answers_another_exercise_may_be_used_and_its_own_may_not(report):
    first, second = report.rows["the first borrowed"]["exercises"]
    assert first["mistake"] == "borrowed" and "minillama4.model.RMSNorm" in first["text"] and second["solved"]


def test_an_instructors_copy_that_fails_its_own_check_is_refused(sandbox, course, tmp_path):
    classroom.save(notebook(OWN, WRONG), tmp_path / "copies" / "07_more.ipynb")
    classroom.save(notebook(OWN, TOTAL), tmp_path / "class" / "jane" / "07_more.ipynb")
    said = classroom.grade(tmp_path / "class", tmp_path / "report", "--copies", tmp_path / "copies", root=course,
                           fails=True).printed  # fmt: skip
    assert "the instructor's copy of 07_more does not pass its own check: more-sum: not yet" in said


def test_the_view_has_no_answers_and_no_judges(course, tmp_path):
    """Looked at in a process of that course's own."""
    import subprocess
    import sys

    script = (
        "import json, sys; from pathlib import Path; from minillama4.course.grading import view;"
        f"view.build(Path({str(tmp_path / 'view')!r}), ('more-norm', 'more-sum', 'start-rms-norm'))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=course, check=True)
    folder = tmp_path / "view" / "minillama4"
    checks = {file.stem: file.read_text() for file in (folder / "course" / "checks").glob("*.py")}
    assert set(checks) == {"__init__", "more_norm", "more_sum", "start_rms_norm"}
    for text in checks.values():
        assert not any(word in text for word in ("judge", "draw", "HINTS", "CARD", "truth", "same"))
    assert "def prepared" in checks["more_norm"] and "def observe" in checks["more_norm"]
    assert "rsqrt" not in (folder / "model.py").read_text() and "F.rms_norm" not in (folder / "model.py").read_text()
    there = {str(file.relative_to(folder)) for file in folder.rglob("*.py")}
    assert not any("grading" in name or "split" in name or "notebooks" in name for name in there)
    assert not list(folder.rglob("*.ipynb")) and "course/observe.py" in there
    solution = json.loads((classroom.ROOT / "solutions" / "00_start_here.ipynb").read_text("utf-8"))
    from minillama4.course.split import solution_lines

    assert solution and not any(
        line in file.read_text() for file in folder.rglob("*.py")
        for line in solution_lines(classroom.ROOT / "solutions" / "00_start_here.ipynb") if len(line) > 30
    )  # fmt: skip
