"""Lesson 04 in a browser: all of it runs, and its three widgets answer to the keyboard and fit their column."""

import re

import pytest


@pytest.fixture(scope="module")
def lesson(open_notebook):
    lesson = open_notebook("notebooks/04_distillation.ipynb")
    lesson.run_all()
    return lesson


def fits(widget) -> bool:
    """Nothing of it lies outside its box, where it would be cut off."""
    return widget.box.evaluate("box => box.scrollWidth <= box.clientWidth + 1")


def test_the_lab_mixes_hard_and_soft_at_another_temperature(lesson, screenshots):
    lab = lesson.widget("token", "KL", "temperature", "soft weight")
    lab.wait_until_it_says("At temperature 1 the teacher's entropy")
    lab.move("temperature", 1)
    lab.wait_until_it_says(re.compile(r"At temperature (?!1 )"))
    lab.move("soft weight", 10)
    lab.wait_until_it_says("0.00 · hard + 1.00 · soft")
    lab.choose("KL", "student ‖ teacher (reverse)")
    lab.wait_until_it_says("KL(student ‖ teacher)")
    assert fits(lab)
    lesson.screenshot(screenshots / "temperature_lab.png")


def test_the_schedule_explorer_shows_another_schedule(lesson, screenshots):
    explorer = lesson.widget("schedule", "documents", "score")
    explorer.choose("schedule", "soft only")
    explorer.wait_until_it_says(re.compile("soft only"))
    explorer.choose("score", "answers right")
    explorer.wait_until_it_says(re.compile("answers right"))
    assert fits(explorer)
    lesson.screenshot(screenshots / "schedule_explorer.png")


def test_the_calculator_finds_when_serving_the_teacher_pays(lesson, screenshots):
    calculator = lesson.widget("student", "weights in", "card")
    calculator.wait_until_it_says("Llama 4 Maverick saves")
    calculator.write("write M a day", "10")
    calculator.keyboard.press("Tab")
    calculator.wait_until_it_says("serve the teacher")
    assert fits(calculator)
    lesson.screenshot(screenshots / "deploy_or_distil.png")
