"""The graded notebooks: the instructor's code and a learner's arrays, run and compared by nbval in one go.

What is stored as their outputs is what the instructor's own copy gives on the same inputs. This file is also the pytest
plugin that says of each cell how it ended, line by line, so that a killed run has lost nothing.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from .view import PACKAGE

LINES = "MINILLAMA4_GRADED_CELLS"
SETUP = """import runpy

runpy.run_path({lite!r})["package_without_model"]({package!r})
from minillama4.course.grading.judge import graded"""


def notebook(file: Path, copy, arrays: str, seed: str, expected: dict[str, str]):
    """Write one. expected: exercise -> what the instructor's copy prints."""
    here = Path(__file__)
    cells = [_cell("setup", SETUP.format(lite=str(here.with_name("lite.py")), package=str(PACKAGE)), "", 1)]
    for number, task in enumerate(copy.tasks, 2):
        cells.append(
            _cell(task.id, f"graded({task.id!r}, {arrays!r}, seed={seed!r})", expected[task.id] + "\n", number)
        )
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    text = json.dumps(
        {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}, indent=1
    )
    file.write_text(text, encoding="utf-8", newline="\n")


def _cell(id: str, source: str, stdout: str, count: int) -> dict:
    outputs = [{"name": "stdout", "output_type": "stream", "text": stdout}] if stdout else []
    return {"cell_type": "code", "execution_count": count, "id": id, "metadata": {}, "outputs": outputs,
            "source": source}  # fmt: skip


class NbvalRun:
    """nbval over all of `files`, which lie in one folder; `lines` grows by one line a cell. Use as a context."""

    def __init__(self, files: list[Path], lines: Path, jobs: int):
        self.files, self.lines, self.jobs, self.folder = files, lines, jobs, files[0].parent
        self.started: list[subprocess.Popen] = []

    def __enter__(self) -> "NbvalRun":
        folder = self.folder
        (folder / "pytest.ini").write_text("[pytest]\n")
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        search = os.pathsep.join([str(PACKAGE.parent), *filter(None, [env.get("PYTHONPATH")])])
        env |= {LINES: str(self.lines), "PYTHONPATH": search, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        env |= {"IPYTHONDIR": str(folder / "ipython"), "MPLBACKEND": "agg", "JUPYTER_PATH": str(folder / "jupyter")}
        command = [sys.executable, "-m", "pytest", "-c", folder / "pytest.ini", "--rootdir", folder, "--noconftest"]
        command += ["-q", "--no-header", "--tb=no", "--color=no", "--continue-on-collection-errors"]
        command += ["-p", "no:cacheprovider", "-p", "minillama4.course.nbval_strict", "-p", __name__, "--nbval"]
        if sys.platform == "linux":
            command += [f"--nbval-kernel-name={self._kernels(env)}"]
        else:
            command += ["--nbval-current-env"]
        if self.jobs > 1 and len(self.files) > 1 and find_spec("xdist"):
            command += ["-n", min(self.jobs, len(self.files)), "--dist", "loadscope"]
        else:
            command += ["-p", "no:xdist"]
        self._start([*command, *self.files], env, "nbval.log")
        return self

    def ended(self) -> bool:
        return self.started[-1].poll() is not None

    def __exit__(self, *error):
        for process in reversed(self.started):
            if process.poll() is None:
                process.terminate()
            process.wait()
        shutil.rmtree(self.sockets, ignore_errors=True)

    sockets = ""

    def _kernels(self, env: dict[str, str]) -> str:
        """The name of a kernel that a server forks; see kernels.py."""
        self.sockets = tempfile.mkdtemp(prefix="minillama4-")  # a socket's path must be short
        script, address = Path(__file__).with_name("kernels.py"), f"{self.sockets}/kernels"
        self._start([sys.executable, script, "serve", address], env, "kernels.log")
        argv = [sys.executable, "-S", "-E", str(script), "ask", address, "{connection_file}"]
        spec = self.folder / "jupyter" / "kernels" / "graded"
        spec.mkdir(parents=True, exist_ok=True)
        (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "graded", "language": "python"}))
        while not os.path.exists(address) and self.started[-1].poll() is None:
            time.sleep(0.02)
        return "graded"

    def _start(self, command: list, env: dict[str, str], log: str):
        command = [*map(str, command)]
        if shutil.which("setpriv"):  # it dies with this process, even where that has died before it could say so
            alive = ["sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"', str(os.getpid())]
            command = ["setpriv", "--pdeathsig=KILL", *alive, *command]
        with open(self.folder / log, "wb") as out:
            self.started.append(
                subprocess.Popen(
                    command, env=env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The plugin


def pytest_runtest_logreport(report):
    """With xdist this runs where the reports meet, and only there."""
    lines = os.environ.get(LINES)
    if not lines or "PYTEST_XDIST_WORKER" in os.environ or not (report.when == "call" or report.failed):
        return
    row = {"notebook": Path(report.location[0]).name, "cell": report.nodeid.rpartition("::")[2],
           "passed": report.passed, "seconds": round(report.duration, 3)}  # fmt: skip
    handle = os.open(lines, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, json.dumps(row).encode() + b"\n")
    finally:
        os.close(handle)
