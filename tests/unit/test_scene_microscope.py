"""The microscope answers as `ask` does, reads where the model read, and knows what a token stands for."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw

from minillama4 import Llama4, ask, build_prompt, load_checkpoint, load_tokenizer, scene_words, scenes, trace
from minillama4.course.widgets import scene_microscope, scene_squares
from minillama4.course.widgets.frame import still
from minillama4.course.widgets.scene_composer import NOTHING, START, suggest
from minillama4.course.widgets.scene_microscope import MEAN, Reading, SceneMicroscope, draw, in_words, read, shares
from minillama4.course.widgets.scene_squares import named, owner, squares
from minillama4.fusion import cut_tiles

SCENE = scenes.Scene(START, background=240)
FIRST, LAST = 3, 7  # the NoPE layers of mini-scout


@pytest.fixture(scope="module")
def model():
    return load_checkpoint("mini-scout")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("mini-scout")


@pytest.fixture(scope="module")
def reading(model, tokenizer):
    return read(model, tokenizer, SCENE, "What colour is the circle?")


@pytest.fixture
def microscope(model, tokenizer, monkeypatch) -> SceneMicroscope:
    monkeypatch.setattr(scene_microscope, "load_checkpoint", lambda name: model)
    monkeypatch.setattr(scene_microscope, "load_tokenizer", lambda name: tokenizer)
    return SceneMicroscope()


# ----------------------------------------------------------------------------------------------------------------------
# Which pixels a token stands for


def features(model, picture: Image.Image) -> torch.Tensor:
    """[tokens, hidden] of a picture, in the order of its tokens in the prompt."""
    return model.encode_images(cut_tiles(picture, model.config.vision)[0]).flatten(0, 1)


@torch.no_grad()
def changed(model) -> list[tuple[int, int, torch.Tensor]]:
    """(x, y, how much each token's vector changes) for a spot of 4 x 4 pixels in the middle of each 12 x 12."""
    blank = Image.new("RGB", (144, 48), (240, 240, 240))
    before, seen = features(model, blank), []
    for y in range(6, 48, 12):
        for x in range(6, 144, 12):
            picture = blank.copy()
            ImageDraw.Draw(picture).rectangle((x - 2, y - 2, x + 1, y + 1), fill=(200, 30, 30))
            seen.append((x, y, (features(model, picture) - before).norm(dim=-1)))
    return seen


def around(boxes: list, x: int, y: int) -> set[int]:
    return {i for i, (left, top, right, bottom) in enumerate(boxes) if left <= x < right and top <= y < bottom}


def test_a_token_stands_for_the_square_whose_paint_alone_changes_it(model):
    """With the encoder's attention cut out, so that patches cannot tell each other what they see."""
    alone = Llama4(model.config)
    alone.load_state_dict(model.state_dict())
    for block in alone.vision_model.model["layers"]:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    boxes = squares(model.config.vision, 144, 48)
    for x, y, change in changed(alone):
        assert set((change > 1e-4).nonzero()[:, 0].tolist()) == around(boxes, x, y)


def test_the_encoder_mixes_squares_inside_a_tile_and_never_across_tiles(model):
    """A lit square is where a token sits, not all that it knows of: some spots even change a neighbour most."""
    boxes, in_tile, in_whole = squares(model.config.vision, 144, 48), 0, 0
    for x, y, change in changed(model):
        own, whole = sorted(around(boxes, x, y))
        tiles = change.view(4, 16)
        assert {int(tile) for tile in (tiles.amax(1) > 1e-4).nonzero()} == {x // 48, 3}
        assert (tiles[[x // 48, 3]] > 1e-3).all()  # every token of the tile has heard of it
        in_tile += int(tiles[x // 48].argmax()) == own % 16
        in_whole += int(tiles[3].argmax()) == whole % 16
    assert in_tile >= 44 and in_whole >= 32  # of 48


def test_squares_by_hand_and_each_view_covers_the_picture_once(model):
    vision = model.config.vision
    boxes = squares(vision, 144, 48)
    assert boxes[0] == (0, 0, 12, 12) and boxes[1] == (12, 0, 24, 12) and boxes[4] == (0, 12, 12, 24)
    assert boxes[16] == (48, 0, 60, 12) and boxes[48] == (0, 0, 36, 12) and boxes[63] == (108, 36, 144, 48)
    for view in (boxes[:48], boxes[48:]):
        painted = np.zeros((48, 144), int)
        for x1, y1, x2, y2 in view:
            painted[y1:y2, x1:x2] += 1
        assert (painted == 1).all()
    assert len(squares(vision, 48, 48)) == 16  # one tile: no second view of the whole
    tall = squares(vision, 48, 144)
    assert tall[16] == (0, 48, 12, 60) and tall[-1] == (36, 108, 48, 144)
    wide = squares(replace(vision, max_tiles=6), 144, 96)
    assert wide[48] == (0, 48, 12, 60) and wide[-1] == (108, 72, 144, 96)


def test_a_picture_that_would_be_padded_or_shrunk_is_refused(model):
    with pytest.raises(ValueError, match="100 x 48; it must fill tiles of 48 x 48 pixels exactly"):
        squares(model.config.vision, 100, 48)


def test_a_square_belongs_to_the_object_with_most_pixels_in_it(model):
    boxes, rng = squares(model.config.vision, 144, 48), random.Random(3)
    shared = 0
    for _ in range(12):
        scene = scenes.draw_scene(rng, "train", 6)
        for box in boxes:
            count = []
            for item in scene.items:
                (x, y), half = item.centre, scenes.PIXELS[item.size] // 2
                inside = [
                    abs(column - x) <= half and abs(row - y) <= half
                    for row in range(box[1], box[3])
                    for column in range(box[0], box[2])
                ]
                count.append(sum(inside))
            shared += sum(n > 0 for n in count) > 1
            whose = owner(box, scene)
            assert (whose is None) == (max(count) == 0) and (whose is None or count[whose] == max(count))
    assert shared > 20  # squares of the whole picture's tile reach into two objects
    assert owner((0, 0, 12, 12), scenes.Scene((), 240)) is None


def test_the_box_around_an_object_holds_all_of_it_and_no_more():
    for shape in scenes.SHAPES:
        item = scenes.Item(shape, "red", "large", "top right", 3, 5, -1)
        pixels = np.asarray(scenes.render(scenes.Scene((item,), 240))).astype(int)
        rows, columns = ((pixels != 240).any(-1)).nonzero()
        x1, y1, x2, y2 = scene_squares.box_of(item)
        assert x1 <= columns.min() <= x1 + 1 and x2 - 1 <= columns.max() + 1 and columns.max() < x2
        assert y1 <= rows.min() <= y1 + 1 and y2 - 1 <= rows.max() + 1 and rows.max() < y2


# ----------------------------------------------------------------------------------------------------------------------
# Which objects a question names


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_every_form_of_question_names_its_objects(language):
    """The questions are written here from their objects, so what they name is known."""
    rng, forms = random.Random(language), scene_words.QUESTIONS[language]
    phrase, checked = scenes.phrase, 0
    for _ in range(60):
        scene = scenes.draw_scene(rng)
        a, b = rng.sample(range(len(scene.items)), 2)
        item, other = scene.items[a], scene.items[b]

        def like(item=item, items=scene.items, **wanted):
            return [i for i, o in enumerate(items) if all(getattr(o, name) == value for name, value in wanted.items())]

        by_shape = {case: phrase(language, case, shape=item.shape) for case in ("the", "of")}
        by_colour = {case: phrase(language, case, colour=item.colour) for case in ("the", "of")}
        both = {case: phrase(language, case, colour=item.colour, shape=item.shape) for case in ("the", "of")}
        of_other = phrase(language, "of", colour=other.colour, shape=other.shape)
        genders = scene_words.COLOURS[language][item.colour]
        many = {
            "shape": phrase(language, "many", shape=item.shape),
            "colour": phrase(language, "many", colour=item.colour),
        }
        questions = [
            (forms["colour_of"].format(**by_shape), like(shape=item.shape)),
            (forms["colour_of_digit"].format(digit=item.digit), like(digit=item.digit)),
            (forms["shape_of"].format(m=genders["m"], f=genders["f"]), like(colour=item.colour)),
            (forms["digit_on"].format(**both), [a]),
            (forms["digit_on"].format(**by_colour), like(colour=item.colour)),
            (forms["size_of"].format(**both), [a]),
            (forms["at_place"].format(place=scene_words.PLACES[language][item.place]), [a]),
            (forms["where"].format(**both), [a]),
            (forms["count_shape"].format(many=many["shape"]), like(shape=item.shape)),
            (forms["count_object"].format(many=many["colour"]), like(colour=item.colour)),
            (forms["count_object"].format(many=phrase(language, "many")), []),
            *((forms[name].format(the=both["the"], of=of_other), sorted((a, b))) for name in scenes.RELATIONS),
        ]  # fmt: skip
        for question, objects in questions:
            assert named(scene, question) == objects, question
            checked += 1
    assert checked == 60 * 15


@pytest.mark.parametrize(
    "question, objects",
    [
        ("the RED circle!", [0]),
        ("is it red or blue?", [0, 2]),
        ("red star?", []),  # none here is both
        ("Where is the green star?", []),
        ("Which circle is at the top right?", []),
        ("Which star is at the top right?", [1]),
        ("What is a circular thing, redder than any, in 31 words?", []),
        ("", []),
    ],
)
def test_what_a_learner_may_type_names_what_it_says(question, objects):
    items = tuple(sorted(START, key=lambda item: scenes.PLACES.index(item.place)))  # circle, star, square
    assert named(scenes.Scene(items, 240), question) == objects
    assert named(scenes.Scene((), 240), question) == []


# ----------------------------------------------------------------------------------------------------------------------
# The answer, and the attention that wrote it


def plain_pass(model, tokenizer, scene: scenes.Scene, question: str, answer_ids: list[int]):
    """(attention of every layer over the whole sequence in one pass, length of the prompt)."""
    content = [{"type": "image", "image": scenes.render(scene)}, {"type": "text", "text": question}]
    ids, pixels = build_prompt(tokenizer, [{"role": "user", "content": content}], None, model.config)
    whole = torch.cat([ids, torch.tensor([answer_ids], dtype=torch.int64)], dim=1)
    with torch.no_grad(), trace(model, attention=(FIRST, LAST)) as seen:
        model(whole, pixels)
    return seen.attention, ids


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_the_answer_is_the_very_answer_of_ask(model, tokenizer, language):
    rng = random.Random(f"ask {language}")
    for kind in scenes.KINDS:
        scene = scenes.draw_scene(rng, "held-out")
        question = scenes.ask(scene, rng, kind, language).text
        assert read(model, tokenizer, scene, question).answer == ask(scenes.render(scene), question)


def test_a_caption_is_that_of_ask_too_and_each_of_its_tokens_can_be_picked(model, tokenizer):
    question = scenes.describe_request("fr")
    seen = read(model, tokenizer, SCENE, question)
    assert seen.answer == ask(scenes.render(SCENE), question)
    ids = tokenizer.encode(seen.answer)
    assert len(seen.names) - seen.words == len(ids) + 1 and seen.names[-1] == "end"


@pytest.mark.parametrize("question", ["What colour is the circle?", "Où est le cercle rouge ?", "कितने वर्ग हैं?"])
def test_rows_are_those_of_one_plain_pass_over_the_whole_sequence(model, tokenizer, question):
    seen = read(model, tokenizer, SCENE, question)
    answer_ids = tokenizer.encode(seen.answer)
    attention, ids = plain_pass(model, tokenizer, SCENE, question, answer_ids)
    prompt, words = ids.shape[1], len(tokenizer.encode(question))
    start = int((ids[0] == model.config.patch_token).nonzero().max()) + 2  # after <|image_end|>
    assert tokenizer.decode(ids[0, start : start + words].tolist()) == question
    assert seen.words == words and len(seen.names) == words + len(answer_ids) + 1
    for token in range(len(seen.names)):
        # A word's own query; the one before an answer's token wrote it.
        position = start + token if token < words else prompt - 1 + token - words
        for layer in (FIRST, LAST) if token >= words else (FIRST,):
            rows = attention[layer][0, :, position]  # [heads, T]
            length = seen.attention[layer].shape[-1]
            for head in range(8):
                torch.testing.assert_close(seen.row(token, layer, head), rows[head, :length], atol=2e-4, rtol=0)
            torch.testing.assert_close(seen.row(token, layer), rows.mean(0)[:length], atol=2e-4, rtol=0)


def test_words_of_the_question_are_no_business_of_the_last_layer(reading):
    with pytest.raises(ValueError, match="Layer 7 is the last.*Pick a token of the answer") as error:
        reading.row(reading.words - 1, LAST)
    assert "\n" not in str(error.value)
    assert reading.row(reading.words, LAST).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "picked, message",
    [
        ((0, 2), "layer is 2; the NoPE layers are 3, 7"),
        ((0, FIRST, 8), "head is 8; it must be 0 to 7, or 'all, mean'"),
        ((-1, FIRST), "token is -1; it must be 0 to 7"),
        ((8, FIRST), "token is 8; it must be 0 to 7"),
    ],
)
def test_what_is_not_there_is_refused(reading, picked, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        reading.row(*picked)


def test_names_are_those_of_question_and_answer(reading):
    assert reading.names == ("What", "colour", "is", "the", "circle", "?", reading.answer, "end")


def test_an_answer_that_is_cut_off_has_no_end_to_pick(model, tokenizer, monkeypatch):
    monkeypatch.setattr(scene_microscope, "MAX_NEW_TOKENS", 3)
    seen = read(model, tokenizer, SCENE, "Describe the picture.")
    assert len(seen.names) == seen.words + 3 and seen.names[-1] != "end"
    assert seen.row(seen.words + 2, LAST).sum() == pytest.approx(1)


def test_bad_questions_and_models_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="the question is empty"):
        read(model, tokenizer, SCENE, "  ")
    rope = Llama4(replace(model.config, text=replace(model.config.text, nope_layers=())))
    with pytest.raises(ValueError, match="no NoPE layer"):
        read(rope, tokenizer, SCENE, "What?")
    blind = Llama4(replace(model.config, vision=None))
    with pytest.raises(ValueError, match="this config has no vision"):
        read(blind, tokenizer, SCENE, "What?")


# ----------------------------------------------------------------------------------------------------------------------
# Shares


@pytest.fixture
def by_hand() -> Reading:
    """Two heads, one question word and one written token, 6 tokens of which 4 are squares of 72 x 24 pixels."""
    items = (
        scenes.Item("star", "red", "small", "top left", 1, 0, 0),
        scenes.Item("cross", "blue", "small", "bottom right", 2, 0, 0),
    )
    attention = torch.tensor([[[0.1, 0.4, 0.2, 0.1, 0.2, 0.0], [0.0, 0.5, 0.1, 0.1, 0.2, 0.1]],
                              [[0.3, 0.0, 0.0, 0.0, 0.7, 0.0], [0.2, 0.1, 0.1, 0.1, 0.0, 0.5]]])  # fmt: skip
    boxes = ((0, 0, 72, 24), (72, 0, 144, 24), (0, 24, 72, 48), (72, 24, 144, 48))
    return Reading(
        scenes.Scene(items, 240), "Where is the star?", "left", ("star", "left"), 1, (4, 5),
        {3: attention, 5: attention[:, -1:]}, torch.tensor([1, 2, 3, 4]), boxes, (0, None, None, 1), (0,),
    )  # fmt: skip


def test_shares_by_hand(by_hand):
    paid = shares(by_hand, 1, 3, 0)
    assert paid.square == pytest.approx((0.5, 0.1, 0.1, 0.2)) and paid.item == pytest.approx((0.5, 0.2))
    assert (
        paid.background == pytest.approx(0.2) and paid.picture == pytest.approx(0.9) and paid.text == pytest.approx(0.1)
    )
    paid = shares(by_hand, 0, 3)  # the mean of both heads
    assert paid.item == pytest.approx((0.2, 0.45)) and paid.background == pytest.approx(0.15)
    assert paid.text == pytest.approx(0.2)
    assert shares(by_hand, 1, 5, 1).item == pytest.approx((0.1, 0.0))


def test_shares_in_words_by_hand(by_hand):
    assert in_words(by_hand, 1, 3, 0) == (
        'To write "left", head 0 in layer 3 reads 90% from the picture: red star (asked about) 50%, blue cross 20%, '
        "background 20%; and 10% from text."
    )
    assert in_words(by_hand, 0, 3).startswith(
        'At the word "star" of the question, the mean of its 2 heads in layer 3 reads 80%'
    )


def test_shares_of_real_readings_add_up_to_all(reading):
    for token in range(reading.words, len(reading.names)):
        for layer in (FIRST, LAST):
            for head in (MEAN, *range(8)):
                paid = shares(reading, token, layer, head)
                assert sum(paid.item) + paid.background + paid.text == pytest.approx(1, abs=1e-5)
                assert sum(paid.square) == pytest.approx(sum(paid.item) + paid.background, abs=1e-5)


def test_the_first_nope_layers_first_two_heads_read_from_the_object_that_a_colour_question_names(model, tokenizer):
    """They were trained to point there from the words; nobody trained the query that writes the answer to do so."""
    rng, asked = random.Random(50), []
    while len(asked) < 50:
        scene, language = scenes.draw_scene(rng, "held-out"), scenes.LANGUAGES[len(asked) % 4]
        alone = [i for i, a in enumerate(scene.items) if sum(a.shape == b.shape for b in scene.items) == 1]
        if not alone:
            continue
        target = rng.choice(alone)
        cases = {case: scenes.phrase(language, case, shape=scene.items[target].shape) for case in ("the", "of")}
        asked.append(
            (target, read(model, tokenizer, scene, scene_words.QUESTIONS[language]["colour_of"].format(**cases)))
        )
    word, written, others = [], [], []
    for target, seen in asked:
        assert seen.asked == (target,)
        by_token = [
            [shares(seen, token, FIRST, head).item for head in (0, 1)] for token in range(seen.words + 1)
        ]  # [tokens, heads, items]
        paid = torch.tensor(by_token).mean(1)  # [tokens, items]
        word.append(float(paid[:-1, target].max()))
        written.append(float(paid[-1, target]))
        others.append((float(paid[-1].sum()) - written[-1]) / (len(seen.scene.items) - 1))
    assert min(word) >= 0.8  # in every one of the 50, at some word of the question
    assert sum(written) / 50 >= 0.6
    assert sum(others) / 50 <= 0.1  # any other object of the same picture


# ----------------------------------------------------------------------------------------------------------------------
# The figure


def drawn(reading: Reading, *picked) -> tuple[np.ndarray, FigureCanvasAgg]:
    """([height, width, 3] in page pixels, the canvas)"""
    canvas = FigureCanvasAgg(draw(reading, *picked).picture)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3], canvas


def on_page(reading: Reading, square: int) -> tuple[int, int, int, int]:
    """Where a square lies on the page: the tiles to the left, the whole picture to the right."""
    x1, y1, x2, y2 = (3 * side for side in reading.boxes[square])
    left = 8 if square < 48 else 8 + 3 * 144 + 16
    return left + x1, 30 + y1, left + x2, 30 + y2


def test_a_square_is_as_bright_as_it_is_read_from(model, tokenizer):
    empty = scenes.Scene((), 240)
    seen = read(model, tokenizer, empty, "How many objects are there?")
    for picked in ((seen.words, FIRST), (0, FIRST, 0), (seen.words, LAST)):
        page, _ = drawn(seen, *picked)
        paid = shares(seen, *picked).square
        for square, share in enumerate(paid):
            x1, y1, x2, y2 = on_page(seen, square)
            light = page[y2 - 8 : y2 - 3, x1 + 4 : x2 - 4].mean() / 240  # below the number
            assert light == pytest.approx(0.22 + 0.78 * min(1, (share / 0.25) ** 0.5), abs=0.01)


def test_the_numbers_on_the_squares_are_the_shares_in_per_cent(reading):
    picture = draw(reading, reading.words, FIRST).picture
    texts = [text for text in picture.axes[0].texts if text.get_text().isdigit()]
    expected = {}
    for square, share in enumerate(shares(reading, reading.words, FIRST).square):
        x, y, *_ = on_page(reading, square)
        if share >= 0.005:
            expected[x + 3, y + 7.5] = str(round(100 * share))
    assert {tuple(text.get_position()): text.get_text() for text in texts} == expected and len(expected) > 5


def blue_dots(page: np.ndarray) -> np.ndarray:
    return (np.abs(page.astype(int) - (0x00, 0x72, 0xB2)).sum(-1) < 40)[30 : 30 + 144]  # beside the pictures


def test_what_is_asked_about_is_framed_in_both_views_and_nothing_else(reading):
    blue = blue_dots(drawn(reading, reading.words, FIRST)[0])
    (asked,) = reading.asked
    x1, y1, x2, y2 = (3 * side for side in scene_squares.box_of(reading.scene.items[asked]))
    for left in (8, 8 + 432 + 16):
        view = blue[:, left : left + 432]
        rows, columns = view.nonzero()
        for found, edge in ((columns.min(), x1), (columns.max(), x2), (rows.min(), y1), (rows.max(), y2)):
            assert abs(found - edge) <= 2
        assert view[(y1 + y2) // 2, x1 + 6 : x2 - 6].sum() == 0  # a frame, not a plate
    assert not blue_dots(drawn(replace(reading, asked=()), reading.words, FIRST)[0]).any()


@pytest.mark.parametrize("asked", [(), (0,), (0, 1, 2)])
@pytest.mark.parametrize("layer", [FIRST, LAST])
def test_nothing_is_cut_or_covered(reading, asked, layer):
    _, canvas = drawn(replace(reading, asked=asked), reading.words, layer)
    width, height = canvas.figure.bbox.size
    boxes = [text.get_window_extent() for text in canvas.figure.axes[0].texts]
    for i, box in enumerate(boxes):
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_the_bar_is_as_long_as_the_shares_and_says_them(reading):
    picked = reading.words, FIRST
    paid, axes = shares(reading, *picked), draw(reading, *picked).picture.axes[0]
    asked = paid.item[reading.asked[0]]
    parts = [asked, sum(paid.item) - asked, paid.background, paid.text]
    said = [text.get_text() for text in axes.texts if text.get_text().endswith("%")]
    names = ("asked about (framed)", "other objects", "background", "text")
    assert said == [f"{name} {100 * part:.0f}%" for name, part in zip(names, parts, strict=True)]
    bars = [p for p in axes.get_children() if isinstance(p, Rectangle) and p.get_height() == 14 and p.get_width() != 16]
    bars.sort(key=lambda bar: bar.get_x())
    assert [bar.get_width() / 880 for bar in bars] == pytest.approx(parts, abs=1e-5)
    assert [bar.get_x() for bar in bars] == pytest.approx([8 + 880 * sum(parts[:i]) for i in range(4)], abs=0.01)
    unnamed = draw(replace(reading, asked=()), *picked).picture.axes[0].texts
    assert f"objects {sum(paid.item):.0%}" in [text.get_text() for text in unnamed]


def test_the_picture_in_words(reading):
    seen = draw(reading, reading.words, FIRST, 1)
    assert seen.text == in_words(reading, reading.words, FIRST, 1)
    assert seen.text in seen.alt and scenes.caption(reading.scene, "en") in seen.alt and "\n" not in seen.alt
    assert still(seen)


# ----------------------------------------------------------------------------------------------------------------------
# The widget


@pytest.fixture
def reads(microscope, monkeypatch) -> list:
    """(scene, question) of each time that the model was asked."""
    calls = []

    def counting(model, tokenizer, scene, question):
        calls.append((scene, question))
        return read(model, tokenizer, scene, question)

    monkeypatch.setattr(scene_microscope, "read", counting)
    return calls


def lines(view) -> list[str]:
    return "".join(letter for letter in view.says() if letter.isprintable() or letter == "\n").splitlines()


def test_it_starts_with_an_answer_and_says_what_its_first_token_was_read_from(microscope):
    view = microscope
    caption, asked, read_from, caveat = lines(view)
    assert caption == scenes.caption(view.scene, "en")
    assert asked == f"What colour is the circle?  →  {ask(scenes.render(view.scene), 'What colour is the circle?')}"
    assert read_from == in_words(view.reading, view.reading.words, FIRST, MEAN) and "(asked about)" in read_from
    assert "no proof of why" in caveat and "<img" in view.picture.value


def test_a_change_of_the_scene_or_question_asks_once_and_answers_as_ask_does(microscope, reads):
    for move in ({"colour": "green"}, {"shape": "triangle"}, {"question": "How many triangles are there?"}):
        before = len(reads)
        microscope.drive(**move)
        assert len(reads) == before + 1 and reads[-1] == (microscope.scene, microscope.controls["question"].value)
        answer = ask(scenes.render(microscope.scene), microscope.controls["question"].value)
        assert lines(microscope)[1].endswith(f"→  {answer}")
    assert microscope.scene.items[0].colour == "green" and microscope.scene.items[0].shape == "triangle"


def test_looking_elsewhere_asks_nothing_and_draws_anew(microscope, reads, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the model ran")

    monkeypatch.setattr(microscope.net, "forward", never)
    seen = [microscope.picture.value]
    for move in ({"token": 4}, {"head": 0}, {"head": 1}, {"head": MEAN, "token": 6, "layer": LAST}, {"token": 7}):
        said = microscope.drive(**move)
        token, layer, head = (microscope.controls[name].value for name in ("token", "layer", "head"))
        assert in_words(microscope.reading, token, layer, head) in said
        assert microscope.picture.value not in seen
        seen.append(microscope.picture.value)
    microscope.drive(place="top right", language="fr", ask=1)  # nor does choosing what to change, or asking again
    assert reads == []


def test_a_token_of_the_question_in_the_last_layer_is_answered_with_what_to_do(microscope):
    said = microscope.drive(token=4, layer=LAST)
    assert "Layer 7 is the last" in said and '"circle"' in said and "<img" in microscope.picture.value
    assert "Layer 7 is the last" not in microscope.drive(token=microscope.reading.words)


def test_tokens_to_pick_are_those_of_question_and_answer(microscope):
    labels = [label for label, _ in microscope.controls["token"].options]
    words = [f"question: {word}" for word in ("What", "colour", "is", "the", "circle", "?")]
    assert labels == [*words, f"answer: {microscope.reading.answer}", "answer: end"]


def test_the_token_that_was_picked_stays_while_the_question_does(microscope, monkeypatch):
    microscope.drive(token=4)
    microscope.drive(colour="purple")
    assert microscope.controls["token"].value == 4 and '"circle"' in microscope.says()
    microscope.drive(question="Is the blue square left of the yellow star?")
    assert microscope.controls["token"].value == microscope.reading.words
    microscope.drive(token=len(microscope.reading.names) - 1)

    def shorter(*asked):
        whole = read(*asked)
        return replace(whole, names=whole.names[:-1], query=whole.query[:-1])

    monkeypatch.setattr(scene_microscope, "read", shorter)
    last = microscope.controls["token"].value
    microscope.drive(colour="green")
    assert microscope.controls["token"].value == len(microscope.reading.names) - 1 == last - 1


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_a_suggested_question_is_asked_once_and_compared(microscope, reads, language):
    microscope.drive(language=language)
    for number in (1, 2):
        microscope.drive(suggest=1)
        known = suggest(microscope.scene, language, number)
        assert microscope.controls["question"].value == known.text
        assert reads[-1] == (microscope.scene, known.text) and len(reads) == number
        verdict = "(right)" if microscope.reading.answer == known.answer else f"(wrong: {known.answer})"
        assert lines(microscope)[1].endswith(verdict)
    microscope.drive(digit=(microscope.controls["digit"].value + 1) % 10)
    assert "(right)" not in microscope.says() and "(wrong" not in microscope.says()  # of another scene nobody knows


def test_a_wrong_answer_is_called_wrong(microscope, monkeypatch):
    monkeypatch.setattr(scene_microscope, "read", lambda *asked: replace(read(*asked), answer="a cat"))
    assert "→  a cat  (wrong: " in microscope.drive(suggest=1)


def test_an_empty_question_is_answered_with_what_to_do_and_the_next_recovers(microscope):
    said = microscope.drive(question=" ")
    assert "the question is empty" in said and microscope.reading is None and "<img" in microscope.picture.value
    assert "the question is empty" in microscope.drive(head=2)
    assert "head 2 in layer 3" in microscope.drive(question="How many stars are there?")


def test_an_empty_canvas_can_be_asked_about(microscope):
    for item in START:
        microscope.drive(place=item.place, shape=NOTHING)
    said = microscope.drive(question="How many objects are there?")
    assert said.startswith("an empty canvas") and "from the picture: background" in said


def test_what_is_typed_is_text_and_never_html(microscope):
    microscope.drive(question="<b>Where</b> is $\\frac$ the circle?", token=1)
    assert "<b>" not in microscope.text.value and "<b>" not in microscope.picture.value
    assert lines(microscope)[1].startswith("<b>Where</b> is $\\frac$ the circle?")


def test_all_controls_are_on_the_page_once(microscope):
    found = []

    def walk(widget):
        found.append(widget)
        for child in getattr(widget, "children", ()):
            walk(child)

    walk(microscope.box)
    for control in (*microscope.controls.values(), microscope.picture, microscope.text):
        assert found.count(control) == 1
    assert set(microscope.controls) >= {"place", "shape", "question", "ask", "suggest", "token", "layer", "head"}
    assert all(control.tooltip is not None for control in microscope.controls.values())


def test_the_model_computes_without_gradients(reading):
    with torch.enable_grad():
        assert not any(attention.requires_grad for attention in reading.attention.values())


def test_without_a_kernel_and_for_nbval_there_is_nothing_that_follows_from_the_weights(microscope):
    bundle = microscope._repr_mimebundle_()
    caption = scenes.caption(microscope.scene, "en")
    assert bundle["text/plain"] == f"SceneMicroscope, a widget: run this notebook to use it\n{caption}"
    assert "application/vnd.jupyter.widget-view+json" in bundle
