"""The microscope shows what the routers really did, says it in words, numbers and colours, and asks the model once."""

import base64
import io
import random
import re
import threading
import time
from html import unescape
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest
import torch
import traitlets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from minillama4 import build_prompt, load_checkpoint, load_tokenizer, scenes
from minillama4.course.widgets import router_microscope
from minillama4.course.widgets.frame import still
from minillama4.course.widgets.router_microscope import COLOURS, RouterMicroscope, figure, ink, page, routes

TEXTS = {
    "en": "Where is the red circle?", "fr": "Où est le cercle rouge ?", "hi": "लाल वृत्त कहाँ है?",
    "ar": "أين الدائرة الحمراء؟",
}  # fmt: skip
SCENE = scenes.draw_scene(random.Random(8), "held-out")


@pytest.fixture(scope="module")
def model():
    return load_checkpoint("mini-scout")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("mini-scout")


@pytest.fixture(scope="module")
def routed(model, tokenizer):
    return routes(model, tokenizer, TEXTS["en"], SCENE)


@pytest.fixture(scope="module")
def text_alone(model, tokenizer):
    return routes(model, tokenizer, TEXTS["en"])


@pytest.fixture
def microscope():
    return RouterMicroscope()


class Reader(HTMLParser):
    """What is on the page: text in order, and the attributes of each element."""

    def __init__(self, source: str):
        super().__init__()
        self.words, self.elements = [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    def titles(self):
        return [attributes["title"] for _, attributes in self.elements if "title" in attributes]


# ----------------------------------------------------------------------------------------------------------------------
# The function


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_routes_are_the_largest_logit_of_each_router_and_its_sigmoid(model, tokenizer, text):
    """From hooks on the routers, without `trace`."""
    content = [{"type": "image", "image": scenes.render(SCENE)}, {"type": "text", "text": text}]
    ids, pixels = build_prompt(tokenizer, [{"role": "user", "content": content}], None, model.config)
    seen = {}
    hooks = [
        block.feed_forward.router.register_forward_hook(lambda m, i, out, k=k: seen.update({k: out}))
        for k, block in enumerate(model.layers)
    ]
    with torch.no_grad():
        model(ids, pixels)
    for hook in hooks:
        hook.remove()
    routed = routes(model, tokenizer, text, SCENE)
    assert list(routed.ids) == ids[0].tolist() and routed.layers == tuple(range(8))
    assert routed.is_patch.sum() == 64 and (torch.tensor(routed.ids)[routed.is_patch] == 1015).all()
    for layer in range(8):
        experts, scores = routed.of(layer)
        assert experts == seen[layer].argmax(-1).tolist()
        torch.testing.assert_close(torch.tensor(scores), seen[layer].max(-1).values.sigmoid())


def test_loads_count_text_and_patches_apart(routed):
    for layer in range(8):
        experts, patch = np.array(routed.of(layer)[0]), routed.is_patch.numpy()
        text, patches = routed.load(layer)
        assert text == [int(((experts == e) & ~patch).sum()) for e in range(8)]
        assert patches == [int(((experts == e) & patch).sum()) for e in range(8)]
    assert routed.fullest == max(routed.of(layer)[0].count(e) for layer in range(8) for e in range(8))


def test_tiles_are_what_the_model_sees(routed):
    """Three tiles side by side are the picture, pixel by pixel; the fourth is all of it."""
    picture = np.array(scenes.render(SCENE))
    assert (np.concatenate([np.array(tile) for tile in routed.tiles[:3]], axis=1) == picture).all()
    assert routed.tiles[3].size == (48, 48)
    assert abs(np.array(routed.tiles[3]).mean() - picture.mean()) < 2


def test_names_of_tokens(model, tokenizer):
    routed = routes(model, tokenizer, "the digit 3?\nÜ")
    assert routed.names[:5] == ("begin_of_text", "header_start", "user", "header_end", "⏎⏎")
    assert "".join(routed.names[5 : routed.names.index("eot")]) == "the␣digit␣3?⏎▯▯"  # two bytes, neither a letter


def test_without_a_picture_there_are_no_tiles_and_no_patches(text_alone):
    assert text_alone.tiles == () and not text_alone.is_patch.any() and text_alone.caption == ""
    assert "patch" not in page(text_alone, 0)


@pytest.mark.parametrize("text, message", [
    (" ", "the question is empty"),
    ("x" * 2001, "text has 2,001 characters; at most 2,000 are drawn"),
])  # fmt: skip
def test_a_text_that_cannot_be_drawn_is_refused(model, tokenizer, text, message):
    with pytest.raises(ValueError, match=message):
        routes(model, tokenizer, text)


@pytest.mark.parametrize("function", [page, figure, router_microscope.loads_in_words])
def test_a_layer_without_experts_is_refused(routed, function):
    with pytest.raises(ValueError, match="layer is 8; the layers with experts are 0, 1, 2, 3, 4, 5, 6, 7"):
        function(routed, 8)


# ----------------------------------------------------------------------------------------------------------------------
# Colours


def linear(colour):
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb.clip(0, 1)
    f = np.cbrt(xyz / [0.9505, 1, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira and Fernandes (2009), severity 1.
VISION = {
    "all hues": np.eye(3),
    "protan": np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),
    "deutan": np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6726, 0.0473], [-0.0118, 0.0429, 0.9689]]),
}


@pytest.mark.parametrize("eyes", VISION.values(), ids=VISION)
def test_colours_of_eight_experts_can_be_told_apart(eyes):
    seen = [lab(eyes @ linear(colour)) for colour in COLOURS]
    assert len(COLOURS) == 8 and min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 10


@pytest.mark.parametrize("colour", COLOURS)
def test_numbers_can_be_read_on_their_colour(colour):
    light, dark = sorted((linear(c) @ [0.2126, 0.7152, 0.0722] for c in (colour, ink(colour))), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG AA


# ----------------------------------------------------------------------------------------------------------------------
# The page


@pytest.mark.parametrize("layer", [0, 3, 7])
def test_every_token_is_on_the_page_with_its_expert_in_number_and_colour(routed, layer):
    source = page(routed, layer)
    experts, scores = routed.of(layer)
    text = [i for i in range(len(routed.ids)) if not routed.is_patch[i]]
    wanted = [f"token {i}: {routed.names[i]}, expert {experts[i]}, score {scores[i]:.2f}" for i in text]
    assert Reader(source).titles() == wanted
    chips = re.findall(r"background: (#\w+); color: #\w+; border-radius[^>]*><bdi>(.*?)</bdi><br><b>(\d+)</b>", source)
    chips = [(colour, unescape(name), int(number)) for colour, name, number in chips]
    assert chips == [(COLOURS[experts[i]], routed.names[i], experts[i]) for i in text]
    cells = re.findall(r"border: 3px solid (#\w+);[^>]*><b [^>]*>(\d+)</b>", source)
    patches = [experts[i] for i in range(len(experts)) if routed.is_patch[i]]
    assert cells == [(COLOURS[expert], str(expert)) for expert in patches]


def test_pictures_on_the_page_have_words_that_name_every_expert(routed):
    images = [attributes for tag, attributes in Reader(page(routed, 2)).elements if tag == "img"]
    assert len(images) == 4
    patches = torch.tensor(routed.of(2)[0])[routed.is_patch].view(4, 4, 4).tolist()
    for image, title, tile in zip(images, ["tile 1", "tile 2", "tile 3", "whole picture"], patches, strict=True):
        rows = "; ".join(" ".join(map(str, row)) for row in tile)
        caption = scenes.caption(SCENE, "en")
        assert image["alt"] == f"{title} of a picture ({caption}). Experts of its patches, row by row: {rows}"


def test_bars_are_as_long_as_the_loads_on_one_scale_for_all_layers(routed):
    for layer in (1, 6):
        source = page(routed, layer)
        widths = [float(w) for w in re.findall(r'<div style="width: ([\d.]+)%', source)]
        wanted = [100 * n / routed.fullest for pair in zip(*routed.load(layer), strict=True) for n in pair]
        assert widths == pytest.approx(wanted, abs=0.006)
        even = [float(left) for left in re.findall(r"left: ([\d.]+)%", source)]
        assert even == pytest.approx([100 * len(routed.ids) / 8 / routed.fullest] * 8, abs=0.006)
        said = re.findall(r"<span>(\d+) \((\d+) patches\)</span>", source)
        pairs = zip(*routed.load(layer), strict=True)
        assert [(int(a), int(b)) for a, b in said] == [(text + patches, patches) for text, patches in pairs]


def test_what_a_learner_types_is_text_and_not_markup(model, tokenizer):
    routed = routes(model, tokenizer, "<b>&</b>\"'<script>")
    source = page(routed, 0)
    assert "<script" not in source
    chips = "".join(map(unescape, re.findall("<bdi>(.*?)</bdi>", source)))
    assert "<b>&</b>\"'<script>" in chips


# ----------------------------------------------------------------------------------------------------------------------
# The figure


def drawn_texts(shown):
    (axes,) = shown.picture.axes
    return axes, axes.texts


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("scene", [SCENE, None], ids=["picture", "text"])
def test_nothing_in_the_figure_is_cut_or_overlaps(model, tokenizer, language, scene):
    text = " ".join([TEXTS[language]] * (1 if scene else 5))
    shown = figure(routes(model, tokenizer, text, scene), 5)
    _, texts = drawn_texts(shown)
    assert shown.picture.get_size_inches()[0] == 9  # 900 pixels of a notebook column
    renderer, page_box = FigureCanvasAgg(shown.picture).get_renderer(), shown.picture.bbox
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert all(
        page_box.x0 <= b.x0 and b.x1 <= page_box.x1 and page_box.y0 <= b.y0 and b.y1 <= page_box.y1 for b in boxes
    )
    for a, b in combinations(boxes, 2):
        assert min(a.x1, b.x1) - max(a.x0, b.x0) < 1 or min(a.y1, b.y1) - max(a.y0, b.y0) < 3


@pytest.mark.filterwarnings("error")
def test_the_figure_never_draws_a_letter_that_its_font_lacks(model, tokenizer):
    routed = routes(model, tokenizer, TEXTS["hi"] + TEXTS["ar"] + TEXTS["fr"])
    shown = figure(routed, 0)
    still(shown)  # matplotlib warns of a missing letter when it draws
    _, texts = drawn_texts(shown)
    words = [text.get_text() for text in texts]
    assert "Où" in words or "▯" in "".join(words)
    for name, token in zip(routed.names, routed.ids, strict=True):
        arabic_or_hindi = any("\u0600" <= letter <= "\u06ff" or "\u0900" <= letter <= "\u097f" for letter in name)
        assert (f"#{token}" in words) if arabic_or_hindi else (name in words)


def test_the_figure_shows_each_expert_as_the_page_does_and_says_the_loads(routed):
    shown = figure(routed, 4)
    experts, _ = routed.of(4)
    _, texts = drawn_texts(shown)
    numbers = [int(text.get_text()) for text in texts if text.get_weight() == "bold"]
    patches = [e for e, patch in zip(experts, routed.is_patch, strict=True) if patch]
    text = [e for e, patch in zip(experts, routed.is_patch, strict=True) if not patch]
    assert numbers == patches + text + list(range(8))
    assert scenes.caption(SCENE, "en") in shown.alt
    for expert in range(8):
        assert f"expert {expert}: {experts.count(expert)}" in shown.alt
    picture = Image.open(io.BytesIO(still(shown).data))
    assert picture.width == 1800 and picture.convert("RGB").getcolors(1 << 20) is not None


def test_sixteen_experts_have_sixteen_numbers(routed):
    """As many as Scout has: the colour comes twice, the number once."""
    expert = torch.arange(len(routed.ids)) % 16
    sixteen = router_microscope.Routed(**(vars(routed) | {"expert": expert.repeat(8, 1), "num_experts": 16}))
    source = page(sixteen, 0)
    assert all(f"<b>{e}</b>" in source or f">{e}</b>" in source for e in range(16))
    _, texts = drawn_texts(figure(sixteen, 0))
    assert {text.get_text() for text in texts} >= set(map(str, range(16)))


# ----------------------------------------------------------------------------------------------------------------------
# The widget


@pytest.fixture
def calls(monkeypatch):
    """The texts that the model was run on."""
    real, seen = router_microscope.routes, []

    def counted(model, tokenizer, text, scene=None):
        seen.append((text, scene, torch.is_grad_enabled()))
        return real(model, tokenizer, text, scene)

    monkeypatch.setattr(router_microscope, "routes", counted)
    return seen


def test_it_starts_with_a_picture_in_layer_0(microscope):
    assert microscope.says() == router_microscope.summary(microscope.routed, 0)
    assert microscope.says().startswith("layer 0: 86 tokens, 64 of them patches of the picture; 8 experts")
    assert microscope.picture.value == page(microscope.routed, 0)


def test_a_layer_is_drawn_anew_and_not_computed_anew(calls):
    microscope = RouterMicroscope()
    pages = []
    for layer in range(8):
        assert microscope.drive(layer=layer).startswith(f"layer {layer}: ")
        pages.append(microscope.picture.value)
        assert pages[-1] == page(microscope.routed, layer)
    assert len(set(pages)) == 8 and len(calls) == 1


def test_moving_the_slider_takes_less_than_a_tenth_of_a_second(microscope):
    seconds = []
    for layer in (1, 2, 3, 4, 5):
        started = time.thread_time()  # ours alone: other programs may hold the cores
        microscope.drive(layer=layer)
        seconds.append(time.thread_time() - started)
    assert sorted(seconds)[2] < 0.1


def test_text_and_picture_are_computed_when_they_change_without_gradients(calls):
    microscope = RouterMicroscope()
    microscope.drive(layer=4, text="How big is it?")
    first = microscope.routed
    microscope.drive(picture="no picture")
    assert first.tiles and not microscope.routed.tiles and microscope.controls["layer"].value == 4
    thread = threading.Thread(target=microscope.drive, kwargs={"picture": "scene 2"})
    thread.start()
    thread.join()
    assert [text for text, _, _ in calls] == ["How many objects are there?"] + ["How big is it?"] * 3
    assert [scene for _, scene, _ in calls][2] is None and calls[0][1] != calls[3][1]
    assert not any(grad for _, _, grad in calls)


def test_scenes_come_from_their_seed(microscope):
    microscope.drive(picture="scene 3")
    scene = scenes.draw_scene(random.Random(3), "held-out")
    assert microscope.routed.caption == scenes.caption(scene, "en")


def test_an_own_scene_is_shown_first_and_can_be_left():
    microscope = RouterMicroscope(scene=SCENE)
    assert microscope.routed.caption == scenes.caption(SCENE, "en")
    microscope.drive(picture="scene 1")
    assert microscope.routed.caption != scenes.caption(SCENE, "en")
    assert "your scene" not in RouterMicroscope().controls["picture"].options


def test_an_empty_text_says_what_to_do_and_leaves_nothing_old_on_the_page(microscope):
    assert microscope.drive(text="  ").startswith("the question is empty")
    assert microscope.picture.value == "" and microscope.routed is None
    assert microscope.drive(layer=2).startswith("the question is empty")
    assert microscope.drive(text="Where?").startswith("layer 2: ") and microscope.picture.value


def test_a_layer_or_picture_that_is_not_there_is_refused(microscope):
    for moves in ({"layer": 8}, {"picture": "scene 99"}):
        with pytest.raises(traitlets.TraitError):
            microscope.drive(**moves)


def test_the_page_changes_in_one_message(microscope, monkeypatch):
    """An empty page in between would make the notebook jump."""
    sent = []
    monkeypatch.setattr(microscope.picture, "send_state", lambda key=None: sent.append(key))
    microscope.drive(layer=6)
    assert len(sent) == 1


def test_what_nbval_compares_does_not_depend_on_the_weights(microscope, model, tokenizer):
    other = load_checkpoint("mini-scout")
    for block in other.layers:
        torch.nn.init.normal_(block.feed_forward.router.weight)
    routed = routes(other, tokenizer, "How many objects are there?", microscope.pictures["scene 1"])
    assert not torch.equal(routed.expert, microscope.routed.expert)
    assert router_microscope.summary(routed, 0) == microscope.says()
    assert microscope._repr_mimebundle_()["text/plain"].splitlines()[1:] == [microscope.says()]


def test_the_whole_picture_is_a_png_of_the_tiles(routed):
    sources = [a["src"] for tag, a in Reader(page(routed, 0)).elements if tag == "img"]
    for source, tile in zip(sources, routed.tiles, strict=True):
        shown = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert shown.convert("RGB").tobytes() == tile.tobytes()
