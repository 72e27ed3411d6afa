"""Exercises from solved notebooks: what is cut, what nbgrader says of it, and which sources are refused.

The committed exercises are made again with `make exercises`.
"""

import json
import keyword
import re
from pathlib import Path

import nbformat
import pytest

from minillama4.course import checking, split

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "solutions").glob("*.ipynb"))
EXERCISES = sorted((ROOT / "exercises").glob("*.ipynb"))
by_name = {"ids": lambda file: file.name}


# ----------------------------------------------------------------------------------------------------------------------
# A small source


def nbgrader(id: str, kind: str, **changes) -> dict:
    points = {"points": 2} if kind == "check" else {}
    return {"nbgrader": {"schema_version": 3, "grade_id": id, "task": False, **split.KINDS[kind], **points, **changes}}


def cell(kind: str, source: str, metadata: dict | None = None, **more) -> dict:
    id = re.sub(r"\W+", "-", source)[:20]
    made = {"cell_type": kind, "id": id, "metadata": metadata or {}, "source": source.splitlines(keepends=True)}
    return made | ({"execution_count": 1, "outputs": [printed()]} if kind == "code" else {}) | more


def printed() -> dict:
    return {"output_type": "stream", "name": "stdout", "text": ["the answer is 42\n"]}


ANSWER = """\
def scores(q, k):
    \"\"\"q, k: [tokens, head] -> [tokens, tokens].\"\"\"
    ### BEGIN SOLUTION
    scale = k.shape[-1] ** -0.5

    return q @ k.T * scale  # [tokens, tokens]
    ### END SOLUTION

def mask(n):
    ### BEGIN SOLUTION
    return torch.ones(n, n).tril()
    ### END SOLUTION"""

STUB = '''\
def scores(q, k):
    """q, k: [tokens, head] -> [tokens, tokens]."""
    # YOUR CODE HERE
    raise NotImplementedError()

def mask(n):
    # YOUR CODE HERE
    raise NotImplementedError()'''


def source(
    answer: str = ANSWER, *, at: dict | None = None, check: dict | None = None, last: list | None = None
) -> dict:
    """A title, a task, set-up, an answer, its check, a hint. Each part may be another, and more may follow."""
    return {
        "cells": [
            cell("markdown", "# Attention"),
            cell("markdown", "## Scores of ü", nbgrader("scores-task", "text")),
            cell("code", "import torch"),
            cell("code", answer, nbgrader("scores-answer", "answer") if at is None else at),
            cell("code", 'check("scores", scores)', nbgrader("scores", "check") if check is None else check),
            cell("code", '# hint("scores")'),
            *(last or []),
        ],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


@pytest.fixture
def solutions(tmp_path, monkeypatch):
    """Writes sources into a folder of their own, which is then the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "solutions").mkdir()

    def solutions(**files: dict) -> Path:
        for name, content in files.items():
            (tmp_path / "solutions" / f"{name}.ipynb").write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return solutions


@pytest.fixture
def made(solutions) -> list[dict]:
    """The cells of the exercise."""
    folder = solutions(attention=source())
    return json.loads(split.split(folder / "solutions/attention.ipynb"))["cells"]


def test_each_region_becomes_a_stub_at_its_own_depth(made):
    assert "".join(made[3]["source"]) == STUB


def test_an_exercise_has_no_outputs(made):
    assert [(one["outputs"], one["execution_count"]) for one in made if one["cell_type"] == "code"] == [([], None)] * 4


def test_everything_else_stays(made):
    for before, after in zip(source()["cells"], made, strict=True):
        if before["id"] != made[3]["id"]:
            assert after["source"] == before["source"]
        assert (after["id"], after["cell_type"]) == (before["id"], before["cell_type"])


def test_a_learner_may_edit_the_answer_and_delete_neither_it_nor_its_check(made):
    may = [(one["metadata"].get("editable", True), one["metadata"].get("deletable", True)) for one in made]
    assert may == [(True, True), (False, False), (True, True), (True, False), (False, False), (True, True)]


def test_main_makes_all_of_them_and_a_second_time_the_same(solutions, capsys):
    folder = solutions(a=source(), b=source())
    for _ in range(2):
        assert split.main([]) == 0
        assert {file.name: file.read_text("utf-8") for file in (folder / "exercises").iterdir()} == {
            f"{name}.ipynb": split.split(folder / f"solutions/{name}.ipynb") for name in "ab"
        }
    assert "solutions/b.ipynb -> exercises/b.ipynb" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Sources that are refused


def answer(*lines: str) -> dict:
    return source("\n".join(["def scores(q, k):", *(f"    {line}" for line in lines)]))


def second(id: str) -> list[dict]:
    """One more answer and its check."""
    code = "def more():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION"
    return [
        cell("code", code, nbgrader(id, "answer")),
        cell("code", 'check("more", more)', nbgrader("more", "check")),
    ]  # fmt: skip


BEGIN, END = split.BEGIN, split.END
MALFORMED = {  # -> (the source, number of the cell that is at fault, what is wrong)
    "a region that does not end": (answer(BEGIN, "return q @ k.T"), 3, "an answer needs ### BEGIN SOLUTION and"),
    "a region in a region": (answer(BEGIN, BEGIN, "return q @ k.T", END, END), 3, "BEGIN SOLUTION inside a region"),
    "an end without a begin": (answer("return q @ k.T", END), 3, "END SOLUTION without ### BEGIN SOLUTION"),
    "an answer without a region": (answer("return q @ k.T"), 3, "an answer needs ### BEGIN SOLUTION and"),
    "markers of nbgrader's that are not ours": (answer("# BEGIN SOLUTION", "1", "# END SOLUTION"), 3, "of its own"),
    "a marker beside code": (answer(BEGIN, "1", END, f"x = 2  {BEGIN}", "3", END), 3, "on a line of its own"),
    "a marker in small letters": (answer(BEGIN, "1", END, "### begin solution", "2"), 3, "on a line of its own"),
    "a region outside an answer": (source(at={}), 3, "its nbgrader metadata does not say `solution`"),
    "a region in a check": (source(check={}, at=nbgrader("scores", "check")), 3, "does not say `solution`"),
    "a stray end outside an answer": (source(last=[cell("code", f"1\n{END}")]), 6, "does not say `solution`"),
    "an answer without a check": (source(check={}), 3, "an answer that no check follows"),
    "an answer before the check of another": (source(check={}, last=second("more-answer")), 3, "that no check follows"),
    "an id twice": (source(last=second("scores-answer")), 6, "grade_id 'scores-answer' must be new"),
    "an id with a space": (source(check=nbgrader("the scores", "check")), 4, "grade_id 'the scores' must be new"),
    "no id": (source(check=nbgrader("", "check")), 4, "grade_id '' must be new"),
    "no points": (source(check=nbgrader("scores", "check", points=None)), 4, "needs points above 0"),
    "zero points": (source(check=nbgrader("scores", "check", points=0)), 4, "needs points above 0"),
    "points as text": (source(check=nbgrader("scores", "check", points="2")), 4, "needs points above 0"),
    "an older schema": (source(check=nbgrader("scores", "check", schema_version=2)), 4, "schema_version 3"),
    "a check that is not locked": (source(check=nbgrader("scores", "check", locked=False)), 4, "be one of"),
    "an answer that people grade": (source(at=nbgrader("scores-answer", "answer", grade=True)), 3, "be one of"),
    "a task": (source(check=nbgrader("scores", "check", task=True)), 4, "task false"),
}


@pytest.mark.parametrize("malformed, number, wrong", MALFORMED.values(), ids=list(MALFORMED))
def test_a_malformed_source_is_refused_by_its_cell_and_nothing_is_written(solutions, capsys, malformed, number, wrong):
    """Not even for a good source that comes before it: exercises are made all together or not at all."""
    folder = solutions(a_good=source(), malformed=malformed)
    file, where = folder / "solutions/malformed.ipynb", f"malformed.ipynb, cell {number} ("
    with pytest.raises(ValueError, match=re.escape(where) + ".*" + re.escape(wrong)):
        split.split(file)
    assert split.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("exercises: " + where) and len(err.splitlines()) == 1
    assert not (folder / "exercises").exists()


@pytest.mark.parametrize("text", ["", "{ broken", "[]", "null", "{}"])
def test_what_is_no_notebook_is_refused(solutions, capsys, text):
    folder = solutions()
    (folder / "solutions/broken.ipynb").write_text(text)
    assert split.main([]) == 2
    assert re.fullmatch(r"exercises: .*broken\.ipynb is not a notebook: .*\n", capsys.readouterr().err)


def test_another_folder_is_no_success(solutions, capsys):
    solutions()
    assert split.main([]) == 2
    assert "there is no solutions/*.ipynb here" in capsys.readouterr().err


def test_a_write_that_fails_leaves_the_exercise_that_is_there(solutions, monkeypatch, capsys):
    folder = solutions(a=source())
    split.main([])
    before = (folder / "exercises/a.ipynb").read_bytes()
    solutions(a=source(last=second("more-answer")))
    monkeypatch.setattr(split.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert split.main([]) == 2
    assert (folder / "exercises/a.ipynb").read_bytes() == before and "disk full" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# No solution leaks


def leaks(solved: Path, exercise: str) -> list[str]:
    """Lines of the solutions that an exercise shows somewhere, spaces and comments apart."""
    shown = "".join(squeeze("".join(one["source"])) for one in json.loads(exercise)["cells"])
    return sorted(line for line in split.solution_lines(solved) if tells(line) and squeeze(bare(line)) in shown)


def bare(line: str) -> str:
    return re.sub(r"\s+#.*", "", line)


def squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


def tells(line: str) -> bool:
    """Is there anything of a solution in it? Not in `else:`, `return` or `return x`, which a task may say as well."""
    return len([word for word in re.findall(r"[^\W\d]\w*", bare(line)) if not keyword.iskeyword(word)]) > 1


@pytest.mark.parametrize("extra", [
    cell("code", "def mine(n):\n    return torch.ones(n, n).tril()"),
    cell("code", "mask = lambda n: 0\nscale=k.shape[-1]**-0.5  # spaces and comments hide nothing"),
    cell("markdown", "One way is `return q @ k.T * scale`."),
], ids=["code", "respaced", "text"])  # fmt: skip
def test_a_leak_is_found_wherever_it_is(solutions, extra):
    folder = solutions(clean=source(), leaking=source(last=[extra]))
    clean, leaking = (folder / f"solutions/{name}.ipynb" for name in ("clean", "leaking"))
    assert leaks(clean, split.split(clean)) == []
    assert len(leaks(leaking, split.split(leaking))) == 1


@pytest.mark.parametrize("line, does", [
    ("return", False), ("return x", False), ("else:", False), (")", False), ("# the mean, over all tokens", True),
    ("return x + y", True), ("x = x.float()  # wide", True), ("for i in range(n):", True),
])  # fmt: skip
def test_which_lines_tell_something_of_a_solution(line, does):
    assert tells(line) is does


@pytest.mark.parametrize("file", SOURCES, **by_name)
def test_no_exercise_of_the_course_shows_a_line_of_its_solution(file):
    assert any(map(tells, split.solution_lines(file)))
    assert leaks(file, (ROOT / "exercises" / file.name).read_text("utf-8")) == []


# ----------------------------------------------------------------------------------------------------------------------
# The exercises of the course


def test_the_committed_exercises_are_those_of_their_sources(tmp_path):
    assert [file.name for file in EXERCISES] == [file.name for file in SOURCES] != [], "run `make exercises`"
    for file in SOURCES:
        made = tmp_path / file.name
        split.write(made, split.split(file))
        assert made.read_bytes() == (ROOT / "exercises" / file.name).read_bytes(), f"{file.name}: run `make exercises`"


@pytest.mark.parametrize("file", EXERCISES, **by_name)
def test_every_check_of_an_untouched_exercise_says_that_it_is_not_written_yet(file, capsys):
    checks = [one for one in json.loads(file.read_text("utf-8"))["cells"] if graded(one)]
    before = file.read_bytes()
    assert checking.check_notebook(file) == 1
    said = capsys.readouterr().out
    for one in checks:
        assert f"{one['metadata']['nbgrader']['grade_id']}: not yet\n" in said
    assert said.count("not written yet") == len(checks) and said.endswith(f"\n0 of {len(checks)} solved\n")
    assert file.read_bytes() == before


def graded(one: dict) -> bool:
    return one["metadata"].get("nbgrader", {}).get("grade", False)


# ----------------------------------------------------------------------------------------------------------------------
# What nbgrader says


@pytest.fixture(scope="module")
def released():
    """Release a source with nbgrader's own steps."""
    from nbgrader import preprocessors  # seconds to import, so not for the other tests of this file

    def released(notebook):
        for step in (preprocessors.LockCells, preprocessors.ClearSolutions, preprocessors.ComputeChecksums):
            notebook, _ = step().preprocess(notebook, {})
        for one in notebook.cells:
            if one.cell_type == "code":
                one |= {"outputs": [], "execution_count": None}
        return notebook

    return released


def test_a_small_exercise_is_what_nbgrader_would_release(solutions, released):
    file = solutions(attention=source()) / "solutions/attention.ipynb"
    assert nbformat.reads(split.split(file), as_version=4) == released(nbformat.read(file, as_version=4))


@pytest.mark.parametrize("file", SOURCES, **by_name)
def test_an_exercise_of_the_course_is_what_nbgrader_would_release(file, released):
    exercise = nbformat.read(ROOT / "exercises" / file.name, as_version=4)
    assert exercise == released(nbformat.read(file, as_version=4))


@pytest.mark.parametrize("file", [*SOURCES, *EXERCISES], ids=lambda file: f"{file.parent.name}/{file.name}")
def test_nbgraders_validator_accepts_source_and_exercise(file):
    from nbgrader.nbgraderformat import MetadataValidator

    MetadataValidator().validate_nb(nbformat.read(file, as_version=4))


@pytest.mark.parametrize("file", EXERCISES, **by_name)
def test_checksums_are_nbgraders_own(file):
    from nbgrader.utils import compute_checksum

    cells = [one for one in nbformat.read(file, as_version=4).cells if "nbgrader" in one.metadata]
    assert cells and [one.metadata.nbgrader.checksum for one in cells] == [compute_checksum(one) for one in cells]
