"""Router microscope: which expert each token of a text or a picture goes to, layer by layer, and how full each one is.

`routes` asks the model once; a layer is then only drawn anew. An expert is a number first and a colour second: eight
colours are all that most people can tell apart, so a ninth expert has the first one's colour and its own number.
The live view is HTML, whose fonts know all four languages; `figure` is the same for GitHub, where no kernel runs.
"""

import base64
import html
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from random import Random

import ipywidgets
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from ... import scenes
from ...ask import prompt_for
from ...checkpoint import load_checkpoint
from ...model import Llama4
from ...tokenizer import Tokenizer, load_tokenizer
from ...trace import trace
from .frame import BLUE, GREEN, ORANGE, PURPLE, RED, Shown, View, png

COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, "#56b4e9", "#f0e442", "#000000")  # Okabe and Ito's eight
LONGEST = 2000  # characters; more would be a wall of chips
NO_PICTURE, COMPOSED = "no picture", "your scene"
SCENES = {f"scene {seed}": seed for seed in range(1, 6)}
PAGE, EDGE, CELL, GAP = 900, 8, 46, 12  # CSS pixels: a notebook column, its margin, a patch, between two tiles


@dataclass(frozen=True)
class Routed:
    """One prompt and its routes. L MoE layers, T tokens."""

    names: tuple[str, ...]  # T tokens as one writes them: a space is "␣", a newline "⏎", part of a letter "▯"
    ids: tuple[int, ...]
    is_patch: Tensor  # [T] bool
    layers: tuple[int, ...]  # the L layers that have experts
    expert: Tensor  # [L, T] int64
    score: Tensor  # [L, T], 0 to 1: what the expert's input was multiplied by
    num_experts: int
    tiles: tuple[Image.Image, ...]  # as the model sees them; the last is the whole picture, made small
    caption: str  # the picture in words

    def of(self, layer: int) -> tuple[list[int], list[float]]:
        """(expert, score) of every token. ValueError: a layer without experts."""
        if layer not in self.layers:
            raise ValueError(f"layer is {layer}; the layers with experts are {', '.join(map(str, self.layers))}")
        row = self.layers.index(layer)
        return self.expert[row].tolist(), self.score[row].tolist()

    def load(self, layer: int) -> tuple[list[int], list[int]]:
        """(text tokens, patches) of each expert."""
        expert = torch.tensor(self.of(layer)[0])
        patches, text = (
            torch.bincount(expert[which], minlength=self.num_experts) for which in (self.is_patch, ~self.is_patch)
        )
        return text.tolist(), patches.tolist()

    @property
    def fullest(self) -> int:
        """Tokens of the fullest expert of any layer: the scale of all bars, so that layers can be compared."""
        return max(max(torch.bincount(row).tolist()) for row in self.expert)


@torch.no_grad()
def routes(model: Llama4, tokenizer: Tokenizer, text: str, scene: scenes.Scene | None = None) -> Routed:
    """The routes of one user's turn: the picture of `scene`, if there is one, and then `text`.

    ValueError: an empty text, or one of over 2,000 characters; a model without experts.
    """
    if len(text) > LONGEST:
        raise ValueError(f"text has {len(text):,} characters; at most {LONGEST:,} are drawn")
    if not model.config.text.moe_layers:
        raise ValueError("model has 0 layers with experts; give one that has some, such as mini-scout")
    ids, pixels = prompt_for(None if scene is None else scenes.render(scene), text, model, tokenizer)
    with trace(model, router=True) as seen:
        model(ids, pixels)
    layers = tuple(sorted(seen.router))
    tokens = tuple(ids[0].tolist())
    return Routed(
        names=tuple(_name(token, tokenizer) for token in tokens),
        ids=tokens,
        is_patch=ids[0] == model.config.patch_token,
        layers=layers,
        expert=torch.stack([seen.router[layer].expert[0] for layer in layers]),
        score=torch.stack([seen.router[layer].score[0] for layer in layers]),
        num_experts=model.config.text.num_experts,
        tiles=() if pixels is None else tuple(map(_as_image, pixels)),
        caption="" if scene is None else scenes.caption(scene, "en") or "an empty canvas",
    )


def _name(token: int, tokenizer: Tokenizer) -> str:
    if token in tokenizer.special_names:
        return tokenizer.special_names[token].strip("<|>")
    return tokenizer.decode([token]).replace("\n", "⏎").replace(" ", "␣").replace("\ufffd", "▯")


def _as_image(tile: Tensor) -> Image.Image:
    """[3, side, side] in -1..1 -> 8-bit RGB."""
    return Image.fromarray(((tile + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def summary(routed: Routed, layer: int) -> str:
    """What does not depend on the weights."""
    tokens, experts = len(routed.ids), routed.num_experts
    patches = f", {int(routed.is_patch.sum())} of them patches of the picture" if routed.tiles else ""
    return f"layer {layer}: {tokens} tokens{patches}; {experts} experts, so an even share is {tokens / experts:.1f}"


def loads_in_words(routed: Routed, layer: int) -> str:
    """The loads as one sentence."""
    loads = [f"expert {e}: {text + patches}" for e, (text, patches) in enumerate(zip(*routed.load(layer), strict=True))]
    return f"Tokens of each expert in layer {layer}: {', '.join(loads)}."


def ink(colour: str) -> str:
    """Black or white, whichever is easier to read on `colour` (relative luminance of WCAG)."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue))
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#ffffff"


def colour_of(expert: int) -> str:
    return COLOURS[expert % len(COLOURS)]


def _runs(routed: Routed, layer: int) -> Iterator[tuple[bool, list[tuple[int, int, float]]]]:
    """(patches?, [(position, expert, score)]) of each run of patches, and of each run of other tokens."""
    tokens = zip(range(len(routed.ids)), *routed.of(layer), strict=True)
    for is_patch, run in groupby(tokens, key=lambda token: bool(routed.is_patch[token[0]])):
        yield is_patch, list(run)


def _tile_rows(routed: Routed, layer: int) -> list[list[list[int]]]:
    """tile -> row -> expert of each patch."""
    if not routed.tiles:
        return []
    patches = torch.tensor(routed.of(layer)[0])[routed.is_patch]
    side = round((len(patches) / len(routed.tiles)) ** 0.5)
    return patches.view(-1, side, side).tolist()  # [tiles, rows, columns]


def _cell(routed: Routed, side: int) -> int:
    """Pixels a side of a patch, such that all tiles, of `side` patches a side, stand beside each other."""
    return min(CELL, ((PAGE - EDGE) // len(routed.tiles) - GAP) // side)


def _tile_title(routed: Routed, tile: int) -> str:
    return "whole picture" if 0 < tile == len(routed.tiles) - 1 else f"tile {tile + 1}"


def _bars_title(routed: Routed) -> str:
    return "Tokens of each expert. Dashed: an even share." + (" Striped: patches." if routed.tiles else "")


# ----------------------------------------------------------------------------------------------------------------------
# Live: HTML.


def page(routed: Routed, layer: int) -> str:
    """Tiles with their patches, the other tokens as chips in their order, and a bar an expert."""
    tiles = "".join(_tile(routed, i, rows) for i, rows in enumerate(_tile_rows(routed, layer)))
    chips = []
    for is_patch, run in _runs(routed, layer):
        if is_patch:
            chips.append(f'<span style="align-self: center; padding: 0 5px">{len(run)} patches</span>')
            continue
        for position, expert, score in run:
            name = routed.names[position]
            what = html.escape(f"token {position}: {name}, expert {expert}, score {score:.2f}")
            chips.append(
                f'<span title="{what}" style="{_paint(expert)}; border-radius: 3px; padding: 1px 5px; '
                f'text-align: center; line-height: 1.25"><bdi>{html.escape(name)}</bdi><br><b>{expert}</b></span>'
            )
    row = "display: flex; flex-wrap: wrap; direction: ltr; margin: 6px 0"
    return (
        f'<div style="max-width: {PAGE}px"><div style="{row}; gap: {GAP}px">{tiles}</div>'
        f'<div style="{row}; gap: 2px">{"".join(chips)}</div>{_bars(routed, layer)}</div>'
    )


def _paint(expert: int) -> str:
    return f"background: {colour_of(expert)}; color: {ink(colour_of(expert))}"


def _tile(routed: Routed, tile: int, rows: list[list[int]]) -> str:
    data = base64.b64encode(png(routed.tiles[tile])[0]).decode()
    title, width = _tile_title(routed, tile), _cell(routed, len(rows)) * len(rows)
    grid = "; ".join(" ".join(map(str, row)) for row in rows)
    alt = html.escape(f"{title} of a picture ({routed.caption}). Experts of its patches, row by row: {grid}")
    cells = "".join(
        f'<span style="border: 3px solid {colour_of(expert)}; box-sizing: border-box">'
        f'<b style="{_paint(expert)}; display: inline-block; line-height: 1.2; padding: 0 4px 2px 2px">{expert}</b>'
        "</span>"
        for row in rows
        for expert in row
    )
    return (
        f'<figure style="margin: 0"><div style="position: relative; width: {width}px; height: {width}px">'
        f'<img src="data:image/png;base64,{data}" alt="{alt}" width={width} height={width} '
        f'style="image-rendering: pixelated; max-width: none">'
        f'<div aria-hidden="true" style="position: absolute; inset: 0; display: grid; '
        f'grid-template-columns: repeat({len(rows)}, 1fr); grid-auto-rows: 1fr">{cells}</div></div>'
        f"<figcaption>{title}</figcaption></figure>"
    )


def _bars(routed: Routed, layer: int) -> str:
    even, lines, edge = len(routed.ids) / routed.num_experts / routed.fullest, [], "inset 0 0 0 1px #404040"
    for expert, (text, patches) in enumerate(zip(*routed.load(layer), strict=True)):
        stripes = f"repeating-linear-gradient(135deg, {colour_of(expert)} 0 4px, #ffffff 4px 7px)"
        parts = "".join(
            f'<div style="width: {100 * part / routed.fullest:.2f}%; background: {fill}; box-shadow: {edge}"></div>'
            for part, fill in ((text, colour_of(expert)), (patches, stripes))
        )
        said = str(text + patches) + (f" ({patches} patches)" if routed.tiles else "")
        lines.append(
            f'<div style="display: flex; gap: 8px; line-height: 1.3"><b style="{_paint(expert)}; width: 2.2em; '
            f'text-align: center">{expert}</b><div style="position: relative; display: flex; width: 480px; '
            f'height: 1.1em; background: #e8e8e8">{parts}<div style="position: absolute; left: {100 * even:.2f}%; '
            f'top: 0; bottom: 0; border-left: 2px dashed #000000"></div></div><span>{said}</span></div>'
        )
    return f'<div style="margin-top: 8px">{_bars_title(routed)}</div>' + "".join(lines)


class RouterMicroscope(View):
    """Choose a picture or none, write a text and press Enter, and move through the layers.

    model: a preset that ships weights, or a checkpoint folder. scene: one more picture to choose, such as a
    `SceneComposer`'s; it is then shown first. `routed` holds what is on the page.
    """

    def __init__(self, model: str = "mini-scout", scene: scenes.Scene | None = None):
        self.model, self.tokenizer = load_checkpoint(model), load_tokenizer(model)
        self.pictures = {NO_PICTURE: None} | {
            name: scenes.draw_scene(Random(seed), "held-out") for name, seed in SCENES.items()
        }
        if scene is not None:
            self.pictures[COMPOSED] = scene
        self.routed, self._asked = None, None
        first = next(iter(SCENES)) if scene is None else COMPOSED
        layers, wide = self.model.config.text.moe_layers, ipywidgets.Layout(width="560px", max_width="100%")
        controls = {
            "picture": ipywidgets.Dropdown(options=list(self.pictures), value=first, description="picture"),
            "text": ipywidgets.Text(
                "How many objects are there?", description="text", layout=wide, continuous_update=False
            ),
            "layer": ipywidgets.SelectionSlider(options=layers, value=layers[0], description="layer"),
        }
        super().__init__(self._show, controls, ("picture text", "layer"))

    def _show(self, picture: str, text: str, layer: int) -> Shown:
        if (picture, text) != self._asked:
            self.routed, self._asked = None, None  # if the text is refused, nothing old stays on the page
            self.routed = routes(self.model, self.tokenizer, text, self.pictures[picture])
            self._asked = picture, text
        return Shown(summary(self.routed, layer))

    def update(self):
        with self.picture.hold_sync():  # one message: the page does not jump
            super().update()
            self.picture.value = page(self.routed, self.controls["layer"].value) if self.routed else ""


# ----------------------------------------------------------------------------------------------------------------------
# Still: a Figure, laid out in CSS pixels from the top left.

FONT, CHIP, LINE = FontProperties(family="DejaVu Sans Mono", size=9.5), 40, 22  # of matplotlib itself; 7.95 px a letter
LETTER = 9.5 / 0.72 * 0.602


def figure(routed: Routed, layer: int) -> Shown:
    """`page` as a picture. A token in a script that the font cannot draw or join is shown by its id, as "#412"."""
    tiles, chips = _tile_rows(routed, layer), []
    cell = _cell(routed, len(tiles[0])) if tiles else 0
    x, y = EDGE, EDGE + (len(tiles[0]) * cell + LINE + GAP if tiles else 0)
    for is_patch, run in _runs(routed, layer):
        names = [routed.names[i] if _drawable(routed.names[i]) else f"#{routed.ids[i]}" for i, _, _ in run]
        drawn = [(f"{len(run)} patches", None)] if is_patch else zip(names, [e for _, e, _ in run], strict=True)
        for name, expert in drawn:
            width = LETTER * len(name) + 10
            if x + width > PAGE - EDGE:
                x, y = EDGE, y + CHIP
            chips.append((x, y, width, name, expert))
            x += width + 3
    top = y + CHIP + 30
    picture = Figure(figsize=(PAGE / 100, (top + LINE * routed.num_experts + EDGE) / 100))
    axes = picture.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, PAGE), ylim=(100 * picture.get_figheight(), 0))
    axes.axis("off")
    for i, rows in enumerate(tiles):
        _draw_tile(axes, EDGE + i * (len(rows) * cell + GAP), cell, routed.tiles[i], _tile_title(routed, i), rows)
    for x, y, width, name, expert in chips:
        if expert is not None:
            _box(axes, x, y, width, CHIP - 4, colour_of(expert))
        colour = "black" if expert is None else ink(colour_of(expert))
        axes.text(x + 5, y + 9, name, color=colour, fontproperties=FONT, va="center_baseline", parse_math=False)
        _number(axes, x + width / 2, y + 26, expert, colour)
    _draw_bars(axes, routed, layer, top)
    about = f"a picture ({routed.caption}) and a text" if routed.tiles else "a text"
    alt = f"Each token of {about}, coloured and numbered by expert. {loads_in_words(routed, layer)}"
    return Shown(summary(routed, layer), picture, alt)


def _drawable(text: str) -> bool:
    known = get_font(findfont(FONT)).get_charmap()
    return all(ord(letter) in known and unicodedata.bidirectional(letter) not in ("R", "AL") for letter in text)


def _number(axes: Axes, x: float, y: float, expert: int | None, colour: str):
    if expert is not None:
        axes.text(x, y, str(expert), color=colour, size=9.5, weight="bold", ha="center", va="center_baseline")


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str):
    axes.add_patch(Rectangle((x, y), width, height, color=colour, lw=0))


def _frame(axes: Axes, x: float, y: float, width: float, height: float, colour: str, lw: float, hatch: str = ""):
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, lw=lw, hatch=hatch))


def _draw_tile(axes: Axes, left: int, cell: int, tile: Image.Image, title: str, rows: list[list[int]]):
    top, width = EDGE, cell * len(rows)
    axes.imshow(tile, extent=(left, left + width, top + width, top), interpolation="nearest", aspect="auto")
    axes.text(left, top + width + 11, title, size=9.5, va="center")
    for i, row in enumerate(rows):
        for j, expert in enumerate(row):
            x, y, colour, number = left + j * cell, top + i * cell, colour_of(expert), 8 * len(str(expert))
            _frame(axes, x + 1.5, y + 1.5, cell - 3, cell - 3, colour, lw=2.2)
            _box(axes, x, y, number + 10, 18, colour)
            _number(axes, x + 5 + number / 2, y + 10, expert, ink(colour))


def _draw_bars(axes: Axes, routed: Routed, layer: int, top: float):
    axes.text(EDGE, top - 14, f"Layer {layer}. {_bars_title(routed)}", size=9.5, va="center")
    left, height, scale = 48, LINE - 3, 480 / routed.fullest
    for expert, (text, patches) in enumerate(zip(*routed.load(layer), strict=True)):
        y, colour = top + LINE * expert, colour_of(expert)
        _box(axes, EDGE, y, 32, height, colour)
        _number(axes, EDGE + 16, y + LINE / 2 - 1, expert, ink(colour))
        _box(axes, left, y, 480, height, "#e8e8e8")
        _box(axes, left, y, text * scale, height, colour)
        _box(axes, left + text * scale, y, patches * scale, height, "white")
        _frame(axes, left + text * scale, y, patches * scale, height, colour, lw=0, hatch="//////")
        _frame(axes, left, y, (text + patches) * scale, height, "#404040", lw=0.7)
        said = str(text + patches) + (f" ({patches} patches)" if routed.tiles else "")
        axes.text(left + 490, y + LINE / 2 - 1, said, size=9.5, va="center")
    even = left + len(routed.ids) / routed.num_experts * scale
    axes.plot([even, even], [top - 2, top + LINE * routed.num_experts], "--", color="black", lw=1.5)
