"""Makes submissions, grades them by the command line, and reads the report."""

import ast
import copy
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "00_start_here"
ID = "start-rms-norm"
BANK = ROOT / "tests" / "wrong_solutions" / "start_rms_norm.py"

RIGHT = """
def rms_norm(x, weight, eps):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).type_as(x) * weight
"""
IDENTITY = """
def rms_norm(x, weight, eps):
    return x
"""


def solved_notebook() -> dict:
    return json.loads((ROOT / "solutions" / f"{NAME}.ipynb").read_text("utf-8"))


def notebook(answer: str | None = None, before: str = "", after: str = "") -> dict:
    """A learner's notebook: the exercise with `answer` in place of the stub, and cells of their own around it."""
    made = copy.deepcopy(untouched())
    at = next(i for i, cell in enumerate(made["cells"]) if cell["id"] == "rms-norm-answer")
    if answer is not None:
        made["cells"][at]["source"] = textwrap.dedent(answer).strip()
    if after:
        made["cells"].insert(at + 1, code(after))
    if before:
        made["cells"].insert(at, code(before))
    return made


def untouched() -> dict:
    from minillama4.course.split import split

    return json.loads(split(ROOT / "solutions" / f"{NAME}.ipynb"))


def code(source: str) -> dict:
    source = textwrap.dedent(source).strip()
    id = f"own-{abs(hash(source)):x}"[:20]
    return {"cell_type": "code", "id": id, "metadata": {}, "outputs": [], "execution_count": None, "source": source}


def check_cell(made: dict) -> dict:
    return next(cell for cell in made["cells"] if cell["id"] == "rms-norm-check")


def answer_cell(made: dict) -> dict:
    return next(cell for cell in made["cells"] if cell["id"] == "rms-norm-answer")


def save(made: dict | bytes, file: Path):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(made if isinstance(made, bytes) else json.dumps(made).encode())


def wrong_answers() -> dict[str, tuple[str, str]]:
    """Name -> (source of the answer, the mistake that its check names), of the bank of wrong solutions."""
    sys.path.insert(0, str(BANK.parent))
    try:
        spec = importlib.util.spec_from_file_location("bank_for_grading", BANK)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BANK.parent))
    found = {}
    for name, function in vars(module).items():
        if not hasattr(function, "wrong"):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        tree.body[0].decorator_list, tree.body[0].name = [], "rms_norm"
        imports = "import torch.nn.functional as F\nfrom minillama4.model import RMSNorm\n"
        found[name] = imports + ast.unparse(tree), function.wrong
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Grading


@dataclass
class Report:
    out: Path
    printed: str
    rows: dict[str, dict] = field(default_factory=dict)  # learner -> row
    left_out: dict[str, str] = field(default_factory=dict)

    def part(self, learner: str) -> dict:
        return self.rows[learner]["exercises"][0]


def command(submissions: Path, out: Path, *options, root: Path = ROOT) -> tuple[list[str], dict[str, str]]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["PYTHONPATH"] = str(root)
    return [
        sys.executable,
        "-m",
        "minillama4.cli",
        "grade",
        str(submissions),
        "--out",
        str(out),
        *map(str, options),
    ], env


def grade(submissions: Path, out: Path, *options, root: Path = ROOT, fails: bool = False) -> Report:
    line, env = command(submissions, out, *options, root=root)
    done = subprocess.run(
        line, env=env, cwd=root, capture_output=True, text=True, encoding="utf-8", stdin=subprocess.DEVNULL
    )
    printed = done.stdout + done.stderr
    assert done.returncode == (2 if fails else 0), printed
    return Report(out, printed) if fails else read(out, printed)


def read(out: Path, printed: str = "") -> Report:
    table = json.loads((out / "grades.json").read_text("utf-8"))
    rows = {row["learner"]: row for row in table["rows"]}
    assert len(rows) == len(table["rows"]), "these tests have one notebook a learner"
    return Report(out, printed, rows, {left["file"]: left["why"] for left in table["left_out"]})


def needs_sandbox():
    """Skip in one line where there is none; where the whole of the project is checked, that is a failure."""
    from minillama4.course.grading.sandbox import NoSandbox, Sandbox

    try:
        Sandbox(5, 2**32, [])
    except NoSandbox as error:
        if os.environ.get("CI"):
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


def rooms(report: Path) -> list[str]:
    """Command lines of the processes that a sandbox of this report has left, or still has."""
    return processes(f"{report.parent.name}/{report.name}/run/job", "mountinfo")


def processes(word: str, file: str = "cmdline") -> list[str]:
    """Command lines of the processes in whose `file` of /proc this word stands."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in (folder / file).read_text(errors="replace"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


def free_copy(target: Path) -> Path:
    """A clone's folder without weights: another course on the same engine can be made of it."""
    for file in (ROOT / "minillama4").rglob("*.py"):
        to = target / "minillama4" / file.relative_to(ROOT / "minillama4")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to)
    for name in ("notebooks", "solutions"):
        (target / name).mkdir()
    shutil.copyfile(ROOT / "pyproject.toml", target / "pyproject.toml")
    return target
