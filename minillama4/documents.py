"""From scenes to training documents: a picture, questions about it, a caption, as one conversation of token ids.

Three sorts of target make one picture teach more than its one answer would. The assistant's words, as usual. Tables:
an inventory names each object and says what can be found by that name, a tally counts every shape and colour, an exam
is ten questions and answers in one breath. And labels: where an object lies, the picture's vector is to resemble the
embeddings of that object's words, in the document's language. A question about "le cercle rouge" then finds in the
picture what it holds itself; without labels, attention has to discover by chance that it could look there at all.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from . import scenes
from .config import Llama4Config
from .fusion import cut_tiles, image_prompt
from .tokenizer import Tokenizer

# How training is mixed: (from this share of the horizon on, share of batches by sort). First mostly what is dense; then
# mostly what is hard, and conversations like those that `ask` will meet. Every batch is of one sort, so little of it is
# padding.
PHASES = (
    (0.0, {"inventory": 0.30, "tally": 0.08, "exam": 0.20, "caption": 0.20, "questions": 0.14, "two pictures": 0.03,
           "text": 0.05}),
    (0.35, {"counts": 0.23, "relations": 0.12, "exam": 0.20, "inventory": 0.09, "caption": 0.03, "questions": 0.24,
            "two pictures": 0.02, "text": 0.07}),
    (0.6, {"counts": 0.15, "relations": 0.08, "attributes": 0.19, "exam": 0.16, "inventory": 0.04, "caption": 0.05,
           "questions": 0.26, "two pictures": 0.01, "text": 0.06}),
)  # fmt: skip
EXAMS = {"exam": None, "attributes": "attribute", "counts": "count", "relations": "relation"}  # ten questions each
SORTS = tuple(sorted({sort for _, mix in PHASES for sort in mix}))


@dataclass
class Document:
    ids: list[int]
    weight: list[float]  # of each id as a target; 0 on the user's words
    pictures: list[scenes.Scene] = field(default_factory=list)
    labels: list[tuple[int, int]] = field(default_factory=list)  # (a picture vector, a word it should resemble)


@dataclass
class Batch:
    ids: Tensor  # [documents, longest] int64
    targets: Tensor  # [documents, longest]: what follows token t of document i
    weights: Tensor  # [documents, longest]: how much that counts
    labels: Tensor  # [labels, 2]: which of the batch's picture vectors, a word that it should resemble
    points: Tensor  # [points, 2]: document, position of a word that some object of the picture has
    pointed: Tensor  # [points, longest] bool: the patch tokens that lie on those objects
    pixels: Tensor | None  # [tiles, 3, side, side]


class Writer:
    """Writes conversations about scenes with one tokenizer, in the chat format of the released models."""

    def __init__(self, config: Llama4Config, tokenizer: Tokenizer):
        self.vision, self.tokenizer, self.config = config.vision, tokenizer, config
        self.stop = tokenizer.token_id("<|eot|>")
        self.picture_ids = self._picture_ids()
        self.patch_offsets = [i for i, token in enumerate(self.picture_ids) if token == config.patch_token]

    def _picture_ids(self) -> list[int]:
        _, grid = cut_tiles(scenes.render(scenes.draw_scene(Random(0))), self.vision)  # all scenes have one size
        return [self.tokenizer.token_id(name) for name in image_prompt(*grid, self.vision.tokens_per_tile)]

    def start(self) -> Document:
        return Document([self.config.bos_token], [0.0])

    def user(self, document: Document, text: str, picture: scenes.Scene | None = None):
        content = self.tokenizer.encode(text)
        if picture is not None:
            document.pictures.append(picture)
            content = self.picture_ids + content
        self._turn(document, "user", content, weight=0.0)

    def label(self, document: Document, language: str):
        """Give the last picture's vectors that lie on an object the words for its colour, shape, size and digit."""
        first = len(self.patch_offsets) * (len(document.pictures) - 1)
        for item in document.pictures[-1].items:
            name = scenes.phrase(language, "bare", item.colour, item.shape)
            size = scenes.size_word(language, item.size)
            words = self.tokenizer.encode(f" {name} {size}")
            words.append(self.tokenizer.encode(str(item.digit))[0])
            for patch in self._patches_on(item):
                document.labels += [(first + patch, word) for word in words]

    def _patches_on(self, item: scenes.Item) -> list[int]:
        """Which patch tokens of the picture show the item's middle: in its tile, and in the global one (last)."""
        per_side = round(self.vision.tokens_per_tile**0.5)
        cell, tiles = self.vision.tile_size / per_side, scenes.WIDTH // self.vision.tile_size
        x, y = item.centre
        column, x_inside = divmod(x, self.vision.tile_size)
        patches = []
        for tile, x_tile in ((column, x_inside), (tiles, x / tiles)):
            patches.append(tile * self.vision.tokens_per_tile + int(y // cell) * per_side + int(x_tile // cell))
        return patches

    def assistant(self, document: Document, text: str, weight: float = 1.0):
        self._turn(document, "assistant", self.tokenizer.encode(text), weight)

    def table(self, document: Document, rows: list[tuple[str, list[str]]]):
        """An assistant's turn of (key, values), one a line, of which only the values are to be learned."""
        content, weight = [], []
        for key, values in rows:
            for text, learn in [(key, 0.0), *((value, 1.0) for value in values)]:
                ids = self.tokenizer.encode(text)
                content += ids + self.tokenizer.encode("\n")
                weight += [learn] * len(ids) + [0.0]
        self._turn(document, "assistant", content, 0.0)
        document.weight[-1 - len(content) : -1] = weight

    def _turn(self, document: Document, role: str, content: list[int], weight: float):
        header = self.tokenizer.encode_header(role)
        document.ids += [*header, *content, self.stop]
        document.weight += [0.0] * len(header) + [weight] * (len(content) + 1)

    def question(self, picture: scenes.Scene, question: scenes.Question) -> Document:
        """One picture, one question, its answer: what `ask` meets and what the scores are taken on."""
        document = self.start()
        self.user(document, question.text, picture)
        self.assistant(document, question.answer)
        return document

    def tiles(self, picture: scenes.Scene) -> Tensor:
        """[tiles, 3, side, side]."""
        return cut_tiles(scenes.render(picture), self.vision)[0]

    def batch(self, documents: list[Document]) -> "Batch":
        """Documents side by side, the shorter ones padded at the end."""
        longest = max(len(d.ids) for d in documents)
        ids = torch.full((len(documents), longest), self.config.pad_token)
        targets, weights = ids.clone(), torch.zeros(len(documents), longest)
        for row, d in enumerate(documents):
            ids[row, : len(d.ids)] = torch.tensor(d.ids)
            targets[row, : len(d.ids) - 1] = torch.tensor(d.ids[1:])
            weights[row, : len(d.ids) - 1] = torch.tensor(d.weight[1:])
        pictures = [picture for d in documents for picture in d.pictures]
        labels, first = [], 0
        for d in documents:
            labels += [(first + vector, word) for vector, word in d.labels]
            first += len(self.patch_offsets) * len(d.pictures)
        points, pointed = self._points(documents, longest)
        return Batch(
            ids, targets, weights, torch.tensor(labels).view(-1, 2), points, pointed,
            torch.cat([self.tiles(p) for p in pictures]) if pictures else None,
        )  # fmt: skip

    def _points(self, documents: list[Document], longest: int) -> tuple[Tensor, Tensor]:
        """(points, pointed) of a `Batch`: "red" points at the patches that are labelled "red"."""
        points, pointed = [], []
        for row, d in enumerate(documents):
            patches = [i for i, token in enumerate(d.ids) if token == self.config.patch_token]
            where = defaultdict(list)
            for vector, word in d.labels:
                where[word].append(patches[vector])
            for position, token in enumerate(d.ids):
                seen = [patch for patch in where.get(token, ()) if patch < position]
                if seen:
                    points.append((row, position))
                    pointed.append(seen)
        mask = torch.zeros(len(points), longest, dtype=torch.bool)
        for row, seen in enumerate(pointed):
            mask[row, seen] = True
        return torch.tensor(points).view(-1, 2), mask

    def training_document(self, rng: Random, sort: str, most_objects: int) -> Document:
        """A random document of one of the sorts above, about scenes of the training split.

        most_objects: in a scene.
        """
        language = rng.choice(scenes.LANGUAGES)
        document = self.start()
        if sort == "text":
            for _ in range(2):
                if language == "en" and rng.random() < 0.5:
                    question, answer = rng.choice(scenes.GLOSSARY)
                else:
                    question, answer = scenes.text_only(rng, language)
                self.user(document, question)
                self.assistant(document, answer)
            return document
        for _ in range(2 if sort == "two pictures" else 1):
            picture = scenes.draw_scene(rng, "train", _count(rng, most_objects))
            if sort == "caption":
                self.user(document, scenes.describe_request(language), picture)
                self.label(document, language)
                self.assistant(document, scenes.caption(picture, language))
                continue
            if sort in EXAMS:
                self.user(document, scenes.request("exam", language), picture)
                self.label(document, language)
                asked = [scenes.ask(picture, rng, EXAMS[sort] or _kind(rng, picture), language) for _ in range(10)]
                self.table(document, [(question.text, [question.answer]) for question in asked])
                continue
            if sort in ("inventory", "tally"):
                self.user(document, scenes.request(sort, language), picture)
                self.label(document, language)
                self.table(document, getattr(scenes, sort)(picture, rng, language))
                continue
            for turn in range(2 if sort == "two pictures" else 4):
                question = scenes.ask(picture, rng, _kind(rng, picture), language)
                self.user(document, question.text, picture if turn == 0 else None)
                if turn == 0:
                    self.label(document, language)
                self.assistant(document, question.answer)
        return document


def _count(rng: Random, most: int) -> int:
    """Objects in a scene: three to six, or fewer while the curriculum is still below that."""
    return rng.randint(min(3, most), most)


def _kind(rng: Random, picture: scenes.Scene) -> str:
    kinds = scenes.KINDS if len(picture.items) >= 3 else ("attribute", "place", "count")
    return rng.choice(kinds)
