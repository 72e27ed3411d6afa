"""`make test-class`: a class of 200 in one run, and one of 24 that is killed ten times."""

import random
import re
import time

import attacks
import classroom
import pytest
from classroom import NAME, RIGHT, notebook, save, wrong_answers
from test_resume import class_of, kill_when, nobody_left, verdicts

pytestmark = pytest.mark.slow

SIZE = 200
MOST_CPU = 6.0  # seconds a notebook, beside what its own code takes


def test_200_submissions_in_one_run(sandbox, tmp_path, capsys):
    expected = {}
    plain = attacks.attacks("/report", "/solutions", "/other", 9, str(tmp_path / "mark"))
    for name, attack in plain.items():
        save(attack.made, tmp_path / "class" / name / f"{NAME}.ipynb")
        expected[name] = attack.solved, attack.mistake
    for name, (source, mistake) in wrong_answers().items():
        save(notebook(source), tmp_path / "class" / f"wrong {name}" / f"{NAME}.ipynb")
        expected[f"wrong {name}"] = mistake is None, mistake or ""
    broken = RIGHT.replace(".type_as(x)", "")
    n = 0
    while len(expected) < SIZE:
        made, verdict = [
            (notebook(RIGHT, before=f"# {n}"), (True, "")),
            (notebook(after=f"# {n}"), (False, "not written")),
            (notebook(broken, before=f"# {n}"), (False, "")),  # right in float32 alone
        ][n % 3]
        save(made, tmp_path / "class" / f"learner {n}" / f"{NAME}.ipynb")
        expected[f"learner {n}"] = verdict
        n += 1
    start = time.monotonic()
    report = classroom.grade(tmp_path / "class", tmp_path / "report", "--seconds", 6, "--memory", 2)
    seconds = time.monotonic() - start
    cpu = float(re.search(r"([\d.]+) s of CPU", report.printed)[1])
    got = verdicts(report)
    wrong = {
        name: (got.get(name), verdict) for name, verdict in expected.items()
        if name not in got or got[name][0] != verdict[0] or (verdict[1] and got[name][1] != verdict[1])
    }  # fmt: skip
    with capsys.disabled():
        print(
            f"\n{SIZE - len(wrong)} of {SIZE} verdicts right in {seconds:.0f} s; {cpu} s of CPU a notebook", flush=True
        )
    assert wrong == {} and len(got) == SIZE
    assert cpu <= MOST_CPU
    assert nobody_left(tmp_path / "report")


def test_killed_ten_times_nothing_is_lost_doubled_or_changed(sandbox, tmp_path, capsys):
    """Each time after a few more submissions and a random moment; a run that ends is checked, and another begun."""
    expected = class_of(24, tmp_path / "class")
    chance, kills, ends, kept = random.Random(9), 0, 0, []
    while kills < 10:
        report = tmp_path / f"report {ends}"
        line, env = classroom.command(tmp_path / "class", report, "-j", 2)
        seen = {}
        while kills < 10:
            moment = after(report, len(seen) + chance.randint(0, 3), chance.uniform(0, 2))
            if not kill_when(line, env, moment):
                break  # it had come to its end
            kills += 1
            assert nobody_left(report)
            now = stored(report)
            assert {name: now.get(name) for name in seen} == seen, "what was stored was lost or changed"
            seen = now
            kept.append(sum(name.startswith("graded/") for name in seen))
        assert verdicts(classroom.grade(tmp_path / "class", report, "-j", 2)) == expected
        now = stored(report)
        assert {name: now.get(name) for name in seen} == seen
        assert sum(name.startswith("rows/") for name in now) == 24
        ends += 1
    with capsys.disabled():
        print(f"\nkilled {kills} times, with {kept} of 24 submissions run; {ends} times to the end", flush=True)
    assert any(0 < run < 24 for run in kept), "no kill fell into the middle of a run"


def after(report, count: int, seconds: float):
    """Is it `seconds` since `count` things were stored?"""
    since = []

    def moment() -> bool:
        if not since and len(stored(report)) >= count:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() > since[0] + seconds

    return moment


def stored(report) -> dict[str, bytes]:
    """What a run keeps of each submission: the arrays that its code gave (`graded`), and its row (`rows`)."""
    files = [*(report / "run" / "graded").glob("*.json"), *(report / "run" / "rows").glob("*.json")]
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}
