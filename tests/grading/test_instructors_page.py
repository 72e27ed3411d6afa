"""Every command of docs/instructors.md, in order, in a clone of its own."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import classroom
import pytest

from minillama4.course.grading import sandbox as room

PAGE = (classroom.ROOT / "docs" / "instructors.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow  # nbgrader alone takes ten seconds
def test_every_command_works_in_order(sandbox, tmp_path):
    clone = classroom.free_copy(tmp_path)
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copyfile(classroom.ROOT / name, clone / name)
        os.utime(clone / name, (0, 0))  # older than `.venv/.ready`, so that `make` does not set up again
    for file in (classroom.ROOT / "solutions").glob("*.ipynb"):
        shutil.copyfile(file, clone / "solutions" / file.name)
    (clone / ".venv").symlink_to(classroom.ROOT / ".venv")
    commands = "\n".join(blocks("bash"))
    done = subprocess.run(
        ["bash", "-exc", commands], cwd=clone, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("report", "report-of-zip", "report-of-appeal"):
        report = classroom.read(clone / name)
        assert not report.part("jane")["solved"]
        assert name == "report-of-appeal" or report.part("bob")["solved"]
    assert len(list((clone / "feedback").rglob("*.ipynb"))) == 2
    assert list((clone / "class" / "release" / "start").glob("*.ipynb")) and list((clone / "exercises").glob("*.ipynb"))


def test_the_packages_to_install_hold_the_tools_that_are_used():
    packages = re.search(r"apt-get install (.+)", "\n".join(blocks("sh")))[1].split()
    if shutil.which("dpkg") is None or not all(map(shutil.which, room.TOOLS)):
        pytest.skip("not a Debian with these tools")
    for tool in room.TOOLS:
        path = Path(shutil.which(tool)).resolve()
        owner = subprocess.run(["dpkg", "-S", f"*/{path.name}"], capture_output=True, text=True).stdout
        assert any(f"{package}:" in owner or f"{package}, " in owner for package in packages), (tool, owner)


def test_the_messages_point_at_a_page_that_says_it():
    assert "profile bwrap /usr/bin/bwrap" in PAGE and "userns," in PAGE and "apparmor_parser -r" in PAGE
    for option in ("--out", "--seed", "--feedback", "--copies", "--trusted", "--seconds", "-j"):
        assert option in PAGE
