"""Where learners work: nothing that exists is overwritten, and nothing in `work/` reaches the tests."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from minillama4 import cli
from minillama4.course import lab

ROOT = Path(__file__).resolve().parents[2]


def notebook(source: str, output: str = "") -> str:
    outputs = [{"output_type": "stream", "name": "stdout", "text": output}] if output else []
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": source, "outputs": outputs, "execution_count": 1}
    return json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A small course: lessons 00 and 02, exercises 02 and 03."""
    root = tmp_path / "clone"
    for name in ("notebooks/00_start_here", "notebooks/02_irope", "exercises/02_irope", "exercises/03_experts"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.ipynb").write_text(notebook(name))
    monkeypatch.setattr(lab, "find_root", lambda: root)
    return root


@pytest.fixture
def work(clone):
    lab.fill(clone)
    return clone / "work"


def tree(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}


def backups(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.backup-*.ipynb"))


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


# ----------------------------------------------------------------------------------------------------------------------
# fill


def test_fill_copies_lessons_and_exercises_and_marks_the_folder(clone):
    assert len(lab.fill(clone)) == 4
    for folder in ("notebooks", "exercises"):
        assert tree(clone / "work" / folder) == tree(clone / folder)
    assert (clone / "work" / ".minillama4-work").is_file()


@pytest.mark.parametrize("mine", [notebook("my answer"), "", "{ broken"])
def test_fill_never_overwrites(clone, work, mine):
    (work / "exercises/02_irope.ipynb").write_text(mine)
    (clone / "exercises/02_irope.ipynb").write_text(notebook("a newer one"))
    assert lab.fill(clone) == []
    assert (work / "exercises/02_irope.ipynb").read_text() == mine


def test_fill_completes_a_missing_file_and_leaves_the_others(clone, work):
    (work / "notebooks/00_start_here.ipynb").write_text("mine")
    missing = work / "notebooks/02_irope.ipynb"
    missing.unlink()
    assert lab.fill(clone) == [missing]
    assert missing.read_text() == (clone / "notebooks/02_irope.ipynb").read_text()
    assert (work / "notebooks/00_start_here.ipynb").read_text() == "mine"


@pytest.mark.parametrize("stop", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_copy_leaves_no_half_file_and_the_next_one_completes_it(clone, monkeypatch, stop):
    replace, names = os.replace, []

    def fails(source, target):
        names.append(target)
        if Path(target).name == "02_irope.ipynb":
            raise stop
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(lab.os, "replace", fails)
        with pytest.raises(type(stop)):
            lab.fill(clone)
    assert set(tree(clone / "work")) == {".minillama4-work", "notebooks/00_start_here.ipynb"}
    assert len(lab.fill(clone)) == 3


def test_a_file_named_work_is_one_line_that_says_what_to_do(clone, capsys):
    (clone / "work").write_text("my notes")
    code, out, err = run(capsys, "lab")
    assert code == 2 and out == "" and re.fullmatch(r"minillama4: .*work is not a folder; move it away.*\n", err)
    assert (clone / "work").read_text() == "my notes"


# ----------------------------------------------------------------------------------------------------------------------
# A course that changes


def test_a_newer_lesson_is_announced_until_it_is_fetched(clone, work):
    (clone / "notebooks/02_irope.ipynb").write_text(notebook("a newer one"))
    lab.fill(clone)
    assert lab.newer(clone) == [
        "notebooks/02_irope.ipynb is newer in the course; `minillama4 reset notebooks/02_irope` fetches it "
        "and keeps yours"
    ]
    lab.reset("notebooks/02_irope", clone)
    assert lab.newer(clone) == []
    assert len(backups(work / "notebooks")) == 1


def test_what_only_the_learner_changed_is_not_newer_in_the_course(clone, work):
    (work / "notebooks/02_irope.ipynb").write_text(notebook("mine"))
    assert lab.newer(clone) == []


@pytest.mark.parametrize("marker", ["", "{ broken", "[]"])
def test_a_broken_marker_loses_only_the_announcements(clone, work, marker):
    (work / ".minillama4-work").write_text(marker)
    (clone / "notebooks/02_irope.ipynb").write_text(notebook("a newer one"))
    assert lab.fill(clone) == [] and lab.newer(clone) == []


# ----------------------------------------------------------------------------------------------------------------------
# reset


def test_reset_restores_and_keeps_a_backup(clone, work, capsys):
    mine = work / "exercises/03_experts.ipynb"
    mine.write_text(notebook("my answer"))
    code, out, err = run(capsys, "reset", "03")
    assert code == 0 and err == "" and len(out.splitlines()) == 1
    assert mine.read_text() == (clone / "exercises/03_experts.ipynb").read_text()
    (backup,) = backups(work / "exercises")
    assert backup.read_text() == notebook("my answer") and backup.name in out
    assert re.fullmatch(r"03_experts\.backup-\d{8}-\d{4}\.ipynb", backup.name)


def test_two_resets_in_the_same_minute_keep_both_backups(clone, work, monkeypatch):
    monkeypatch.setattr(lab.time, "strftime", lambda _: "20261124-1530")
    for answer in ("first", "second", "third"):
        (work / "exercises/03_experts.ipynb").write_text(answer)
        lab.reset("03", clone)
    kept = {file.name: file.read_text() for file in backups(work / "exercises")}
    assert kept == {
        "03_experts.backup-20261124-1530.ipynb": "first",
        "03_experts.backup-20261124-1530-2.ipynb": "second",
        "03_experts.backup-20261124-1530-3.ipynb": "third",
    }


def test_an_interrupted_reset_leaves_the_learners_file(clone, work, monkeypatch):
    mine = work / "exercises/03_experts.ipynb"
    mine.write_text("my answer")
    monkeypatch.setattr(lab.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        lab.reset("03", clone)
    assert mine.read_text() == "my answer"


@pytest.mark.parametrize(
    "name", ["03", "03_experts", "03_experts.ipynb", "work/exercises/03_experts.ipynb", r"work\exercises\03"]
)
def test_a_file_can_be_named_by_number_name_or_path(clone, work, name):
    (work / "exercises/03_experts.ipynb").write_text("mine")
    lab.reset(name, clone)
    assert len(backups(work / "exercises")) == 1


def test_a_number_means_the_exercise_when_the_lesson_was_only_run(clone, work):
    (work / "notebooks/02_irope.ipynb").write_text(notebook("notebooks/02_irope", output="another machine"))
    (work / "exercises/02_irope.ipynb").write_text(notebook("my answer"))
    assert "work/exercises/02_irope.ipynb" in lab.reset("02", clone)
    assert backups(work / "notebooks") == [] and len(backups(work / "exercises")) == 1


def test_a_number_means_the_lesson_when_only_that_was_run(clone, work):
    (work / "notebooks/02_irope.ipynb").write_text(notebook("notebooks/02_irope", output="another machine"))
    assert "work/notebooks/02_irope.ipynb" in lab.reset("02", clone)


def test_a_number_that_may_mean_two_changed_files_restores_neither(clone, work, capsys):
    for folder in ("notebooks", "exercises"):
        (work / folder / "02_irope.ipynb").write_text(notebook("mine"))
    before = tree(work)
    code, out, err = run(capsys, "reset", "02")
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert "`minillama4 reset notebooks/02_irope` or `minillama4 reset exercises/02_irope`" in err
    assert tree(work) == before
    assert run(capsys, "reset", "notebooks/02")[0] == 0


def test_reset_of_an_untouched_file_makes_no_backup(clone, work):
    before = tree(work)
    assert "already as the course has it" in lab.reset("02", clone)
    assert tree(work) == before


def test_reset_of_a_deleted_file_fetches_it(clone, work):
    (work / "exercises/03_experts.ipynb").unlink()
    assert "is there again" in lab.reset("03", clone)
    assert tree(work / "exercises") == tree(clone / "exercises")


@pytest.mark.parametrize("name, there", [
    ("07", "00_start_here, 02_irope, 03_experts"),
    ("", "00_start_here, 02_irope, 03_experts"),
    ("exercises/00", "02_irope, 03_experts"),
    ("../../etc/passwd", "00_start_here, 02_irope, 03_experts"),
])  # fmt: skip
def test_an_unknown_name_is_one_line_with_what_there_is(clone, work, capsys, name, there):
    before = tree(work)
    assert run(capsys, "reset", name) == (2, "", f"minillama4: no notebook is called {name!r}; there are {there}\n")
    assert tree(work) == before


def test_a_course_without_exercises_does_not_reset_the_lesson_instead(clone, work):
    shutil.rmtree(clone / "exercises")
    (work / "notebooks/02_irope.ipynb").write_text("mine")
    with pytest.raises(ValueError, match="there are none"):
        lab.reset("exercises/02", clone)


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def test_an_installation_without_the_course_says_where_to_run_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lab, "__file__", str(tmp_path / "site-packages/minillama4/course/lab.py"))
    for command in (["lab"], ["reset", "02"]):
        code, out, err = run(capsys, *command)
        assert code == 2 and out == "" and re.fullmatch(r"minillama4: .* has no lessons; clone .*\n", err)


def test_lab_fills_work_and_starts_jupyterlab_there(clone, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(lab, "_become", lambda *started_as: started.append(started_as) or 0)
    code, out, _ = run(capsys, "lab", "--", "--port=9999")
    ((command, environ),) = started
    assert code == 0 and "4 notebooks copied" in out
    assert command[:3] == [sys.executable, "-m", "jupyterlab"] and command[-1] == "--port=9999"
    assert f"--ServerApp.root_dir={clone / 'work'}" in command
    assert (clone / "work" / lab.FIRST).is_file() and f"--LabApp.default_url=/lab/tree/{lab.FIRST}" in command
    assert not any("token" in word or "password" in word for word in command)


@pytest.mark.parametrize("platform, environ, is_root, expected", [
    ("linux", {}, False, ["--no-browser"]),
    ("linux", {"DISPLAY": ":0"}, False, []),
    ("linux", {"WAYLAND_DISPLAY": "wayland-0"}, True, ["--allow-root"]),
    ("linux", {"DISPLAY": ""}, True, ["--no-browser", "--allow-root"]),
    ("darwin", {}, False, []),
    ("win32", {}, False, []),
])  # fmt: skip
def test_browser_and_root_options_fit_the_machine(monkeypatch, platform, environ, is_root, expected):
    monkeypatch.setattr(lab.sys, "platform", platform)
    monkeypatch.setattr(lab.os, "geteuid", lambda: 0 if is_root else 1000, raising=False)
    assert lab.jupyter(Path("work"), environ)[0][5:] == expected


def test_the_settings_come_before_the_users_own_folders_of_settings():
    _, environ = lab.jupyter(Path("work"), {"JUPYTER_CONFIG_PATH": "theirs", "HOME": "home"})
    assert environ["JUPYTER_CONFIG_PATH"].split(os.pathsep) == [str(lab.SETTINGS), "theirs"]
    assert environ["HOME"] == "home"


def test_progress_is_read_from_work_wherever_the_command_runs(clone, work, monkeypatch, tmp_path):
    monkeypatch.setattr(lab, "__file__", str(clone / "minillama4/course/lab.py"))
    monkeypatch.chdir(tmp_path)
    assert lab.find_work() == work
    monkeypatch.chdir(work / "exercises")
    assert lab.find_work() == work


def test_progress_and_check_are_commands(capsys, tmp_path):
    code, out, err = run(capsys, "progress")
    assert code == 0 and re.search(r"\d+ of \d+ solved\n$", out) and err == ""
    code, out, err = run(capsys, "check", str(tmp_path / "nowhere.ipynb"))
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and "nowhere.ipynb" in err


# ----------------------------------------------------------------------------------------------------------------------
# What a learner does never reaches the tests


def test_nothing_in_work_reaches_the_tests_or_git(clone, work):
    """The course's own pytest settings, in a tree whose `work/` holds all that could break a collection."""
    for name in ("pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / name, clone)
    (clone / "tests").mkdir()
    (clone / "tests/test_course.py").write_text("def test_of_the_course():\n    pass\n")
    (work / "notebooks/02_irope.ipynb").write_text("{ broken")
    (work / "exercises/02_irope.ipynb").write_text(notebook("raise NotImplementedError()"))
    for name in ("conftest.py", "test_mine.py", "exercises/test_mine.py"):
        (work / name).write_text("raise RuntimeError('of a learner')\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbval", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if "::" in line] == ["tests/test_course.py::test_of_the_course"]
    assert "work/" in (ROOT / ".gitignore").read_text().split()


# ----------------------------------------------------------------------------------------------------------------------
# JupyterLab's settings


def test_the_settings_are_ones_that_the_installed_jupyterlab_knows():
    """A name that JupyterLab does not know would be ignored without a word."""
    overrides = json.loads((lab.SETTINGS / "labconfig/default_setting_overrides.json").read_text())
    schemas = Path(sys.prefix) / "share/jupyter/lab/schemas"
    for plugin, values in overrides.items():
        package, _, name = plugin.partition(":")
        known = json.loads((schemas / package / f"{name}.json").read_text())["properties"]
        for key, value in values.items():
            choices = [choice["const"] for choice in known[key].get("oneOf", ())] or known[key].get(
                "enum", (True, False)
            )
            assert value in choices, f"{plugin} {key}"


@pytest.mark.slow  # 8 s on an idle machine, half a minute on a busy one
def test_jupyterlab_applies_the_settings_and_keeps_its_token(clone, work, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    own = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{kind}_DIR": str(tmp_path / kind) for kind in ("SETTINGS", "WORKSPACES")}
    command, environ = lab.jupyter(
        work, os.environ | own | {"JUPYTER_TOKEN": "a-token"}, ["--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    )

    def get(path: str, token: str = "a-token") -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}?token={token}", timeout=30) as answer:
            return answer.read().decode()

    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                get("/api/status")
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
        known = {plugin["id"]: plugin for plugin in json.loads(get("/lab/api/settings"))["settings"]}
        for plugin, values in json.loads(
            (lab.SETTINGS / "labconfig/default_setting_overrides.json").read_text()
        ).items():
            used = {key: value["default"] for key, value in known[plugin]["schema"]["properties"].items()}
            assert used.items() >= values.items() and known[plugin]["settings"] == {}
        page = re.search(r'id="jupyter-config-data" type="application/json">(.*?)</script>', get("/lab"), re.DOTALL)
        assert "@jupyter/nbgrader" in json.loads(page[1])["disabledExtensions"]
        files = json.loads(get("/api/contents/notebooks"))["content"]
        assert {file["name"] for file in files} == {"00_start_here.ipynb", "02_irope.ipynb"}
        with pytest.raises(urllib.error.HTTPError, match="403"):
            get("/api/contents", token="")
        assert "nbgrader" not in (tmp_path / "log").read_text()  # which would cost seconds and report an error
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
        log.close()
