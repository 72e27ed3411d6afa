"""Lesson 02 in a browser: all of it runs, and its three widgets answer to the keyboard."""

import pytest


@pytest.fixture(scope="module")
def lesson(open_notebook):
    lesson = open_notebook("notebooks/02_irope.ipynb")
    lesson.run_all()
    return lesson


def test_who_sees_whom_follows_its_sliders(lesson, screenshots):
    who = lesson.widget("layer", "chunk size", "token")
    who.wait_until_it_says("Token 8 sees 1 token: itself.")
    who.move("token", -1)
    who.wait_until_it_says("Token 7 sees 8 tokens: 0 to 7.")
    who.move("chunk size", 1)
    who.wait_until_it_says("chunks of 9")
    lesson.screenshot(screenshots / "who_sees_whom.png")


def test_the_memory_of_a_longer_context(lesson, screenshots):
    context = lesson.widget("preset", "cache", "context")
    context.wait_until_it_says("KV cache 49.125 GiB")
    context.move("context", 10)  # to the right end
    context.wait_until_it_says("KV cache 481.125 GiB")
    lesson.screenshot(screenshots / "context_memory.png")


def test_another_pair_turns_at_another_speed(lesson, screenshots):
    explorer = lesson.widget("rotary pair", "distance", "margin")
    explorer.wait_until_it_says("Pair 40 (channels 80 and 81)")
    explorer.move("rotary pair", 1)
    explorer.wait_until_it_says("Pair 41 (channels 82 and 83)")
    lesson.screenshot(screenshots / "rotation_explorer.png")
