"""The notebooks of the course print what is stored in them, in time; and what `make notebooks` stores is worth storing.

The outputs of a lesson that changed are made again with `make notebooks`.
"""

import json
import os
import stat
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat import v4
from nbval_run import run_nbval

from minillama4.course import notebooks

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / name for name in notebooks.FOLDERS]
FILES = sorted(file for folder in FOLDERS for file in folder.glob("*.ipynb"))
LESSON_SECONDS = 45  # of computing, on two idle cores


def code_cells(file: Path) -> list[dict]:
    return [cell for cell in json.loads(file.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """File -> its code cells, as strict nbval saw them."""
    before = sorted(path for folder in FOLDERS for path in folder.rglob("*"))
    cells, _ = run_nbval(*FOLDERS, scratch=tmp_path_factory.mktemp("course"))
    assert sorted(path for folder in FOLDERS for path in folder.rglob("*")) == before, "a cell left a file behind"
    by_file = defaultdict(list)
    for cell in cells:
        by_file[ROOT / cell.notebook].append(cell)
    return by_file


# ----------------------------------------------------------------------------------------------------------------------
# The course


def test_every_code_cell_prints_what_is_stored(course):
    failures = [
        f"{file.relative_to(ROOT)}, code cell {cell.number + 1}: {cell.failure}"
        for file, cells in course.items()
        for cell in cells
        if cell.failure
    ]
    assert not failures, "\n\n".join([f"{len(failures)} cells fail; `make notebooks` stores new outputs", *failures])
    assert {file: len(cells) for file, cells in course.items()} == {file: len(code_cells(file)) for file in FILES}


@pytest.mark.parametrize("lesson", sorted(FOLDERS[0].glob("*.ipynb")), ids=lambda file: file.name)
def test_a_lesson_computes_for_at_most_45_seconds(course, lesson):
    seconds = [round(cell.seconds, 1) for cell in course[lesson]]
    assert sum(seconds) <= LESSON_SECONDS, f"seconds of each code cell: {seconds}"


def test_running_the_shortest_notebook_again_changes_no_byte(course):
    """Of those without figures: another machine's fonts may draw another pixel, which is no fault of a notebook."""
    files = [file for file in course if "image/png" not in file.read_text("utf-8")]
    shortest = min(files, key=lambda file: sum(cell.seconds for cell in course[file]))
    assert notebooks.execute(shortest) == shortest.read_text("utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# What is kept of a run


def code(source: str, *outputs, id: str = "a", count: int | None = 1, **metadata):
    return v4.new_code_cell(source, id=id, execution_count=count, outputs=list(outputs), metadata=metadata)


def stream(text: str, name: str = "stdout"):
    return v4.new_output("stream", name=name, text=text)


def result(data: dict, count: int = 1):
    return v4.new_output("execute_result", data=data, execution_count=count)


def normal(*cells, stored=None, **metadata):
    notebook = v4.new_notebook(cells=list(cells), metadata=metadata)
    notebooks.normalise(notebook, stored)
    nbformat.validate(notebook)
    again = json.dumps(notebook)
    notebooks.normalise(notebook, stored)
    assert json.dumps(notebook) == again, "a second time must change nothing"
    return notebook


def test_what_an_editor_adds_to_a_notebook_goes_and_what_a_person_wrote_stays():
    theirs = {
        "widgets": {"application/vnd.jupyter.widget-state+json": {"state": {}}},
        "kernelspec": {"name": "my-env", "display_name": "mine", "language": "python"},
        "language_info": {"name": "python", "version": "3.13.1"},
        "colab": {"provenance": []},
        "title": "Early fusion",
    }
    assert normal(**theirs).metadata == notebooks.NOTEBOOK_METADATA | {"title": "Early fusion"}


def test_what_an_editor_adds_to_a_cell_goes_and_what_a_person_wrote_stays():
    (cell,) = normal(code("1", collapsed=True, execution={"iopub.status.busy": "now"}, tags=["nbval-skip"])).cells
    assert cell.metadata == {"tags": ["nbval-skip"]}


def test_one_notebook_does_not_share_its_metadata_with_the_next():
    normal().metadata.kernelspec["name"] = "changed"
    assert normal().metadata == notebooks.NOTEBOOK_METADATA


def test_printed_pieces_become_one_with_stdout_before_stderr():
    pieces = [stream("warning\n", "stderr"), stream("a "), stream("b\n"), result({"text/plain": "1"}), stream("c\n")]
    (cell,) = normal(code("1", *pieces)).cells
    assert [(output.get("name"), output.get("text")) for output in cell.outputs] == [
        ("stdout", "a b\n"), ("stderr", "warning\n"), (None, None), ("stdout", "c\n")
    ]  # fmt: skip


def test_a_progress_bar_keeps_its_last_state():
    (cell,) = normal(code("1", stream("1 of 2\r"), stream("2 of 2\n"))).cells
    assert cell.outputs[0].text == "2 of 2\n"


def test_the_id_of_a_widget_goes_and_its_text_stays():
    view = {notebooks.WIDGET_VIEW: {"model_id": "7f3a", "version_major": 2}, "text/plain": "IntSlider(value=3)"}
    (cell,) = normal(code("slider", result(view))).cells
    assert cell.outputs[0].data == {"text/plain": "IntSlider(value=3)"}


def test_a_traceback_becomes_one_line_without_paths():
    frames = ["File /home/me/minillama4/config.py:7, in preset", "ValueError: unknown"]
    (cell,) = normal(code("1", v4.new_output("error", ename="ValueError", evalue="unknown", traceback=frames))).cells
    assert cell.outputs[0].traceback == ["ValueError: unknown"]


def test_cells_are_counted_from_one_whatever_their_kernel_counted():
    cells = [code("1", result({"text/plain": "1"}, 7), count=7), code(" \n", id="b", count=8), code("2", id="c")]
    counted = normal(*cells).cells
    assert [cell.execution_count for cell in counted] == [1, None, 2]
    assert counted[0].outputs[0].execution_count == 1


@pytest.mark.parametrize("before, after, kept", [
    ("<object at 0x7f01>", "<object at 0x7f02>", "before"),
    ("<object at 0x7f01> 1", "<object at 0x7f02> 2", "after"),
    ("0.5", "0.6", "after"),
])  # fmt: skip
def test_a_stored_output_stays_where_nbval_sees_no_difference(before, after, kept):
    stored = {"a": ("print(x)", [stream(before)])}
    (cell,) = normal(code("print(x)", stream(after)), stored=stored).cells
    assert cell.outputs[0].text == {"before": before, "after": after}[kept]


def test_a_stored_output_of_another_source_goes():
    stored = {"a": ("print(x)", [stream("at 0x7f01")])}
    (cell,) = normal(code("print(y)", stream("at 0x7f02")), stored=stored).cells
    assert cell.outputs[0].text == "at 0x7f02"


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be stored


@pytest.fixture
def lesson(tmp_path):
    """Writes a notebook whose last cell, `bad`, is the given one; a good cell with an old output stands before it."""

    def lesson(source: str) -> Path:
        cells = [v4.new_markdown_cell("# A lesson"), code("x = 1", stream("old"), id="good"), code(source, id="bad")]
        nbformat.write(v4.new_notebook(cells=cells), tmp_path / "lesson.ipynb")
        return tmp_path / "lesson.ipynb"

    return lesson


@pytest.mark.parametrize("source, timeout, message", [
    ("while True:\n    pass", 4, "takes more than 4 s"),
    ("import os\nos._exit(1)", 60, "Kernel died"),
])  # fmt: skip
def test_a_cell_that_does_not_end_well_is_named(lesson, source, timeout, message):
    file = lesson(source)
    before = file.read_bytes()
    with pytest.raises(notebooks.NotebookError, match=rf"lesson\.ipynb, code cell 2 \(id bad\).*{message}"):
        notebooks.execute(file, timeout)
    assert file.read_bytes() == before


def test_make_notebooks_names_the_failing_cell_goes_on_and_stores_nothing_of_it(lesson, tmp_path, capfd):
    file = lesson("def half(x):\n    return x / 0\nhalf(x)")
    before = file.read_bytes()
    (tmp_path / "broken.ipynb").write_text("{ broken")
    assert notebooks.main([str(tmp_path / name) for name in ("broken.ipynb", "missing.ipynb", "lesson.ipynb")]) == 1
    out, err = capfd.readouterr()
    assert out == "" and "broken.ipynb is not a notebook" in err and "missing.ipynb" in err
    assert "lesson.ipynb, code cell 2 (id bad) fails:" in err
    assert "return x / 0" in err and err.rstrip().endswith("ZeroDivisionError: division by zero")
    assert "\x1b" not in err, "colours are for a screen"
    assert file.read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {"broken.ipynb", file.name}


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"nbformat": 99, "cells": [], "metadata": {}}', "\xff"])
def test_what_is_no_notebook_is_one_kind_of_error(tmp_path, text):
    file = tmp_path / "lesson.ipynb"
    file.write_bytes(text.encode("latin-1"))
    for read in (notebooks.execute, notebooks.run):
        with pytest.raises(ValueError, match=r"lesson\.ipynb is not a notebook: "):
            read(file)


def test_a_result_too_big_for_github_is_refused(lesson, monkeypatch):
    monkeypatch.setattr(notebooks, "_client", lambda *_: (SimpleNamespace(execute=lambda **_: None), []))
    monkeypatch.setattr(notebooks, "MAX_BYTES", 100)
    with pytest.raises(notebooks.NotebookError, match=r"0\.0001 MB is the limit\. Smaller or fewer figures"):
        notebooks.execute(lesson("1"))


def test_another_folder_is_no_success(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert notebooks.main([]) == 1
    assert (
        capsys.readouterr().err == "notebooks: nothing in notebooks or solutions; run it in the course's own folder\n"
    )


def test_without_nbclient_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nbclient", None)
    assert notebooks.main(["any.ipynb"]) == 1
    assert capsys.readouterr().err == "notebooks: nbclient is missing; get it with: pip install nbclient nbval\n"


def test_a_file_is_replaced_whole_and_only_where_it_changed(lesson):
    file = lesson("1")
    file.chmod(0o640)
    assert notebooks.store(file, "new\n") and file.read_bytes() == b"new\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    before = file.stat().st_ino
    assert not notebooks.store(file, "new\n") and file.stat().st_ino == before


@pytest.mark.parametrize("stop", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(lesson, monkeypatch, stop):
    file = lesson("1")
    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(stop))
    with pytest.raises(type(stop)):
        notebooks.store(file, "new\n")
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


# ----------------------------------------------------------------------------------------------------------------------
# A learner's notebook is run to its end


def test_a_learners_run_keeps_every_failure_as_one_error(lesson):
    """One kernel, each way to fail, in an order that still reaches the next."""
    cells = {
        "print(1)": "",
        "def half(x):\n    return x / 0\nhalf(1)": "ZeroDivisionError: division by zero",
        "get_ipython().set_custom_exc((Exception,), lambda *a, **k: None)\nassert False, 1": "AssertionError: 1",
        "get_ipython().set_custom_exc((), None)": "",
        "while True:\n    pass": "TimeoutError: more than 4 s",
        "print(2)": "",
        "import os\nos._exit(1)": "DeadKernelError: Kernel died",
        "print(3)": "",
    }  # fmt: skip
    file = lesson("1")
    content = [code(source, stream("old"), id=f"cell-{i}") for i, source in enumerate(cells)]
    nbformat.write(v4.new_notebook(cells=content), file)
    before = file.read_bytes()
    ran = notebooks.run(file, timeout=4)
    errors = [[output for output in cell.outputs if output.output_type == "error"] for cell in ran]
    assert ["; ".join(f"{error.ename}: {error.evalue}" for error in found) for found in errors] == list(cells.values())
    assert [output.text for cell in ran for output in cell.outputs if "text" in output] == ["1\n", "2\n"]
    unreached = [cell.execution_count is None for cell in ran]
    assert not any(unreached[:6]) and unreached[7]  # a dying kernel may or may not have said its number
    assert file.read_bytes() == before
