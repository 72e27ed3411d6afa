"""Widgets are driven here as a learner drives them: a control moves, and text and picture follow."""

import base64
import io
import random
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import ipywidgets
import pytest
import torch
import traitlets
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from minillama4 import scenes
from minillama4.config import Llama4Config
from minillama4.course import figures
from minillama4.course.widgets import frame, scene_composer
from minillama4.course.widgets.frame import Shown, View
from minillama4.course.widgets.scene_composer import NOTHING, START, SceneComposer


def square(k: int) -> Shown:
    if k == 5:
        raise ValueError("5 is < 6 & not allowed")
    return Shown(f"k = {k}\nk² = {k * k}", Image.new("RGB", (k + 1, 1)), f"a line of {k + 1} pixels")


def pixels(tag: str) -> Image.Image:
    """The picture inside an <img> tag."""
    return Image.open(io.BytesIO(base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', tag)[1])))


def parsed(text: str) -> tuple[list, str]:
    """(tags with their attributes, the words between them), as a browser reads it"""
    tags, words = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda name, attributes: tags.append((name, attributes))
    parser.handle_data = words.append
    parser.feed(text)
    parser.close()
    return tags, "".join(words)


@pytest.fixture
def view() -> View:
    return View(square, {"k": ipywidgets.IntSlider(2, 0, 9), "again": ipywidgets.Button(description="Again")})


# ----------------------------------------------------------------------------------------------------------------------
# The frame


def test_a_widget_shows_something_before_anything_is_moved(view):
    assert view.says() == "k = 2\nk² = 4" and pixels(view.picture.value).width == 3


def test_moving_a_control_changes_text_and_picture(view):
    view.controls["k"].value = 7
    assert view.says() == "k = 7\nk² = 49" and pixels(view.picture.value).width == 8
    assert 'alt="a line of 8 pixels"' in view.picture.value


def test_bad_input_is_text_and_the_next_move_recovers(view):
    assert view.drive(k=5) == "5 is < 6 & not allowed" and view.picture.value == ""
    assert view.drive(k=6) == "k = 6\nk² = 36" and pixels(view.picture.value).width == 7


def test_text_is_shown_as_it_is_and_never_as_html():
    text = '<b>bold</b> & "quoted" </div><script>1</script>'
    view = View(lambda k: Shown(text, Image.new("RGB", (1, 1)), text), {"k": ipywidgets.IntSlider()})
    assert view.says() == text
    tags, words = parsed(view.text.value)
    assert [name for name, _ in tags] == ["div"] and words == text
    ((name, attributes),), words = parsed(view.picture.value)
    assert name == "img" and dict(attributes)["alt"] == text and words == ""


@pytest.mark.parametrize("picture", [Image.new("RGB", (1, 1)), Figure()])
@pytest.mark.parametrize("alt", ["", "  "])
def test_a_picture_without_alt_text_is_refused(picture, alt):
    for use in (lambda: frame.img_tag(picture, alt), lambda: frame.still(Shown("text", picture, alt))):
        with pytest.raises(ValueError, match="needs alt text"):
            use()


def test_a_still_is_the_widgets_picture_with_its_alt_text():
    bundle, metadata = frame.still(square(3))._repr_mimebundle_()
    data = bundle["image/png"]
    assert Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data)).width == 4
    assert metadata["image/png"]["alt"] == "a line of 4 pixels"


def test_drive_moves_controls_one_after_the_other_and_returns_the_text():
    moved = []
    controls = {name: ipywidgets.IntSlider(0, 0, 9) for name in ("b", "a")}
    view = View(lambda a, b: moved.append((a, b)) or Shown(f"{a} {b}"), controls)
    assert view.drive(a=1, b=2) == "1 2" and moved == [(0, 0), (1, 0), (1, 2)]


def test_drive_clamps_as_the_slider_does(view):
    assert view.drive(k=99) == "k = 9\nk² = 81"
    assert view.drive(k=-99) == "k = 0\nk² = 0"


def test_drive_presses_a_button_as_often_as_asked(view):
    pressed = []
    view.controls["again"].on_click(pressed.append)
    view.drive(again=3)
    assert len(pressed) == 3


def test_a_button_shows_again(view):
    shown = []
    view.show = lambda k: shown.append(k) or Shown("pressed")
    assert view.drive(again=1) == "pressed" and shown == [2]


def test_drive_refuses_a_control_that_is_not_there(view):
    with pytest.raises(ValueError, match="there is no control 'z'; there are k, again"):
        view.drive(z=1)


def test_controls_can_share_a_row():
    controls = {name: ipywidgets.IntSlider() for name in "abc"}
    view = View(lambda **_: Shown(""), controls, ("a b", "c"))
    row, last, *_ = view.box.children
    assert row.children == (controls["a"], controls["b"]) and last is controls["c"]


def test_gradients_are_off_in_a_callback_on_every_thread():
    on = []
    view = View(lambda k: on.append(torch.is_grad_enabled()) or Shown(""), {"k": ipywidgets.IntSlider()})
    view.drive(k=1)
    thread = threading.Thread(target=view.drive, kwargs={"k": 2})  # as newer versions of JupyterLab do
    thread.start()
    thread.join()
    assert on == [False] * 3 and torch.is_grad_enabled()


def test_two_threads_at_once_are_shown_one_after_the_other():
    inside, most = [], []

    def slow(a, b):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()
        return Shown(f"{a} {b}", Image.new("RGB", (a + 1, b + 1)), "a box")

    view = View(slow, {name: ipywidgets.IntSlider(0, 0, 30) for name in "ab"})

    def move(name):
        for value in range(31):
            view.controls[name].value = value

    threads = [threading.Thread(target=move, args=name) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert view.says() == "30 30" and pixels(view.picture.value).size == (31, 31)


def test_an_error_in_the_function_does_not_leave_the_widget_locked(view):
    def fails(k):
        raise ZeroDivisionError

    view.show = fails
    with pytest.raises(ZeroDivisionError):
        view.drive(k=3)
    view.show = square
    thread = threading.Thread(target=view.drive, kwargs={"k": 4}, daemon=True)
    thread.start()
    thread.join(5)
    assert view.says() == "k = 4\nk² = 16"


def test_without_a_kernel_and_for_nbval_there_is_its_text_and_nothing_that_changes_by_itself():
    bundles = []
    for _ in range(2):
        view = View(square, {"k": ipywidgets.IntSlider(3)})
        bundles.append(view._repr_mimebundle_())
    first, second = (bundle["text/plain"] for bundle in bundles)
    assert first == second == "View, a widget: run this notebook to use it\nk = 3\nk² = 9"
    assert "application/vnd.jupyter.widget-view+json" in bundles[0]


def test_nothing_is_printed(capsys):
    View(square, {"k": ipywidgets.IntSlider(3)}).drive(k=4)
    SceneComposer().drive(shape="star")
    assert capsys.readouterr() == ("", "")


MOVES = {  # every widget, and how a learner moves it
    "balance_lab.BalanceLab": dict(cure="aux", strength=0.1, step=0),
    "context_memory.ContextMemory": dict(preset="maverick", context=2**17),
    "cost_calculator.CostCalculator": dict(preset="maverick", batch=64),
    "deploy_or_distil.DeployOrDistil": dict(written=100.0, gap=3.0),
    "fit_explorer.FitExplorer": dict(model="maverick", context=2**20),
    "roofline_explorer.RooflineExplorer": dict(model="maverick", batch=8),
    "rotation_explorer.RotationExplorer": dict(pair=3),
    "router_microscope.RouterMicroscope": dict(layer=2),
    "scene_composer.SceneComposer": dict(place="top left", shape="star"),
    "scene_microscope.SceneMicroscope": dict(suggest=1),
    "schedule_explorer.ScheduleExplorer": dict(arm="ramp", measure="caption_loss"),
    "temperature_lab.TemperatureLab": dict(temperature=8.0, soft_weight=1.0),
    "tile_explorer.TileExplorer": dict(picture="one tile, 336 x 336", width=337),
    "training_cost.TrainingCost": dict(preset="maverick", batch=64),
    "who_sees_whom.WhoSeesWhom": dict(kind="meta", mode="decode"),
}


def test_no_widget_prints_or_touches_pyplot():
    """A callback on another thread would draw on whatever figure pyplot then has, and print into whatever cell."""
    code = f"""
import contextlib, importlib, io, sys
from minillama4.course import figures
from minillama4.course.widgets import frame
frame.still(figures.layer_map("mini-scout"))
for name, moves in {MOVES!r}.items():
    module, _, kind = name.partition(".")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        getattr(importlib.import_module("minillama4.course.widgets." + module), kind)().drive(**moves)
    if printed.getvalue() or "matplotlib.pyplot" in sys.modules:
        sys.exit(name + " prints or touches pyplot: " + printed.getvalue())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_every_widget_is_moved_there():
    """All modules of the folder but the frame and what other widgets draw with."""
    modules = {file.stem for file in Path(frame.__file__).parent.glob("*.py")} - {"__init__", "frame", "scene_squares"}
    assert modules == {name.partition(".")[0] for name in MOVES}


# ----------------------------------------------------------------------------------------------------------------------
# Scene composer: the functions

SCENE = scenes.Scene(START, background=240)
EMPTY = scenes.Scene((), background=240)


def test_put_adds_replaces_and_clears_and_leaves_the_scene_it_was_given():
    added = scene_composer.put(SCENE, "top middle", "cross", "green", "small", 4)
    new = scenes.Item("cross", "green", "small", "top middle", 4, 0, 0)
    assert added.items == (START[0], new, START[2], START[1])  # in reading order
    replaced = scene_composer.put(added, "top middle", "star", "red", "large", 5)
    assert [item.shape for item in replaced.items] == ["circle", "star", "star", "square"]
    assert scene_composer.put(added, "top middle", NOTHING, "green", "small", 4).items == (START[0], START[2], START[1])
    assert scene_composer.put(EMPTY, "top left", NOTHING, "red", "small", 0) == EMPTY
    assert SCENE == scenes.Scene(START, background=240) and added.background == 240


@pytest.mark.parametrize("language", list(scene_composer.LANGUAGES.values()))
def test_suggested_questions_are_about_this_scene_and_their_answer_is_known(language):
    asked = [scene_composer.suggest(SCENE, language, number) for number in range(40)]
    assert asked == [scene_composer.suggest(SCENE, language, number) for number in range(40)]
    assert {question.kind for question in asked} == set(scenes.KINDS)
    assert {question.language for question in asked} == {language}
    assert all(question.answer in question.choices for question in asked)
    assert len({question.text for question in asked}) > 10


def test_of_an_empty_canvas_one_can_still_ask_how_many():
    for number in range(20):
        question = scene_composer.suggest(EMPTY, "en", number)
        assert question.kind == "count" and question.answer == "0"


def test_a_scene_is_shown_with_its_words_and_what_was_asked():
    seen = scene_composer.shown(SCENE, "How many?  →  3")
    assert seen.text.startswith(scenes.caption(SCENE, "en")) and seen.text.endswith("How many?  →  3")
    assert seen.alt == f"The scene: {scenes.caption(SCENE, 'en')}."
    assert seen.picture.tobytes() == scenes.render(SCENE, seen.picture.width // scenes.WIDTH).tobytes()
    assert seen.picture.width >= 4 * scenes.WIDTH  # for people; the model sees every pixel of a smaller one
    assert scene_composer.shown(EMPTY).text == "an empty canvas"


# ----------------------------------------------------------------------------------------------------------------------
# Scene composer: the widget


@pytest.fixture
def asked(monkeypatch) -> list:
    """(picture, question) of every question; the answers come from here, and no trained weights decide a test."""
    calls = []

    def ask(picture, question, model):
        if not question.strip():
            raise ValueError("the question is empty")
        calls.append((picture, question))
        return "3"

    monkeypatch.setattr(scene_composer, "ask", ask)
    return calls


@pytest.fixture
def composer(asked) -> SceneComposer:
    return SceneComposer()


def values(composer: SceneComposer) -> dict:
    return {name: composer.controls[name].value for name in ("place", "shape", "colour", "size", "digit")}


def at(composer: SceneComposer, place: str) -> scenes.Item | None:
    return next((item for item in composer.scene.items if item.place == place), None)


def tail(said: str) -> str:
    """What was asked last and the answer, without their layout and invisible marks."""
    words = " ".join("".join(letter for letter in said if letter.isprintable() or letter.isspace()).split())
    return words.rpartition(" ".join(said.splitlines()[0].split()))[2].strip()


def test_it_starts_with_the_first_object_in_hand_and_asks_nothing(composer, asked):
    assert composer.scene.items == tuple(sorted(START, key=lambda item: scenes.PLACES.index(item.place)))
    first = START[0]
    assert values(composer) == {key: getattr(first, key) for key in ("place", "shape", "colour", "size", "digit")}
    assert composer.says() == scenes.caption(composer.scene, "en") and asked == []


def test_choosing_a_place_brings_what_stands_there_and_alters_nothing(composer):
    before = composer.scene
    for item in random.Random(0).choices(START, k=12):
        composer.drive(place=item.place)
        assert values(composer) == {key: getattr(item, key) for key in ("place", "shape", "colour", "size", "digit")}
        assert composer.scene == before and composer.says() == scenes.caption(before, "en")


def test_choosing_an_empty_place_says_nothing_stands_there_and_a_shape_puts_it_there(composer):
    before = composer.scene
    composer.drive(place="bottom right")
    assert composer.controls["shape"].value == NOTHING and composer.scene == before
    composer.drive(digit=6, colour="green", size="small")
    assert composer.scene == before
    said = composer.drive(shape="triangle")
    assert at(composer, "bottom right") == scenes.Item("triangle", "green", "small", "bottom right", 6, 0, 0)
    assert len(composer.scene.items) == 4 and said == scenes.caption(composer.scene, "en")
    picture = pixels(composer.picture.value).convert("RGB")
    assert picture.tobytes() == scene_composer.shown(composer.scene).picture.tobytes()


@pytest.mark.parametrize("name, value", [("shape", "cross"), ("colour", "orange"), ("size", "small"), ("digit", 8)])
def test_each_control_changes_its_own_attribute_of_the_object_in_hand(composer, name, value):
    before = at(composer, "top left")
    composer.drive(**{name: value})
    assert at(composer, "top left") == replace(before, **{name: value})


def test_the_digit_is_clamped_and_an_unknown_shape_refused(composer):
    composer.drive(digit=42)
    assert at(composer, "top left").digit == 9
    with pytest.raises(traitlets.TraitError):
        composer.drive(shape="hexagon")
    assert at(composer, "top left").shape == "circle"


def test_nothing_clears_the_place_and_all_of_it_empties_the_canvas(composer):
    composer.drive(shape=NOTHING)
    assert at(composer, "top left") is None and len(composer.scene.items) == 2
    for item in START[1:]:
        composer.drive(place=item.place, shape=NOTHING)
    assert composer.says() == "an empty canvas" and 'alt="The scene: an empty canvas."' in composer.picture.value
    assert pixels(composer.picture.value).convert("RGB").getextrema() == ((240, 240),) * 3


def test_ask_sends_the_picture_that_the_model_is_used_to_and_the_learners_question(composer, asked):
    said = composer.drive(question="How many stars are there?", ask=1)
    ((picture, question),) = asked
    assert picture.size == (144, 48) and picture.tobytes() == scenes.render(composer.scene).tobytes()
    assert question == "How many stars are there?"
    assert tail(said) == "How many stars are there? → 3"


def test_the_model_computes_without_gradients_also_when_a_button_asks(composer, monkeypatch):
    on = []
    monkeypatch.setattr(scene_composer, "ask", lambda *_: on.append(torch.is_grad_enabled()) or "3")
    composer.drive(ask=1, suggest=1)
    assert on == [False, False]


def test_an_empty_question_is_answered_with_what_to_do(composer):
    assert tail(composer.drive(question=" ", ask=1)) == "→ the question is empty"


@pytest.mark.parametrize("right", [True, False])
def test_a_suggested_question_is_asked_and_the_answer_compared(composer, monkeypatch, right):
    asked = []
    for number in range(1, 5):
        question = scene_composer.suggest(composer.scene, "en", number)
        answer = question.answer if right else "a cat"
        monkeypatch.setattr(scene_composer, "ask", lambda _, text, __, answer=answer: asked.append(text) or answer)
        verdict = "(right)" if right else f"(wrong: {question.answer})"
        assert tail(composer.drive(suggest=1)) == f"{question.text} → {answer} {verdict}"
        assert composer.controls["question"].value == question.text == asked[-1]
    assert len(set(asked)) > 1


def test_a_suggestion_is_in_the_language_chosen(composer, asked):
    composer.drive(language="fr", suggest=1)
    assert asked[-1][1] == scene_composer.suggest(composer.scene, "fr", 1).text


def test_an_empty_canvas_can_be_asked_about(composer):
    for item in START:
        composer.drive(place=item.place, shape=NOTHING)
    assert tail(composer.drive(suggest=1)).endswith("→ 3 (wrong: 0)")


def test_an_answer_about_another_scene_does_not_stay(composer):
    assert "→" in composer.drive(ask=1)
    assert "→" not in composer.drive(colour="green")
    assert "→" in composer.drive(ask=1)
    assert "→" in composer.drive(place="top right")  # looking at a place is no change
    assert "→" in composer.drive(question="Where is the red circle?")
    assert "→" not in composer.drive(shape=NOTHING)


# ----------------------------------------------------------------------------------------------------------------------
# Figures


@pytest.mark.parametrize("names", [("scout", "maverick"), ("mini-scout",)])
def test_the_layer_map_has_a_box_for_each_layer_and_a_dot_for_each_that_holds_experts(names):
    seen = figures.layer_map(*names)
    (axes,) = seen.picture.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(names)
    for row, name in enumerate(names):
        text = Llama4Config.preset(name).text
        boxes = [c for c in axes.collections if abs(c.get_datalim(axes.transData).intervaly.mean() - row) < 0.5]
        boxes.sort(key=lambda box: box.get_datalim(axes.transData).x0)
        colours = [to_hex(box.get_facecolor()[0]) for box in boxes]
        local = [figures.LOCAL if text.is_local(layer) else figures.GLOBAL for layer in range(text.num_layers)]
        assert colours == local and colours.count(figures.GLOBAL) == text.num_layers // 4
        dots = [line for line in axes.lines if list(line.get_ydata()) == [row]]
        width = boxes[1].get_datalim(axes.transData).x0 - boxes[0].get_datalim(axes.transData).x0
        assert [int(dot.get_xdata()[0] / width) for dot in dots] == list(text.moe_layers)


def test_the_layer_map_says_in_words_what_it_shows():
    seen = figures.layer_map("scout", "maverick")
    scout, maverick = seen.text.splitlines()
    assert scout.startswith("scout: 48 layers, 12 of them without rotary") and scout.endswith("experts in 48")
    assert maverick.startswith("maverick: 48 layers, 12 of them without rotary") and maverick.endswith("experts in 24")
    assert scout in seen.alt and maverick in seen.alt and "\n" not in seen.alt


def test_the_layer_map_says_of_an_estimate_that_it_is_one():
    assert "published no shape" in figures.layer_map("behemoth-estimate").text
