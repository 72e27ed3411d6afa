"""Answers to `fusion-image-prompt`."""

import math

from bank import right, wrong

from minillama4 import fusion

START, END, IMAGE, PATCH = "<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>"
X, Y = "<|tile_x_separator|>", "<|tile_y_separator|>"


def _least_change(scale, rows, columns):
    return scale < 1, scale if scale >= 1 else -scale, rows * columns


def _best(height, width, tile_size, max_tiles, key=_least_change):
    """The grid with the smallest key(scale, rows, columns)."""
    grids = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)]
    return min(grids, key=lambda grid: key(min(grid[0] * tile_size / height, grid[1] * tile_size / width), *grid))


def _tiles(rows, columns, patches):
    tokens = []
    for _ in range(rows):
        for column in range(columns):
            tokens += [PATCH] * patches + [X] * (column < columns - 1)
        tokens.append(Y)
    return tokens if rows * columns > 1 else []


def _prompt(rows, columns, patches):
    return [START, *_tiles(rows, columns, patches), IMAGE, *[PATCH] * patches, END]


def _by_grid(key):
    """An answer that chooses its grid by this key, and is right else."""

    def answer(height, width, tile_size, max_tiles, tokens_per_tile):
        grid = _best(height, width, tile_size, max_tiles, key)
        return grid, _prompt(*grid, tokens_per_tile)

    return answer


def _by_prompt(prompt):
    """An answer that lays out prompt(rows, columns, patches), and whose grid is right."""

    def answer(height, width, tile_size, max_tiles, tokens_per_tile):
        grid = _best(height, width, tile_size, max_tiles)
        return grid, prompt(*grid, tokens_per_tile)

    return answer


@right
def by_the_covering_tiles(height, width, tile_size, max_tiles, tokens_per_tile):
    """Where some grid has room, it is the one that just covers the picture; else the search."""
    rows, columns = -(-height // tile_size), -(-width // tile_size)
    if rows * columns > max_tiles:
        rows, columns = _best(height, width, tile_size, max_tiles, lambda s, r, c: (-s, r * c))
    tile = [PATCH] * tokens_per_tile
    if rows == columns == 1:
        return (1, 1), [START, IMAGE, *tile, END]
    row = ([*tile, X] * columns)[:-1] + [Y]
    return (rows, columns), [START, *row * rows, IMAGE, *tile, END]


@right
def in_two_lists(height, width, tile_size, max_tiles, tokens_per_tile):
    """As Meta's code: first the scales of all grids, then those that grow the picture, if there are any."""
    grids = [(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles + 1) if r * c <= max_tiles]
    scales = [min(r * tile_size / height, c * tile_size / width) for r, c in grids]
    growing = [scale for scale in scales if scale >= 1]
    chosen = min(growing) if growing else max(scales)
    _, rows, columns = min((r * c, r, c) for (r, c), scale in zip(grids, scales, strict=True) if scale == chosen)
    return (rows, columns), _prompt(rows, columns, tokens_per_tile)


@wrong("not written")
def stub(height, width, tile_size, max_tiles, tokens_per_tile):
    raise NotImplementedError()


@wrong("raises")
def three_results(height, width, tile_size, max_tiles, tokens_per_tile):
    rows, columns = _best(height, width, tile_size, max_tiles)
    return rows, columns, _prompt(rows, columns, tokens_per_tile)


@wrong("shape")
def tokens_alone(height, width, tile_size, max_tiles, tokens_per_tile):
    return _prompt(*_best(height, width, tile_size, max_tiles), tokens_per_tile)


@wrong("transposed")
def columns_and_rows(height, width, tile_size, max_tiles, tokens_per_tile):
    rows, columns = _best(height, width, tile_size, max_tiles)
    return (columns, rows), _prompt(rows, columns, tokens_per_tile)


@wrong("transposed")
def width_and_height(height, width, tile_size, max_tiles, tokens_per_tile):
    grid = _best(width, height, tile_size, max_tiles)
    return grid, _prompt(*grid, tokens_per_tile)


@wrong("a picture that just fills one tile gets one")
def no_grid_at_all(height, width, tile_size, max_tiles, tokens_per_tile):
    return (0, 0), []


grows_most = wrong("grows most")(_by_grid(lambda s, r, c: -s))
as_many_as_allowed = wrong("most tiles")(_by_grid(lambda s, r, c: (-r * c, -s)))
larger_of_equals = wrong("larger of equals")(_by_grid(lambda s, r, c: (*_least_change(s, r, c)[:2], -r * c)))
larger_of_equals_that_shrink = wrong("larger of equals")(
    _by_grid(lambda s, r, c: (*_least_change(s, r, c)[:2], r * c if s >= 1 else -r * c))
)
nearest_scale = wrong("made smaller")(_by_grid(lambda s, r, c: (abs(s - 1), r * c)))
shrinks_most = wrong("shrinks most")(_by_grid(lambda s, r, c: (s < 1, s, r * c)))


@wrong("shape alone")
def closest_aspect_ratio(height, width, tile_size, max_tiles, tokens_per_tile):
    """As InternVL's rule begins: the shape decides."""
    grid = _best(height, width, tile_size, max_tiles, lambda s, r, c: (abs(width / height - c / r), r * c))
    return grid, _prompt(*grid, tokens_per_tile)


@wrong("one more than needed")
def floor_plus_one(height, width, tile_size, max_tiles, tokens_per_tile):
    grid = height // tile_size + 1, width // tile_size + 1
    return grid, _prompt(*grid, tokens_per_tile)


@wrong("made smaller")
def rounded_down(height, width, tile_size, max_tiles, tokens_per_tile):
    """337 pixels in a tile of 336."""
    grid = max(1, height // tile_size), max(1, width // tile_size)
    return grid, _prompt(*grid, tokens_per_tile)


@wrong("made smaller")
def rounded(height, width, tile_size, max_tiles, tokens_per_tile):
    grid = max(1, round(height / tile_size)), max(1, round(width / tile_size))
    return grid, _prompt(*grid, tokens_per_tile)


@wrong("more tiles than allowed")
def covering(height, width, tile_size, max_tiles, tokens_per_tile):
    grid = math.ceil(height / tile_size), math.ceil(width / tile_size)
    return grid, _prompt(*grid, tokens_per_tile)


@wrong("cut off")
def covering_as_far_as_allowed(height, width, tile_size, max_tiles, tokens_per_tile):
    rows = min(math.ceil(height / tile_size), max_tiles)
    columns = min(math.ceil(width / tile_size), max_tiles // rows)
    return (rows, columns), _prompt(rows, columns, tokens_per_tile)


@wrong("if all grids shrink it, the one that shrinks it least")
def two_by_two_if_it_shrinks(height, width, tile_size, max_tiles, tokens_per_tile):
    grid = _best(height, width, tile_size, max_tiles)
    if grid[0] * tile_size < height or grid[1] * tile_size < width:
        grid = (2, 2)
    return grid, _prompt(*grid, tokens_per_tile)


@wrong("type")
def one_string(height, width, tile_size, max_tiles, tokens_per_tile):
    grid = _best(height, width, tile_size, max_tiles)
    return grid, "".join(_prompt(*grid, tokens_per_tile))


@wrong("one tile: start, image, patches, end")
def other_names(height, width, tile_size, max_tiles, tokens_per_tile):
    """The names without their bars."""
    grid = _best(height, width, tile_size, max_tiles)
    return grid, [token.replace("|", "") for token in _prompt(*grid, tokens_per_tile)]


@wrong("one tile: start, image, patches, end")
def a_list_of_lists(height, width, tile_size, max_tiles, tokens_per_tile):
    grid = _best(height, width, tile_size, max_tiles)
    return grid, [_prompt(*grid, tokens_per_tile)]


@wrong("global view of one tile")
def always_a_global_view(height, width, tile_size, max_tiles, tokens_per_tile):
    rows, columns = _best(height, width, tile_size, max_tiles)
    patches = [PATCH] * tokens_per_tile
    row = ([*patches, X] * columns)[:-1] + [Y]
    return (rows, columns), [START, *row * rows, IMAGE, *patches, END]


@wrong("one row or column taken for one tile")
def rows_tell(height, width, tile_size, max_tiles, tokens_per_tile):
    rows, columns = _best(height, width, tile_size, max_tiles)
    return (rows, columns), _prompt(*((rows, columns) if rows > 1 else (1, 1)), tokens_per_tile)


@wrong("one row or column taken for one tile")
def columns_tell(height, width, tile_size, max_tiles, tokens_per_tile):
    rows, columns = _best(height, width, tile_size, max_tiles)
    return (rows, columns), _prompt(*((rows, columns) if columns > 1 else (1, 1)), tokens_per_tile)


def _several(layout):
    """One tile as it should be; several as layout(tiles, patches) has it."""

    def prompt(rows, columns, patches):
        one, grid = [PATCH] * patches, _tiles(rows, columns, patches)
        return [START, *layout(grid, one), END] if grid else _prompt(1, 1, patches)

    return _by_prompt(prompt)


no_global_view = wrong("no global view")(_several(lambda grid, one: grid))
image_token_first = wrong("image token first")(_several(lambda grid, one: [IMAGE, *grid, *one]))
global_view_first = wrong("global view first")(_several(lambda grid, one: [IMAGE, *one, *grid]))
image_token_last = wrong("image token last")(
    _by_prompt(lambda r, c, p: [START, *_tiles(r, c, p), *[PATCH] * p, IMAGE, END])
)
no_image_token = wrong("no image token")(
    _by_prompt(lambda r, c, p: [token for token in _prompt(r, c, p) if token != IMAGE])
)
no_end = wrong("no end")(_by_prompt(lambda r, c, p: _prompt(r, c, p)[:-1]))
one_patch_token_a_tile = wrong("one patch token a tile")(_by_prompt(lambda r, c, p: _prompt(r, c, 1)))
tiles_column_by_column = wrong("rows and columns swapped")(_by_prompt(lambda r, c, p: _prompt(c, r, p)))
no_separators = wrong("no separators")(
    _by_prompt(lambda r, c, p: [token for token in _prompt(r, c, p) if token not in (X, Y)])
)
separators_swapped = wrong("separators swapped")(
    _by_prompt(lambda r, c, p: [{X: Y, Y: X}.get(token, token) for token in _prompt(r, c, p)])
)
x_separator_after_every_tile = wrong("x separator after the last column")(
    _several(lambda grid, one: [part for token in grid for part in ([X, Y] if token == Y else [token])] + [IMAGE, *one])
)
y_separator_between_rows = wrong("no y separator after the last row")(
    _several(lambda grid, one: [*grid[:-1], IMAGE, *one])
)
image_token_after_the_end = wrong("one tile: start, image, patches, end")(
    _by_prompt(lambda r, c, p: [START, *_tiles(r, c, p), *[PATCH] * p, END, IMAGE])
)
grid_tiles_and_global_view_alike = wrong("several tiles: row by row with separators, then the whole picture")(
    _several(lambda grid, one: [*grid, IMAGE, *one, Y])
)


@wrong("no y separator after the last row")
def one_row_needs_no_y(height, width, tile_size, max_tiles, tokens_per_tile):
    rows, columns = _best(height, width, tile_size, max_tiles)
    tokens = _prompt(rows, columns, tokens_per_tile)
    return (rows, columns), [token for token in tokens if token != Y] if rows == 1 else tokens


@wrong("separators swapped")
def one_column_with_x(height, width, tile_size, max_tiles, tokens_per_tile):
    rows, columns = _best(height, width, tile_size, max_tiles)
    tokens = _prompt(rows, columns, tokens_per_tile)
    return (rows, columns), [X if token == Y else token for token in tokens] if columns == 1 else tokens


@wrong("Llama 4: 1344 x 1344 pixels are 2467 tokens")
def at_most_15_tiles(height, width, tile_size, max_tiles, tokens_per_tile):
    """As max_tiles was in the drawn pictures."""
    grid = _best(height, width, tile_size, min(max_tiles, 15))
    return grid, _prompt(*grid, tokens_per_tile)


@wrong("borrowed")
def grid_from_the_package(height, width, tile_size, max_tiles, tokens_per_tile):
    grid = fusion.choose_grid(height, width, tile_size, max_tiles)
    return grid, _prompt(*grid, tokens_per_tile)


@wrong("borrowed")
def prompt_from_the_package(height, width, tile_size, max_tiles, tokens_per_tile):
    grid = _best(height, width, tile_size, max_tiles)
    return grid, fusion.image_prompt(*grid, tokens_per_tile)


EQUIVALENT = {
    "tuple[tuple[int, int], list[str]]  ->  tuple": "an annotation computes nothing at all",
    "tuple[int, int]  ->  tuple": "an annotation computes nothing at all",
    "list[str]  ->  list": "an annotation computes nothing at all",
    "1  ->  0": "a grid without rows or columns has scale 0, and any other is nearer to 1",
    "1  ->  2": "a row more than max_tiles is in no grid that is allowed",
    "min(grid[0] * tile_size / height, grid[1] * tile_size / width)  ->  "
    "min(grid[1] * tile_size / width, grid[0] * tile_size / height)": "the smaller of two numbers, in any order",
}
