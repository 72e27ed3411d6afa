"""The first lesson in a browser: all of it runs, and its scene composer is worked by keyboard alone.

Each test goes from what the composer shows when it begins: the lesson may have moved the controls before.
"""

import re

import pytest

from minillama4 import scenes

CONTROLS = ["place", "shape", "colour", "size", "digit", "question", "Ask", "language", "Suggest and ask"]


@pytest.fixture(scope="module")
def lesson(open_notebook):
    lesson = open_notebook("notebooks/00_start_here.ipynb")
    lesson.run_all()
    return lesson


@pytest.fixture
def composer(lesson):
    """With an object at the chosen place."""
    composer = lesson.widget(*CONTROLS)
    if composer.value("shape") == "nothing":
        composer.choose("shape", "circle")
    return composer


def description(composer) -> str:
    """What the caption must say of the object that the controls describe."""
    shape, colour, size, place = (composer.value(name) for name in ("shape", "colour", "size", "place"))
    item = scenes.Item(shape, colour, size, place, int(composer.value("digit")), 0, 0)
    return scenes.caption(scenes.Scene((item,), background=240), "en")


def test_an_arrow_key_moves_the_slider_and_the_caption_follows(composer):
    before = int(composer.value("digit"))
    composer.move("digit", -1 if before == 9 else 1)
    composer.wait_until_it_says(description(composer))
    assert int(composer.value("digit")) == (8 if before == 9 else before + 1)


def test_another_shape_is_chosen_by_arrow_keys(composer):
    before = composer.value("shape")
    composer.choose("shape", next(shape for shape in scenes.SHAPES if shape != before))
    assert composer.value("shape") != before
    composer.wait_until_it_says(description(composer))


def test_keys_in_a_dropdown_do_not_reach_the_notebook(composer, lesson):
    """JupyterLab's B adds a cell below, and its arrow down goes there."""
    cells = lesson.number_of_cells()
    composer.choose("colour", "red")
    composer.keyboard.press("b")
    composer.keyboard.press("ArrowDown")
    assert composer.focused() == "colour" and composer.value("colour") == "yellow"
    composer.wait_until_it_says(description(composer))
    assert lesson.number_of_cells() == cells


def test_the_tab_key_visits_the_controls_in_reading_order(composer):
    composer.focus(CONTROLS[0])
    visited = [composer.focused()]
    while visited[-1] != CONTROLS[-1] and len(visited) < 2 * len(CONTROLS):
        composer.keyboard.press("Tab")
        visited.append(composer.focused())
    assert list(dict.fromkeys(visited)) == CONTROLS  # a slider's number is a field of its own


def test_the_picture_is_described_to_those_who_cannot_see_it(composer):
    composer.wait_until_it_says(description(composer))
    caption = composer.says.inner_text().splitlines()[0]
    assert composer.picture.get_attribute("alt") == f"The scene: {caption}."


def test_the_button_asks(composer):
    composer.write("question", "How many objects are there?")
    composer.press("Ask")
    composer.wait_until_it_says(re.compile(r"How many objects are there\?\s+→\s+\w"))


def test_enter_asks_what_has_just_been_typed(composer):
    composer.write("question", "What is at the top right?")
    composer.keyboard.press("Enter")
    composer.wait_until_it_says(re.compile(r"What is at the top right\?\s+→\s+\w"))
