"""Lesson 05 in a browser: all of it runs, and its two widgets answer to the keyboard and fit their column."""

import pytest


@pytest.fixture(scope="module")
def lesson(open_notebook):
    lesson = open_notebook("notebooks/05_one_h100.ipynb")
    lesson.run_all()
    return lesson


def fits(widget) -> bool:
    """Nothing of it lies outside its box, where it would be cut off."""
    return widget.box.evaluate("box => box.scrollWidth <= box.clientWidth + 1")


def test_the_fit_explorer_refuses_fp8_and_a_longer_context(lesson, screenshots):
    explorer = lesson.widget("weights in", "cache", "cache in")
    explorer.wait_until_it_says("weights in int4")
    explorer.choose("weights in", "fp8")
    explorer.wait_until_it_says("does not fit, no context would fit")
    explorer.choose("weights in", "int4")
    explorer.move("context", 3)
    explorer.wait_until_it_says("does not fit, a shorter context would fit")
    assert fits(explorer)
    lesson.screenshot(screenshots / "fit_explorer.png")


def test_the_roofline_explorer_turns_from_bytes_to_flops(lesson, screenshots):
    explorer = lesson.widget("beside it", "prompt", "batch")
    explorer.wait_until_it_says("so memory binds: at least 2.56 ms")
    explorer.move("batch", 9)  # 512 sequences
    explorer.wait_until_it_says("decoding at batch 512")
    explorer.wait_until_it_says("so compute binds")
    assert fits(explorer)
    lesson.screenshot(screenshots / "roofline_explorer.png")
