"""From scenes to training documents: a picture, questions about it, a caption, as one conversation of token ids.

Three sorts of target make one picture teach more than its one answer would. The assistant's words, as usual. Captions,
which name every object. And labels: where an object lies, the patch token is to predict one of its words (its colour,
shape, size or digit). Without labels nothing points at a place in the picture until attention has found it by chance,
and training stands still for thousands of steps. Nothing reads what a patch token predicts once training is over.
"""

from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor

from . import scenes
from .config import Llama4Config
from .fusion import cut_tiles, image_prompt
from .tokenizer import Tokenizer

# How the training set is mixed, by share of batches. Every batch is of one sort, so little of it is padding.
SORTS = {"questions": 0.45, "caption": 0.40, "two pictures": 0.07, "text": 0.08}

LABEL_WEIGHT = 0.5  # of a patch token's label, where a word of the assistant's has 1


@dataclass
class Document:
    ids: list[int]
    weight: list[float]  # of each id as a target; 0 on the user's words
    pictures: list[scenes.Scene] = field(default_factory=list)
    labels: dict[int, int] = field(default_factory=dict)  # position of a patch token -> what it should predict


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

    def label(self, document: Document, picture: scenes.Scene, rng: Random):
        """Give the patch tokens of the document's last picture that lie on an object a word to predict.

        The word is English: a patch cannot know which language the question after it will have.
        """
        first = len(document.ids) - 1 - document.ids[::-1].index(self.picture_ids[0])  # of <|image_start|>
        for item in picture.items:
            for patch in self._patches_on(item):
                word = rng.choice((item.colour, item.shape, item.size, str(item.digit)))
                document.labels[first + self.patch_offsets[patch]] = self.tokenizer.encode(" " + word)[-1]

    def _patches_on(self, item: scenes.Item) -> list[int]:
        """Which patch tokens of the picture show the item's middle: in its tile, and in the global one, which is last."""
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

    def batch(self, documents: list[Document]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """ids, targets, weights, pictures: three [documents, longest], and tiles [tiles, 3, side, side] or None.

        targets[i, t] is what is to be predicted after token t of document i, with a weight of weights[i, t].
        """
        longest = max(len(d.ids) for d in documents)
        ids = torch.full((len(documents), longest), self.config.pad_token)
        targets, weights = ids.clone(), torch.zeros(len(documents), longest)
        for row, d in enumerate(documents):
            ids[row, : len(d.ids)] = torch.tensor(d.ids)
            targets[row, : len(d.ids) - 1] = torch.tensor(d.ids[1:])
            weights[row, : len(d.ids) - 1] = torch.tensor(d.weight[1:])
            for position, label in d.labels.items():
                targets[row, position], weights[row, position] = label, LABEL_WEIGHT
        pictures = [picture for d in documents for picture in d.pictures]
        return ids, targets, weights, torch.cat([self.tiles(p) for p in pictures]) if pictures else None

    def training_document(self, rng: Random, sort: str, most_objects: int) -> Document:
        """A random document of one of `SORTS`, about scenes of the training split with at most `most_objects`."""
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
                self.label(document, picture, rng)
                self.assistant(document, scenes.caption(picture, language))
                continue
            for turn in range(2 if sort == "two pictures" else 4):
                question = scenes.ask(picture, rng, _kind(rng, picture), language)
                self.user(document, question.text, picture if turn == 0 else None)
                if turn == 0:
                    self.label(document, picture, rng)
                self.assistant(document, question.answer)
        return document


def _count(rng: Random, most: int) -> int:
    """Objects in a scene: three to six, or fewer while the curriculum is still below that."""
    return rng.randint(min(3, most), most)


def _kind(rng: Random, picture: scenes.Scene) -> str:
    kinds = scenes.KINDS if len(picture.items) >= 3 else ("attribute", "place", "count")
    return rng.choice(kinds)
