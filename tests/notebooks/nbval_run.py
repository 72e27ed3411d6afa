"""Runs nbval in a pytest of its own, which leaves nothing behind: no cache, no settings from outside."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

SANITIZE = Path(__file__).parent / "sanitize.cfg"


@dataclass
class Cell:
    notebook: str  # its path, from the folder that holds all targets
    number: int  # counts code cells only, from 0, as nbval does
    seconds: float  # of the cell alone, without the start of its kernel
    failure: str  # "" where it passed


def run_nbval(*targets: Path, scratch: Path, hardened: bool = True, timeout: float = 60) -> tuple[list[Cell], str]:
    """nbval over notebooks, or all of a folder -> their code cells, and what pytest printed.

    timeout: seconds a cell. A cell that is tagged `nbval-skip` passes; the guards ask it for a reason.
    """
    scratch.mkdir(exist_ok=True)
    ini, report = scratch / "pytest.ini", scratch / "report.xml"
    ini.write_text("[pytest]\n")
    root = os.path.commonpath([target if target.is_dir() else target.parent for target in targets])
    command = [sys.executable, "-m", "pytest", "-c", ini, "--rootdir", root, "--noconftest", "-q"]
    command += ["-p", "no:cacheprovider", *(["-p", "minillama4.course.nbval_strict"] if hardened else [])]
    command += ["--nbval", "--nbval-current-env", f"--nbval-cell-timeout={timeout}"]
    command += [f"--nbval-sanitize-with={SANITIZE}", "--continue-on-collection-errors", "--color=no"]
    # xunit1 is the family that says which file a cell is in.
    command += [f"--junitxml={report}", "-o", "junit_family=xunit1", "-o", "junit_duration_report=call"]
    command += targets
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"IPYTHONDIR": str(scratch / "ipython"), "PYTHONDONTWRITEBYTECODE": "1"}  # no start-up files of the user
    done = subprocess.run(
        list(map(str, command)), env=env, cwd=scratch, capture_output=True, text=True, encoding="utf-8", timeout=900
    )
    if not report.exists():
        raise AssertionError(f"pytest did not get to the cells:\n{done.stdout}{done.stderr}")
    cells = [_cell(case) for case in ElementTree.parse(report).iter("testcase")]
    return cells, done.stdout + done.stderr


def _cell(case) -> Cell:
    name = case.get("name")
    # pytest.xfail: what nbval makes of the cells after one that took too long
    bad = [child for child in case if child.tag in ("failure", "error") or child.get("type") == "pytest.xfail"]
    failure = "\n".join(child.text or child.get("message") for child in bad)
    number = int(name.removeprefix("Cell ")) if name.startswith("Cell ") else -1  # -1: the file could not be read
    return Cell(case.get("file") or case.get("classname"), number, float(case.get("time")), failure)
