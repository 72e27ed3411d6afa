"""Scene composer: put objects on the canvas, ask mini-scout about them, and see whether it is right."""

import random
import unicodedata
from dataclasses import replace

import ipywidgets

from ... import scenes
from ...ask import ask
from .frame import Shown, View

NOTHING = "nothing"
LEFT_TO_RIGHT = "\u200e"  # invisible
LANGUAGES = {"English": "en", "français": "fr", "हिन्दी": "hi", "العربية": "ar"}
START = (
    scenes.Item("circle", "red", "large", "top left", 3, 0, 0),
    scenes.Item("square", "blue", "small", "bottom middle", 7, 0, 0),
    scenes.Item("star", "yellow", "large", "top right", 1, 0, 0),
)


def put(scene: scenes.Scene, place: str, shape: str, colour: str, size: str, digit: int) -> scenes.Scene:
    """The scene with this object at `place`, instead of what was there; shape "nothing" clears the place."""
    items = {item.place: item for item in scene.items}
    items.pop(place, None)
    if shape != NOTHING:
        items[place] = scenes.Item(shape, colour, size, place, digit, 0, 0)
    return replace(scene, items=tuple(items[p] for p in scenes.PLACES if p in items))


def suggest(scene: scenes.Scene, language: str, number: int) -> scenes.Question:
    """The `number`-th question that can be asked about this scene, with its answer. ValueError: too little to ask."""
    rng = random.Random(number)
    for kind in rng.sample(scenes.KINDS, len(scenes.KINDS)):
        try:
            return scenes.ask(scene, rng, kind, language)
        except (ValueError, IndexError):
            continue  # this scene has no question of that kind
    raise ValueError("Put an object on the canvas first.")


def shown(scene: scenes.Scene, asked: str = "") -> Shown:
    """The picture four times as large as the model sees it, what is in it, and what was asked."""
    caption = scenes.caption(scene, "en") if scene.items else "an empty canvas"
    return Shown(f"{caption}\n{asked}".strip(), scenes.render(scene, 4), f"The scene: {caption}.")


def answered(question: str, answer: str) -> str:
    """In one line. Where both are written from right to left, a mark keeps the question left of the arrow."""
    to_the_left = any(unicodedata.bidirectional(letter) == "AL" for letter in question)
    return f"{question}{LEFT_TO_RIGHT if to_the_left else ''}  →  {answer}"


class SceneComposer(View):
    """Choose a place and what stands there; ask your own question, or let one be suggested whose answer is known."""

    def __init__(self, model: str = "mini-scout"):
        self.scene, self.model = scenes.Scene(START, background=240), model
        self.asked, self.number = "", 0
        first, wide = START[0], ipywidgets.Layout(width="452px")  # with the button, as wide as two dropdowns
        controls = {
            "place": ipywidgets.Dropdown(options=scenes.PLACES, value=first.place, description="place"),
            "shape": ipywidgets.Dropdown(options=(NOTHING, *scenes.SHAPES), value=first.shape, description="shape"),
            "colour": ipywidgets.Dropdown(options=scenes.COLOURS, value=first.colour, description="colour"),
            "size": ipywidgets.Dropdown(options=scenes.SIZES, value=first.size, description="size"),
            "digit": ipywidgets.IntSlider(first.digit, 0, 9, description="digit"),
            "question": ipywidgets.Text(
                "How many objects are there?", description="question", layout=wide, continuous_update=False
            ),
            "ask": ipywidgets.Button(description="Ask", button_style="primary", tooltip="Ask mini-scout"),
            "language": ipywidgets.Dropdown(options=LANGUAGES, description="language"),
            "suggest": ipywidgets.Button(description="Suggest and ask", tooltip="A question whose answer is known"),
        }
        super().__init__(
            self._show, controls, ("place shape", "colour size", "digit", "question ask", "language suggest")
        )

    def _show(self, place, shape, colour, size, digit, **others) -> Shown:
        scene = put(self.scene, place, shape, colour, size, digit)
        if scene != self.scene:
            self.scene, self.asked = scene, ""
        return shown(self.scene, self.asked)

    def react(self, event):
        if event is self.controls["ask"]:
            self._ask(self.controls["question"].value)
        elif event is self.controls["suggest"]:
            self._suggest()
        elif isinstance(event, dict) and event["owner"] is self.controls["place"]:
            self._load(event["new"])

    def _ask(self, question: str, truth: str | None = None):
        self.asked = answered(question, "…")
        self.update()  # the model takes a moment
        try:
            answer = ask(scenes.render(self.scene), question, self.model)
        except ValueError as error:
            answer = str(error)
        known = "" if truth is None else "  (right)" if answer == truth else f"  (wrong: {truth})"
        self.asked = answered(question, answer + known)

    def _suggest(self):
        self.number += 1
        try:
            question = suggest(self.scene, self.controls["language"].value, self.number)
        except ValueError as error:
            self.asked = str(error)
        else:
            self.controls["question"].value = question.text
            self._ask(question.text, question.answer)

    def _load(self, place: str):
        """Bring the controls to what stands at the place just chosen."""
        item = next((item for item in self.scene.items if item.place == place), None)
        self.controls["shape"].value = item.shape if item else NOTHING
        for name in ("colour", "size", "digit") if item else ():
            self.controls[name].value = getattr(item, name)
