"""Scenes: the split, the pictures, and questions that only the picture answers."""

import random
import re
import unicodedata
from collections import Counter, defaultdict
from itertools import combinations, product

import numpy as np
import pytest

from minillama4 import scene_words, scenes
from minillama4.scenes import COLOURS, DIGITS, KINDS, LANGUAGES, PLACES, SHAPES, SIZES, Item, Scene, ask, draw_scene

CELLS = list(product(KINDS, LANGUAGES))
SCRIPT = {"en": "[A-Za-z]", "fr": "[A-Za-zÀ-ÿ]", "hi": "[\u0900-\u097f]", "ar": "[\u0600-\u06ff]"}


def draw(seed, number, split="train", count=None):
    rng = random.Random(seed)
    return [draw_scene(rng, split, count) for _ in range(number)]


def asked(kind, language, number, seed=0, split="train"):
    """(scene, question) pairs, each about a scene of its own."""
    rng = random.Random(f"{seed} {kind} {language}")
    for _ in range(number):
        scene = draw_scene(rng, split)
        yield scene, ask(scene, rng, kind, language)


# --- The split


def test_train_and_held_out_share_no_combination_but_every_pair():
    """A held-out object is new as a whole only: each two of its attributes were seen together in training."""
    seen = {
        split: {(i.colour, i.shape, i.digit) for scene in draw(1, 2500, split) for i in scene.items}
        for split in ("train", "held-out")
    }
    assert not seen["train"] & seen["held-out"]
    assert (len(seen["train"]), len(seen["held-out"])) == (240, 60)
    for a, b in combinations(range(3), 2):
        pairs = {split: {(c[a], c[b]) for c in triples} for split, triples in seen.items()}
        assert pairs["held-out"] <= pairs["train"]
        assert len(pairs["train"]) == len(set(product(*[(COLOURS, SHAPES, DIGITS)[axis] for axis in (a, b)])))


@pytest.mark.parametrize("count", [None, 1, 2, 3, 4, 5, 6])
def test_places_and_names_are_distinct(count):
    for scene in draw(2, 200, count=count):
        assert len(scene.items) == count or (count is None and 3 <= len(scene.items) <= 6)
        places = [item.place for item in scene.items]
        assert places == sorted(set(places), key=PLACES.index), "reading order, no place twice"
        assert len({(item.colour, item.shape) for item in scene.items}) == len(scene.items)


def test_bad_requests_are_refused():
    rng = random.Random(0)
    with pytest.raises(ValueError, match="split"):
        draw_scene(rng, "test")
    for count in (0, 7):
        with pytest.raises(ValueError, match="1 to 6"):
            draw_scene(rng, count=count)
    with pytest.raises(ValueError, match="two objects"):
        ask(draw_scene(rng, count=1), rng, "relation", "en")


# --- Pictures


def test_same_seed_same_everything():
    assert draw(3, 5) == draw(3, 5) != draw(4, 5)
    scene = draw(3, 1)[0]
    assert scenes.render(scene).tobytes() == scenes.render(scene).tobytes()
    for kind, language in CELLS:
        assert ask(scene, random.Random(7), kind, language) == ask(scene, random.Random(7), kind, language)
    assert scenes.data_fingerprint() == scenes.data_fingerprint()


@pytest.mark.parametrize("scale", [1, 3])
def test_objects_stay_inside_their_tile_and_apart(scale):
    """What a picture shows of one object alone lies in its cell; and a picture is the sum of such patches."""
    for scene in draw(5, 40):
        whole = np.asarray(scenes.render(scene, scale))
        assert whole.shape == (48 * scale, 144 * scale, 3) and whole.dtype == np.uint8
        covered = np.zeros(whole.shape[:2], int)
        for item in scene.items:
            alone = np.asarray(scenes.render(Scene((item,), scene.background), scale))
            drawn = (alone != scene.background).any(axis=-1)
            y, x = drawn.nonzero()
            assert set(x // (48 * scale)) == {PLACES.index(item.place) % 3}
            assert set(y // (24 * scale)) == {PLACES.index(item.place) // 3}
            assert np.array_equal(whole[drawn], alone[drawn])
            covered += drawn
        assert covered.max() == 1 and (whole[covered == 0] == scene.background).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dy", [-1, 1])
def test_digits_lie_wholly_on_their_object(shape, size, dy):
    """Changing the digit changes ink only: no dot of it falls on the background, where white could not be seen."""
    for colour in COLOURS:
        pictures = [
            np.asarray(scenes.render(Scene((Item(shape, colour, size, "top middle", digit, 0, dy),), 240)), int)
            for digit in DIGITS
        ]
        for a, b in combinations(pictures, 2):
            changed = (a != b).any(axis=-1)
            assert changed.sum() >= 2, "two digits must differ by two pixels at least"
            values = {tuple(v) for v in np.concatenate([a[changed], b[changed]])}
            assert values <= {scenes.RGB[colour], (0, 0, 0), (255, 255, 255)}


def test_shapes_and_sizes_differ_by_many_pixels():
    def mask(shape, size):
        picture = np.asarray(scenes.render(Scene((Item(shape, "red", size, "top left", 1, 0, 0),), 240)), int)
        return (picture != 240).any(axis=-1)

    for size in SIZES:
        for a, b in combinations(SHAPES, 2):
            assert (mask(a, size) != mask(b, size)).sum() >= 24, (a, b, size)


# --- Questions: the answer, found again by other means

# Each language's questions as patterns. `a` and `b` are noun phrases in any case, looked up in NAMED.
PATTERNS = {
    "en": {
        "colour_of": r"What colour is (?P<a>.+)\?",
        "colour_of_digit": r"What colour is the object with the digit (?P<digit>\d)\?",
        "shape_of": r"Which shape is (?P<colour>.+)\?",
        "digit_on": r"Which digit is on (?P<a>.+)\?",
        "size_of": r"How big is (?P<a>.+)\?",
        "at_place": r"What is at the (?P<place>.+)\?",
        "where": r"Where is (?P<a>.+)\?",
        "left_of": r"Is (?P<a>.+) left of (?P<b>.+)\?",
        "right_of": r"Is (?P<a>.+) right of (?P<b>.+)\?",
        "above": r"Is (?P<a>.+) above (?P<b>.+)\?",
        "below": r"Is (?P<a>.+) below (?P<b>.+)\?",
        "count": r"How many (?P<many>.+) are there\?",
    },
    "fr": {
        "colour_of": r"Quelle est la couleur (?P<a>.+) \?",
        "colour_of_digit": r"Quelle est la couleur de l'objet avec le chiffre (?P<digit>\d) \?",
        "shape_of": r"Quelle forme est (?P<colour>.+) \?",
        "digit_on": r"Quel chiffre est sur (?P<a>.+) \?",
        "size_of": r"Quelle est la taille (?P<a>.+) \?",
        "at_place": r"Qu'y a-t-il (?P<place>.+) \?",
        "where": r"Où est (?P<a>.+) \?",
        "left_of": r"Est-ce que (?P<a>.+) est à gauche (?P<b>.+) \?",
        "right_of": r"Est-ce que (?P<a>.+) est à droite (?P<b>.+) \?",
        "above": r"Est-ce que (?P<a>.+) est au-dessus (?P<b>.+) \?",
        "below": r"Est-ce que (?P<a>.+) est au-dessous (?P<b>.+) \?",
        "count": r"Combien (?P<many>.+) y a-t-il \?",
    },
    "hi": {
        "colour_of": r"(?P<a>.+) का रंग क्या है\?",
        "colour_of_digit": r"अंक (?P<digit>\d) वाली आकृति का रंग क्या है\?",
        "shape_of": r"कौन सी आकृति (?P<colour>.+) है\?",
        "digit_on": r"(?P<a>.+) पर कौन सा अंक है\?",
        "size_of": r"(?P<a>.+) कितना बड़ा है\?",
        "at_place": r"(?P<place>.+) क्या है\?",
        "where": r"(?P<a>.+) कहाँ है\?",
        "left_of": r"क्या (?P<a>\S+ \S+) (?P<b>\S+ \S+) के बाएँ है\?",
        "right_of": r"क्या (?P<a>\S+ \S+) (?P<b>\S+ \S+) के दाएँ है\?",
        "above": r"क्या (?P<a>\S+ \S+) (?P<b>\S+ \S+) के ऊपर है\?",
        "below": r"क्या (?P<a>\S+ \S+) (?P<b>\S+ \S+) के नीचे है\?",
        "count": r"कितन[ेी] (?P<many>.+) हैं\?",
    },
    "ar": {
        "colour_of": r"ما لون (?P<a>.+)؟",
        "colour_of_digit": r"ما لون الشكل ذي الرقم (?P<digit>\d)؟",
        "shape_of": r"أي شكل لونه (?P<colour>.+)؟",
        "digit_on": r"أي رقم على (?P<a>.+)؟",
        "size_of": r"ما حجم (?P<a>.+)؟",
        "at_place": r"ماذا يوجد (?P<place>.+)؟",
        "where": r"أين (?P<a>.+)؟",
        "left_of": r"هل (?P<a>.+) على يسار (?P<b>.+)؟",
        "right_of": r"هل (?P<a>.+) على يمين (?P<b>.+)؟",
        "above": r"هل (?P<a>.+) فوق (?P<b>.+)؟",
        "below": r"هل (?P<a>.+) تحت (?P<b>.+)؟",
        "count": r"كم (?P<many>.+) في الصورة؟",
    },
}

# Every way to spell a colour or a shape in a language, in any gender, number or case -> its English key.
SPELLINGS = {
    "en": """red:red green:green blue:blue yellow:yellow purple:purple orange:orange circle:circle,circles
        square:square,squares triangle:triangle,triangles star:star,stars cross:cross,crosses""",
    "fr": """red:rouge,rouges green:vert,verte,verts blue:bleu,bleue,bleus yellow:jaune,jaunes
        purple:violet,violette,violets orange:orange circle:cercle,cercles square:carré,carrés
        triangle:triangle,triangles star:étoile,étoiles cross:croix""",
    "hi": """red:लाल green:हरा,हरी,हरे blue:नीला,नीली,नीले yellow:पीला,पीली,पीले purple:बैंगनी orange:नारंगी
        circle:वृत्त square:वर्ग triangle:त्रिभुज star:तारा,तारे cross:क्रॉस""",
    "ar": """red:أحمر,حمراء green:أخضر,خضراء blue:أزرق,زرقاء yellow:أصفر,صفراء purple:بنفسجي,بنفسجية,بنفسجيًا
        orange:برتقالي,برتقالية,برتقاليًا circle:دائرة square:مربع,مربعًا triangle:مثلث,مثلثًا star:نجمة
        cross:صليب,صليبًا""",
}
KEYS = {
    language: {form: entry.split(":")[0] for entry in table.split() for form in entry.split(":")[1].split(",")}
    for language, table in SPELLINGS.items()
}


def named(text, language):
    """The colour and the shape that a noun phrase names, as attribute -> English key."""
    stems = (re.sub(r"^(d'|l'|ال)", "", word) for word in text.split())
    keys = [KEYS[language][stem] for stem in stems if stem in KEYS[language]]
    return {"colour" if key in COLOURS else "shape": key for key in keys}


def matching(scene, names):
    return [item for item in scene.items if all(getattr(item, key) == value for key, value in names.items())]


def the_one(scene, names):
    found = matching(scene, names)
    assert names and len(found) == 1, f"{names} must name exactly one object"
    return found[0]


def key_of(word, language, table):
    return next(key for key, value in table[language].items() if value == word)


def solve(scene, question):
    """What the picture says, as English keys; and the given answer, as English keys."""
    language, form, answer = question.language, question.form, question.answer
    pattern = PATTERNS[language]["count" if form.startswith("count") else form]
    parts = re.fullmatch(pattern, question.text).groupdict()
    if form.startswith("count"):
        names = named(parts["many"], language)
        assert set(names) == {"count_shape": {"shape"}, "count_colour": {"colour"}, "count_all": set()}[form]
        return len(matching(scene, names)), int(answer)
    if form == "at_place":
        place = key_of(parts["place"], language, scene_words.PLACES)
        item = next(item for item in scene.items if item.place == place)
        return {"colour": item.colour, "shape": item.shape}, named(answer, language)
    if form == "colour_of_digit":
        found = [item for item in scene.items if str(item.digit) == parts["digit"]]
        assert len(found) == 1
        return {"colour": found[0].colour}, named(answer, language)
    a = the_one(scene, named(parts.get("a") or parts["colour"], language))
    if form == "colour_of":
        return {"colour": a.colour}, named(answer, language)
    if form == "shape_of":
        return {"shape": a.shape}, named(answer, language)
    if form == "digit_on":
        return str(a.digit), answer
    if form == "size_of":
        spelt = {key: set(forms.values()) for key, forms in scene_words.SIZES[language].items()}
        return a.size, next(key for key, forms in spelt.items() if answer in forms)
    if form == "where":
        return a.place, key_of(answer, language, scene_words.PLACES)
    b = the_one(scene, named(parts["b"], language))
    (row_a, column_a), (row_b, column_b) = (divmod(PLACES.index(item.place), 3) for item in (a, b))
    truth = {"left_of": column_a < column_b, "right_of": column_a > column_b, "above": row_a < row_b}
    return truth.get(form, row_a > row_b), {"yes": True, "oui": True, "हाँ": True, "نعم": True}.get(answer, False)


@pytest.mark.parametrize(("kind", "language"), CELLS)
@pytest.mark.parametrize("split", ["train", "held-out"])
def test_answers_agree_with_the_scene(kind, language, split):
    """Reads the question's text as a person would, finds its objects in the scene, and answers it again."""
    forms = set()
    for scene, question in asked(kind, language, 300, split=split):
        truth, answer = solve(scene, question)
        assert truth == answer, (question, scene)
        assert question.answer in question.choices and len(set(question.choices)) == len(question.choices)
        assert (question.kind, question.language) == (kind, language)
        forms.add(question.form)
    expected = {"attribute": 6, "place": 1, "relation": 4, "count": 3}[kind]
    assert len(forms) == expected, forms


@pytest.mark.parametrize("count", [1, 2, 6])
def test_small_scenes_can_be_asked_about(count):
    rng = random.Random(8)
    for scene, language in product(draw(8, 60, count=count), LANGUAGES):
        for kind in KINDS:
            if kind != "relation" or count > 1:
                truth, answer = solve(scene, ask(scene, rng, kind, language))
                assert truth == answer


def test_relations_are_balanced_for_every_relation_and_first_object():
    """Yes and no, half each, within four standard errors: in all, by relation, and by what the text names."""
    groups = defaultdict(Counter)
    for _, question in asked("relation", "en", 8000):
        words = question.text.rstrip("?").split()
        for group in ("all", question.form, words[2], words[3], words[-2], words[-1], words[3] == words[-1]):
            groups[group][question.answer] += 1
    for group, votes in groups.items():
        total = votes.total()
        assert abs(votes["yes"] - total / 2) < 4 * (total / 4) ** 0.5, (group, votes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_guesser_who_never_sees_the_picture_stays_at_chance(kind):
    """He knows the commonest answer to each text from 4,000 questions, and is asked 4,000 new ones."""
    common = defaultdict(Counter)
    for _, question in asked(kind, "en", 4000, seed=1):
        common[question.form, question.text][question.answer] += 1
    right, chance = defaultdict(list), defaultdict(list)
    for _, question in asked(kind, "en", 4000, seed=2):
        votes = common[question.form, question.text]
        guess = votes.most_common(1)[0][0] if votes else question.choices[0]
        right[question.form].append(guess == question.answer)
        chance[question.form].append(1 / len(question.choices))
    for form, hits in right.items():
        assert np.mean(hits) < np.mean(chance[form]) + 0.06, (form, np.mean(hits), np.mean(chance[form]))


# --- Language


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_name_every_object_in_reading_order(language):
    for scene in draw(9, 50):
        parts = re.split(r" ?[;؛] ", scenes.caption(scene, language))
        assert len(parts) == len(scene.items)
        for part, item in zip(parts, scene.items, strict=True):
            assert part.startswith(scene_words.PLACES[language][item.place])
            assert named(part, language) == {"colour": item.colour, "shape": item.shape}
            assert re.findall(r"\d", part) == [str(item.digit)]
            assert set(part.split()) & set(scene_words.SIZES[language][item.size].values())


def test_agreement():
    """One sentence for each rule of agreement."""

    def line(language, *words):
        return scenes.caption(Scene((Item(*words, "top left", 7, 0, 0),), 240), language)

    assert line("fr", "star", "green", "small") == "en haut à gauche : petite étoile verte avec le chiffre 7"
    assert line("fr", "square", "green", "large") == "en haut à gauche : grand carré vert avec le chiffre 7"
    assert line("hi", "star", "blue", "large") == "ऊपर बाएँ: बड़ा नीला तारा अंक 7 के साथ"
    assert line("ar", "circle", "red", "small") == "أعلى اليسار: دائرة صغيرة حمراء برقم 7"
    assert line("ar", "square", "red", "small") == "أعلى اليسار: مربع صغير أحمر برقم 7"
    phrase = scene_words.phrase
    assert phrase("fr", "of", "purple", "cross") == "de la croix violette"
    assert phrase("fr", "of", "blue", "star") == "de l'étoile bleue"
    assert phrase("fr", "many", "orange") == "d'objets orange"
    assert phrase("hi", "of", "yellow", "star") == "पीले तारे"
    assert phrase("hi", "the", "green") == "हरी आकृति"
    assert phrase("ar", "the", "yellow", "star") == "النجمة الصفراء"
    assert phrase("ar", "many", "purple") == "شكلًا بنفسجيًا"
    assert phrase("en", "many", shape="cross") == "crosses"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_writes_its_script(language):
    end = "؟" if language == "ar" else "?"
    rng = random.Random(10)
    texts = [scenes.describe_request(language)] + [scenes.text_only(rng, language)[0] for _ in range(50)]
    for kind in KINDS:
        questions = [question for _, question in asked(kind, language, 50)]
        assert all(q.text.endswith(end) for q in questions)
        texts += [q.text for q in questions]
        texts += [q.answer for q in questions if not q.answer.isdigit()]
    for text in texts:
        assert re.search(SCRIPT[language], text), text
        assert unicodedata.is_normalized("NFC", text), text
        assert "  " not in text and "{" not in text and text == text.strip()
    answers = [q.answer for kind in KINDS for _, q in asked(kind, language, 50)]
    assert all(answer == answer.lower() and not answer.endswith(".") for answer in answers)


@pytest.mark.parametrize("language", LANGUAGES)
def test_text_only_questions_have_one_answer(language):
    rng = random.Random(11)
    answers = defaultdict(set)
    for _ in range(3000):
        question, answer = scenes.text_only(rng, language)
        answers[question].add(answer)
    assert all(len(found) == 1 for found in answers.values())


def test_glossary_answers_are_two_sentences():
    assert 12 <= len(scenes.GLOSSARY) <= 16
    for question, answer in scenes.GLOSSARY:
        assert question.endswith((".", "?")) and answer.isascii()
        assert len(re.findall(r"\.(?= |$)", answer)) == 2, answer


def test_words_cover_every_text():
    """No character and no word of later questions is new to the tokenizer."""
    text = "\n".join(scenes.words())
    assert list(scenes.words(20)) == list(scenes.words(20))
    known, characters = set(text.split()), set(text)
    for kind, language in CELLS:
        for scene, question in asked(kind, language, 40, seed=3, split="held-out"):
            assert set(question.text.split()) | set(question.answer.split()) <= known
            assert set(scenes.caption(scene, language)) <= characters
    assert all(part in text for pair in scenes.GLOSSARY for part in pair)
