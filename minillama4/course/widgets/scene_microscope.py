"""Scene microscope: the composer, and from which squares of the picture each token of the answer was read.

`read` asks the model once and keeps what its NoPE layers attended to: they alone see the whole picture from the answer.
Another token, layer or head is then only drawn anew. Attention says where a query reads from. It is no proof of why.
Shapes: T tokens of the whole sequence, K of them picture tokens, each of which stands for one square of pixels.
"""

from dataclasses import dataclass

import ipywidgets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ... import scenes
from ...ask import MAX_NEW_TOKENS, prompt_for
from ...checkpoint import load_checkpoint
from ...generate import stream
from ...model import Llama4
from ...tokenizer import Tokenizer, load_tokenizer
from ...trace import trace
from .frame import BLUE, GREY, ORANGE, Shown
from .scene_composer import SceneComposer, answered, shown
from .scene_squares import Box, box_of, named, owner, squares

FIRST_QUESTION = "What colour is the circle?"
MEAN = "all, mean"  # of the heads
BRIGHT = 0.25  # share of attention from which on a square is fully lit; below, by the square root
DARK = 0.22  # brightness of a square that is not read from
CAVEAT = (
    "A square is where the layer reads, no proof of why it answers so: what it takes from there passes through more "
    "layers, and inside a tile the encoder has shown every square all the others."
)


# ----------------------------------------------------------------------------------------------------------------------
# Ask once; then look.


@dataclass(frozen=True)
class Reading:
    """An answer, and what the NoPE layers read on the way to it."""

    scene: scenes.Scene
    question: str
    answer: str
    names: tuple[str, ...]  # the tokens that can be picked: the words of the question, then those of the answer
    words: int  # so many of them are the question's
    query: tuple[int, ...]  # position of each one's query. A word's own; an answer's token is written one before it
    attention: dict[int, Tensor]  # NoPE layer -> [heads, last queries, T]; the last layer has only the answer's queries
    picture: Tensor  # [K], positions of the picture tokens
    boxes: tuple[Box, ...]  # K squares of pixels
    owners: tuple[int | None, ...]  # K objects, see `owner`
    asked: tuple[int, ...]  # the objects that the question names

    @property
    def heads(self) -> int:
        return len(next(iter(self.attention.values())))

    def row(self, token: int, layer: int, head: int | str = MEAN) -> Tensor:
        """What one query of one layer pays to each of the T tokens, 1 in all: [T].

        token: index into `names`. ValueError: no such token, layer or head, or a query that the layer never computed.
        """
        if layer not in self.attention:
            raise ValueError(f"layer is {layer}; the NoPE layers are {', '.join(map(str, self.attention))}")
        if head != MEAN and head not in range(self.heads):
            raise ValueError(f"head is {head!r}; it must be 0 to {self.heads - 1}, or {MEAN!r}")
        if token not in range(len(self.names)):
            raise ValueError(f"token is {token}; it must be 0 to {len(self.names) - 1}")
        seen = self.attention[layer]  # [heads, queries, T]
        back = seen.shape[-1] - self.query[token]
        if back > seen.shape[1]:
            raise ValueError(
                f"Layer {layer} is the last: it works only where a next token is wanted, not at a word of the "
                f'question such as "{self.names[token]}". Pick a token of the answer, or an earlier layer.'
            )
        return seen[:, -back].mean(0) if head == MEAN else seen[head, -back]


@torch.no_grad()
def read(model: Llama4, tokenizer: Tokenizer, scene: scenes.Scene, question: str) -> Reading:
    """The answer of `ask`, token for token, with the attention that wrote it.

    ValueError: an empty question, a model without vision or without NoPE layers.
    """
    layers = model.config.text.nope_layers
    if not layers:
        raise ValueError(
            "model has no NoPE layer, so an answer cannot see a whole picture; give one such as mini-scout"
        )
    ids, pixels = prompt_for(scenes.render(scene), question, model, tokenizer)
    with trace(model, attention=layers) as seen:
        tokens = list(stream(model, ids, pixels, MAX_NEW_TOKENS, stop_tokens=model.config.stop_tokens))
    prompt = ids[0].tolist()
    first = prompt.index(tokenizer.token_id("<|image_end|>")) + 1
    words = range(first, prompt.index(tokenizer.token_id("<|eot|>"), first))
    # One query more than tokens, the one that ended the answer, unless it had grown too long.
    writers = range(len(prompt) - 1, seen.attention[layers[0]].shape[-1])
    names = [_name(token, tokenizer) for token in [*prompt[first : words.stop], *tokens]]
    boxes = squares(model.config.vision, scenes.WIDTH, scenes.HEIGHT)
    return Reading(
        scene=scene,
        question=question,
        answer=tokenizer.decode(tokens).strip(),
        names=(*names, *["end"] * (len(writers) - len(tokens))),
        words=len(words),
        query=(*words, *writers),
        attention={layer: seen.attention[layer][0] for layer in layers},
        picture=(ids[0] == model.config.patch_token).nonzero()[:, 0],
        boxes=tuple(boxes),
        owners=tuple(owner(box, scene) for box in boxes),
        asked=tuple(named(scene, question)),
    )


def _name(token: int, tokenizer: Tokenizer) -> str:
    """As one writes it; a part of a letter is "▯"."""
    return tokenizer.decode([token]).replace("\ufffd", "▯").strip() or "␣"


@dataclass(frozen=True)
class Shares:
    """Where one query reads: shares of its attention, 1 in all."""

    square: tuple[float, ...]  # K
    item: tuple[float, ...]  # each object of the scene: the squares that it fills most of
    background: float
    text: float  # words, separators, the markers of the turn

    @property
    def picture(self) -> float:
        return sum(self.square)


def shares(reading: Reading, token: int, layer: int, head: int | str = MEAN) -> Shares:
    """`Reading.row` summed over the picture's objects; see there for ValueErrors."""
    row = reading.row(token, layer, head)
    square = row[reading.picture].tolist()
    on = {who: sum(s for s, o in zip(square, reading.owners, strict=True) if o == who) for who in set(reading.owners)}
    item = tuple(on.get(i, 0.0) for i in range(len(reading.scene.items)))
    return Shares(tuple(square), item, on.get(None, 0.0), float(row.sum()) - sum(square))


def in_words(reading: Reading, token: int, layer: int, head: int | str = MEAN) -> str:
    """The shares as one sentence, in whole per cent."""
    paid, name = shares(reading, token, layer, head), reading.names[token]
    does = f'At the word "{name}" of the question' if token < reading.words else f'To write "{name}"'
    parts = []
    for i, (item, share) in enumerate(zip(reading.scene.items, paid.item, strict=True)):
        asked = " (asked about)" if i in reading.asked else ""
        parts.append(f"{scenes.phrase('en', 'bare', item.colour, item.shape)}{asked} {share:.0%}")
    heads = f"the mean of its {reading.heads} heads" if head == MEAN else f"head {head}"
    return (
        f"{does}, {heads} in layer {layer} reads {paid.picture:.0%} from the picture: "
        f"{', '.join([*parts, f'background {paid.background:.0%}'])}; and {paid.text:.0%} from text."
    )


# ----------------------------------------------------------------------------------------------------------------------
# Draw, in CSS pixels from the top left.

SCALE, EDGE, GAP, LINE = 3, 8, 16, 22  # page pixels a picture pixel, margin, between the pictures, a line of words
PAGE, TOP = 2 * SCALE * scenes.WIDTH + GAP + 2 * EDGE, EDGE + LINE


def draw(reading: Reading, token: int, layer: int, head: int | str = MEAN) -> Shown:
    """The picture twice, cut into the squares of its tiles and of the whole picture's tile, each lit as far as it is
    read from. Below, a bar of the shares. The text is `in_words`; see `Reading.row` for ValueErrors.
    """
    paid, words = shares(reading, token, layer, head), in_words(reading, token, layer, head)
    high, per_tile = SCALE * scenes.HEIGHT, round(len(reading.boxes) / (1 + scenes.WIDTH // scenes.TILE))
    bar = TOP + high + 20
    figure = Figure(figsize=(PAGE / 100, (bar + 2 * LINE + EDGE) / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, PAGE), ylim=(100 * figure.get_figheight(), 0))
    axes.axis("off")
    views = ("The three tiles", slice(None, -per_tile)), ("The whole picture in one tile", slice(-per_tile, None))
    for i, (title, part) in enumerate(views):
        left, boxes = EDGE + i * (SCALE * scenes.WIDTH + GAP), reading.boxes[part]
        _, _, wide, tall = boxes[0]
        axes.text(left, EDGE + 9, f"{title}: a token stands for {wide} × {tall} pixels", size=9.5, va="center")
        _draw_view(axes, left, reading, boxes, paid.square[part])
    _draw_bar(axes, bar, reading, paid)
    caption = scenes.caption(reading.scene, "en") or "an empty canvas"
    return Shown(words, figure, f"The scene, lit where it is read from: {caption}. {words}")


def _draw_view(axes: Axes, left: int, reading: Reading, boxes: tuple[Box, ...], paid: tuple[float, ...]):
    """The scene under one set of squares, which cover it: lit by what is paid, its per cent in the corner.

    The grid is drawn into the picture and each sort of box is one artist: matplotlib needs a millisecond for each.
    """
    sharp = 2 * SCALE  # as many dots as the page has on a screen with fine dots
    picture = np.asarray(scenes.render(reading.scene, sharp).convert("RGBA")).copy()
    for (x1, y1, x2, y2), share in zip(boxes, paid, strict=True):
        cell = picture[sharp * y1 : sharp * y2, sharp * x1 : sharp * x2, :3]
        cell[:] = cell * (DARK + (1 - DARK) * min(1, (share / BRIGHT) ** 0.5))
        cell[0] = cell[:, 0] = 128
    extent = (left, left + SCALE * scenes.WIDTH, TOP + SCALE * scenes.HEIGHT, TOP)
    axes.imshow(picture, extent=extent, interpolation="nearest", aspect="auto")
    framed = [_corners(left, box_of(reading.scene.items[i])) for i in reading.asked]
    for colour, width in (("white", 3.4), (BLUE, 1.8)):
        axes.add_collection(PolyCollection(framed, facecolors="none", edgecolors=colour, lw=width), autolim=False)
    numbers = [(box, f"{100 * share:.0f}") for box, share in zip(boxes, paid, strict=True) if share >= 0.005]
    plates = [
        _corners(left, (x, y, x + (5 + 7 * len(number)) / SCALE, y + 14 / SCALE)) for (x, y, *_), number in numbers
    ]
    axes.add_collection(PolyCollection(plates, facecolors="black", lw=0), autolim=False)
    for (x, y, *_), number in numbers:
        at = left + SCALE * x + 3, TOP + SCALE * y + 7.5
        axes.text(*at, number, color="white", size=8, va="center_baseline", parse_math=False)


def _corners(left: int, box: Box) -> list[tuple[float, float]]:
    """On the page, of a box in the picture."""
    x1, y1, x2, y2 = (start + SCALE * at for start, at in zip((left, TOP) * 2, box, strict=True))
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


def _draw_bar(axes: Axes, top: float, reading: Reading, paid: Shares):
    on_asked = sum(paid.item[i] for i in reading.asked)
    parts = [
        ("asked about (framed)", on_asked, BLUE, ""),
        ("other objects" if reading.asked else "objects", sum(paid.item) - on_asked, ORANGE, ""),
        ("background", paid.background, GREY, ""),
        ("text", paid.text, "white", "////"),
    ]
    x, name_at = EDGE, EDGE
    for name, share, colour, hatch in parts if reading.asked else parts[1:]:
        width = share * (PAGE - 2 * EDGE)
        swatches = [(name_at, 16, top + LINE + 5)] + ([(x, width, top)] if share >= 0.005 else [])
        for at, wide, y in swatches:
            axes.add_artist(Rectangle((at, y), wide, 14, facecolor=colour, edgecolor="black", lw=0.7, hatch=hatch))
        axes.text(name_at + 22, top + LINE + 12, f"{name} {share:.0%}", size=9.5, va="center")
        x, name_at = x + width, name_at + 215


class SceneMicroscope(SceneComposer):
    """Compose a scene and ask, as in the composer; then pick a token, a NoPE layer and a head.

    It asks by itself when the scene or the question has changed. `reading` is on the page; None after a refusal.
    """

    def __init__(self, model: str = "mini-scout"):
        self.net, self.tokenizer = load_checkpoint(model), load_tokenizer(model)
        self.reading, self.refused, self.known = None, "", None
        text, wide = self.net.config.text, ipywidgets.Layout(width="452px")
        heads = [MEAN, *range(text.num_heads)]
        self.lens = {
            "token": ipywidgets.SelectionSlider(options=[("", 0)], description="token", layout=wide),
            "layer": ipywidgets.SelectionSlider(options=text.nope_layers, description="layer"),
            "head": ipywidgets.SelectionSlider(options=heads, description="head"),
        }
        super().__init__(model)
        for control in self.lens.values():
            control.tooltip = ""
            control.observe(self.changed, "value")
        self.controls |= self.lens
        *rows, picture, said, keys = self.box.children
        row = ipywidgets.HBox([self.lens["layer"], self.lens["head"]], layout=ipywidgets.Layout(flex_flow="row wrap"))
        self.box.children = (*rows, self.lens["token"], row, picture, said, keys)

    def react(self, event):
        if event is None:  # nothing has been moved yet
            self.controls["question"].value = FIRST_QUESTION
        super().react(event)
        super()._show(**self.values())  # what the controls hold goes into the scene
        question, before = self.controls["question"].value, self.reading
        if before is None or (self.scene, question) != (before.scene, before.question):
            try:
                self.reading = read(self.net, self.tokenizer, self.scene, question)
            except ValueError as error:
                self.reading, self.refused = None, str(error)
            else:
                self._offer_tokens(stay=before is not None and question == before.question)

    def _ask(self, question: str, truth: str | None = None):
        """`react` asks; here only the answer that is known to be right is kept."""
        self.known = self.scene, question, truth

    def _offer_tokens(self, stay: bool):
        """At first the first token that it wrote; of the same question the place that was picked."""
        control, names, words = self.lens["token"], self.reading.names, self.reading.words
        token = min(control.value, len(names) - 1) if stay else words
        control.options = [(f"{'question' if i < words else 'answer'}: {name}", i) for i, name in enumerate(names)]
        control.value = token

    def _show(self, question: str, **composed) -> Shown:
        if self.reading is None:
            return shown(self.scene, answered(question, self.refused))
        answer, truth = self.reading.answer, None
        if self.known is not None and self.known[:2] == (self.scene, question):
            truth = self.known[2]
        known = "" if truth is None else "  (right)" if answer == truth else f"  (wrong: {truth})"
        said = shown(self.scene, answered(question, answer + known))
        try:
            seen = draw(self.reading, *(control.value for control in self.lens.values()))
        except ValueError as error:
            return Shown(f"{said.text}\n{error}", said.picture, said.alt)
        return Shown(f"{said.text}\n{seen.text}\n{CAVEAT}", seen.picture, seen.alt)

    def _repr_mimebundle_(self, **options) -> dict:
        """Where no kernel runs, the scene alone: answer and attention follow from the weights."""
        bundle = super()._repr_mimebundle_(**options)
        return bundle | {"text/plain": f"{bundle['text/plain'].splitlines()[0]}\n{shown(self.scene).text}"}
