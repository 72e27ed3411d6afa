"""Tile explorer against the fact sheet's table of sizes, sums by hand, and pictures whose pixels are known."""

import base64
import io
import re
from datetime import datetime

import numpy as np
import pytest
from PIL import Image

from minillama4.course.widgets.frame import png
from minillama4.course.widgets.tile_explorer import (
    MOST,
    OWN,
    SIZES,
    UPLOADED,
    Drawing,
    TileExplorer,
    abbreviated,
    drawn_tiles,
    shown,
    steps,
    tiling,
)

FACTS = {  # width, height -> rows, columns, tokens (fact sheet, section 2.2)
    (336, 336): (1, 1, 147),
    (100, 50): (1, 1, 147),
    (337, 337): (2, 2, 727),
    (336, 672): (2, 1, 437),
    (640, 480): (2, 2, 727),
    (1280, 720): (3, 4, 1887),
    (1024, 768): (3, 4, 1887),
    (1920, 1080): (3, 5, 2322),
    (1344, 1344): (4, 4, 2467),
}
IDS = {  # fact sheet, section 2.3
    "<|image_start|>": 200080,
    "<|image_end|>": 200081,
    "<|tile_x_separator|>": 200084,
    "<|tile_y_separator|>": 200085,
    "<|image|>": 200090,
    "<|patch|>": 200092,
}
ODD = [(1, 1), (1, MOST), (MOST, 1), (MOST, MOST), (400, 5000), (5000, 40), (337, 336), (20_000, 300)]


# ----------------------------------------------------------------------------------------------------------------------
# Counts


@pytest.mark.parametrize("size", FACTS)
def test_the_table_of_the_fact_sheet(size):
    now = tiling(*size)
    assert (now.rows, now.columns, now.tokens) == FACTS[size]
    said = shown(*size).text
    assert said.startswith(f"{size[0]:,} x {size[1]:,} pixels: ") and f" {now.tokens:,} tokens: " in said
    assert f"grid of {now.rows} x {now.columns} tiles" in said or now.tokens == 147


@pytest.mark.parametrize("size", [*SIZES.values(), *ODD])
def test_each_tile_of_a_grid_takes_145_tokens_and_the_rest_147(size):
    now = tiling(*size)
    grid = now.rows * now.columns
    assert 1 <= grid <= 16 and now.tiles == (1 if grid == 1 else grid + 1)
    assert now.tokens == (147 if grid == 1 else 145 * grid + 147)


def test_the_prompt_of_a_small_grid_written_out():
    tile = "<|patch|>" * 144
    assert "".join(tiling(10, 10).prompt) == f"<|image_start|><|image|>{tile}<|image_end|>"
    x, y = "<|tile_x_separator|>", "<|tile_y_separator|>"
    rows = (tile + x + tile + y) * 2
    assert "".join(tiling(337, 337).prompt) == f"<|image_start|>{rows}<|image|>{tile}<|image_end|>"
    assert {IDS[token] for token in tiling(337, 337).prompt} == set(IDS.values())


@pytest.mark.parametrize("size", [(336, 336), (337, 337), (3000, 400), (600, 2400)])
def test_the_prompt_to_read_says_the_exact_one(size):
    prompt = tiling(*size).prompt
    said = abbreviated(prompt)
    again = re.sub(r"(\d+) x (<\|patch\|>)", lambda match: match[2] * int(match[1]), said)
    assert re.sub(r"\s", "", again) == "".join(prompt) and len(said) < 1300
    assert len(said.splitlines()) == (tiling(*size).rows + 1 if len(prompt) > 147 else 1)


@pytest.mark.parametrize("size", [(336, 336), (337, 337), (4000, 3000)])
def test_what_scout_pays(size):
    """By hand, of the numbers in the fact sheet: 2 FLOPs a weight, 4 x 5,120 a pair of query and key."""
    now = tiling(*size)
    tokens, tiles = now.tokens, now.tiles
    weights = 16_138_408_960 - 1_034_485_760 - 496_640  # active, without embedding, head and norms
    text = 2 * tokens * weights + 48 * 4 * 5120 * tokens * (tokens + 1) // 2
    layer = 4 * 1408**2 + 2 * 1408 * 5632
    tile = 576 * 588 * 1408 + 577 * 34 * layer + 144 * (5632 + 4096) * 4096
    encoder = tiles * (2 * tile + 34 * 4 * 1408 * 577**2)
    projector = 2 * tiles * 144 * 4096 * 5120
    cost = now.cost()
    assert [part.forward for part in cost.parts().values()] == [encoder, projector, text]
    assert now.kv_bytes == tokens * 192 * 1024
    said = shown(*size).text
    assert f"pays {(text + encoder + projector) / 1e12:.1f} TFLOPs of prefill" in said
    assert f"{tokens * 196_608:,} bytes of KV cache" in said


def test_the_seam_of_one_pixel():
    assert "A seam! With one pixel more: 437 if wider, 437 if higher, 727 if wider and higher." in shown(336, 336).text
    assert "A seam! With one pixel more: 727 if higher, 727 if wider and higher." in shown(337, 336).text
    assert "One pixel more changes nothing." in shown(337, 337).text
    assert [tiling(side, side).tokens for side in (336, 337)] == [147, 727]


@pytest.mark.parametrize("height", [300, 336, 3000])
def test_the_curve_has_every_step(height):
    last = 5000 if height == 3000 else 1500
    counts = [tiling(width, height).tokens for width in range(1, last + 1)]
    edges = [width for width in range(2, last + 1) if counts[width - 1] != counts[width - 2]]
    widths, tokens = steps(height, last)
    assert widths == [1, *edges, last] and tokens == [counts[width - 1] for width in widths]


def test_no_picture_has_no_pixels():
    with pytest.raises(ValueError, match="width is 0; it must be at least 1 pixel"):
        tiling(0, 5)
    with pytest.raises(ValueError, match="height is -1; it must be at least 1 pixel"):
        shown(5, -1)


# ----------------------------------------------------------------------------------------------------------------------
# Pixels


def colours(tile: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(pixel) for pixel in tile.reshape(-1, 3).tolist()}


def test_tiles_row_by_row_and_the_whole_picture_last():
    image, parts = Image.new("RGB", (672, 672)), [(250, 0, 0), (0, 250, 0), (0, 0, 250), (90, 90, 90)]
    for i, colour in enumerate(parts):
        image.paste(colour, (i % 2 * 336, i // 2 * 336, i % 2 * 336 + 336, i // 2 * 336 + 336))
    tiles = drawn_tiles(image)
    assert tiles.shape == (5, 84, 84, 3) and [colours(tile) for tile in tiles[:4]] == [{colour} for colour in parts]
    assert [tuple(tiles[4, y, x]) for y in (20, 60) for x in (20, 60)] == parts


def test_black_where_the_picture_ends_but_not_in_the_global_tile():
    first, second, whole = drawn_tiles(Image.new("RGB", (672, 300), "white")) // 255
    for tile in (first, second):
        assert (tile[:75] == 1).all() and (tile[75:] == 0).all()  # 300 of 336 rows
    assert (whole == 1).all()


@pytest.mark.parametrize("width, height", [(600, 2400), (1344, 336), (500, 500)])
def test_discs_are_round_in_the_grid_and_squeezed_in_the_global_tile(width, height):
    paper = (243, 233, 210)
    picture = np.asarray(Drawing(width, height).resize((width, height)))
    square = np.asarray(Drawing(width, height).resize((336, 336)))
    short, discs = min(width, height), round(max(width, height) / min(width, height))
    for pixels, across, down in ((picture, 1, 1), (square, 336 / width, 336 / height)):
        disc = (pixels != paper).any(-1)
        for axis, scale, many in (
            (0, across, discs if width > height else 1),
            (1, down, discs if height > width else 1),
        ):
            size = disc.any(axis).sum() / many
            assert size == pytest.approx(0.84 * short * scale, abs=2.5)
    assert (picture[0, 0] == paper).all()


def test_a_drawing_is_cut_as_a_picture_of_its_size_is():
    size = (700, 400)
    picture = Drawing(*size).resize(size)
    ours, theirs = drawn_tiles(Drawing(*size)).astype(int), drawn_tiles(picture).astype(int)
    assert ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 2


# ----------------------------------------------------------------------------------------------------------------------
# Picture


@pytest.mark.parametrize("size", [*SIZES.values(), *ODD])
def test_nothing_is_cut_and_the_picture_is_described(size):
    seen = shown(*size)
    figure = seen.picture
    assert seen.text.splitlines()[0] in seen.alt and "\n" not in seen.alt and png(figure)[1] <= 900
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [text.get_window_extent() for text in figure.texts]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_the_point_lies_on_the_curve_and_the_tiles_are_drawn_apart():
    grid, whole, curve = shown(4000, 3000).picture.axes
    line, point = curve.lines
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (4000, 1887)
    at = list(line.get_xdata()).index(4000)
    assert line.get_ydata()[at] == 1887
    mosaic = np.asarray(grid.images[0].get_array())
    assert mosaic.shape == (3 * 84 + 2 * 8, 4 * 84 + 3 * 8, 3) and (mosaic[84:92] == 255).all()
    assert (mosaic[:, 84:92] == 255).all() and whole.images[0].get_array().shape == (84, 84, 3)
    assert len(shown(336, 336).picture.axes) == 2  # no global tile


# ----------------------------------------------------------------------------------------------------------------------
# The widget


@pytest.fixture(scope="module")
def explorer() -> TileExplorer:
    return TileExplorer()


def values(widget) -> list[int]:
    return [widget.controls[name].value for name in ("width", "width_px", "height", "height_px")]


def test_a_preset_fills_sliders_and_fields(explorer):
    for label, (width, height) in SIZES.items():
        said = explorer.drive(picture=label)
        assert said.startswith(f"{width:,} x {height:,} pixels: ")
        assert values(explorer) == [width, width, height, height]
        assert explorer.controls["picture"].value == label
        assert explorer.prompt == "".join(tiling(width, height).prompt)


def test_slider_and_field_follow_each_other_and_make_it_any_size(explorer):
    explorer.drive(picture="one tile, 336 x 336")
    assert "437 tokens" in explorer.drive(width=337) and explorer.controls["picture"].value == OWN
    assert "727 tokens" in explorer.drive(height_px=337) and values(explorer) == [337, 337, 337, 337]
    drawn = explorer.picture.value
    explorer.drive(width_px=99_999, height=-4)
    assert values(explorer) == [MOST, MOST, 1, 1] and explorer.picture.value != drawn


def upload(explorer, name: str, content: bytes) -> str:
    """As the browser does it."""
    file = dict(name=name, type="", size=len(content), content=memoryview(content), last_modified=datetime.now())
    return explorer.drive(upload=(file,))


def saved(image: Image.Image, format: str = "PNG", **how) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=format, **how)
    return stream.getvalue()


def seen(explorer) -> Image.Image:
    """The picture that a learner sees."""
    data = re.search(r'base64,([^"]+)"', explorer.picture.value)[1]
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


GREY16 = Image.fromarray(np.full((90, 90), 257 * 180, np.uint16))
PALETTE = Image.new("P", (700, 340), 0)
PALETTE.putpalette([0, 90, 0, 9, 9, 9])
TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize(
    "name, content, size, colour",
    [
        ("photo.jpg", saved(Image.new("RGB", (4000, 3000), (200, 40, 60)), "JPEG"), (4000, 3000), (200, 40, 60)),
        (
            "turned.jpg",
            saved(Image.new("RGB", (800, 300), (0, 99, 200)), "JPEG", exif=TURNED),
            (300, 800),
            (0, 99, 200),
        ),
        ("ink.jpg", saved(Image.new("CMYK", (90, 80), (0, 255, 255, 0)), "JPEG"), (90, 80), (255, 0, 0)),
        ("clear.png", saved(PALETTE, transparency=0), (700, 340), (255, 255, 255)),
        ("palette.png", saved(PALETTE, transparency=1), (700, 340), (0, 90, 0)),
        ("grey16.png", saved(GREY16), (90, 90), (180, 180, 180)),
        ("still.gif", saved(Image.new("RGB", (50, 60), (0, 0, 200)), "GIF"), (50, 60), (0, 0, 200)),
    ],
)
def test_an_uploaded_picture_is_shown_as_it_is(explorer, name, content, size, colour):
    width, height = size
    assert upload(explorer, name, content).startswith(f"{name}: {width:,} x {height:,} pixels: ")
    assert explorer.controls["picture"].value == UPLOADED and values(explorer) == [width, width, height, height]
    assert explorer.prompt.count("<|patch|>") == 144 * tiling(*size).tiles
    pixels = np.asarray(seen(explorer)).astype(int)[100:, :780]  # below the title
    assert (np.abs(pixels - colour).max(-1) <= 6).any()
    assert f'alt="{name}: ' in explorer.picture.value


MOVING = saved(Image.new("RGB", (9, 9)), "GIF", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")])
WHOLE = saved(Image.effect_noise((300, 200), 50).convert("RGB"), "JPEG")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("moving.gif", MOVING, "animated (2 frames); save one frame as PNG"),
        ("cut.jpg", WHOLE[: len(WHOLE) // 2], "truncated or broken"),
        ("notes.png", b"not a picture\n", "is no image"),
        ("<b>.png", b"", "is empty"),
    ],
)
def test_what_is_no_picture_is_said_in_one_line_and_the_next_one_works(explorer, name, content, words):
    said = upload(explorer, name, content)
    assert said.startswith(f"{name}: ") and words in said and "\n" not in said and "Traceback" not in said
    assert explorer.picture.value == explorer.prompt == ""
    assert upload(explorer, "next.png", saved(Image.new("RGB", (20, 20)))).startswith("next.png: 20 x 20 pixels")
    assert explorer.picture.value


def test_to_and_fro_between_an_upload_and_a_size():
    explorer = TileExplorer()
    assert explorer.drive(picture=UPLOADED) == "Upload a picture first." and explorer.prompt == ""
    said = upload(explorer, "mine.png", saved(Image.new("RGB", (700, 100), "green")))
    shown_ = explorer.picture.value
    assert explorer.drive(width=500).startswith("500 x 100 pixels") and explorer.controls["picture"].value == OWN
    assert explorer.drive(picture=UPLOADED) == said and explorer.picture.value == shown_
    assert values(explorer) == [700, 700, 100, 100]
    long = upload(explorer, "long.png", saved(Image.new("1", (7000, 20))))
    assert long.startswith("long.png: 7,000 x 20 pixels") and values(explorer) == [MOST, MOST, 20, 20]
