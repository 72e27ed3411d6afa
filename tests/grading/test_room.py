"""What a room holds, wherever this Python lies."""

import subprocess

import pytest

from minillama4.course.grading.sandbox import FIRST_UID, Sandbox


@pytest.fixture
def room(sandbox, tmp_path, monkeypatch):
    """run(*words) -> what a command in the room of a Python that lies in `tmp_path`, below /tmp, printed."""
    places = [*Sandbox(10, 2**31, [])._places(), tmp_path / "python"]
    (tmp_path / "python").mkdir(mode=0o755)
    (tmp_path / "python" / "library.py").write_text("it is here")
    (tmp_path / "python" / "library.py").chmod(0o666)  # so that the room alone refuses to change it
    (tmp_path / "other").write_text("not for learners")
    monkeypatch.setattr(Sandbox, "_places", lambda self: places)

    def run(*words):
        command = Sandbox(10, 2**31, [])._command([], list(map(str, words)), FIRST_UID, 60)
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    return run


def test_a_python_below_tmp_is_seen_and_cannot_be_changed(room, tmp_path):
    assert room("cat", tmp_path / "python" / "library.py").stdout == "it is here"
    assert "Read-only" in room("touch", tmp_path / "python" / "library.py").stderr


def test_nothing_else_of_tmp_is_seen(room, tmp_path):
    assert room("ls", tmp_path).stdout.split() == ["python"]
    assert room("touch", "/tmp/own").returncode == 0
