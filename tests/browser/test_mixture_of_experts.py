"""Lesson 03 in a browser: all of it runs, and its three widgets answer to the keyboard and fit their column."""

import re

import pytest


@pytest.fixture(scope="module")
def lesson(open_notebook):
    lesson = open_notebook("notebooks/03_mixture_of_experts.ipynb")
    lesson.run_all()
    return lesson


def fits(widget) -> bool:
    """Nothing of it lies outside its box, where it would be cut off."""
    return widget.box.evaluate("box => box.scrollWidth <= box.clientWidth + 1")


def test_the_microscope_goes_through_the_layers_and_takes_a_text(lesson, screenshots):
    microscope = lesson.widget("picture", "text", "layer")
    microscope.move("layer", 1)
    microscope.wait_until_it_says("layer 1: ")
    microscope.choose("picture", "no picture")
    microscope.wait_until_it_says(re.compile(r"layer 1: \d+ tokens; 8 experts"))
    before = microscope.says.inner_text()
    microscope.write("text", "Where is the star, and where is the circle that stands beside it?")
    microscope.keyboard.press("Enter")
    microscope.wait_until_it_says(re.compile(f"^(?!{re.escape(before)}).*layer 1: "))
    assert fits(microscope)
    lesson.screenshot(screenshots / "router_microscope.png")


def test_the_calculator_counts_what_its_fields_say(lesson, screenshots):
    calculator = lesson.widget("preset", "experts", "tokens")
    calculator.choose("preset", "Llama 4 Scout")
    calculator.wait_until_it_says("108,641,793,536 in all")
    calculator.move("tokens", 20)  # to the right end, wherever it was
    calculator.wait_until_it_says("A batch of 8,192 tokens touches 16.0 of 16")
    calculator.move("tokens", -13)
    calculator.wait_until_it_says("A batch of 1 token touches 1.0 of 16")
    calculator.write("experts", "32")
    calculator.keyboard.press("Tab")
    calculator.wait_until_it_says("32 experts")
    assert fits(calculator)
    lesson.screenshot(screenshots / "cost_calculator.png")


def test_the_balance_lab_shows_another_step(lesson, screenshots):
    lab = lesson.widget("cure", "strength", "step")
    lab.wait_until_it_says("Cure: none. Step 1999 of 1999")
    lab.move("step", -1)
    lab.wait_until_it_says("Step 1950 of 1999")
    lab.choose("cure", "auxiliary loss")
    lab.wait_until_it_says("Cure: auxiliary loss, coefficient 0.01")
    lab.move("strength", 1)
    lab.wait_until_it_says("Cure: auxiliary loss, coefficient 0.1")
    assert fits(lab)
    lesson.screenshot(screenshots / "balance_lab.png")
