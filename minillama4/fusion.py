"""Early fusion: text and images -> one token sequence -> one embedding sequence.

    picture -> grid of tiles (+ a global view) -> <|image_start|> 144 x <|patch|> ... <|image_end|> among the words
    embeddings of all tokens -> those of <|patch|> are overwritten by projected picture vectors, in order

After that the decoder knows no pictures: patches have ordinary positions, the ordinary causal mask, the same experts.
Shapes: pixel_values [tiles, 3, side, side]; embeddings [batch, tokens, hidden].
Source: Meta's llama-models, models/llama4/preprocess.py and chat_format.py (facts sections 2.2 and 2.3).
"""

import io
import json
import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .config import Llama4Config, VisionConfig
from .tokenizer import Tokenizer

MAX_PIXELS = 100_000_000
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")  # no others: Pillow starts a PostScript interpreter for EPS
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")  # what `convert` makes RGB of


# ----------------------------------------------------------------------------------------------------------------------
# A picture becomes tiles.


def open_image(image: str | Path | bytes | bytearray | memoryview | Image.Image) -> Image.Image:
    """One picture as 8-bit RGB, upright (EXIF), transparency on white, 16-bit grey scaled to 8 bits.

    image: a path to a PNG, JPEG, WebP, BMP, TIFF or one-frame GIF, the bytes of such a file, or a PIL image.
    ValueError, in one line: no such file, not an image, truncated, animated, above 100 megapixels (seen in the header,
    before anything is decoded), or pixels without a known range, such as floats.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image, f"image {getattr(image, 'filename', '') or f'({image.mode} in memory)'}")
    if isinstance(image, (bytes, bytearray, memoryview)):
        content = bytes(image)
        return _decode(io.BytesIO(content), f"image ({len(content):,} bytes in memory)")
    if not isinstance(image, (str, Path)):
        raise ValueError(f"image is {type(image).__name__}; it must be a path, the bytes of a file, or a PIL image")
    path, name = Path(image), f"image {str(image)!r}"
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise ValueError(f"{name} is {what}; give the path of a PNG or JPEG file")
    try:
        file = path.open("rb")
    except PermissionError:
        raise ValueError(f"{name} may not be read; check its permissions") from None
    with file:
        return _decode(file, name)


def _decode(file: BinaryIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is above this warning
            image = Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has over {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller first") from None
    except Exception:
        file.seek(0)
        start = file.read(12)
        content = f"starts with {start!r}" if start else "is empty"
        raise ValueError(f"{name} is no image, or a broken one (the file {content}); give a PNG or JPEG file") from None
    with image:
        return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ValueError(
            f"{name} is {image.width} x {image.height}, {pixels / 1e6:.0f} megapixels; at most "
            f"{MAX_PIXELS / 1e6:.0f} are read: make it smaller first"
        )
    if pixels == 0:
        raise ValueError(f"{name} is {image.width} x {image.height}; it must have at least one pixel")
    try:
        # "MPO" is what Pillow calls a phone's JPEG with a second picture inside; its first is the photograph.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames == 1:
            image.load()
    except Exception as error:  # Pillow raises OSError, SyntaxError, EOFError, struct.error, ... for a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is truncated or broken ({reason}); save it again as PNG or JPEG") from None
    if frames > 1:
        raise ValueError(f"{name} is animated ({frames} frames); save one frame as PNG")
    with suppress(Exception):  # a damaged EXIF block says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _grey_to_8_bits(image, name)
    if image.mode not in _MODES:
        raise ValueError(f"{name} has pixels of mode {image.mode!r}; save it as 8-bit RGB or grey")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """16-bit grey: 0..65535 -> 0..255. Pillow's own `convert` would cut off everything above 255."""
    grey = np.asarray(image).astype(np.int64)
    darkest, brightest = grey.min(), grey.max()
    if darkest < 0 or brightest > 65535:
        raise ValueError(f"{name} has grey values from {darkest} to {brightest}; save it with 8 or 16 bits per pixel")
    scaled = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if isinstance(key := image.info.get("transparency"), int):  # one of the 65536 levels means "nothing here"
        scaled.putalpha(Image.fromarray(np.where(grey == key, 0, 255).astype(np.uint8)))
    return scaled


def choose_grid(height: int, width: int, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """(rows, columns) of tiles for a picture of height x width pixels; rows * columns <= max_tiles.

    On each grid the picture can grow by min(vertical, horizontal) room. Of the grids that need no shrinking, take the
    one that grows it least; if all shrink it, the one that shrinks it least; ties go to the smaller grid. No two grids
    of equal area tie: if (2, 3) and (3, 2) fit equally well, then so does (2, 2).
    """
    if min(height, width, tile_size, max_tiles) < 1:
        raise ValueError(
            f"height, width, tile_size, max_tiles are {height}, {width}, {tile_size}, {max_tiles}; "
            "each must be at least 1"
        )
    grids = [(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)]

    def preference(grid: tuple[int, int]) -> tuple[bool, float, int]:
        scale = min(grid[0] * tile_size / height, grid[1] * tile_size / width)
        return scale < 1, scale if scale >= 1 else -scale, grid[0] * grid[1]

    return min(grids, key=preference)


def cut_tiles(image: Image.Image, vision: VisionConfig) -> tuple[Tensor, tuple[int, int]]:
    """(pixel_values [tiles, 3, side, side] float32 in -1..1, (rows, columns)) of an RGB picture.

    The picture is resized without distortion to fill its grid (but not beyond the larger of its own size and one
    tile), lies top left on black, and is cut row by row. With more than one tile, the last is the global view: the
    whole picture squeezed into one tile, its proportions not kept. A value v in 0..255 becomes (v / 255 - 0.5) / 0.5.

    Pillow resizes (bilinear, antialiased), as in Meta's code. Against `Llama4ImageProcessor` of transformers 5.23, grid
    and layout are equal. Its torch resize rounds otherwise: one level of 255 on at most 0.5 % of the values of noise at
    tile size 336 and fewer of real pictures (48: 3 %, at most two levels); it then normalises in bfloat16 (0.004).
    """
    side, (width, height) = vision.tile_size, image.size
    rows, columns = choose_grid(height, width, side, vision.max_tiles)
    room = min(max(height, side), rows * side), min(max(width, side), columns * side)
    canvas = Image.new("RGB", (columns * side, rows * side))
    canvas.paste(image.resize(_fit(height, width, *room), Image.Resampling.BILINEAR), (0, 0))

    grid = _normalise(canvas).view(3, rows, side, columns, side)
    tiles = grid.permute(1, 3, 0, 2, 4).reshape(rows * columns, 3, side, side)
    if rows * columns > 1:
        overview = _normalise(image.resize((side, side), Image.Resampling.BILINEAR))
        tiles = torch.cat([tiles, overview[None]])
    return tiles, (rows, columns)


def _fit(height: int, width: int, max_height: int, max_width: int) -> tuple[int, int]:
    """(width, height), in Pillow's order, of the largest undistorted picture inside max_height x max_width."""
    scale_y, scale_x = max_height / height, max_width / width
    if scale_x < scale_y:
        return max_width, max(1, min(math.floor(height * scale_x), max_height))
    return max(1, min(math.floor(width * scale_y), max_width)), max_height


def _normalise(image: Image.Image) -> Tensor:
    """PIL RGB -> [3, height, width] float32, mean 0.5 and standard deviation 0.5 taken out."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (pixels.float() / 255 - 0.5) / 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Tiles and words become one token sequence.


def image_prompt(rows: int, columns: int, tokens_per_tile: int) -> list[str]:
    """The special tokens that stand for one picture of rows x columns tiles (and its global view, if more than one).

    One tile: start, image, patches, end. Else, per row, tiles joined by x separators and closed by a y separator (the
    last row too); then image and the patches of the global view. Separators carry the 2-D order into a 1-D sequence.
    """
    patches = ["<|patch|>"] * tokens_per_tile
    tokens = ["<|image_start|>"]
    if rows * columns > 1:
        for _ in range(rows):
            for column in range(columns):
                tokens += patches + (["<|tile_x_separator|>"] if column < columns - 1 else [])
            tokens.append("<|tile_y_separator|>")
    return tokens + ["<|image|>"] + patches + ["<|image_end|>"]


def build_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[dict],
    images: Sequence[str | Path | Image.Image] | None,
    config: Llama4Config,
    add_generation_prompt: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(input_ids [1, tokens] int64, pixel_values [tiles, 3, side, side] float32, or None without pictures).

    messages: as in `Tokenizer.encode_chat`. A part {"type": "image", "image": path or PIL image} brings its own
    picture; one without "image" takes the next of `images`. Text and pictures keep their order.
    ValueError: too few or too many `images`, a text-only config, a tokenizer of another model, a bad picture.
    """
    ids = tokenizer.encode_chat(messages, add_generation_prompt)
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    parts = [part for part in parts if part["type"] == "image"]
    waiting = list(images or [])
    needed = sum(part.get("image") is None for part in parts)
    if needed != len(waiting):
        raise ValueError(f"images holds {len(waiting)}, but the messages leave {needed} pictures open")
    if not parts:
        return torch.tensor([ids]), None
    if config.vision is None:
        raise ValueError(f"messages hold {len(parts)} pictures, but this config has no vision")
    if tokenizer.token_id("<|patch|>") != config.patch_token:
        raise ValueError(
            f"the tokenizer writes <|patch|> as {tokenizer.token_id('<|patch|>')}, "
            f"but config.patch_token is {config.patch_token}; they belong to different models"
        )

    pictures = [part["image"] if part.get("image") is not None else waiting.pop(0) for part in parts]
    cut = [cut_tiles(open_image(picture), config.vision) for picture in pictures]
    grids = iter([grid for _, grid in cut])
    placeholder, tokens = tokenizer.token_id("<|image|>"), []
    for id in ids:  # only a picture can have put the placeholder here: text is never read as a special token
        if id == placeholder:
            tokens += map(tokenizer.token_id, image_prompt(*next(grids), config.vision.tokens_per_tile))
        else:
            tokens.append(id)
    return torch.tensor([tokens]), torch.cat([tiles for tiles, _ in cut])


def token_layout(input_ids: Tensor | Sequence[int], tokenizer: Tokenizer, max_text: int = 40) -> str:
    """One sequence in words, runs counted: <|image_start|>, <|image|>, 16 x <|patch|>, <|image_end|>, 3 x text "How m…"

    input_ids: [tokens], or [1, tokens]. Texts longer than max_text characters are shortened.
    """
    ids = torch.as_tensor(input_ids)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise ValueError(f"input_ids is {list(ids.shape)}; it must be one sequence: [tokens] or [1, tokens]")
    pieces = []
    for name, run in groupby(ids.tolist(), key=tokenizer.special_names.get):
        run = list(run)
        if name is None:
            text = tokenizer.decode(run)
            text = text if len(text) <= max_text else text[: max_text - 1] + "…"
            pieces.append(f"{len(run)} x text {json.dumps(text, ensure_ascii=False)}")
        else:
            pieces.append(name if len(run) == 1 else f"{len(run)} x {name}")
    return ", ".join(pieces)


# ----------------------------------------------------------------------------------------------------------------------
# One token sequence becomes one embedding sequence.


def merge_image_embeddings(
    embeddings: Tensor, input_ids: Tensor, image_embeddings: Tensor | None, patch_token: int
) -> Tensor:
    """Embeddings [batch, tokens, hidden] with every patch token's row replaced by the next picture vector.

    input_ids: [batch, tokens]. image_embeddings: [tiles, tokens_per_tile, hidden] (or [vectors, hidden]) in the order
    of the patch tokens, row after row; None for no picture. Separators and `<|image|>` keep their own embeddings.
    Out of place: gradients reach the words and the pictures.
    ValueError: as many vectors as patch tokens are needed, of the same hidden size.
    """
    if image_embeddings is None:
        if input_ids.shape[1] == 1:  # decoding: a patch token that the model itself wrote is a word like any other
            return embeddings
        image_embeddings = embeddings.new_empty(0, embeddings.shape[-1])
    vectors, hidden = image_embeddings.reshape(-1, image_embeddings.shape[-1]), embeddings.shape[-1]
    if vectors.shape[-1] != hidden:
        raise ValueError(f"image_embeddings have {vectors.shape[-1]} channels, but the text embeddings {hidden}")
    here = input_ids == patch_token
    if not here.is_meta and int(here.sum()) != len(vectors):
        raise ValueError(
            f"input_ids hold {int(here.sum())} patch tokens (id {patch_token}), but the pictures give "
            f"{len(vectors)} vectors ({list(image_embeddings.shape)}); they must be equally many"
        )
    return embeddings.masked_scatter(here[..., None], vectors.to(embeddings.dtype))
