"""What a stranger relies on before reading any code: the imports, the pins, the README and the set-up."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from minillama4.course import setup_env

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]

PLANTS_PLACES = {  # to see them found
    *("tests/notebooks/test_guards.py", "tests/notebooks/test_course_notebooks.py", "tests/unit/test_observe.py"),
}
NOT_FOR_A_MODEL = ["matplotlib", "ipywidgets", "IPython", "jupyterlab", "transformers", "accelerate"]
PUBLIC_NAMES = [
    *("Llama4", "Llama4Config", "load_checkpoint", "save_checkpoint", "load_tokenizer"),
    *("ask", "generate", "stream", "trace"),
]

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def make(*arguments: str) -> subprocess.CompletedProcess:
    """`make` as from a shell of its own: pytest may itself have been started by make."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


# ----------------------------------------------------------------------------------------------------------------------
# Importing


def test_a_model_runs_where_no_jupyter_plotting_or_transformers_is_installed():
    """Every public name is there, and a model answers, while importing any of these packages fails."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({NOT_FOR_A_MODEL}))  # None: an import of it raises ImportError
import torch, minillama4
missing = [name for name in {PUBLIC_NAMES} if not hasattr(minillama4, name)]
assert not missing, f"not in minillama4: {{missing}}"
model = minillama4.Llama4(minillama4.Llama4Config.preset("mini-scout"))
print(tuple(model(torch.zeros(1, 3, dtype=torch.int64)).shape))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["(1,", "3,", "1024)"]


def test_import_does_not_pull_in_the_lesson_side():
    """They are installed here, so a guarded import would pass the test above and still cost seconds. So does dynamo."""
    names = [*NOT_FOR_A_MODEL, "torch._dynamo"]
    code = f"import json, sys, minillama4; print(json.dumps([m for m in {names} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


# ----------------------------------------------------------------------------------------------------------------------
# Versions


PINNED = [  # not triton: a torch with CUDA names the one version that it works with
    line for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"] if not line.startswith("triton")
]


@pytest.mark.parametrize("line", PINNED)
def test_every_dependency_has_a_pin_inside_its_range(line):
    requirement = Requirement(line)
    pin = pins().get(canonicalize_name(requirement.name))
    assert pin is not None, f"constraints.txt has no pin for {requirement.name}"
    assert requirement.specifier.contains(pin), f"pyproject.toml wants {line}, constraints.txt pins {pin}"


# ----------------------------------------------------------------------------------------------------------------------
# The README and the Makefile say the same


@needs_make
def test_readme_shows_two_commands_for_a_fresh_machine_and_make_knows_them():
    commands = re.findall(r"^make (\S+)", readme_blocks("bash")[0], re.MULTILINE)
    assert commands == ["lab", "test"]
    for command in commands:
        dry_run = make("--dry-run", command)
        assert dry_run.returncode == 0, dry_run.stderr


@needs_make
def test_make_test_runs_every_folder_of_tests():
    """It names none, and then pytest takes what pyproject.toml says."""
    line = next(line for line in make("--dry-run", "test").stdout.splitlines() if " pytest " in line)
    assert not [word for word in line.partition(" pytest ")[2].split() if (ROOT / word.partition("::")[0]).exists()]
    settings = PYPROJECT["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == ["tests"] and "--ignore" not in line + str(settings)


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_make_lint_finds_nothing(command):
    ruff = [sys.executable, "-m", "ruff", *command.split()]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_minillama4_command_in_the_readme_exists(monkeypatch, capsys):
    from minillama4.cli import main

    commands = re.findall(r"^minillama4 ([a-z]+)", "".join(readme_blocks("bash")), re.MULTILINE)
    assert commands == [
        "ask",
        "train",
        "bench",
        "bench",
        "budget",
        "demo",
        "needle",
        "doctor",
        "check",
        "progress",
        "reset",
        "grade",
    ]
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["minillama4", command, "--help"])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0, f"minillama4 {command}: {capsys.readouterr().err}"


def test_the_python_example_of_the_readme_runs(monkeypatch, tmp_path, capsys):
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(picture).ellipse((20, 20, 70, 70), fill="red")
    picture.save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(readme_blocks("python")[0], "README.md", "exec"), {})
    answer, *explanation = capsys.readouterr().out.splitlines()
    assert answer.strip() and "".join(explanation).strip()


# ----------------------------------------------------------------------------------------------------------------------
# Setting up


@needs_make
def test_a_second_make_env_takes_no_time():
    if make("--question", ".venv/.ready").returncode:
        pytest.skip(".venv was not made by `make env`, or is older than pyproject.toml or constraints.txt")
    start = time.monotonic()
    assert make("env").returncode == 0
    assert time.monotonic() - start < 2


def test_a_silent_cpu_index_is_given_up_in_time():
    """A server that takes the connection and never answers, which no connection timeout would notice."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        assert not setup_env.answers(f"http://127.0.0.1:{silent.getsockname()[1]}/", seconds=1.0)
        assert time.monotonic() - start < 2
    assert setup_env.PATIENCE <= 5


def test_no_file_names_a_place_on_somebodys_machine():
    """Home folders and the like, in all files that git tracks or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    place = re.compile(rb"(?<![\w.~})/*-])/(?:root|home|Users|work|opt|mnt)/[\w.-]+|[A-Z]:\\Users\\\w+")
    names = set(map(os.fsdecode, listed.stdout.split(b"\0"))) - PLANTS_PLACES - {""}
    paths = [ROOT / name for name in names]
    text = [path for path in paths if path.is_file() and path.suffix not in {".safetensors", ".png", ".jpg"}]
    found = {str(path.relative_to(ROOT)): place.findall(path.read_bytes()) for path in text}
    assert {name: places for name, places in found.items() if places} == {}
