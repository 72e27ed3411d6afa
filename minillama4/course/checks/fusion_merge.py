"""Early fusion itself: picture vectors written over the embeddings of the patch tokens, and over nothing else."""

import random
import re

import torch

from ...fusion import image_prompt
from ..exercise import Card, Step, normal, runs, same
from ..observe import call

CARD = Card("01", "Merge", difficulty=2, importance=5, minutes=20, trains="early fusion, masks, refusing bad input")

HINTS = (
    "Which rows of [batch, tokens, hidden] get another value, and in which order do the vectors of [tiles, "
    "tokens_per_tile, hidden] go into them? Say both for a batch of two rows, of which the first has two tiles.",
    "here = input_ids == patch_token says where: [batch, tokens]. All vectors in a row are image_embeddings.flatten(0, "
    "1). Two numbers must be equal before anything is written. And embeddings itself must stay as it was.",
    "embeddings.masked_scatter(here[..., None], vectors) is a new tensor, takes the vectors in order, row after row of "
    "the batch, and wants them in the dtype of embeddings. But it says nothing about vectors that are left over: "
    "compare here.sum() with len(vectors) first, and raise a ValueError with both.",
)

ANSWERED_BY = ("minillama4.fusion.merge_image_embeddings",)

# Where a special token is, counted from <|image_start|>: as in Llama 4.
OFFSET = {
    "<|image_start|>": 0, "<|image_end|>": 1, "<|tile_x_separator|>": 4, "<|tile_y_separator|>": 5, "<|image|>": 10,
    "<|patch|>": 12,
}  # fmt: skip


def draw(rng: random.Random) -> dict:
    per_tile, hidden, base = rng.randint(4, 7), rng.choice((8, 9, 11, 13)), rng.randint(2_000, 9_000)
    wide, square = _ids(rng, base, (1, 2), per_tile), _ids(rng, base, (1, 1), per_tile)
    words = _ids(rng, base, None, per_tile)
    rows = [wide, words, square] if rng.random() < 0.5 else [square, words, wide]
    longest = max(map(len, rows))
    batch = torch.tensor([row + [base + 30] * (longest - len(row)) for row in rows])  # 30: some padding token
    return {
        "patch_token": base + OFFSET["<|patch|>"],
        "table": normal(rng, base + 31, hidden),
        "vectors": normal(rng, 5, per_tile, hidden),  # one tile more than any case needs
        "ids": {"one": torch.tensor([square]), "wide": torch.tensor([wide]), "batch": batch,
                "words": torch.tensor([words])},
        "push": normal(rng, *batch.shape, hidden),
    }  # fmt: skip


def _ids(rng: random.Random, base: int, grid: tuple[int, int] | None, per_tile: int) -> list[int]:
    """Words, a picture of rows x columns tiles (or none), and words."""
    picture = [base + OFFSET[name] for name in image_prompt(*grid, per_tile)] if grid else []
    before, after = ([rng.randrange(base) for _ in range(rng.randint(2, 5))] for _ in range(2))
    return before + picture + after


TILES = {"one": 1, "wide": 3, "batch": 4, "words": 0}
REFUSED = {"many": 5, "few": 3}  # tiles for the four of "batch"


def observe(function, inputs: dict) -> dict:
    ids, vectors, patch_token = inputs["ids"], inputs["vectors"], inputs["patch_token"]

    def given(name: str) -> tuple:
        return inputs["table"][ids[name]], ids[name], vectors[: TILES[name]], patch_token

    embeddings, batch = given("batch")[:2]
    seen = {}
    for name in TILES:
        seen |= call(name, function, *given(name))
    seen |= call("push", function, *given("batch"), cotangent=inputs["push"], wrt=(0, 2))
    seen |= call("half", function, embeddings.bfloat16(), batch, vectors[:4], patch_token)
    for name, wrong in _refused(vectors).items():
        seen |= call(name, _refusal(function), embeddings, batch, wrong, patch_token)
    return seen


def _refused(vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: vectors[:tiles] for name, tiles in REFUSED.items()} | {"single": vectors[:1, :1]}


def _refusal(function):
    """Asks `function` for the ValueError that it should raise, in words."""

    def ask(*arguments) -> str:
        try:
            function(*arguments)
        except ValueError as error:
            return f"ValueError: {error}"
        return "no error"

    return ask


def judge(inputs: dict, observed: dict):
    table, vectors, patch_token = inputs["table"], inputs["vectors"], inputs["patch_token"]
    asks = {
        "one": (
            "patch tokens become the picture's vectors, and all others stay what they were",
            "Mark the rows of your result that differ from embeddings. Are they the ones whose id is patch_token?",
        ),
        "wide": (
            "tiles follow each other, and the separators between them stay",
            "Three tiles: in which rows do the vectors of each of them lie in yours, and what lies between?",
        ),
        "batch": (
            "each row of the batch goes on where the one before it stopped",
            "How many vectors did the rows before have used up, and where does your next row begin?",
        ),
        "words": ("without a picture, nothing changes", "No patch token, no vector: what is left to write?"),
    }  # fmt: skip
    for name, (step, question) in asks.items():
        ids = inputs["ids"][name]
        embeddings, own = table[ids], vectors[: TILES[name]]
        given = _given(ids, own, patch_token)
        longer = embeddings.shape[1] + len(own.flatten(0, 1))
        if len(own) and observed[f"{name}/value"].shape[1:2] == (longer,):
            yield Step(
                "pictures take no places of their own", False, given, f"{longer} rows",
                f"{embeddings.shape[1]} rows, as there are tokens",
                "The prompt holds as many patch tokens as there are vectors. What are they for?",
                "put beside the words",
            )  # fmt: skip
        yield from runs(observed, name, embeddings.shape, given)
        want = truth(embeddings, ids, own, patch_token)
        mistakes = _mistakes(name, embeddings, ids, own, patch_token)
        yield same(step, observed[f"{name}/value"], want, given, question, mistakes)

    ids, own = inputs["ids"]["batch"], vectors[:4]
    leaves = [table[ids].double().requires_grad_(), own.double().requires_grad_()]
    truth(leaves[0], ids, leaves[1], patch_token).mul(inputs["push"]).sum().backward()
    asks = "Does every step to the result stay a tensor, without .detach(), .data, .item() and no_grad?"
    for i, what, leaf in ((0, "words", leaves[0]), (2, "pictures", leaves[1])):
        cut = (torch.zeros_like(leaf), f"Which of your lines takes the {what} out of the graph that backward follows?")
        yield same(
            f"the gradient reaches the {what}", observed[f"push/grad{i}"], leaf.grad, _given(ids, own, patch_token),
            asks, {f"{what} without gradient": cut},
        )  # fmt: skip

    half = table[ids].bfloat16()
    given = f"embeddings in bfloat16 and image_embeddings in float32, {_given(ids, own, patch_token)}"
    yield from runs(observed, "half", half.shape, given, dtype="bfloat16")
    yield same(
        "the result has the dtype of embeddings", observed["half/value"], truth(half, ids, own.bfloat16(), patch_token),
        given, "Which of the two is to take the dtype of the other?",
    )  # fmt: skip
    yield from _refusals(inputs, observed)


def _refusals(inputs: dict, observed: dict):
    """Another number of vectors than of patch tokens is an error, and the error says how many there are of each."""
    ids, patch_token = inputs["ids"]["batch"], inputs["patch_token"]
    needed = int((ids == patch_token).sum())
    asks = {
        "many": ("more vectors than patch tokens are refused", "truncated", "Where do the vectors go that are over?"),
        "few": (
            "fewer vectors than patch tokens are refused", "made do",
            "There are too few vectors. What does your function write into the last patch tokens?",
        ),
        "single": (
            "one vector is not spread over all patch tokens", "broadcast",
            "torch stretches a single row over many. Does your comparison come before it can?",
        ),
    }  # fmt: skip
    for name, (step, mistake, question) in asks.items():
        wrong = _refused(inputs["vectors"])[name]
        counts = needed, wrong.shape[0] * wrong.shape[1]
        given = f"{needed} patch tokens, and image_embeddings {list(wrong.shape)}: {counts[1]} vectors"
        said = str(observed[f"{name}/value"])
        if said != "no error":
            mistake, question = (
                "another error",
                "Which error should a caller get, and does yours come from your own if?",
            )
        refused = said.startswith("ValueError: ")
        yield Step(step, refused, given, said, "a ValueError", question, mistake)
        yield Step(
            "the error says how many there are of each", set(map(str, counts)) <= set(re.findall(r"\d+", said)), given,
            said, f"a message with the numbers {counts[0]} and {counts[1]}",
            "Someone reads your message at night, and has nothing else. Which two numbers would help?", "no counts",
        )  # fmt: skip


def _given(ids: torch.Tensor, vectors: torch.Tensor, patch_token: int) -> str:
    return f"input_ids {ids.tolist()}, image_embeddings {list(vectors.shape)}, patch_token {patch_token}"


def truth(embeddings: torch.Tensor, ids: torch.Tensor, vectors: torch.Tensor, patch_token: int) -> torch.Tensor:
    """Token by token through the whole batch: the next vector, or the token's own row."""
    waiting = iter(vectors.flatten(0, 1))
    rows = [
        next(waiting) if id == patch_token else row
        for row, id in zip(embeddings.flatten(0, 1), ids.flatten().tolist(), strict=True)
    ]
    return torch.stack(rows).view_as(embeddings)


def _mistakes(name: str, embeddings: torch.Tensor, ids: torch.Tensor, vectors: torch.Tensor, patch_token: int) -> dict:
    """What known mistakes give, with their questions."""

    def with_vectors(other: torch.Tensor) -> torch.Tensor:
        return truth(embeddings, ids, other.expand_as(vectors), patch_token)

    def at(places: list[int]) -> torch.Tensor:
        """The vectors in these rows, counted through the batch."""
        out = embeddings.flatten(0, 1).clone()
        out[places] = vectors.flatten(0, 1)[: len(places)]
        return out.view_as(embeddings)

    flat = ids.flatten()
    patches = (flat == patch_token).nonzero().flatten().tolist()
    if name == "one":
        right, here, count = with_vectors(vectors), (ids == patch_token)[..., None], len(patches)
        start = patch_token - OFFSET["<|patch|>"]
        special = (flat >= start).nonzero().flatten().tolist()
        return {
            "nothing written": (embeddings, "In which of your lines do image_embeddings go into the result?"),
            "added": (right + embeddings * here, "What is left of the embedding of <|patch|> in a row with a vector?"),
            "words lost": (right * here, "What becomes of the rows of the words?"),
            "<|image_start|> and <|image|> as well": (
                at(special[:count]), "Which ids do your rows have: only patch_token, or all that belongs to a picture?",
            ),
            "one row too early": (at([p - 1 for p in patches]), "Which token is in the first row that you overwrite?"),
            "one row too late": (at([p + 1 for p in patches]), "Which token is in the last row that you overwrite?"),
            "at the front": (at(list(range(count))), "In which row is the first patch token here?"),
            "backwards": (with_vectors(vectors.flip(1)), "Which vector does the first patch token get?"),
            "one vector for all": (with_vectors(vectors[:1, :1]), "How many of the tile's vectors are in your result?"),
            "their mean": (with_vectors(vectors.mean(1, keepdim=True)), "How many vectors does a tile keep in yours?"),
        }  # fmt: skip
    if name == "wide":
        one_block = list(range(patches[0], patches[0] + len(patches)))
        return {
            "one block": (at(one_block), "Are the patch tokens of three tiles one run? What is between two tiles?"),
            "first tile only": (at(patches[: len(patches) // 3]), "How many runs of patch tokens does yours find?"),
            "the first tile three times": (with_vectors(vectors[:1]), "Which tile do your last patch tokens show?"),
            "last tile first": (with_vectors(vectors.flip(0)), "Which tile do your first patch tokens show?"),
            "global tile first": (
                with_vectors(vectors.roll(1, 0)), "The global tile comes last, in both. Does it in your result?",
            ),
            "tiles interleaved": (
                with_vectors(vectors.transpose(0, 1).reshape(vectors.shape)),
                "Do all vectors of a tile follow each other in your flat list, or do the tiles take turns?",
            ),
        }  # fmt: skip
    if name == "batch":
        rows = [(row == patch_token).nonzero().flatten() + i * ids.shape[1] for i, row in enumerate(ids)]
        again = embeddings.flatten(0, 1).clone()
        for row in rows:
            again[row] = vectors.flatten(0, 1)[: len(row)]
        by_column = sorted(patches, key=lambda place: (place % ids.shape[1], place))
        return {
            "each row from the start": (
                again.view_as(embeddings), "Which picture does the second row with patch tokens show in yours?",
            ),
            "first row only": (at(rows[0].tolist()), "How many rows of the batch does your function look at?"),
            "last row first": (at(torch.cat(rows[::-1]).tolist()), "Which row of the batch gets the first vectors?"),
            "column by column": (
                at(by_column), "Do you go through the batch row after row, or through all rows at a time?",
            ),
        }  # fmt: skip
    return {}
