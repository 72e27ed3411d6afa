"""Tile explorer: what a picture of any size becomes, in tiles, in tokens, in the prompt, and in what Scout pays for it.

The tiles drawn are what the model's own `cut_tiles` gives its encoder: the picture top left on black, cut row by row,
and the global tile, into which all of it is squeezed. A size without a picture gets a drawing of discs, which shows
where proportions are lost. Counts and bytes are those of `minillama4.fusion`, `train_cost` and `budget`.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import ipywidgets
import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from PIL import Image, ImageDraw

from ...budget import kv_bytes
from ...config import Llama4Config
from ...fusion import choose_grid, cut_tiles, image_prompt, open_image
from ...roofline import GPUS
from ...train_cost import Cost, training_cost
from .frame import BLUE, GREY, ORANGE, Shown, View

VISION = Llama4Config.preset("scout").vision
SIDE = VISION.tile_size
MOST = 5000  # pixels of a side, by the sliders; an uploaded picture may have more
SIZES = {  # width, height
    "a phone photo, 4000 x 3000": (4000, 3000),
    "a tall receipt, 600 x 2400": (600, 2400),
    "a banner, 3000 x 400": (3000, 400),
    "one tile, 336 x 336": (336, 336),
    "one pixel wider, 337 x 336": (337, 336),
    "one pixel wider and higher, 337 x 337": (337, 337),
}
OWN, UPLOADED = "any size", "the uploaded picture"
SHOWN_TILE = 84  # pixels of a tile's side as drawn; a divisor of SIDE


# ----------------------------------------------------------------------------------------------------------------------
# Counts


@dataclass(frozen=True)
class Tiling:
    """What a picture becomes."""

    rows: int
    columns: int
    prompt: tuple[str, ...]  # its special tokens, each as the tokenizer names it

    @property
    def tiles(self) -> int:
        """The global tile included, which a picture of one tile does not have."""
        grid = self.rows * self.columns
        return grid + (grid > 1)

    @property
    def tokens(self) -> int:
        return len(self.prompt)

    def cost(self) -> Cost:
        """Scout's FLOPs for this picture as the first thing in a prompt: `forward` of each part. No head."""
        return training_cost("scout", self.tokens, self.tiles, (), head_tokens=0)

    @property
    def kv_bytes(self) -> int:
        """In bf16, in Scout's 48 layers."""
        return kv_bytes("scout", self.tokens)


def tiling(width: int, height: int) -> Tiling:
    """Of a picture of so many pixels, for Scout. ValueError: a side below 1 pixel."""
    for name, size in (("width", width), ("height", height)):
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1 pixel")
    rows, columns = choose_grid(height, width, SIDE, VISION.max_tiles)
    return Tiling(rows, columns, tuple(image_prompt(rows, columns, VISION.tokens_per_tile)))


def abbreviated(prompt: tuple[str, ...]) -> str:
    """The prompt to read: runs are counted, and each row of tiles is a line."""
    runs = [(token, len(list(run))) for token, run in groupby(prompt)]
    text = " ".join(token if count == 1 else f"{count} x {token}" for token, count in runs)
    return text.replace("<|tile_y_separator|> ", "<|tile_y_separator|>\n")


# ----------------------------------------------------------------------------------------------------------------------
# Tiles


class Drawing:
    """A picture of discs that has no pixels until it is resized, so that megapixels cost nothing.

    It has what `cut_tiles` asks of a picture: `size`, and `resize`.
    """

    def __init__(self, width: int, height: int):
        self.size = width, height

    def resize(self, size: tuple[int, int], resample: int | None = None) -> Image.Image:
        image = Image.new("RGB", size, "#f3e9d2")
        draw, (width, height) = ImageDraw.Draw(image), self.size
        across, down = size[0] / width, size[1] / height
        short, wide = min(width, height), width >= height
        discs = min(round(max(width, height) / short), 60)
        for i in range(discs):
            along, radius = (i + 0.5) / discs, 0.42 * short
            x, y = (along * width, height / 2) if wide else (width / 2, along * height)
            for share, colour in ((1, BLUE), (0.66, ORANGE), (0.33, "#f3e9d2")):
                r = radius * share
                draw.ellipse(((x - r) * across, (y - r) * down, (x + r) * across, (y + r) * down), colour)
        return image


def drawn_tiles(image: Image.Image | Drawing) -> np.ndarray:
    """[tiles, SHOWN_TILE, SHOWN_TILE, 3] uint8: what the encoder gets, in a size to look at; a global tile is last."""
    tiles = F.avg_pool2d(cut_tiles(image, VISION)[0], SIDE // SHOWN_TILE)  # [tiles, 3, SHOWN_TILE, SHOWN_TILE]
    return ((tiles + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


@lru_cache(maxsize=64)
def _drawing_tiles(width: int, height: int) -> np.ndarray:
    return drawn_tiles(Drawing(width, height))


# ----------------------------------------------------------------------------------------------------------------------
# Words and picture


def shown(width: int, height: int, tiles: np.ndarray | None = None) -> Shown:
    """What Scout makes of a picture of width x height pixels. tiles: of `drawn_tiles`; without them, discs are drawn.

    ValueError: a side below 1 pixel.
    """
    now = tiling(width, height)
    cost = now.cost()
    flops = {name: part.forward for name, part in cost.parts().items()}
    if now.tiles == 1:
        cut = "1 tile, so no global tile beside it"
        sum_up = f"{VISION.tokens_per_tile} patches + 3 marks"
    else:
        cut = (
            f"a grid of {now.rows} x {now.columns} tiles (rows x columns) + 1 global tile, the whole picture "
            "squeezed into a square"
        )
        marks = now.tokens - now.tiles * VISION.tokens_per_tile
        sum_up = f"{now.tiles} x {VISION.tokens_per_tile} patches + {marks} marks"
    lines = [
        f"{width:,} x {height:,} pixels: {cut}. {now.tokens:,} tokens: {sum_up}.",
        _one_pixel_more(width, height, now),
        f"Scout pays {cost.forward / 1e12:.1f} TFLOPs of prefill (encoder {flops['encoder'] / 1e12:.1f}, projector "
        f"{flops['projector'] / 1e12:.2f}, decoder {flops['text'] / 1e12:.1f}), at least "
        f"{cost.forward / GPUS['h100'].flops * 1e3:.1f} ms of an H100, and {now.kv_bytes:,} bytes of KV cache "
        f"({now.kv_bytes / 2**20:,.1f} MiB, bf16), as the first thing in a prompt.",
        f"Prompt:\n{abbreviated(now.prompt)}",
    ]
    text = "\n".join(lines)
    pixels = tiles if tiles is not None else _drawing_tiles(width, height)
    figure = Figure(figsize=(9, 3.3))
    grid = f"grid: {now.rows} x {now.columns} tiles" if now.tiles > 1 else "one tile"
    _image(figure, (0.01, 0.43), _mosaic(pixels, now), f"{grid}, black where the picture ends")
    if now.tiles > 1:
        _image(figure, (0.455, 0.17), pixels[-1], "global tile")
    else:
        figure.text(0.54, 0.5, "no global tile:\none tile is\nthe whole picture", ha="center", va="center", color=GREY)
    _seams(figure.add_axes((0.7, 0.15, 0.27, 0.74)), width, now, *steps(height, max(MOST, width)))
    figure.text(0.835, 0.93, "tokens by width, at this height", ha="center")
    alt = (
        f"The tiles that the encoder gets, the picture top left on black. {lines[0]} "
        "A curve: tokens against the width, at this height, in steps."
    )
    return Shown(text, figure, alt)


def _one_pixel_more(width: int, height: int, now: Tiling) -> str:
    moves = {"wider": (1, 0), "higher": (0, 1), "wider and higher": (1, 1)}
    more = {words: tiling(width + across, height + down).tokens for words, (across, down) in moves.items()}
    changed = [f"{tokens:,} if {words}" for words, tokens in more.items() if tokens != now.tokens]
    return f"A seam! With one pixel more: {', '.join(changed)}." if changed else "One pixel more changes nothing."


def _mosaic(pixels: np.ndarray, now: Tiling) -> np.ndarray:
    """[height, width, 3]: the tiles of the grid, with gaps between them, since the encoder sees each one alone."""
    gap = max(2, 2 * max(now.rows, now.columns))
    step = SHOWN_TILE + gap
    canvas = np.full((now.rows * step - gap, now.columns * step - gap, 3), 255, np.uint8)
    for i in range(now.rows * now.columns):
        top, left = i // now.columns * step, i % now.columns * step
        canvas[top : top + SHOWN_TILE, left : left + SHOWN_TILE] = pixels[i]
    return canvas


def _image(figure: Figure, place: tuple[float, float], pixels: np.ndarray, title: str):
    """place: left and width in the figure. Titles are the figure's: those of axes take as long to draw as the rest."""
    left, width = place
    axes = figure.add_axes((left, 0.03, width, 0.86), anchor="N", xticks=[], yticks=[])
    axes.imshow(pixels, interpolation="nearest")
    axes.set_axis_off()
    figure.text(left + width / 2, 0.93, title, ha="center")


@lru_cache(maxsize=64)
def steps(height: int, last: int) -> tuple[list[int], list[int]]:
    """(widths, tokens) of pictures of this height: from each width to the next (not included), so many tokens.

    Compared every 28 pixels, and where the counts differ, halved down to the pixels where they change. A picture with
    just the proportions of a grid can be a step of one pixel.
    """

    def changes(low: int, high: int, before: int, after: int) -> list[tuple[int, int]]:
        if before == after or high - low == 1:
            return [] if before == after else [(high, after)]
        middle = (low + high) // 2
        between = tiling(middle, height).tokens
        return changes(low, middle, before, between) + changes(middle, high, between, after)

    ends = [1, *range(28, last, 28), last]
    counts = [tiling(width, height).tokens for width in ends]
    found = [(1, counts[0])]
    for low, high, before, after in zip(ends, ends[1:], counts, counts[1:], strict=False):
        found += changes(low, high, before, after)
    found.append((last, counts[-1]))
    return [width for width, _ in found], [tokens for _, tokens in found]


def _seams(axes: Axes, width: int, now: Tiling, widths: list[int], tokens: list[int]):
    axes.step(widths, tokens, where="post", color=BLUE)
    axes.plot(width, now.tokens, "o", color=ORANGE, markeredgecolor="black", markersize=8, clip_on=False)
    axes.set(xlim=(0, widths[-1]), ylim=(0, 2650), xlabel="width, pixels")
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_locator(FixedLocator(range(0, 2501, 500)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))


# ----------------------------------------------------------------------------------------------------------------------
# The widget


class TileExplorer(View):
    """Choose a picture, or any size, or upload a picture of your own.

    `prompt`: the exact special tokens of the picture now shown, as one string; "" where none is shown.
    """

    def __init__(self):
        width, height = next(iter(SIZES.values()))
        self._name, self._size, self._tiles, self._refused = "", (0, 0), None, "Upload a picture first."
        self.prompt = ""
        controls = {
            "picture": ipywidgets.Dropdown(options=[*SIZES, OWN, UPLOADED], description="picture"),
            "upload": ipywidgets.FileUpload(accept="image/*", description="Upload a picture"),
            "width": ipywidgets.IntSlider(width, 1, MOST, description="width", readout=False),
            "width_px": ipywidgets.BoundedIntText(width, min=1, max=MOST, tooltip="width in pixels"),
            "height": ipywidgets.IntSlider(height, 1, MOST, description="height", readout=False),
            "height_px": ipywidgets.BoundedIntText(height, min=1, max=MOST, tooltip="height in pixels"),
        }
        for name, pixels in (("picture", 380), ("width", 340), ("height", 340), ("width_px", 80), ("height_px", 80)):
            controls[name].layout.width = f"{pixels}px"
        # Jupyter's server drops the connection at a message of 10 MiB: nothing larger would reach this code.
        controls["upload"].tooltip = "PNG, JPEG, WebP, BMP, TIFF or a GIF of one frame, below 10 MB"
        controls["upload"].layout.width = "200px"
        super().__init__(self._show, controls, ("picture upload", "width width_px height height_px"))

    def _show(self, picture, width, height, **others) -> Shown:
        self.prompt, tiles, name = "", None, ""
        if picture == UPLOADED:
            if self._refused:
                raise ValueError(self._refused)
            (width, height), tiles, name = self._size, self._tiles, f"{self._name}: "
        seen = shown(width, height, tiles)
        self.prompt = "".join(tiling(width, height).prompt)
        return Shown(name + seen.text, seen.picture, name + seen.alt)

    def react(self, event):
        """Sliders and fields follow each other; a preset and an upload fill them."""
        if not isinstance(event, dict):
            return
        name = next(name for name, control in self.controls.items() if control is event["owner"])
        if name == "upload" and event["new"]:
            self._open(event["new"][0])
            self.controls["picture"].value = UPLOADED
        elif name == "picture" and event["new"] in SIZES:
            self._fill(*SIZES[event["new"]])
        elif name.partition("_")[0] in ("width", "height"):
            side = name.partition("_")[0]
            self._fill(**{side: event["new"]})
            self.controls["picture"].value = OWN
        if self.controls["picture"].value == UPLOADED and not self._refused:
            self._fill(*self._size)

    def _fill(self, width: int | None = None, height: int | None = None):
        for side, pixels in (("width", width), ("height", height)):
            for name in (side, f"{side}_px") if pixels else ():
                self.controls[name].value = min(pixels, MOST)

    def _open(self, file: dict):
        """An item of `FileUpload.value`. It is cut into tiles once, so that showing it again is quick."""
        self._name, self._refused = file["name"], ""
        try:
            image = open_image(file["content"])
            self._size, self._tiles = image.size, drawn_tiles(image)
        except ValueError as error:
            self._refused = f"{self._name}: {error}"
