"""From pictures to tiles, from tiles to prompts, from prompts to one embedding sequence."""

import ast
import importlib.util
import io
import math
import struct
import zlib
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from transformers.image_utils import SizeDict

from minillama4.config import Llama4Config
from minillama4.fusion import (
    build_prompt,
    choose_grid,
    cut_tiles,
    image_prompt,
    merge_image_embeddings,
    open_image,
    token_layout,
)
from minillama4.tokenizer import train_tokenizer

SCOUT, MINI = Llama4Config.preset("scout"), Llama4Config.preset("mini-scout")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["How many circles are there?"])


@pytest.fixture(scope="module")
def theirs():
    """The sizing functions of transformers' Llama 4 image processor. Its module needs torchvision; these do not."""
    path = Path(importlib.util.find_spec("transformers").origin).parent / "models/llama4/image_processing_llama4.py"
    module = ast.parse(path.read_text("utf-8"))
    module.body = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name != "pad_to_best_fit"]
    names = {"math": math, "torch": torch, "defaultdict": defaultdict, "lru_cache": lru_cache, "SizeDict": SizeDict}
    exec(compile(module, str(path), "exec"), names)
    return names


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def error(call, *arguments):
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- The grid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, height, grid, tokens", [
    (336, 336, (1, 1), 147), (1, 1, (1, 1), 147), (337, 337, (2, 2), 727), (336, 672, (2, 1), 437),
    (640, 480, (2, 2), 727), (1280, 720, (3, 4), 1887), (1024, 768, (3, 4), 1887), (1920, 1080, (3, 5), 2322),
    (1344, 1344, (4, 4), 2467),
])  # fmt: skip
def test_table_of_facts(width, height, grid, tokens):
    assert choose_grid(height, width, 336, 16) == grid
    assert len(image_prompt(*grid, SCOUT.vision.tokens_per_tile)) == tokens


def random_sizes(count):
    random = Random(4)
    yield from [(1, 1), (20, 20000), (20000, 20), (1, 5000), (335, 337), (672, 672), (1008, 672)]
    for _ in range(count):
        yield tuple(round(math.exp(random.uniform(0, math.log(6000)))) for _ in "hw")


@pytest.mark.parametrize("tile, most", [(336, 16), (48, 3), (48, 7)])
def test_grid_is_that_of_transformers(theirs, tile, most):
    canvases = torch.tensor(theirs["find_supported_resolutions"](most, SizeDict(height=tile, width=tile)))
    assert most != 16 or len(canvases) == 50
    chosen = set()
    for height, width in random_sizes(400):
        grid = choose_grid(height, width, tile, most)
        canvas = theirs["get_best_fit"]((height, width), canvases).tolist()
        assert [side * tile for side in grid] == canvas, (height, width)
        chosen.add(grid)
    assert len(chosen) > {16: 20, 3: 4, 7: 8}[most]


def test_every_one_of_the_50_grids_is_reached():
    grids = {choose_grid(rows * 336, columns * 336, 336, 16)
             for rows in range(1, 17) for columns in range(1, 17) if rows * columns <= 16}  # fmt: skip
    assert len(grids) == 50


def test_bad_sizes():
    assert "height" in error(choose_grid, 0, 5, 336, 16)


# --- Tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(48, 48), (1, 1), (30, 40), (100, 30), (47, 145), (20, 20000), (333, 7)])
@pytest.mark.parametrize("vision", [SCOUT.vision, MINI.vision], ids=["scout", "mini"])
def test_tiles_equal_the_torch_resize_of_transformers(theirs, vision, height, width):
    """What `Llama4ImageProcessor` does, written with torch: equal to one or two levels of 255 (its own rounding)."""
    image, side = noise(height, width), vision.tile_size
    tiles, (rows, columns) = cut_tiles(image, vision)

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resize = lambda size: F.interpolate(pixels, size, mode="bilinear", antialias=True)[0]  # noqa: E731
    room = min(max(height, side), rows * side), min(max(width, side), columns * side)
    new = [max(1, n) for n in theirs["get_max_res_without_distortion"]((height, width), room)]
    canvas = F.pad(resize(new), (0, columns * side - new[1], 0, rows * side - new[0]))
    expected = [tile for row in canvas.split(side, dim=1) for tile in row.split(side, dim=2)]
    expected += [resize([side, side])] if rows * columns > 1 else []

    assert tiles.shape == (len(expected), 3, side, side) and tiles.dtype == torch.float32
    levels = (tiles * 0.5 + 0.5) * 255
    off = (levels - torch.stack(expected)).abs()
    assert off.max() < 2.01
    assert (off > 0.01).float().mean() < 0.2


def test_padding_is_black_right_and_below():
    tiles, grid = cut_tiles(Image.new("RGB", (24, 12), "white"), MINI.vision)  # grown to 48 x 24
    assert grid == (1, 1)
    assert (tiles[0, :, :24] == 1).all() and (tiles[0, :, 24:] == -1).all()
    tiles, grid = cut_tiles(Image.new("RGB", (120, 30), "white"), MINI.vision)  # not grown to 144: stays 120 x 30
    assert grid == (1, 3)
    assert (tiles[2, :, :30, :24] == 1).all() and (tiles[2, :, :30, 24:] == -1).all()
    assert (tiles[:3, :, 30:] == -1).all()


def test_tiles_come_row_by_row_and_the_global_view_last():
    image = Image.new("RGB", (96, 96))
    for number, corner in enumerate([(0, 0), (48, 0), (0, 48), (48, 48)]):
        image.paste((50 * (number + 1),) * 3, (*corner, corner[0] + 48, corner[1] + 48))
    four = MINI.vision.__class__(**{**vars(MINI.vision), "max_tiles": 4})
    tiles, grid = cut_tiles(image, four)
    assert grid == (2, 2) and len(tiles) == 5
    levels = ((tiles * 0.5 + 0.5) * 255).round()
    assert [levels[i].unique().tolist() for i in range(4)] == [[50], [100], [150], [200]]
    assert [levels[4, 0, y, x].item() for y, x in ((5, 5), (5, 42), (42, 5), (42, 42))] == [50, 100, 150, 200]


def test_global_view_does_not_keep_proportions():
    tiles, _ = cut_tiles(Image.new("RGB", (144, 48), "white"), MINI.vision)
    assert len(tiles) == 4 and (tiles == 1).all()  # no black bars


# --- Opening ----------------------------------------------------------------------------------------------------------


def rgb(image, at=(0, 0)):
    image = open_image(image)
    assert image.mode == "RGB"
    return image.getpixel(at)


def test_png_and_jpeg(tmp_path):
    for name in ("a.png", "a.jpg", "a.webp", "a.bmp", "a.gif", "a.tiff"):
        Image.new("RGB", (8, 8), (250, 0, 0)).save(tmp_path / name)
        assert rgb(str(tmp_path / name)) == pytest.approx((250, 0, 0), abs=6)


def test_transparency_lies_on_white(tmp_path):
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 1), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert rgb(tmp_path / "p.png") == (255, 255, 255)
    assert rgb(tmp_path / "p.png", (1, 1)) == (255, 0, 0)
    assert rgb(Image.new("RGBA", (2, 2), (0, 0, 0, 128))) == pytest.approx((127, 127, 127), abs=1)
    assert rgb(Image.new("LA", (2, 2), (0, 0))) == (255, 255, 255)
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert rgb(tmp_path / "key.png") == (255, 255, 255)


def test_grey_of_any_depth(tmp_path):
    Image.fromarray(np.array([[0, 200, 257 * 100, 65535]], dtype=np.uint16)).save(tmp_path / "grey16.png")
    assert [rgb(tmp_path / "grey16.png", (x, 0))[0] for x in range(4)] == [0, 1, 100, 255]
    assert rgb(Image.fromarray(np.array([[65535]], dtype=np.int32))) == (255, 255, 255)
    assert rgb(Image.new("1", (1, 1), 1)) == (255, 255, 255)
    assert rgb(Image.new("L", (1, 1), 9)) == (9, 9, 9)


def test_cmyk_and_exif(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert rgb(tmp_path / "cmyk.jpg") == pytest.approx((255, 0, 0), abs=6)
    image, exif = Image.new("RGB", (20, 10)), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20)
    assert open_image(Image.open(tmp_path / "turned.jpg")).size == (10, 20)


def test_phone_jpeg_with_a_second_picture(tmp_path):
    first, second = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    assert rgb(tmp_path / "phone.jpg") == pytest.approx((255, 0, 0), abs=6)


def png_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + checksum + struct.pack(">I", 99) + b"IDAT"


def test_bad_files_are_refused_in_one_line(tmp_path):
    def written(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    cases = {
        written("text.png", b"hello\nworld"): ["text.png", "hello", "PNG or JPEG"],
        written("empty.png", b""): ["empty.png", "is empty"],
        written("page.pdf", b"%PDF-1.4\n"): ["page.pdf", "PDF"],
        written("eps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"): ["eps.png"],
        written("wide.png", png_header(20000, 6000)): ["wide.png", "20000 x 6000", "120 megapixels", "100"],
        written("bomb.png", png_header(65535, 65535)): ["bomb.png", "100 megapixels"],
        tmp_path / "none.png": ["none.png", "not there"],
        tmp_path: ["folder"],
    }
    picture = noise(200, 200)
    for name in ("cut.png", "cut.jpg", "cut.webp"):
        picture.save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        cases[written(name, content[: len(content) // 2])] = [name]
    picture.save(tmp_path / "moving.gif", save_all=True, append_images=[noise(200, 200, 1), noise(200, 200, 2)])
    cases[tmp_path / "moving.gif"] = ["moving.gif", "animated (3 frames)", "PNG"]
    picture.save(tmp_path / "moving.png", save_all=True, append_images=[noise(200, 200, 1)])
    cases[tmp_path / "moving.png"] = ["moving.png", "animated (2 frames)"]
    for path, words in cases.items():
        said = error(open_image, path)
        assert all(word in said for word in words), said


def test_bad_pictures_in_memory_are_refused():
    assert "'F'" in error(open_image, Image.new("F", (2, 2)))
    assert "-1" in error(open_image, Image.fromarray(np.array([[-1]], dtype=np.int32)))
    assert "0 x 3" in error(open_image, Image.new("RGB", (0, 3)))
    assert "ndarray" in error(open_image, np.zeros((3, 3)))


def saved(image, **how):
    """The bytes of its file."""
    stream = io.BytesIO()
    image.save(stream, **how)
    return stream.getvalue()


def test_bytes_of_a_file_of_any_format():
    for name in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        content = saved(Image.new("RGB", (8, 8), (250, 0, 0)), format=name)
        for given in (content, bytearray(content), memoryview(content)):
            assert rgb(given) == pytest.approx((250, 0, 0), abs=6)
    assert "over 100 megapixels" in error(open_image, png_header(65535, 65535))


def test_a_photo_of_twelve_megapixels():
    photo, colours = Image.new("RGB", (4000, 3000)), [(200, 30, 30), (30, 200, 30), (30, 30, 200), (180, 180, 20)]
    corners = [(0, 0), (2000, 0), (0, 1500), (2000, 1500)]
    for corner, colour in zip(corners, colours, strict=True):
        photo.paste(colour, (*corner, corner[0] + 2000, corner[1] + 1500))
    opened = open_image(saved(photo, format="JPEG", quality=90))
    assert (opened.mode, opened.size) == ("RGB", (4000, 3000))
    for (x, y), colour in zip(corners, colours, strict=True):
        assert opened.getpixel((x + 1000, y + 750)) == pytest.approx(colour, abs=4)


def test_each_colour_of_a_palette_has_its_own_transparency():
    palette = Image.new("P", (4, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255, 0, 255, 0, 10, 20, 30])
    for x in range(4):
        palette.putpixel((x, 0), x)
    opened = open_image(saved(palette, format="PNG", transparency=bytes([0, 51, 255, 255])))
    faint = 255 - 51  # a fifth of blue on white
    assert [opened.getpixel((x, 0)) for x in range(4)] == [
        (255, 255, 255), (faint, faint, 255), (0, 255, 0), (10, 20, 30)
    ]  # fmt: skip


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_brightness(format):
    """A ramp over all 65,536 levels: level v is v / 65535 of white, and no level above 255 is cut off."""
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    opened = np.array(open_image(saved(Image.fromarray(levels), format=format)))
    assert opened.shape == (256, 256, 3) and (opened == opened[..., :1]).all()
    assert np.abs(opened[..., 0] - levels / 65535 * 255).max() <= 0.5


def test_grey_of_16_bits_with_a_level_that_is_transparent():
    levels = Image.fromarray(np.array([[257 * 5, 257 * 6, 257 * 5 + 1]], dtype=np.uint16))
    opened = open_image(saved(levels, format="PNG", transparency=257 * 5))
    assert [opened.getpixel((x, 0))[0] for x in range(3)] == [255, 6, 5]


@pytest.mark.parametrize(
    "orientation, corner", [(1, (0, 0)), (2, (1, 0)), (3, (1, 1)), (4, (0, 1)), (5, (0, 0)), (6, (1, 0)), (7, (1, 1)),
                            (8, (0, 1))])  # fmt: skip
def test_all_eight_exif_orientations(orientation, corner):
    """Where the stored picture's first pixel belongs, by the EXIF standard: 1 is top left, 6 is top right, ..."""
    image, exif = Image.new("RGB", (40, 20), "black"), Image.Exif()
    image.paste("white", (0, 0, 8, 8))
    exif[0x0112] = orientation
    opened = open_image(saved(image, format="JPEG", quality=95, exif=exif))
    assert opened.size == ((40, 20) if orientation < 5 else (20, 40))
    at = [(3, size - 4)[far] for size, far in zip(opened.size, corner, strict=True)]
    assert min(opened.getpixel(tuple(at))) > 240
    assert sum(min(opened.getpixel((x, y))) > 128 for x in (3, opened.width - 4) for y in (3, opened.height - 4)) == 1


def test_cmyk_bytes_are_not_inverted():
    """Ink on white paper: half of the black ink is grey, cyan and yellow are green, none is white."""
    for ink, seen in {(0, 0, 0, 128): (127,) * 3, (255, 0, 255, 0): (0, 255, 0), (0, 0, 0, 0): (255,) * 3}.items():
        assert rgb(saved(Image.new("CMYK", (8, 8), ink), format="JPEG")) == pytest.approx(seen, abs=6)


def test_bad_bytes_are_refused_in_one_line():
    first, second = noise(200, 200), noise(200, 200, 1)
    whole = {name: saved(first, format=name) for name in ("PNG", "JPEG", "WEBP", "GIF")}
    cut = {name: content[: len(content) // 2] for name, content in whole.items()}
    moving = saved(first, format="GIF", save_all=True, append_images=[second])
    assert "animated (2 frames); save one frame as PNG" in error(open_image, moving)
    for name, content in cut.items():
        said = error(open_image, content)
        assert f"image ({len(content):,} bytes in memory) is" in said and "broken" in said, name
    assert "starts with b'hello\\nworld'" in error(open_image, b"hello\nworld")
    assert "is empty" in error(open_image, b"")


# --- Prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid, layout", [
    ((1, 1), "S I pp E"),
    ((1, 3), "S pp x pp x pp y I pp E"),
    ((3, 1), "S pp y pp y pp y I pp E"),
    ((2, 2), "S pp x pp y pp x pp y I pp E"),
])  # fmt: skip
def test_separators(grid, layout):
    names = ["image_start", "image_end", "image", "patch", "tile_x_separator", "tile_y_separator"]
    long = dict(zip("SEIpxy", names, strict=True))
    assert image_prompt(*grid, 2) == [f"<|{long[letter]}|>" for letter in layout.replace(" ", "")]


def chat(*parts):
    return [{"role": "user", "content": list(parts)}]


def test_text_and_pictures_keep_their_order(tokenizer):
    wide, small = Image.new("RGB", (144, 48), "white"), Image.new("RGB", (48, 48), "black")
    say = lambda text: {"type": "text", "text": text}  # noqa: E731
    own, next_one = {"type": "image", "image": small}, {"type": "image"}
    messages = chat(say("How"), own, say("many"), next_one, next_one)
    ids, pixels = build_prompt(tokenizer, messages, [wide, small], MINI)
    assert ids.dtype == torch.int64 and ids.shape[0] == 1
    assert pixels.shape == (6, 3, 48, 48)
    assert [tile.mean().item() for tile in pixels] == [-1, 1, 1, 1, 1, -1]
    assert int((ids == MINI.patch_token).sum()) == 6 * 16
    one = "<|image_start|>, <|image|>, 16 x <|patch|>, <|image_end|>"
    row = "16 x <|patch|>, <|tile_x_separator|>, " * 2 + "16 x <|patch|>, <|tile_y_separator|>"
    three = f"<|image_start|>, {row}, <|image|>, 16 x <|patch|>, <|image_end|>"
    content = rf'text "\n\nHow", {one}, {len(tokenizer.encode("many"))} x text "many", {three}, {one}, <|eot|>'
    assert content in token_layout(ids, tokenizer)


def test_without_pictures(tokenizer):
    messages = [{"role": "user", "content": "<|image|><|patch|> How many?"}]
    ids, pixels = build_prompt(tokenizer, messages, None, MINI)
    assert pixels is None
    assert ids[0].tolist() == tokenizer.encode_chat(messages)
    assert not {1014, 1015} & set(ids[0].tolist())


def test_bad_prompts(tokenizer):
    picture = Image.new("RGB", (9, 9))
    assert "images holds 0" in error(build_prompt, tokenizer, chat({"type": "image"}), None, MINI)
    assert "images holds 1" in error(build_prompt, tokenizer, chat(), [picture], MINI)
    text_only = MINI.__class__(**{**vars(MINI), "vision": None})
    assert "no vision" in error(build_prompt, tokenizer, chat({"type": "image"}), [picture], text_only)
    assert "200092" in error(build_prompt, tokenizer, chat({"type": "image"}), [picture], SCOUT)


def test_layout(tokenizer):
    """Runs are counted, long texts shortened."""
    ids = [1000, *tokenizer.encode("many " * 30), 1015, 1015]
    said = token_layout(ids, tokenizer, max_text=10)
    assert said.startswith("<|begin_of_text|>, ") and said.endswith(", 2 x <|patch|>") and '"many many…"' in said
    assert token_layout([], tokenizer) == ""
    assert "[2, 3]" in error(token_layout, torch.zeros(2, 3, dtype=torch.int64), tokenizer)


# --- Fusion -----------------------------------------------------------------------------------------------------------


def test_merge_overwrites_patches_in_order_and_nothing_else():
    ids = torch.tensor([[7, 9, 9, 5], [9, 6, 8, 9]])
    words, pictures = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 2, 3, requires_grad=True)
    merged = merge_image_embeddings(words, ids, pictures, patch_token=9)
    expected = words.detach().clone()
    for vector, (row, column) in zip(pictures.detach().flatten(0, 1), [(0, 1), (0, 2), (1, 0), (1, 3)], strict=True):
        expected[row, column] = vector
    assert torch.equal(merged, expected)
    assert words.grad_fn is None and not torch.equal(merged, words)  # out of place
    merged.sum().backward()
    assert torch.equal(words.grad, (ids != 9)[..., None].expand_as(words).float())
    assert (pictures.grad == 1).all()


def test_merge_keeps_the_dtype_and_runs_on_meta():
    ids, words = torch.tensor([[9, 1]]), torch.zeros(1, 2, 3, dtype=torch.bfloat16)
    assert merge_image_embeddings(words, ids, torch.ones(1, 1, 3), 9).dtype == torch.bfloat16
    with torch.device("meta"):
        merged = merge_image_embeddings(
            torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 1, 3), 9
        )
    assert merged.shape == (1, 2, 3)


def test_merge_never_truncates():
    ids, words = torch.tensor([[9, 9, 1]]), torch.zeros(1, 3, 4)
    for vectors in (torch.ones(1, 1, 4), torch.ones(3, 1, 4), torch.ones(0, 4)):
        said = error(merge_image_embeddings, words, ids, vectors, 9)
        assert "2 patch tokens" in said and f"{len(vectors)} vectors" in said
    assert "0 vectors" in error(merge_image_embeddings, words, ids, None, 9)
    assert "5 channels" in error(merge_image_embeddings, words, ids, torch.ones(2, 1, 5), 9)


def test_merge_without_pictures():
    words = torch.randn(1, 2, 4)
    assert torch.equal(merge_image_embeddings(words, torch.tensor([[1, 2]]), None, 9), words)
    assert torch.equal(merge_image_embeddings(words[:, :1], torch.tensor([[9]]), None, 9), words[:, :1])


def test_a_picture_file_end_to_end(tokenizer, tmp_path):
    image = Image.new("RGB", (144, 48), "white")
    ImageDraw.Draw(image).ellipse((10, 10, 30, 30), fill="red")
    image.save(tmp_path / "scene.png")
    ids, pixels = build_prompt(tokenizer, chat({"type": "image", "image": tmp_path / "scene.png"}), None, MINI)
    assert torch.equal(pixels, cut_tiles(image, MINI.vision)[0])
    vectors = torch.randn(len(pixels), MINI.vision.tokens_per_tile, 8)
    merged = merge_image_embeddings(torch.zeros(1, ids.shape[1], 8), ids, vectors, MINI.patch_token)
    assert torch.equal(merged[ids == MINI.patch_token], vectors.flatten(0, 1))
