"""Lesson 01 in a browser: all of it runs, and its three widgets answer to the keyboard, take an upload, and fit."""

import io
import re

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def lesson(open_notebook):
    lesson = open_notebook("notebooks/01_early_fusion.ipynb")
    lesson.run_all()
    return lesson


def fits(widget) -> bool:
    """Nothing of it lies outside its box, where it would be cut off."""
    return widget.box.evaluate("box => box.scrollWidth <= box.clientWidth + 1")


def test_the_tile_explorer_finds_the_seam_and_takes_an_uploaded_picture(lesson, screenshots):
    explorer = lesson.widget("picture", "width", "height")
    explorer.choose("picture", "one tile, 336 x 336")
    explorer.wait_until_it_says("336 x 336 pixels: 1 tile")
    explorer.move("width", 1)
    explorer.wait_until_it_says("337 x 336 pixels: a grid of 1 x 2 tiles")
    explorer.move("height", 1)
    explorer.wait_until_it_says("727 tokens: 5 x 144 patches + 7 marks")
    assert fits(explorer)
    lesson.screenshot(screenshots / "tile_explorer.png")

    png = io.BytesIO()
    Image.new("RGB", (1000, 340), "orange").save(png, "PNG")
    offer(explorer, "banner.png", png.getvalue())
    explorer.wait_until_it_says(re.compile(r"banner\.png: 1,000 x 340 pixels: a grid of 2 x 3 tiles"))
    offer(explorer, "text.png", b"no picture")
    explorer.wait_until_it_says(re.compile(r"text\.png: .*is no image"))


def offer(explorer, name: str, content: bytes):
    """Choose a file where the browser asks for one."""
    with explorer.page.expect_file_chooser() as asked:
        explorer.box.locator(".widget-upload").click()
    asked.value.set_files({"name": name, "mimeType": "image/png", "buffer": content})


def test_the_training_cost_follows_what_trains(lesson, screenshots):
    calculator = lesson.widget("model", "trains", "optimizer")
    calculator.choose("trains", "projector only")
    calculator.wait_until_it_says("20,971,520 of 108,641,793,536 parameters train")
    calculator.wait_until_it_says("65% of training jointly")
    calculator.move("pictures", -1)
    calculator.wait_until_it_says("there is nothing here to learn from")
    assert fits(calculator)
    lesson.screenshot(screenshots / "training_cost.png")


def test_the_microscope_asks_again_and_looks_at_another_token(lesson, screenshots):
    microscope = lesson.widget("place", "shape", "token", "layer", "head")
    microscope.choose("shape", "star")
    microscope.wait_until_it_says(re.compile("What colour is the circle"))
    microscope.write("question", "Where is the star?")
    microscope.keyboard.press("Enter")
    microscope.wait_until_it_says("Where is the star?")
    microscope.wait_until_it_says(re.compile("To write"))
    microscope.move("head", 1)
    microscope.wait_until_it_says("head 0")
    assert fits(microscope)
    lesson.screenshot(screenshots / "scene_microscope.png")
