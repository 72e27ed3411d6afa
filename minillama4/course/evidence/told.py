"""Scenes told in words, line by line: what the models of lesson 04 read and are asked.

     red star large 6
     blue cross small 0
     red star large 6
     ...

A document is one scene of four to six objects as text, in English or French. A line names an object by colour and
shape, and says its size and its digit. Objects come up again and again, in any order. Two kinds of token are learned:

- Captions: a line about a new object. Nobody can know what it says, so a model can at best be right about the chances;
  how well it knows them depends on how much it has read.
- Answers: size and digit of an object that was told before. They have to be looked up. Which object it is, is given.

Held out is what `scenes` holds out: 60 of the 300 combinations of colour, shape and digit. They are for answers: what
was read must count, not what usually goes with a red star. In captions they would punish a model for having learned
which digits never go with it, so captions are scored on fresh scenes of the training split.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...distill import hard_loss
from ...model import Llama4
from ...scene_words import phrase
from ...scenes import draw_scene, size_word
from ...tokenizer import Tokenizer, load_tokenizer

LINE = 6  # tokens: two of a name, one of a size, two of a digit, the end
TOKENS = 16 * LINE  # of a document
LANGUAGES = ("en", "fr")
KINDS = ("size", "digit")  # of answers
READ, CAPTION, ANSWER = 0, 1, 2  # parts of a document; ANSWER + i for an answer of KINDS[i]


@dataclass
class Documents:
    """Documents side by side; `part` says of each token what it is as a target."""

    ids: Tensor  # [documents, TOKENS] int64
    part: Tensor  # [documents, TOKENS] int64: READ, CAPTION or an answer's kind

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index) -> "Documents":
        return Documents(self.ids[index], self.part[index])

    @property
    def learn(self) -> Tensor:
        """[documents, TOKENS - 1] bool: where what comes next is to be learned."""
        return self.part[:, 1:] != READ

    @property
    def inputs(self) -> Tensor:
        return self.ids[:, :-1]

    @property
    def targets(self) -> Tensor:
        """[T]: what comes next, where it is to be learned, document by document."""
        return self.ids[:, 1:][self.learn]


def document(rng: Random, split: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(ids, part), TOKENS long each, of one document of `split` "train" or "held-out"."""
    language, scene = rng.choice(LANGUAGES), draw_scene(rng, split, rng.randint(4, 6))
    untold, ids, part = rng.sample(scene.items, len(scene.items)), [], []
    told = []
    while len(ids) < TOKENS:
        new = not told or (len(untold) > 0 and rng.random() < 0.4)
        item = untold.pop() if new else rng.choice(told)
        told += [item] * new
        name, size = phrase(language, "bare", item.colour, item.shape), size_word(language, item.size)
        ids += tokenizer.encode(f" {name} {size} {item.digit}\n")
        part += [CAPTION] * LINE if new else [READ, READ, ANSWER, READ, ANSWER + 1, READ]
    return ids, part


def documents(name: str, split: str, count: int, first: int = 0) -> Documents:
    """Documents number `first` to `first + count - 1` of the endless row called `name`; each has a seed of its own."""
    tokenizer = load_tokenizer("mini-scout")
    rows = [document(Random(f"{name}/{first + number}"), split, tokenizer) for number in range(count)]
    ids, part = (torch.tensor(column).view(count, TOKENS) for column in zip(*rows, strict=True))
    return Documents(ids, part)


def kept_documents(folder: Path, name: str, split: str, count: int) -> Documents:
    """`documents`, written once to `folder` and read from there later."""
    file = folder / f"{name}-{split}-{count}.safetensors"
    if not file.exists():
        made = documents(name, split, count)
        temporary = file.with_name(file.name + ".new")
        save_file({key: value.short() for key, value in vars(made).items()}, temporary)
        temporary.replace(file)
    return Documents(**{key: value.long() for key, value in load_file(file).items()})


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def exam(model: Llama4, folder: Path, count: int, share: float = 1.0) -> dict:
    """Scores as [mean, low, high], with 95 % intervals.

    "answers": of scenes whose combinations were held out; "fresh answers" and "captions": of fresh training scenes. An
    answer is right if it is the likeliest token.
    """
    some = slice(round(share * count))
    held, fresh = (scores(model, kept_documents(folder, "exam", split, count)[some]) for split in ("held-out", "train"))
    return {"answers": held["answers"], "fresh_answers": fresh["answers"], "captions": fresh["captions"]}


@torch.no_grad()
def scores(model: Llama4, read: Documents) -> dict:
    losses, hits = [], []
    for first in range(0, len(read), 50):
        some = read[first : first + 50]
        logits_TV = model.lm_head(model.hidden_states(some.inputs)[some.learn])
        losses.append(hard_loss(logits_TV, some.targets))
        hits.append(logits_TV.argmax(-1) == some.targets)
    loss, hit = torch.cat(losses), torch.cat(hits)
    part, of = read.part[:, 1:][read.learn], read.learn.nonzero()[:, 0]  # [T]: part, and document
    told, said = part == CAPTION, part >= ANSWER
    by_kind = {name: round(float(hit[part == ANSWER + i].float().mean()), 4) for i, name in enumerate(KINDS)}
    return {
        "captions": {"loss": clustered(loss[told], of[told])},
        "answers": {
            "loss": clustered(loss[said], of[said]),
            "right": clustered(hit[said].float(), of[said]),
            "right_by_kind": by_kind,
            "asked": int(said.sum()),
        },
    }


def clustered(values: Tensor, document: Tensor) -> list[float]:
    """[mean, low, high]: a 95 % interval with documents as what was drawn, since their tokens are related."""
    values, inverse = values.double(), document.unique(return_inverse=True)[1]
    mean, documents = values.mean(), int(inverse.max()) + 1
    gaps = torch.zeros(documents, dtype=torch.float64).index_add(0, inverse, values - mean)
    half = 1.96 * math.sqrt(float(gaps.square().sum()) * documents / max(1, documents - 1)) / len(values)
    return [round(x, 4) for x in (float(mean), float(mean) - half, float(mean) + half)]
