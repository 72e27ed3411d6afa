"""What a mini model can do, measured on held-out scenes: accuracy by kind of question and by language.

An answer counts when every token of it, and the end of the turn, is the model's first choice: the same as greedy
generation giving exactly that text, at the cost of one forward pass.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from random import Random

import torch

from . import scenes
from .documents import PHASES, Batch, Writer
from .model import Llama4
from .trace import trace


@dataclass(frozen=True)
class Item:
    """One question of the test, about one picture."""

    picture: scenes.Scene
    question: scenes.Question


def held_out_questions(per_cell: int, seed: int = 1_000_003) -> list[Item]:
    """`per_cell` questions for each kind and language, each about its own held-out scene of three to six objects."""
    rng = Random(seed)
    items = []
    for kind in scenes.KINDS:
        for language in scenes.LANGUAGES:
            for _ in range(per_cell):
                picture = scenes.draw_scene(rng, "held-out")
                items.append(Item(picture, scenes.ask(picture, rng, kind, language)))
    return items


@torch.no_grad()
def answers_right(
    model: Llama4, writer: Writer, items: list[Item], batch_size: int = 32, blind: bool = False
) -> list[bool]:
    """Is each answer right? `blind` shows the picture of another question instead."""
    order = sorted(range(len(items)), key=lambda i: len(writer.tokenizer.encode(items[i].question.text)))
    right = [False] * len(items)
    for first in range(0, len(items), batch_size):
        index = order[first : first + batch_size]
        documents = [
            writer.question(items[(i + len(items) // 2 + 1) % len(items) if blind else i].picture, items[i].question)
            for i in index
        ]
        batch = writer.batch(documents)
        wrong = (model(batch.ids, batch.pixels).argmax(-1) != batch.targets) & (batch.weights > 0)
        for i, row in zip(index, wrong, strict=True):
            right[i] = not bool(row.any())
    return right


def accuracy(items: list[Item], right: list[bool], by: str) -> dict[str, float]:
    """Share of right answers by "kind" or "language"."""
    groups = defaultdict(list)
    for item, ok in zip(items, right, strict=True):
        groups[getattr(item.question, by)].append(ok)
    return {name: sum(group) / len(group) for name, group in groups.items()}


def chance(items: list[Item], seed: int = 7, samples: int = 4000) -> dict[str, float]:
    """The best a guesser can do who reads the question and never sees the picture, by kind.

    He answers what was commonest in training for questions of the same form and language.
    """
    rng = Random(seed)
    seen = defaultdict(Counter)
    for _ in range(samples):
        picture = scenes.draw_scene(rng, "train")
        question = scenes.ask(picture, rng, rng.choice(scenes.KINDS), rng.choice(scenes.LANGUAGES))
        seen[question.form, question.language][question.answer] += 1
    best = {key: counts.most_common(1)[0][0] for key, counts in seen.items()}
    right = [best.get((item.question.form, item.question.language)) == item.question.answer for item in items]
    return accuracy(items, right, "kind")


@contextmanager
def nope_layers_off(model: Llama4) -> Iterator[None]:
    """The NoPE layers' attention adds nothing: what remains sees one chunk."""
    hooks = [
        model.layers[layer].self_attn.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        for layer in model.config.text.nope_layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def random_experts(model: Llama4, seed: int = 0) -> Iterator[None]:
    """Every token goes to an expert drawn by lot, with the score that its own choice had."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(module, inputs, logits_TE):
        best_T1 = logits_TE.max(-1, keepdim=True).values
        lot_T1 = torch.randint(logits_TE.shape[-1], best_T1.shape, generator=generator)
        return torch.full_like(logits_TE, float("-inf")).scatter(-1, lot_T1, best_T1)

    hooks = [
        model.layers[layer].feed_forward.router.register_forward_hook(shuffle) for layer in model.config.text.moe_layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def question_batches(writer: Writer, items: list[Item], batch_size: int = 32) -> Iterator[Batch]:
    for first in range(0, len(items), batch_size):
        yield writer.batch([writer.question(i.picture, i.question) for i in items[first : first + batch_size]])


def mixed_batches(writer: Writer, each: int = 12, seed: int = 9) -> Iterator[Batch]:
    """Fresh documents of every sort of the last phase of training, in its mix: captions and text alone as well."""
    rng, mix = Random(seed), PHASES[-1][1]
    for sort, share in mix.items():
        for _ in range(max(1, round(each * share * len(mix)))):
            yield writer.batch([writer.training_document(rng, sort, most_objects=6) for _ in range(4)])


@torch.no_grad()
def expert_load(model: Llama4, batches: Iterable[Batch]) -> dict[int, list[float]]:
    """Share of tokens that each expert of each MoE layer gets; padding does not count."""
    counts = {layer: torch.zeros(model.config.text.num_experts) for layer in model.config.text.moe_layers}
    for batch in batches:
        with trace(model, router=True) as seen:
            model(batch.ids, batch.pixels)
        real = batch.ids != model.config.pad_token
        for layer, total in counts.items():
            total += torch.bincount(seen.router[layer].expert[real], minlength=len(total))
    return {layer: (total / total.sum()).tolist() for layer, total in counts.items()}


def load_entropy(shares: list[float]) -> float:
    """Entropy of an expert load as a share of its maximum: 1 is perfectly even, 0 is one expert for all.

    One expert alone is even.
    """
    if len(shares) == 1:
        return 1.0
    return -sum(share * math.log(share) for share in shares if share > 0) / math.log(len(shares))


def report_card(model: Llama4, writer: Writer, per_cell: int = 60) -> dict:
    """All scores that a weight card states, from one held-out set. Shares and accuracies in 0..1."""
    items = held_out_questions(per_cell)
    variants = {
        "full": (nullcontext(), False),
        "another picture": (nullcontext(), True),
        "nope layers off": (nope_layers_off(model), False),
        "random experts": (random_experts(model), False),
    }
    card = {"questions": len(items), "chance": chance(items)}
    for name, (context, blind) in variants.items():
        with context:
            right = answers_right(model, writer, items, blind=blind)
        card[name] = {by: accuracy(items, right, by) for by in ("kind", "language")} | {"mean": sum(right) / len(right)}
    asked = expert_load(model, question_batches(writer, items[:: max(1, len(items) // 128)]))
    card["smallest load entropy"] = min(load_entropy(shares) for shares in asked.values())
    used = expert_load(model, mixed_batches(writer))  # an expert of captions has little to do with questions
    card["smallest expert share"] = min(min(shares) for shares in used.values())
    return card
