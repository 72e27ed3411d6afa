"""Do mini-scout's experts specialise: by modality, by kind of token, by language? Counted, not judged by eye.

    I(expert; label) = sum over pairs of p(expert, label) log2(p(expert, label) / (p(expert) p(label)))     [bits]

It is 0 if the expert tells nothing about the label, and H(label) if it tells all. Three things make it too large:

- Few tokens. Counts of chance already "inform"; so labels are shuffled many times, and the mean is taken off.
- Neighbours are alike, and one document has one language. Tokens shuffled one by one would make a control that anything
  passes. So a sequence of labels is turned round as a whole, or whole documents swap their languages.
- Labels come together. A French word is another token than its English one, so a router that looks tokens up in a table
  "knows" languages. So language is also asked *given* the token, on tokens that all languages share; modality given the
  position; and everything once more of weights that were never trained, whose router is such a table by birth.

Documents: held-out scenes, each told in English, French, Hindi and Arabic: the same objects, the same questions.
`python -m minillama4.course.evidence.specialise` measures all, and writes `results/specialise.json`.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from random import Random

import numpy as np
import torch
from tqdm import tqdm

from ... import scenes
from ...bench import machine
from ...checkpoint import WEIGHTS, load_checkpoint
from ...documents import Document, Writer
from ...model import Llama4
from ...tokenizer import Tokenizer, load_tokenizer
from ...trace import trace
from . import study

RESULTS = study.RESULTS / "specialise.json"
KINDS = ("patch", "frame", "word start", "word inside", "digit", "punctuation")  # frame: of the chat, and of pictures
PATCH, FRAME, START, INSIDE, DIGIT, PUNCTUATION = range(len(KINDS))
SORTS = ("questions", "two pictures", "caption")  # of documents, as in training
LEAST = 8  # documents of each language that a token must be in, to be compared between languages


# ----------------------------------------------------------------------------------------------------------------------
# Documents, and the expert of each of their tokens.


@dataclass(frozen=True)
class Tokens:
    """N tokens of D documents, document after document; all arrays are int64."""

    expert: dict[int, np.ndarray]  # MoE layer -> [N]
    token: np.ndarray  # [N] ids
    kind: np.ndarray  # [N] index into KINDS
    document: np.ndarray  # [N]
    position: np.ndarray  # [N] in the document
    words: np.ndarray  # [N] words before it in the document: 0 where the language cannot be known yet
    language: np.ndarray  # [D] index into scenes.LANGUAGES
    group: np.ndarray  # [D] the same for the four versions of one document


def write(writer: Writer, scene: int, sort: str, language: str, seed: int) -> Document:
    """One document; another language changes its words, and nothing else that is drawn."""
    rng = Random(f"{seed} {scene} {sort}")
    document = writer.start()
    for _ in range(2 if sort == "two pictures" else 1):
        picture = scenes.draw_scene(rng, "held-out")
        if sort == "caption":
            writer.user(document, scenes.describe_request(language), picture)
            writer.assistant(document, scenes.caption(picture, language))
            continue
        for turn in range(2 if sort == "two pictures" else 4):
            asked = scenes.ask(picture, rng, rng.choice(scenes.KINDS), language)
            writer.user(document, asked.text, picture if turn == 0 else None)
            writer.assistant(document, asked.answer)
    return document


def kinds_of(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Index into KINDS of each token of a document. Roles and their newlines are of the frame: no language has them."""
    opens = {tokenizer.token_id("<|header_start|>"), tokenizer.token_id("<|header_end|>")}
    patch, kinds = tokenizer.token_id("<|patch|>"), []
    for before, token in zip([None, *ids], ids, strict=False):
        text = tokenizer.decode([token])
        if token == patch:
            kind = PATCH
        elif token in tokenizer.special_names or before in opens:
            kind = FRAME
        elif any(letter.isalpha() or letter == "\ufffd" for letter in text):  # U+FFFD: a part of a letter's bytes
            kind = INSIDE if kinds[-1] in (START, INSIDE) and not text.startswith(" ") else START
        else:
            kind = DIGIT if text.strip().isdigit() else PUNCTUATION
        kinds.append(kind)
    return kinds


@torch.no_grad()
def collect(model: Llama4, writer: Writer, num_scenes: int, seed: int, batch_size: int = 12) -> Tokens:
    """Write the documents of `num_scenes` scenes, and trace each through `model`."""
    plan = product(range(num_scenes), SORTS, scenes.LANGUAGES)
    documents = [write(writer, scene, sort, language, seed) for scene, sort, language in plan]
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].ids))  # little padding
    routes = [{} for _ in documents]
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        batch = writer.batch([documents[i] for i in rows])
        with trace(model, router=True) as seen:
            model(batch.ids, batch.pixels)
        for row, i in enumerate(rows):
            routes[i] = {layer: r.expert[row, : len(documents[i].ids)].numpy() for layer, r in seen.router.items()}
    kinds = [np.array(kinds_of(d.ids, writer.tokenizer)) for d in documents]
    is_word = [np.isin(kind, (START, INSIDE)) for kind in kinds]
    return Tokens(
        expert={layer: np.concatenate([r[layer] for r in routes]) for layer in routes[0]},
        token=np.concatenate([d.ids for d in documents]),
        kind=np.concatenate(kinds),
        document=np.repeat(np.arange(len(documents)), [len(d.ids) for d in documents]),
        position=np.concatenate([np.arange(len(d.ids)) for d in documents]),
        words=np.concatenate([word.cumsum() - word for word in is_word]),
        language=np.arange(len(documents)) % len(scenes.LANGUAGES),
        group=np.arange(len(documents)) // len(scenes.LANGUAGES),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Information, and labels shuffled so that only the expert's knowledge of them is lost.


def entropy(label: np.ndarray, given: np.ndarray | None = None) -> float:
    """H(label), or H(label | given), in bits; both are arrays of integers from 0 on."""
    return information(label, label, given)


def information(a: np.ndarray, b: np.ndarray, given: np.ndarray | None = None) -> float:
    """I(a; b), or I(a; b | given), in bits, of the counts themselves: of few samples, it is too large."""
    given = np.zeros_like(a) if given is None else given
    sizes = given.max() + 1, a.max() + 1, b.max() + 1
    cells = np.bincount(np.ravel_multi_index((given, a, b), sizes), minlength=np.prod(sizes)).reshape(sizes)
    g, i, j = cells.nonzero()
    n, of_a, of_b, of_both = cells[g, i, j], cells.sum(2)[g, i], cells.sum(1)[g, j], cells.sum((1, 2))[g]
    return float((n * np.log2(n * of_both / (of_a * of_b))).sum() / len(a))


def rotated(rng: np.random.Generator, label: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Each document's labels turned round by a random number of tokens: runs of labels stay runs."""
    _, start, index, size = np.unique(document, return_index=True, return_inverse=True, return_counts=True)
    shift = rng.integers(size)
    place = (np.arange(len(label)) - start[index] + shift[index]) % size[index]
    return label[start[index] + place]


def dealt(rng: np.random.Generator, tokens: Tokens, keep: np.ndarray) -> np.ndarray:
    """The languages of the four versions of each document, dealt anew among the four."""
    to = np.lexsort((rng.random(len(tokens.group)), tokens.group))
    language = np.empty_like(tokens.language)
    language[np.argsort(tokens.group, kind="stable")] = tokens.language[to]
    return language[tokens.document[keep]]


def within(rng: np.random.Generator, label: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Labels shuffled among the samples of equal `given`."""
    shuffled = np.empty_like(label)
    shuffled[np.argsort(given, kind="stable")] = label[np.lexsort((rng.random(len(label)), given))]
    return shuffled


def swapped_rows(rng: np.random.Generator, label: np.ndarray, documents: int) -> np.ndarray:
    """Each document gets another's labels, position by position. label: [documents * positions]."""
    return label.reshape(documents, -1)[rng.permutation(documents)].ravel()


# ----------------------------------------------------------------------------------------------------------------------
# What is asked of the tokens.


@dataclass(frozen=True)
class Measure:
    """I(expert; label | given) over the tokens `keep`, and how to shuffle the label."""

    keep: np.ndarray  # indices
    label: np.ndarray
    shuffle: Callable[[np.random.Generator], np.ndarray]
    given: np.ndarray | None = None


def measures(tokens: Tokens, rng: np.random.Generator) -> dict[str, Measure]:
    """All of them, by the name that the results carry."""
    language = tokens.language[tokens.document]

    def turned(keep, label):
        keep = keep.nonzero()[0]
        return Measure(keep, label[keep], partial(rotated, label=label[keep], document=tokens.document[keep]))

    def spoken(keep, given=None):
        keep = keep.nonzero()[0]
        shuffle = partial(dealt, tokens=tokens, keep=keep)
        return Measure(keep, language[keep], shuffle, None if given is None else given[keep])

    patch, word = tokens.kind == PATCH, np.isin(tokens.kind, (START, INSIDE))
    anywhere, known = np.ones_like(patch), tokens.words > 0
    place = _place_in_picture(tokens)
    return {
        "modality": turned(anywhere, patch.astype(int)),
        "modality | position": _modality_at_equal_positions(tokens),
        "kind of text token": turned(~patch, tokens.kind),
        "token": turned(~patch, tokens.token),
        "language, on words": spoken(word),
        "language | kind of text token": spoken(~patch & known, tokens.kind),
        "language | token": _language_on_shared_tokens(tokens, rng),
        "language | place, later patches": spoken(patch & known, place),
        "language | place, first patches": spoken(patch & ~known, place),  # must be 0: no word came before
    }


def _place_in_picture(tokens: Tokens) -> np.ndarray:
    """[N]: of a patch, how many patches of the same picture came before it; 0 of other tokens."""
    is_patch = tokens.kind == PATCH
    in_a_picture = is_patch[tokens.document == 0].sum()  # all have one size, and the first document has one picture
    return np.where(is_patch, (is_patch.cumsum() - is_patch) % in_a_picture, 0)


def _modality_at_equal_positions(tokens: Tokens) -> Measure:
    """Where some documents have a second picture and others go on in words, and no document has ended."""
    sort = tokens.group % len(SORTS)
    rows = np.isin(tokens.document, (sort != SORTS.index("caption")).nonzero()[0])
    documents = len(np.unique(tokens.document[rows]))
    here = np.bincount(tokens.position[rows])
    patches = np.bincount(tokens.position[rows], tokens.kind[rows] == PATCH)
    mixed = (here == documents) & (patches > 0) & (patches < documents)
    keep = (rows & mixed[tokens.position]).nonzero()[0]
    label = (tokens.kind[keep] == PATCH).astype(int)
    return Measure(keep, label, partial(swapped_rows, label=label, documents=documents), tokens.position[keep])


def _language_on_shared_tokens(tokens: Tokens, rng: np.random.Generator) -> Measure:
    """Tokens that documents of all four languages hold; one of each a document, so that a sample is a document."""
    able = rng.permutation(((tokens.kind != PATCH) & (tokens.words > 0)).nonzero()[0])
    pair = np.stack([tokens.document[able], tokens.token[able]])
    keep = np.sort(able[np.unique(pair, axis=1, return_index=True)[1]])
    language = tokens.language[tokens.document[keep]]
    in_each = np.zeros((tokens.token.max() + 1, len(scenes.LANGUAGES)), int)
    np.add.at(in_each, (tokens.token[keep], language), 1)
    shared = (in_each >= LEAST).all(1)[tokens.token[keep]]
    keep, language = keep[shared], language[shared]
    given = tokens.token[keep]
    return Measure(keep, language, partial(within, label=language, given=given), given)


def measured(tokens: Tokens, shuffles: int, seed: int) -> list[dict]:
    """One row a measure and layer."""
    rng = np.random.default_rng(seed)
    rows = []
    for name, measure in measures(tokens, rng).items():
        if len(measure.keep) == 0:
            raise ValueError(f"no tokens to measure {name!r} on; num_scenes is too small")
        fakes = [measure.shuffle(rng) for _ in range(shuffles)]
        label_bits = entropy(measure.label, measure.given)
        for layer, expert in tokens.expert.items():
            expert = expert[measure.keep]
            bits, expert_bits = information(expert, measure.label, measure.given), entropy(expert, measure.given)
            control = [information(expert, fake, measure.given) for fake in fakes]
            corrected = bits - float(np.mean(control))
            rows.append({
                "measure": name, "layer": layer, "tokens": len(expert), "bits": bits,
                "control_mean": float(np.mean(control)), "control_95": float(np.quantile(control, 0.95)),
                "corrected_bits": corrected, "label_bits": label_bits, "share_of_label": corrected / label_bits,
                "expert_bits": expert_bits, "share_of_expert": corrected / expert_bits if expert_bits else 0.0,
            })  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def run(num_scenes: int = 16, seeds: tuple[int, ...] = (0, 1, 2), shuffles: int = 200) -> dict:
    """{"card": what it was made with, "rows": as of `measured`, with the weights' name and the seed of the documents}.

    num_scenes: each is 12 documents. "untrained" weights are drawn anew for every seed.
    """
    started = time.perf_counter()
    model = load_checkpoint("mini-scout")
    writer = Writer(model.config, load_tokenizer("mini-scout"))
    rows, sizes = [], []
    for seed in tqdm(seeds, unit="seed", disable=None, dynamic_ncols=True):
        untrained = Llama4(model.config).eval()
        untrained.reset_parameters(torch.Generator().manual_seed(seed))
        for weights, net in (("trained", model), ("untrained", untrained)):
            tokens = collect(net, writer, num_scenes, seed)
            rows += [{"weights": weights, "seed": seed} | row for row in measured(tokens, shuffles, seed)]
        sizes.append((len(tokens.language), len(tokens.token)))
    file = WEIGHTS / "mini-scout" / "model.safetensors"
    card = {
        "command": "python -m minillama4.course.evidence.specialise", "seeds": list(seeds), "shuffles": shuffles,
        "documents": sum(d for d, _ in sizes), "samples": sum(t for _, t in sizes), "model": "mini-scout",
        "model_sha256": hashlib.sha256(file.read_bytes()).hexdigest(), **machine("numpy"),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    rounded = [{name: round(v, 5) if isinstance(v, float) else v for name, v in row.items()} for row in rows]
    return {"card": card, "rows": rounded}


def by_layer(result: dict, weights: str, measure: str, value: str) -> np.ndarray:
    """[layers, seeds] of one value of the rows. ValueError: no row has these weights and this measure."""
    rows = [row for row in result["rows"] if (row["weights"], row["measure"]) == (weights, measure)]
    if not rows:
        known = ", ".join(dict.fromkeys(row["measure"] for row in result["rows"]))
        raise ValueError(f"no row has weights {weights!r} and measure {measure!r}; the measures are {known}")
    layers = sorted({row["layer"] for row in rows})
    return np.array([[row[value] for row in rows if row["layer"] == layer] for layer in layers])


def above_control(result: dict, weights: str, measure: str) -> np.ndarray:
    """[layers] bool: do all seeds lie above 95 % of their shuffles?"""
    value, limit = (by_layer(result, weights, measure, name) for name in ("bits", "control_95"))
    return (value > limit).all(1)


def table(result: dict) -> str:
    """A line a measure. Least and most of the layers (mean over seeds), and how many layers are above control."""
    lines = [f"{'':34}{'share of H(label), layers above':36}share of H(expert)"]
    lines.append(f"{'':34}{'trained':>18}{'untrained':>18}{'trained':>13}{'untrained':>13}")
    for name in dict.fromkeys(row["measure"] for row in result["rows"]):
        of_label, of_expert = "", ""
        for weights in ("trained", "untrained"):
            above = above_control(result, weights, name)
            label, expert = (by_layer(result, weights, name, f"share_of_{x}").mean(1) for x in ("label", "expert"))
            of_label += f"{label.min():7.3f}{label.max():6.3f}  {above.sum()}/{len(above)}"
            of_expert += f"{expert.min():7.3f}{expert.max():6.3f}"
        lines.append(f"{name:34}{of_label}{of_expert}")
    return "\n".join(lines)


def verdicts(result: dict) -> dict[str, bool]:
    """What the rows allow one to say of mini-scout: statement -> does it hold?"""

    def share(measure, weights="trained"):
        return by_layer(result, weights, measure, "share_of_label").mean(1)  # [layers]

    modality, word, first = "modality", "language, on words", "language | place, first patches"
    holds = {
        "every layer tells patches from text": above_control(result, "trained", modality),
        "also at equal positions": above_control(result, "trained", "modality | position"),
        "and better than before training": share(modality) > share(modality, "untrained"),
        "every layer tells kinds of text token apart": above_control(result, "trained", "kind of text token"),
        "of the language of a word, no layer tells a tenth": share(word) < 0.1,
        "training made words of a language go together": share(word).mean() > share(word, "untrained").mean(),
        "every layer tells languages apart on the same token": above_control(result, "trained", "language | token"),
        "patches before any word tell no language": share(first) < 1e-3,
    }
    return {statement: bool(np.all(layers)) for statement, layers in holds.items()}


def main():
    result = run()
    study.store(RESULTS, result)
    print(table(result), "", *(f"{statement}: {holds}" for statement, holds in verdicts(result).items()), sep="\n")


if __name__ == "__main__":
    main()
