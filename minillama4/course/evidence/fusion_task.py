"""The task of lesson 01's study: small scenes as pictures or told in words, and questions about them in two languages.

A document is a scene and a few questions about it, answered in one breath (an exam of `documents.py`). As a picture,
the scene comes as image tokens; as text, its caption stands there instead, so that a language model without eyes can
learn to answer the same questions. Digits are not asked for: reading them takes longer to learn than a run has.
"""

from collections import Counter, defaultdict
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import scenes
from ...config import Llama4Config, TextConfig, VisionConfig
from ...documents import Batch, Document, Writer
from ...evaluate import Item
from ...model import Llama4
from ...tokenizer import load_tokenizer
from ...train import label_loss

LANGUAGES = ("en", "hi")
KINDS = ("attribute", "place", "count")
LEFT_OUT = ("digit_on", "colour_of_digit", "at_place")  # forms of "attribute": digits, and an answer of many words
MOST = 2  # objects in a scene that is asked about
CROWD = 6  # objects in a scene of which only labels are learned: the more objects, the more labels
QUESTIONS = 4  # in a training document
TILES = 4  # of each picture: three, and the global view

TEXT = TextConfig(
    vocab_size=1024, hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, num_experts=0,
    expert_width=0, dense_width=192, moe_layers=(), nope_layers=(1, 3), chunk_size=None, max_positions=512,
    rope_theta=10_000.0, temperature_tuning=False,
)  # fmt: skip
EYES = {  # both cut patches of 12 pixels; the ViT's pixel shuffle then makes one token of four
    "linear": VisionConfig(tile_size=48, patch_size=12, max_tiles=3, encoder="linear"),
    "vit": VisionConfig(
        tile_size=48, patch_size=12, max_tiles=3, hidden_size=64, num_layers=2, num_heads=4, mlp_width=256,
        adapter_width=128,
    ),
}  # fmt: skip
TOKENS = {"bos_token": 1000, "stop_tokens": (1001, 1007, 1008), "pad_token": 1018, "patch_token": 1015}  # mini-scout's


def config(eye: str) -> Llama4Config:
    return Llama4Config(TEXT, EYES[eye], **TOKENS)


class Exams:
    """Writes the study's documents for models with one kind of eye: "linear" or "vit"."""

    def __init__(self, eye: str):
        self.writer = Writer(config(eye), load_tokenizer("mini-scout"))
        self.digits = {self.writer.tokenizer.encode(str(digit))[0] for digit in scenes.DIGITS}

    def document(self, scene: scenes.Scene, language: str, asked: list[scenes.Question], as_text: bool) -> Document:
        document, request = self.writer.start(), scenes.request("exam", language)
        if as_text:
            self.writer.user(document, f"{scenes.caption(scene, language)}. {request}")
        else:
            self.writer.user(document, request, scene)
            self.writer.label(document, language)
            document.labels = [(vector, word) for vector, word in document.labels if word not in self.digits]
        self.writer.table(document, [(question.text, [question.answer]) for question in asked])
        return document

    def batch(self, rng: Random, size: int, sort: str) -> Batch:
        """Documents to learn from, of training scenes. sort: "pictures", "text" or "labels" (no questions)."""
        documents = []
        for _ in range(size):
            count = CROWD if sort == "labels" else rng.randint(1, MOST)
            scene, language = scenes.draw_scene(rng, "train", count), rng.choice(LANGUAGES)
            questions = 0 if sort == "labels" else QUESTIONS
            asked = [ask(scene, rng, rng.choice(KINDS), language) for _ in range(questions)]
            documents.append(self.document(scene, language, asked, sort == "text"))
        return self.writer.batch(documents)

    def test_batch(self, items: list[Item], as_text: bool) -> Batch:
        """One question a document: questions before it would tell of the scene."""
        documents = [self.document(i.picture, i.question.language, [i.question], as_text) for i in items]
        return self.writer.batch(documents)


def ask(scene: scenes.Scene, rng: Random, kind: str, language: str) -> scenes.Question:
    """A question that neither asks for a digit nor names one."""
    while True:
        question = scenes.ask(scene, rng, kind, language)
        if question.form not in LEFT_OUT:
            return question


def held_out(per_cell: int, name: str) -> list[Item]:
    """`per_cell` questions for each kind and language, each about its own held-out scene; drawn from the name alone."""
    rng, items = Random(f"fusion {name}"), []
    for kind in KINDS:
        for language in LANGUAGES:
            for _ in range(per_cell):
                scene = scenes.draw_scene(rng, "held-out", rng.randint(1, MOST))
                items.append(Item(scene, ask(scene, rng, kind, language)))
    return items


def held_out_labels(exams: Exams, pictures: int) -> Batch:
    rng, documents = Random("fusion labels"), []
    for _ in range(pictures):
        scene = scenes.draw_scene(rng, "held-out", CROWD)
        documents.append(exams.document(scene, rng.choice(LANGUAGES), [], as_text=False))
    return exams.writer.batch(documents)


def guessed(items: list[Item], samples: int = 6000) -> dict[str, float]:
    """Accuracy, as in `examine`, of who reads the question only and says what was commonest in training after it."""
    rng, seen = Random("fusion guess"), defaultdict(Counter)
    for _ in range(samples):
        scene = scenes.draw_scene(rng, "train", rng.randint(1, MOST))
        question = ask(scene, rng, rng.choice(KINDS), rng.choice(LANGUAGES))
        seen[question.form, question.language][question.answer] += 1
    best = {form: answers.most_common(1)[0][0] for form, answers in seen.items()}
    return by_cell(items, [best[i.question.form, i.question.language] == i.question.answer for i in items])


def by_cell(items: list[Item], right: list[bool]) -> dict[str, float]:
    """Share of right answers: of all, and of each kind in each language."""
    cells = {"all": right}
    for item, ok in zip(items, right, strict=True):
        cells.setdefault(f"{item.question.kind}, {item.question.language}", []).append(ok)
    return {name: round(sum(cell) / len(cell), 4) for name, cell in cells.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def losses(model: Llama4, batch: Batch) -> tuple[Tensor, Tensor | float]:
    """(mean cross-entropy of the answers, that of the picture's labels: 0.0 if the batch has no picture)."""
    pictures = []  # [tiles, tokens_per_tile, hidden], as the projector hands them to the text side
    projector = model.multi_modal_projector["linear_1"]
    with projector.register_forward_hook(lambda module, inputs, output: pictures.append(output)):
        hidden = model.hidden_states(batch.ids, batch.pixels)
    learn = batch.weights > 0  # the head runs only where there is something to learn
    words = F.cross_entropy(model.lm_head(hidden[learn]), batch.targets[learn])
    return words, label_loss(model, pictures[0], batch.labels) if pictures else 0.0


def labels_only(model: Llama4, batch: Batch) -> Tensor:
    return label_loss(model, model.encode_images(batch.pixels), batch.labels)


@torch.no_grad()
def examine(model: Llama4, exams: Exams, items: list[Item], as_text: bool) -> dict:
    """Loss in nats a token of the answers, and accuracy (`by_cell`).

    An answer is right if all its tokens are the likeliest ones, as in `evaluate.answers_right`.
    """
    loss, right = [], []
    for first in range(0, len(items), 60):
        batch = exams.test_batch(items[first : first + 60], as_text)
        learn = batch.weights > 0
        logits, targets = model.lm_head(model.hidden_states(batch.ids, batch.pixels)[learn]), batch.targets[learn]
        loss.append(F.cross_entropy(logits, targets, reduction="none"))
        wrong = torch.zeros_like(learn).masked_scatter(learn, logits.argmax(-1) != targets)
        right += (~wrong.any(1)).tolist()
    return {"loss": round(float(torch.cat(loss).mean()), 4)} | by_cell(items, right)
