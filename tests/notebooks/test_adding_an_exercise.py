"""docs/adding-an-exercise.md, followed to the letter in a copy of the course: no other file needs an edit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs/adding-an-exercise.md").read_text(encoding="utf-8")
ID = "demo-visible-tokens"
COPIED = ("Makefile", "pyproject.toml", "constraints.txt", "conftest.py", "tests", "solutions", "minillama4")
LEFT_OUT = shutil.ignore_patterns("weights", "__pycache__", "browser", "parity", "contract", "unit", "*.tmp", ".*")


def section(number: int) -> str:
    return re.search(rf"^## {number}\. .*?(?=^## \d|\Z)", GUIDE, re.MULTILINE | re.DOTALL)[0]


def files() -> dict[str, str]:
    """Path -> text of every block that stands under the name of its file."""
    return dict(re.findall(r"^\*\*`([^`]+)`\*\*\n\n```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL))


def cells() -> tuple[str, list[dict]]:
    """(the notebook that they are appended to, the cells)"""
    text = section(3)
    found = []
    for number, kind, blocks in re.findall(
        r"^\*\*Cell (\d+), (markdown|code)\*\*(.*?)(?=^\*\*Cell|\Z)", text, re.MULTILINE | re.DOTALL
    ):
        fenced = dict(re.findall(r"^```(\w+)\n(.*?)^```$", blocks, re.MULTILINE | re.DOTALL))
        source = fenced["python" if kind == "code" else "markdown"].rstrip("\n")
        cell = {"cell_type": kind, "id": f"guide-{number}", "metadata": json.loads(fenced.get("json", "{}"))}
        output = {"outputs": [], "execution_count": None} if kind == "code" else {}
        found.append(cell | output | {"source": source.splitlines(keepends=True)})
    return re.search(r"Append them to `([^`]+)`", text)[1], found


def commands() -> list[str]:
    return re.search(r"^```sh\n(.*?)^```$", section(4), re.MULTILINE | re.DOTALL)[1].splitlines()


def tree(root: Path) -> dict[str, bytes]:
    """Every file of the course but what tools keep for themselves."""
    files = {file.relative_to(root): file for file in root.rglob("*") if file.is_file()}
    return {name.as_posix(): file.read_bytes() for name, file in files.items() if not name.parts[0].startswith(".")}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """(the course with the guide's files and cells in it, every file of it before that)"""
    root = tmp_path_factory.mktemp("course")
    for name in COPIED:
        source = ROOT / name
        shutil.copytree(source, root / name, ignore=LEFT_OUT) if source.is_dir() else shutil.copy2(source, root / name)
    (root / "notebooks").mkdir()  # `make notebooks` also runs the lessons, which are of no interest here
    name, added = cells()
    for notebook in (root / "solutions").glob("*.ipynb"):
        if notebook != root / name:
            notebook.unlink()
    # `make` finds the environment set up. Its packages are the ones in use; the package of the course is the copy's.
    (root / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".ready":
            (root / ".venv" / entry.name).symlink_to(entry)
    (root / ".venv/.ready").touch()
    before = tree(root)

    for file, text in files().items():
        assert not (root / file).exists()
        (root / file).write_text(text, encoding="utf-8")
    notebook = json.loads((root / name).read_text("utf-8"))
    notebook["cells"] += added
    (root / name).write_text(json.dumps(notebook), encoding="utf-8")
    return root, before


@pytest.fixture(scope="module")
def course(copy) -> Path:
    return copy[0]


@pytest.fixture(scope="module")
def ran(course) -> dict[str, str]:
    """Command of the guide -> what it printed."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTEST_"))}
    environ |= {"PYTHONPATH": str(course), "PYTHONDONTWRITEBYTECODE": "1", "PIP_NO_INDEX": "1"}
    printed = {}
    for command in commands():
        done = subprocess.run(
            command, shell=True, cwd=course, env=environ, capture_output=True, text=True, encoding="utf-8", timeout=600
        )
        printed[command] = done.stdout + done.stderr
        assert done.returncode == 0, f"{command}\n{printed[command]}"
    return printed


def said(ran: dict[str, str], word: str) -> str:
    (command,) = [command for command in ran if word in command]
    return ran[command]


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def test_the_guide_names_two_files_four_cells_and_four_commands():
    stem = ID.replace("-", "_")
    assert list(files()) == [f"minillama4/course/checks/{stem}.py", f"tests/wrong_solutions/{stem}.py"]
    assert [cell["cell_type"] for cell in cells()[1]] == ["markdown", "code", "code", "code"]
    assert [command.split()[0] for command in commands()] == [
        "make",
        "make",
        ".venv/bin/python",
        ".venv/bin/minillama4",
    ]


def test_its_code_is_in_the_style_of_the_course(tmp_path):
    for number, text in enumerate(files().values()):
        (tmp_path / f"file{number}.py").write_text(text, encoding="utf-8")
    ruff = [sys.executable, "-m", "ruff"]
    for command in ([*ruff, "check"], [*ruff, "format", "--check"]):
        done = subprocess.run(
            [*command, "--config", ROOT / "pyproject.toml", "--no-cache", tmp_path], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@needs_make
def test_the_exercise_is_generated_without_its_solution(course, ran):
    notebook = json.loads((course / "exercises/00_start_here.ipynb").read_text("utf-8"))
    by_id = {cell["metadata"].get("nbgrader", {}).get("grade_id"): cell for cell in notebook["cells"]}
    answer = "".join(by_id[f"{ID}-answer"]["source"])
    assert answer.startswith("def visible_tokens(") and answer.endswith("    raise NotImplementedError()")
    assert "".join(by_id[ID]["source"]) == f'check("{ID}", visible_tokens)'
    assert "Difficulty 1/5" in "".join(by_id[f"{ID}-task"]["source"])
    assert "positions % chunk_size" not in json.dumps(notebook) and f'hint(\\"{ID}\\")' in json.dumps(notebook)


@needs_make
def test_the_reference_passes_and_the_solved_notebook_says_so(course, ran):
    notebook = json.loads((course / "solutions/00_start_here.ipynb").read_text("utf-8"))
    outputs = {cell["id"]: cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"}
    (output,) = outputs["guide-3"]
    assert "".join(output["text"]).startswith(f"{ID}: solved\n  ✓ it runs\n")


@needs_make
def test_every_wrong_answer_and_every_mutant_is_rejected(ran):
    wrong, of_wrong, mutants, of_mutants = map(
        int,
        re.search(
            r"(\d+) of (\d+) wrong answers and (\d+) of (\d+) mutants in 1 exercises", said(ran, "pytest")
        ).groups(),
    )
    assert wrong == of_wrong == files()[f"tests/wrong_solutions/{ID.replace('-', '_')}.py"].count("@wrong(")
    assert mutants == of_mutants >= 8


@needs_make
def test_the_exercise_is_listed(ran):
    assert re.search(rf"^00  {ID} +-$", said(ran, "progress"), re.MULTILINE)


@needs_make
def test_no_other_file_of_the_course_was_touched(copy, ran):
    """What the guide adds, what its commands make, and nothing else."""
    root, before = copy
    after = tree(root)
    assert set(before) <= set(after)
    changed = {name for name, content in after.items() if before.get(name) != content}
    assert changed == {*files(), "solutions/00_start_here.ipynb", "exercises/00_start_here.ipynb"}
