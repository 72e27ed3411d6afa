"""The guards find what they are for, and find nothing in the notebooks of the course."""

import json
from pathlib import Path

import pytest
from guards import faults
from nbformat import v4

from minillama4.course.notebooks import MAX_BYTES

ROOT = Path(__file__).resolve().parents[2]
COURSE = sorted(file for folder in ("notebooks", "solutions", "exercises") for file in (ROOT / folder).glob("*.ipynb"))


def notebook(*cells, **metadata) -> dict:
    """What no guard may object to, and then `cells`."""
    good = [
        v4.new_markdown_cell(
            "# A lesson\n\n![a mask of 4 chunks](mask.png)\n\nIn `work/` and at <https://a.b/home/c>."
        ),
        code("print(1)", v4.new_output("stream", text="1\n")),
        code("# not compared: the clock\nprint(now)", tags=["nbval-ignore-output"]),
        code("# NBVAL_SKIP\n# not compared: takes minutes"),
        code("# raises: an unknown preset\nload('scut')", tags=["raises-exception", "any-other-tag"]),
        code("picture", shown("text/html", "<img alt='three circles' src='data:image/png;base64,AA'>")),
        code("figure", shown("image/png", "iVBO+/home/=")),
        code("", count=None),
    ]
    return v4.new_notebook(cells=[*good, *cells], metadata=metadata)


def code(source: str, *outputs, tags=(), count: int | None = 1):
    return v4.new_code_cell(source, execution_count=count, outputs=list(outputs), metadata={"tags": list(tags)})


def shown(kind: str, data):
    return v4.new_output("display_data", data={kind: data})


@pytest.fixture
def check(tmp_path):
    def check(content: dict, **options) -> list[str]:
        file = tmp_path / "lesson.ipynb"
        file.write_text(json.dumps(content), encoding="utf-8")
        return faults(file, **options)

    return check


def test_a_good_notebook_has_no_fault(check):
    assert check(notebook()) == []


@pytest.mark.parametrize("cell, fault", [
    (code("print(1)", count=None), "was never run"),
    (code("print(1)", v4.new_output("stream", text="1"), count=None), "was never run"),
    (code("print(now)", tags=["nbval-ignore-output"]), "tagged nbval-ignore-output, and no line `# not compared: ...`"),
    (code("print(now)", tags=["nbval-skip"]), "tagged nbval-skip, and no line"),
    (code("load('scut')", tags=["raises-exception"]), "tagged raises-exception, and no line `# raises: ...`"),
    (code("load('scut')", tags=["nbval-raises-exception"]), "tagged nbval-raises-exception, and no line"),
    (code("#NBVAL_IGNORE_OUTPUT\nprint(now)"), "tagged nbval-ignore-output, and no line"),
    (code("print(now)\n  ## NBVAL_SKIP  "), "tagged nbval-skip, and no line"),
    (code("# NBVAL_RAISES_EXCEPTION\nload('scut')"), "tagged nbval-raises-exception, and no line"),
    (code("# PYTEST_VALIDATE_IGNORE_OUTPUT\nprint(now)"), "tagged pytest-validate-ignore-output, and no line"),
    (code("# not compared:\nprint(now)", tags=["nbval-skip"]), "tagged nbval-skip, and no line"),
    (code("# raises: it does\nprint(now)", tags=["nbval-skip"]), "tagged nbval-skip, and no line"),
    (code("print('# not compared: no comment')", tags=["nbval-skip"]), "tagged nbval-skip, and no line"),
    (v4.new_markdown_cell("![](mask.png)"), "a picture without alt text"),
    (v4.new_markdown_cell("![ ](mask.png)"), "a picture without alt text"),
    (v4.new_markdown_cell("<img src='mask.png'>"), "a picture without alt text"),
    (v4.new_markdown_cell("<img alt='' src='mask.png'>"), "a picture without alt text"),
    (code("picture", shown("text/html", "<p><img\nsrc='data:image/png;base64,AA'></p>")), "a picture without alt text"),
    (v4.new_markdown_cell("Look into /home/me/minillama4."), "a folder of one machine"),
    (v4.new_markdown_cell("Look at file:///home/me/minillama4."), "a folder of one machine"),
    (code("load('/work/main/weights')"), "a folder of one machine"),
    (code("print(path)", v4.new_output("stream", text="in /tmp/abc")), "a folder of one machine"),
    (code("warn()", v4.new_output("stream", name="stderr", text="/tmp/ipykernel_7/1.py")), "a folder of one machine"),
    (code("path", shown("text/plain", "'C:\\\\Users\\\\me'")), "a folder of one machine"),
    (code("path", shown("text/html", "<b>/Users/me</b>")), "a folder of one machine"),
    (code("path", shown("image/svg+xml", "<text>/root/x</text>")), "a folder of one machine"),
    (code("path", shown("application/json", {"at": {"path": "/root/x"}})), "a folder of one machine"),
    (code("# raises: no such file\nopen(path)", v4.new_output("error", ename="E", evalue="no /home/me/x")),
     "a folder of one machine"),
], ids=lambda value: repr(value if isinstance(value, str) else value["source"]))  # fmt: skip
def test_each_fault_of_a_cell_is_found_once_and_names_the_cell(check, cell, fault):
    content = notebook(cell)
    (found,) = check(content)
    assert fault in found and found.startswith(f"cell {len(content['cells']) - 1} ({cell['id']}) ")


def test_left_over_widget_state_is_found(check):
    (found,) = check(notebook(widgets={"application/vnd.jupyter.widget-state+json": {"state": {}}}))
    assert "metadata.widgets is there" in found


def test_a_notebook_too_big_for_github_is_found(check):
    (found,) = check(notebook(code("figure", shown("image/png", "A" * MAX_BYTES))))
    assert "1.5 MB is the limit" in found


def test_an_exercise_is_not_run_and_all_other_guards_hold_for_it(check):
    cells = [code("raise NotImplementedError()", count=None), v4.new_markdown_cell("Look into /home/me.")]
    (found,) = check(v4.new_notebook(cells=cells), stub=True)
    assert "a folder of one machine" in found


@pytest.mark.parametrize("left", [{"count": 3}, {"outputs": [v4.new_output("stream", text="1\n")], "count": None}])
def test_an_exercise_that_keeps_something_of_a_run_is_found(check, left):
    (found,) = check(v4.new_notebook(cells=[code("1 + 1", *left.get("outputs", ()), count=left["count"])]), stub=True)
    assert "was run; `make exercises` takes that away" in found


@pytest.mark.parametrize("file", COURSE, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_the_notebooks_of_the_course_have_no_fault(file):
    assert faults(file, stub=file.parent.name == "exercises") == []
