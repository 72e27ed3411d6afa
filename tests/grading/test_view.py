"""What the sandbox sees of each lesson's exercises is enough to observe answers, and holds no judge."""

import ast
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillama4.course import exercise
from minillama4.course.grading import view

CHECKS = sorted(file.stem for file in Path(exercise.__file__).with_name("checks").glob("[!_]*.py"))
LESSONS = sorted({stem.partition("_")[0] for stem in CHECKS})
LOOK = """
import importlib, inspect, sys, torch
inputs = torch.load(sys.argv[1], weights_only=False)
for stem, drawn in inputs.items():
    module = importlib.import_module("minillama4.course.checks." + stem)
    assert module.__file__.startswith(sys.argv[2]), module.__file__
    assert isinstance(module.observe(lambda *arguments, **named: None, drawn), dict)
    if hasattr(module, "planted"):  # what a learner's code is given must run as well
        suspect = module.planted(1)
        try:
            suspect(*[torch.ones(2, 2)] * len(inspect.signature(suspect).parameters))
        except (NameError, AttributeError, ImportError):
            raise
        except Exception:
            pass  # it does not like ones
"""


@pytest.mark.parametrize("lesson", LESSONS)
def test_answers_can_be_observed_in_a_view_of_one_lesson(lesson, tmp_path):
    stems = [stem for stem in CHECKS if stem.partition("_")[0] == lesson]
    modules = {stem: exercise.find(stem.replace("_", "-")).module for stem in stems}
    folder = view.build(tmp_path / "view", tuple(stem.replace("_", "-") for stem in stems))
    torch.save({stem: module.draw(random.Random(0)) for stem, module in modules.items()}, tmp_path / "inputs.pt")
    command = [sys.executable, "-s", "-c", LOOK, str(tmp_path / "inputs.pt"), str(folder)]
    done = subprocess.run(command, env={"PYTHONPATH": str(folder)}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    course = folder / "minillama4" / "course"
    for file in (*course.glob("*.py"), *(course / "checks").glob("*.py")):
        if file.name not in view.COURSE:
            names = {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
            assert not names & {"judge", "draw"}, file


def test_what_observing_imports_is_cut_down_to_it_also_twice_removed(tmp_path, monkeypatch):
    sources = {
        "checks/one": """
from .two import half
from .. import three

def observe(f, x):
    return half(three.whole(x))

def judge(x, seen):
    return half(0)
""",
        "checks/two": """
from ..three import part

def half(x):
    return part(x)

def other():
    pass
""",
        "three": """
def whole(x):
    return x

def part(x):
    return x / 2

def answer():
    pass
""",
    }
    for name, source in sources.items():
        file = tmp_path / "course" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    monkeypatch.setattr(view, "PACKAGE", tmp_path)
    texts = view.observing([tmp_path / "course" / "checks" / "one.py"])
    defined = {
        file.stem: {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
        for file, text in texts.items()
    }
    assert defined == {"one": {"observe"}, "two": {"half"}, "three": {"whole", "part"}}
