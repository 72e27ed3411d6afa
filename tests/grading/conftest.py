"""One class of attackers, graded once; every test looks at the same report."""

import socket
import time
from types import SimpleNamespace

import attacks
import classroom
import pytest


@pytest.fixture(scope="session")
def sandbox():
    classroom.needs_sandbox()


@pytest.fixture(scope="session")
def attacked(sandbox, tmp_path_factory):
    """The report on a class of attackers, and what they went for."""
    folder = tmp_path_factory.mktemp("attacked")
    submissions, out, marks = folder / "class", folder / "report", folder / "marks"
    marks.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        bystander = submissions / "a bystander" / f"{classroom.NAME}.ipynb"
        found = attacks.attacks(
            str(out), str(classroom.ROOT / "solutions"), str(bystander.parent), server.getsockname()[1],
            str(marks / "was-here"),
        )  # fmt: skip
        classroom.save(classroom.notebook(classroom.RIGHT), bystander)
        for name, attack in found.items():
            classroom.save(attack.made, submissions / name / f"{classroom.NAME}.ipynb")
            for beside, content in attack.files.items():
                (submissions / name / beside).write_bytes(content)
        large = submissions / "200 MB" / f"{classroom.NAME}.ipynb"
        large.parent.mkdir()
        with open(large, "wb") as file:
            file.truncate(200_000_000)
        link = submissions / "symlink" / f"{classroom.NAME}.ipynb"
        link.parent.mkdir()
        link.symlink_to(classroom.ROOT / "solutions" / f"{classroom.NAME}.ipynb")
        (submissions / "linked folder").symlink_to(classroom.ROOT / "solutions")
        start = time.monotonic()
        report = classroom.grade(submissions, out, "--seconds", 6, "--memory", 2, "-j", 2, "--seed", "attack")
        try:
            connected = bool(server.accept())
        except BlockingIOError:
            connected = False
    time.sleep(0.5)
    return SimpleNamespace(
        report=report, attacks=found, connected=connected, marks=list(marks.iterdir()), rooms=classroom.rooms(out),
        seconds=time.monotonic() - start, out=out, folder=submissions,
    )  # fmt: skip
