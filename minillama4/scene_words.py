"""The words of `scenes.py` in four languages, as data: nouns, adjectives, sentence patterns, a glossary.

Patterns are chosen so that agreement stays small and right. Three choices do most of it: a colour or size that is asked
for agrees with the word "colour" or "size" in the question, not with the shape (French "la couleur ... vert", Hindi
"रंग ... हरा", Arabic "لون ... أخضر"); all Hindi shapes are masculine; yes/no questions in French use "est-ce que".

A noun has four cases: `bare` (red circle), `the` (the red circle), `of` (of the red circle; Hindi: the oblique form, as
before every postposition) and `many` (what follows "how many"; Arabic: accusative singular). An adjective lists its
form by gender, and by case and gender where the case changes it. All text is NFC; French uses plain spaces.
"""

import random
from typing import NamedTuple

LANGUAGES = ("en", "fr", "hi", "ar")


class Noun(NamedTuple):
    gender: str  # "m" or "f"
    bare: str
    the: str
    of: str
    many: str


# "object" stands for any shape, where only the colour or the digit is named.
NOUNS = {
    "en": {
        "circle": Noun("m", "circle", "circle", "circle", "circles"),
        "square": Noun("m", "square", "square", "square", "squares"),
        "triangle": Noun("m", "triangle", "triangle", "triangle", "triangles"),
        "star": Noun("m", "star", "star", "star", "stars"),
        "cross": Noun("m", "cross", "cross", "cross", "crosses"),
        "object": Noun("m", "object", "object", "object", "objects"),
    },
    "fr": {
        "circle": Noun("m", "cercle", "le cercle", "du cercle", "de cercles"),
        "square": Noun("m", "carré", "le carré", "du carré", "de carrés"),
        "triangle": Noun("m", "triangle", "le triangle", "du triangle", "de triangles"),
        "star": Noun("f", "étoile", "l'étoile", "de l'étoile", "d'étoiles"),
        "cross": Noun("f", "croix", "la croix", "de la croix", "de croix"),
        "object": Noun("m", "objet", "l'objet", "de l'objet", "d'objets"),
    },
    "hi": {
        "circle": Noun("m", "वृत्त", "वृत्त", "वृत्त", "वृत्त"),
        "square": Noun("m", "वर्ग", "वर्ग", "वर्ग", "वर्ग"),
        "triangle": Noun("m", "त्रिभुज", "त्रिभुज", "त्रिभुज", "त्रिभुज"),
        "star": Noun("m", "तारा", "तारा", "तारे", "तारे"),
        "cross": Noun("m", "क्रॉस", "क्रॉस", "क्रॉस", "क्रॉस"),
        "object": Noun("f", "आकृति", "आकृति", "आकृति", "आकृतियाँ"),
    },
    "ar": {
        "circle": Noun("f", "دائرة", "الدائرة", "الدائرة", "دائرة"),
        "square": Noun("m", "مربع", "المربع", "المربع", "مربعًا"),
        "triangle": Noun("m", "مثلث", "المثلث", "المثلث", "مثلثًا"),
        "star": Noun("f", "نجمة", "النجمة", "النجمة", "نجمة"),
        "cross": Noun("m", "صليب", "الصليب", "الصليب", "صليبًا"),
        "object": Noun("m", "شكل", "الشكل", "الشكل", "شكلًا"),
    },
}


def _table(header: str, rows: str) -> dict[str, dict[str, str]]:
    """Rows `key form form ...` under column names such as `m f of_m`; a column `of_m` is the masculine of case `of`."""
    return {
        key: dict(zip(header.split(), forms, strict=True)) for key, *forms in map(str.split, rows.strip().splitlines())
    }


COLOURS = {
    "en": {colour: {"m": colour, "f": colour} for colour in ("red", "green", "blue", "yellow", "purple", "orange")},
    "fr": _table(
        "m f many_m",
        """
        red     rouge   rouge     rouges
        green   vert    verte     verts
        blue    bleu    bleue     bleus
        yellow  jaune   jaune     jaunes
        purple  violet  violette  violets
        orange  orange  orange    orange""",
    ),
    "hi": _table(
        "m f of_m",
        """
        red     लाल     लाल     लाल
        green   हरा     हरी     हरे
        blue    नीला    नीली    नीले
        yellow  पीला    पीली    पीले
        purple  बैंगनी   बैंगनी   बैंगनी
        orange  नारंगी   नारंगी   नारंगी""",
    ),
    "ar": _table(
        "m f the_m the_f of_m of_f many_m",
        """
        red     أحمر     حمراء     الأحمر     الحمراء     الأحمر     الحمراء     أحمر
        green   أخضر     خضراء     الأخضر     الخضراء     الأخضر     الخضراء     أخضر
        blue    أزرق     زرقاء     الأزرق     الزرقاء     الأزرق     الزرقاء     أزرق
        yellow  أصفر     صفراء     الأصفر     الصفراء     الأصفر     الصفراء     أصفر
        purple  بنفسجي   بنفسجية   البنفسجي   البنفسجية   البنفسجي   البنفسجية   بنفسجيًا
        orange  برتقالي  برتقالية  البرتقالي  البرتقالية  البرتقالي  البرتقالية  برتقاليًا""",
    ),
}

SIZES = {
    "en": {"small": {"m": "small", "f": "small"}, "large": {"m": "large", "f": "large"}},
    "fr": {"small": {"m": "petit", "f": "petite"}, "large": {"m": "grand", "f": "grande"}},
    "hi": {"small": {"m": "छोटा", "f": "छोटी"}, "large": {"m": "बड़ा", "f": "बड़ी"}},
    "ar": {"small": {"m": "صغير", "f": "صغيرة"}, "large": {"m": "كبير", "f": "كبيرة"}},
}
SIZE_GENDER = {"en": "m", "fr": "f", "hi": "m", "ar": "m"}  # French answers agree with "la taille"

_PLACES = """
top left      | en haut à gauche  | ऊपर बाएँ    | أعلى اليسار
top middle    | en haut au milieu | ऊपर बीच में  | أعلى الوسط
top right     | en haut à droite  | ऊपर दाएँ    | أعلى اليمين
bottom left   | en bas à gauche   | नीचे बाएँ    | أسفل اليسار
bottom middle | en bas au milieu  | नीचे बीच में  | أسفل الوسط
bottom right  | en bas à droite   | नीचे दाएँ    | أسفل اليمين"""
PLACES = {language: {} for language in LANGUAGES}  # English key -> the place in that language
for _line in _PLACES.strip().splitlines():
    for _language, _place in zip(LANGUAGES, _line.split("|"), strict=True):
        PLACES[_language][_line.split("|")[0].strip()] = _place.strip()

YES_NO = {"en": ("yes", "no"), "fr": ("oui", "non"), "hi": ("हाँ", "नहीं"), "ar": ("نعم", "لا")}

# Noun phrases. French and Arabic nouns carry their article; the English one stands before the colour.
PHRASES = {
    "en": dict.fromkeys(("bare", "many"), "{colour} {noun}") | dict.fromkeys(("the", "of"), "the {colour} {noun}"),
    "fr": dict.fromkeys(("bare", "the", "of", "many"), "{noun} {colour}"),
    "hi": dict.fromkeys(("bare", "the", "of", "many"), "{colour} {noun}"),
    "ar": dict.fromkeys(("bare", "the", "of", "many"), "{noun} {colour}"),
}

# {the}, {of}, {many}: the noun phrase in that case; {m}, {f}: the bare colour in that gender.
QUESTIONS = {
    "en": {
        "colour_of": "What colour is {the}?",
        "colour_of_digit": "What colour is the object with the digit {digit}?",
        "shape_of": "Which shape is {m}?",
        "digit_on": "Which digit is on {the}?",
        "size_of": "How big is {the}?",
        "at_place": "What is at the {place}?",
        "where": "Where is {the}?",
        "left of": "Is {the} left of {of}?",
        "right of": "Is {the} right of {of}?",
        "above": "Is {the} above {of}?",
        "below": "Is {the} below {of}?",
        "count_shape": "How many {many} are there?",
        "count_object": "How many {many} are there?",
    },
    "fr": {
        "colour_of": "Quelle est la couleur {of} ?",
        "colour_of_digit": "Quelle est la couleur de l'objet avec le chiffre {digit} ?",
        "shape_of": "Quelle forme est {f} ?",
        "digit_on": "Quel chiffre est sur {the} ?",
        "size_of": "Quelle est la taille {of} ?",
        "at_place": "Qu'y a-t-il {place} ?",
        "where": "Où est {the} ?",
        "left of": "Est-ce que {the} est à gauche {of} ?",
        "right of": "Est-ce que {the} est à droite {of} ?",
        "above": "Est-ce que {the} est au-dessus {of} ?",
        "below": "Est-ce que {the} est au-dessous {of} ?",
        "count_shape": "Combien {many} y a-t-il ?",
        "count_object": "Combien {many} y a-t-il ?",
    },
    "hi": {
        "colour_of": "{of} का रंग क्या है?",
        "colour_of_digit": "अंक {digit} वाली आकृति का रंग क्या है?",
        "shape_of": "कौन सी आकृति {f} है?",
        "digit_on": "{of} पर कौन सा अंक है?",
        "size_of": "{the} कितना बड़ा है?",
        "at_place": "{place} क्या है?",
        "where": "{the} कहाँ है?",
        "left of": "क्या {the} {of} के बाएँ है?",
        "right of": "क्या {the} {of} के दाएँ है?",
        "above": "क्या {the} {of} के ऊपर है?",
        "below": "क्या {the} {of} के नीचे है?",
        "count_shape": "कितने {many} हैं?",
        "count_object": "कितनी {many} हैं?",
    },
    "ar": {
        "colour_of": "ما لون {of}؟",
        "colour_of_digit": "ما لون الشكل ذي الرقم {digit}؟",
        "shape_of": "أي شكل لونه {m}؟",
        "digit_on": "أي رقم على {of}؟",
        "size_of": "ما حجم {of}؟",
        "at_place": "ماذا يوجد {place}؟",
        "where": "أين {the}؟",
        "left of": "هل {the} على يسار {of}؟",
        "right of": "هل {the} على يمين {of}؟",
        "above": "هل {the} فوق {of}؟",
        "below": "هل {the} تحت {of}؟",
        "count_shape": "كم {many} في الصورة؟",
        "count_object": "كم {many} في الصورة؟",
    },
}

CAPTION_ITEM = {
    "en": "{place}: {size} {colour} {shape} with the digit {digit}",
    "fr": "{place} : {size} {shape} {colour} avec le chiffre {digit}",
    "hi": "{place}: {size} {colour} {shape} अंक {digit} के साथ",
    "ar": "{place}: {shape} {size} {colour} برقم {digit}",
}
CAPTION_JOIN = {"en": "; ", "fr": " ; ", "hi": "; ", "ar": "؛ "}
DESCRIBE = {"en": "Describe the picture.", "fr": "Décris l'image.", "hi": "चित्र का वर्णन कीजिए।", "ar": "صف الصورة."}
INVENTORY = {
    "en": "List the objects.",
    "fr": "Fais la liste des objets.",
    "hi": "आकृतियों की सूची दीजिए।",
    "ar": "اذكر الأشكال.",
}
TALLY = {"en": "Count everything.", "fr": "Compte tout.", "hi": "सब कुछ गिनिए।", "ar": "عد كل شيء."}
EXAM = {
    "en": "Answer the questions.",
    "fr": "Réponds aux questions.",
    "hi": "प्रश्नों के उत्तर दीजिए।",
    "ar": "أجب عن الأسئلة.",
}

# Text-only questions.
LANGUAGE_NAMES = {
    "en": {"en": "English", "fr": "French", "hi": "Hindi", "ar": "Arabic"},
    "fr": {"en": "anglais", "fr": "français", "hi": "hindi", "ar": "arabe"},
    "hi": {"en": "अंग्रेज़ी", "fr": "फ़्रेंच", "hi": "हिंदी", "ar": "अरबी"},
    "ar": {"en": "بالإنجليزية", "fr": "بالفرنسية", "hi": "بالهندية", "ar": "بالعربية"},
}
TEXT_QUESTIONS = {
    "en": {
        "say": 'What is "{word}" in {language}?',
        "mean": 'What does "{word}" mean?',
        "after": "Which number comes after {number}?",
        "before": "Which number comes before {number}?",
        "opposite": 'What is the opposite of "{word}"?',
    },
    "fr": {
        "say": "Comment dit-on « {word} » en {language} ?",
        "mean": "Que veut dire « {word} » ?",
        "after": "Quel nombre vient après {number} ?",
        "before": "Quel nombre vient avant {number} ?",
        "opposite": "Quel est le contraire de « {word} » ?",
    },
    "hi": {
        "say": '{language} में "{word}" को क्या कहते हैं?',
        "mean": '"{word}" का मतलब क्या है?',
        "after": "{number} के बाद कौन सी संख्या है?",
        "before": "{number} से पहले कौन सी संख्या है?",
        "opposite": '"{word}" का उल्टा क्या है?',
    },
    "ar": {
        "say": "كيف نقول «{word}» {language}؟",
        "mean": "ما معنى «{word}»؟",
        "after": "ما العدد بعد {number}؟",
        "before": "ما العدد قبل {number}؟",
        "opposite": "ما عكس «{word}»؟",
    },
}
OPPOSITES = {
    "en": (("small", "large"), ("left", "right"), ("top", "bottom"), ("yes", "no")),
    "fr": (("petit", "grand"), ("gauche", "droite"), ("haut", "bas"), ("oui", "non")),
    "hi": (("छोटा", "बड़ा"), ("बाएँ", "दाएँ"), ("ऊपर", "नीचे"), ("हाँ", "नहीं")),
    "ar": (("صغير", "كبير"), ("يسار", "يمين"), ("أعلى", "أسفل"), ("نعم", "لا")),
}

# Two sentences each, as Meta announced (April 2025) and as the released configs and code have it.
_GLOSSARY = """
Explain MoE routing in two sentences.
A router scores all experts for each token, and the token goes to the best one.
The sigmoid of its score scales the input of that expert.

Explain the shared expert in two sentences.
Every token passes through the shared expert, whatever the router says.
Its output is added to that of the routed expert.

Explain early fusion in two sentences.
Image patches become vectors and stand in one sequence with the text tokens.
The same decoder reads both from its first layer on.

Explain iRoPE in two sentences.
Three of four layers use rotary positions and look only inside a chunk.
Every fourth layer has no positions and looks at the whole context.

Explain NoPE in two sentences.
A NoPE layer gives no position to its queries and keys.
It learns the order from the causal mask and from the layers before it.

Explain chunked attention in two sentences.
The sequence is cut into chunks of equal length.
A token looks only at itself and at earlier tokens of its own chunk.

Explain QK norm in two sentences.
Queries and keys are divided by their root mean square after the rotary turn.
Scout does so on its rotary layers, without a learned weight.

Explain temperature tuning in two sentences.
On NoPE layers the query grows with the logarithm of its position.
This keeps attention sharp when the context is long.

Explain the KV cache in two sentences.
The keys and values of past tokens are kept in memory.
So each new token costs one step instead of a pass over the whole text.

Explain distillation in two sentences.
A student model learns to match the probabilities of a larger teacher.
Meta used Behemoth as the teacher of Maverick.

What is Scout? Answer in two sentences.
Scout is a Llama 4 model with 16 experts and 109 billion parameters.
Each token uses 17 billion of them.

What is Maverick? Answer in two sentences.
Maverick is a Llama 4 model with 128 experts and 400 billion parameters.
Each token uses 17 billion of them.

What is Behemoth? Answer in two sentences.
Behemoth is the teacher model of Llama 4, with about two trillion parameters.
Each token uses 288 billion of them.

What is a tile? Answer in two sentences.
A tile is a square part of a picture that the vision encoder sees at once.
A large picture becomes several tiles and one small view of the whole.

Explain pixel shuffle in two sentences.
Four neighbouring patches are joined into one longer vector.
So a picture takes four times fewer tokens."""
GLOSSARY = tuple(
    (question, " ".join(answer)) for question, *answer in map(str.splitlines, _GLOSSARY.strip().split("\n\n"))
)


def adjective(forms: dict[str, str], gender: str, case: str = "bare") -> str:
    return forms.get(f"{case}_{gender}", forms[gender])


def phrase(language: str, case: str, colour: str | None = None, shape: str | None = None) -> str:
    """In that case and language: "the red circle", or "the circle" without a colour, or "the red object"."""
    noun = NOUNS[language][shape or "object"]
    colour = adjective(COLOURS[language][colour], noun.gender, case) if colour else ""
    return PHRASES[language][case].format(noun=getattr(noun, case), colour=colour).replace("  ", " ").strip()


def text_only(rng: random.Random, language: str) -> tuple[str, str]:
    """A question without a picture, and its answer: a word in another language, a neighbouring number, an opposite."""
    patterns = TEXT_QUESTIONS[language]
    form = rng.choice(("say", "mean", "number", "opposite"))
    if form == "number":
        form, number = rng.choice((("after", rng.randint(0, 9)), ("before", rng.randint(1, 10))))
        return patterns[form].format(number=number), str(number + 1 if form == "after" else number - 1)
    if form == "opposite":
        word, answer = rng.sample(rng.choice(OPPOSITES[language]), 2)
        return patterns[form].format(word=word), answer
    other = rng.choice([code for code in LANGUAGES if code != language])
    here, there = lexicon(language), lexicon(other)
    key = rng.choice([key for key in here if here[key] != there[key]])  # not "orange", the same word in French
    if form == "say":
        return patterns[form].format(word=here[key], language=LANGUAGE_NAMES[language][other]), there[key]
    return patterns[form].format(word=there[key]), here[key]


def lexicon(language: str) -> dict[str, str]:
    """English key -> the word as a dictionary lists it: shapes, colours, sizes, places."""
    nouns = {key: noun.bare for key, noun in NOUNS[language].items() if key != "object"}
    adjectives = {key: forms["m"] for key, forms in (COLOURS[language] | SIZES[language]).items()}
    return nouns | adjectives | PLACES[language]
