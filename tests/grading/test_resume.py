"""A run that is killed goes on: nothing lost, doubled or changed. And what `grade` refuses, in one line."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import classroom
import pytest
from classroom import NAME, RIGHT, notebook, save, wrong_answers


def class_of(number: int, folder: Path) -> dict[str, tuple[bool, str]]:
    """Write `number` submissions; learner -> (solved, the mistake that the report must name)."""
    wrong = list(wrong_answers().items())
    random.Random(number).shuffle(wrong)
    expected = {}
    for n in range(number):
        learner = f"learner {n:03}"
        if n % 4 == 0:
            made, verdict = notebook(RIGHT, before=f"# number {n}"), (True, "")
        elif n % 8 == 1:
            made, verdict = notebook(), (False, "not written")
        else:
            _, (source, mistake) = wrong[n % len(wrong)]
            made, verdict = notebook(source), (mistake is None, mistake or "")
        save(made, folder / learner / f"{NAME}.ipynb")
        expected[learner] = verdict
    return expected


def verdicts(report) -> dict[str, tuple[bool, str]]:
    return {name: (row["exercises"][0]["solved"], row["exercises"][0]["mistake"]) for name, row in report.rows.items()}


def kill_when(line: list[str], env: dict, wait, seconds: float = 600):
    """Start a run, and kill -9 it when `wait()` says so."""
    process = subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + seconds
    while process.poll() is None and not wait() and time.monotonic() < end:
        time.sleep(0.02)
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return killed


def nobody_left(of: Path | str, find=classroom.rooms) -> bool:
    """Ten seconds later at most: no room of this report, or no process with this word."""
    end = time.monotonic() + 10
    while find(of) and time.monotonic() < end:
        time.sleep(0.1)
    return find(of) == []


@pytest.fixture(scope="module")
def killed(sandbox, tmp_path_factory):
    """A class of 12 whose grading was killed once in the middle, and then went on."""
    folder = tmp_path_factory.mktemp("twelve")
    expected = class_of(12, folder / "class")
    line, env = classroom.command(folder / "class", folder / "report", "-j", 2)
    done = folder / "report" / "run" / "graded"
    assert kill_when(line, env, lambda: done.is_dir() and len(list(done.glob("*.json"))) >= 4), "it was over too soon"
    left = nobody_left(folder / "report")
    half = {file.name: file.read_bytes() for file in done.glob("*.json")}
    seed = (folder / "report" / "run" / "seed").read_text()
    feedback = folder / "feedback"
    report = classroom.grade(folder / "class", folder / "report", "-j", 2, "--feedback", feedback)
    return dict(folder=folder, expected=expected, left=left, half=half, seed=seed, report=report, feedback=feedback)


def test_every_verdict_is_right_after_a_kill(killed):
    assert verdicts(killed["report"]) == killed["expected"]


def test_a_kill_leaves_no_process_and_changes_nothing_that_was_done(killed):
    assert killed["left"] and len(killed["half"]) >= 4
    graded = killed["folder"] / "report" / "run" / "graded"
    for name, content in killed["half"].items():
        assert (graded / name).read_bytes() == content
    assert (killed["folder"] / "report" / "run" / "seed").read_text() == killed["seed"]


@pytest.mark.parametrize(
    "slow, part, before", [("bwrap", "run/job-anna", "import time; time.sleep(100)"), ("setpriv", "run/graded", "")]
)
def test_a_kill_while_something_starts_leaves_no_process(slow, part, before, sandbox, tmp_path):
    """Between its start and its tie to the grader's life, which here are a second apart."""
    save(notebook(RIGHT, before), tmp_path / "class" / "anna" / f"{NAME}.ipynb")
    line, env = classroom.command(tmp_path / "class", tmp_path / "report")
    word, fake = str(tmp_path / "report" / part), tmp_path / "bin"
    fake.mkdir()
    script = f'#!/bin/sh\ncase "$*" in *{word}*) touch {fake}/begun; sleep 1;; esac\nexec {shutil.which(slow)} "$@"\n'
    (fake / slow).write_text(script)
    (fake / slow).chmod(0o755)
    assert kill_when(line, {**env, "PATH": f"{fake}:{env['PATH']}"}, (fake / "begun").exists)
    assert classroom.processes(word)
    assert nobody_left(word, classroom.processes)


def test_a_second_run_does_nothing_again(killed):
    rows = killed["folder"] / "report" / "run" / "rows"
    before = {file.name: file.stat().st_mtime_ns for file in rows.iterdir()}
    report = classroom.grade(killed["folder"] / "class", killed["folder"] / "report")
    assert {file.name: file.stat().st_mtime_ns for file in rows.iterdir()} == before
    assert "graded in" not in report.printed and verdicts(report) == killed["expected"]


@pytest.mark.parametrize("deaths", [1, 2])
def test_what_nbval_did_not_confirm_is_judged_once_more(deaths, tmp_path, monkeypatch, capsys):
    """nbval ends without a word, as where a kernel dies; a second time is too often."""
    from minillama4.cli import main
    from minillama4.course.grading import nbval_run

    save(notebook(RIGHT), tmp_path / "class" / "anna" / f"{NAME}.ipynb")
    real, started = nbval_run.NbvalRun.__enter__, []

    def dies(run):
        started.append(run)
        if len(started) > deaths:
            return real(run)
        run._start(["true"], dict(os.environ), "nbval.log")
        return run

    monkeypatch.setattr(nbval_run.NbvalRun, "__enter__", dies)
    code = main(["grade", str(tmp_path / "class"), "--out", str(tmp_path / "report"), "--trusted"])
    assert len(started) == 2
    if deaths == 1:
        assert code == 0 and "1 of 1 exercises solved" in capsys.readouterr().out
    else:
        assert code == 2 and "nbval did not confirm" in capsys.readouterr().err


def test_the_report_names_known_wrong_answers(killed):
    for name, (solved, mistake) in killed["expected"].items():
        part = killed["report"].part(name)
        if not solved and mistake not in ("not written", "raises", "borrowed", "type", "shape", "changes its input"):
            assert part["like"] or "noise" in mistake or mistake.startswith("each token"), part


def test_the_tables_agree(killed):
    out = killed["report"].out
    table = json.loads((out / "grades.json").read_text("utf-8"))
    assert table["version"] == 1 and table["sandbox"] and table["seed"] == killed["seed"].strip()
    with open(out / "grades.csv", encoding="utf-8-sig", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["learner"]: line["solved"] == "yes" for line in lines} == {
        name: solved for name, (solved, _) in killed["expected"].items()
    }


def test_feedback_is_their_notebook_with_the_verdict(killed):
    import nbformat

    files = list(killed["feedback"].rglob("*.ipynb"))
    assert len(files) == 12
    for file in files:
        made = nbformat.read(file, as_version=4)
        nbformat.validate(made)
        text = "\n".join(cell.source for cell in made.cells if cell.cell_type == "markdown")
        assert "start-rms-norm: solved" in text or "start-rms-norm: not yet" in text


# ----------------------------------------------------------------------------------------------------------------------
# Refusals, of which none leaves anything behind


@pytest.fixture
def one(tmp_path):
    save(notebook(RIGHT), tmp_path / "class" / "jane" / f"{NAME}.ipynb")
    return tmp_path


def refused(one, *options, env=None, says: str) -> str:
    line, given = classroom.command(one / "class", one / "report", *options)
    done = subprocess.run(line, env={**given, **(env or {})}, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("minillama4: ") and says in done.stderr
    return done.stderr


def test_without_bubblewrap_it_says_what_to_install(one):
    said = refused(one, env={"PATH": str(one)}, says="apt-get install bubblewrap")
    assert "--trusted" in said and not (one / "report").exists()


def test_where_apparmor_forbids_it_it_names_the_profile(one):
    fake = one / "bin"
    fake.mkdir()
    (fake / "bwrap").write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    (fake / "bwrap").chmod(0o755)
    refused(one, env={"PATH": f"{fake}:{os.environ['PATH']}"}, says="docs/instructors.md has the profile")
    assert not (one / "report").exists()


def test_trusted_needs_no_sandbox_and_the_report_says_so(one):
    line, env = classroom.command(one / "class", one / "report", "--trusted")
    done = subprocess.run(line, env={**env, "PATH": str(one)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = classroom.read(one / "report")
    assert report.part("jane")["solved"]
    assert "WITHOUT a sandbox" in (one / "report" / "index.html").read_text("utf-8")


def test_a_folder_of_something_else_is_not_written_to(one):
    (one / "report").mkdir()
    (one / "report" / "thesis.txt").write_text("mine")
    refused(one, says="is not empty and holds no report")
    assert [file.name for file in (one / "report").iterdir()] == ["thesis.txt"]


def test_another_seed_is_another_report(killed):
    folder = killed["folder"]
    classroom_line, env = classroom.command(folder / "class", folder / "report", "--seed", "another")
    done = subprocess.run(classroom_line, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "take another --out" in done.stderr


def test_nothing_to_grade_is_one_line(one):
    shutil.rmtree(one / "class" / "jane")
    refused(one, says="no submission in")
