"""Which layers should know positions: `python -m minillama4.course.evidence.irope` (about 40 minutes, two cores).

Tiny models of four layers learn key-value recall (`recall.py`) in contexts of 64 tokens. They differ in positions
alone: which layers turn queries and keys (RoPE), which see the whole context, and how long a chunk is. Then they are
asked in contexts of up to 1,048,576 tokens.

- "lengths": at each length, how many of the questions were answered, and how far the needle's logit in the last layer
  stands out. Softmax gives the needle 1 / (1 + (n - 1) exp(-margin)) of its attention if margin is its logit less the
  log of the mean of exp(logit) over the n - 1 others. So the margin has to grow as the log of the length.
- "split": the rate on pairs that a chunk border cuts after one, two or three of their four tokens, and on whole pairs
  of the same contexts.
- "crowd": the rate when many keys of the context share two of three symbols with the one that is asked for.
"""

import math
import time

import torch
from torch import Tensor

from ...config import RopeScaling
from ...model import Llama4
from .recall import (
    PAIR,
    ROWS,
    SYMBOLS,
    TRAINED,
    Haystack,
    ask,
    changed,
    haystack,
    learn,
    prefill,
    recall_config,
    wilson,
)
from .study import main

LENGTHS = [TRAINED * 4**i for i in range(8)]  # 64 ... 1,048,576
MIDDLE = 65_536  # the longest context of arms whose cost grows as the square
BREAKS = 4_096  # where "split" and "crowd" are tested
ASKED = 128  # questions at each length
WATCHED = 16  # of them, whose logits are read too

SCALING = RopeScaling(factor=16, low_frequency_factor=1, high_frequency_factor=1, original_positions=16)
ARMS = {  # what differs from `recall_config`: three local RoPE layers in chunks of 16, then one NoPE layer
    "iRoPE": {},
    "local only": {"nope_layers": ()},
    "all RoPE": {"nope_layers": (), "chunk_size": None},
    "all NoPE": {"nope_layers": (0, 1, 2, 3)},
    "NoPE every 2": {"nope_layers": (1, 3)},
    "NoPE above one RoPE": {"nope_layers": (1, 2, 3)},
    "NoPE first": {"nope_layers": (0,)},
    "chunk 8": {"chunk_size": 8},
    "chunk 32": {"chunk_size": 32},
    "chunk 64": {"chunk_size": 64},  # the whole training context: in training, no chunks
    "RoPE scaled": {"rope_scaling": SCALING},  # Scout's factors, with the chunk as original length
}
CHANGES = {  # what is changed after training
    "as trained": {},
    "temperature off": {"temperature_tuning": False},
    "no chunks": {"chunk_size": None},
    "no chunks, RoPE scaled": {"chunk_size": None, "rope_scaling": RopeScaling(16, 1, 1, TRAINED)},
}
RECIPE = {"train_steps": 1200, "finish_steps": 500, "rows": ROWS, "row_tokens": TRAINED, "rates": [0.005, 0.01, 0.02]}
RATES = {"iRoPE": 0.01, "local only": 0.01, "all RoPE": 0.01, "all NoPE": 0.01}  # each one's best: see the rows


def build(arm: str) -> Llama4:
    return Llama4(recall_config(**ARMS[arm]))


def run(job: dict) -> dict:
    """One model: how it learned, and what it finds after each of the job's changes, up to the job's longest context."""
    steps, started = (job["train_steps"], job["finish_steps"]), time.process_time()
    if "start" in job:  # from the weights of another arm that has learned the task
        model = build(job["start"])
        learn(model, job["rate"], job["seed"], *steps)
        model = changed(model, **ARMS[job["arm"]])
    else:
        model = build(job["arm"])
    row = learn(model, job["rate"], job["seed"], *steps, fresh="start" not in job)
    row["train_seconds"] = round(time.process_time() - started, 1)
    for name in job["changes"]:
        variant = changed(model, **CHANGES[name])
        lengths = [n for n in LENGTHS if n <= job["longest"]]
        row.setdefault("lengths", {})[name] = [at_length(variant, n, job["asked"], job["seed"]) for n in lengths]
        if job["breaks"]:
            row.setdefault("split", {})[name] = split_pairs(variant, BREAKS, job["asked"], job["seed"])
            row.setdefault("crowd", {})[name] = crowds(variant, BREAKS, job["asked"], job["seed"])
    return row


# ---------------------------------------------------------------------------------------------------------------------
# What a trained model finds


def rows_for(tokens: int) -> int:
    """Contexts side by side: as many as 65,536 tokens hold, 64 at most."""
    return min(64, max(1, MIDDLE // tokens))


def at_length(model: Llama4, tokens: int, asked: int, seed: int) -> dict:
    """Pairs at random depths of contexts of `tokens` tokens; any two models are asked the same."""
    draw = torch.Generator().manual_seed(100_000 * seed + tokens)
    hay = haystack(rows_for(tokens), tokens, draw)
    started = time.process_time()
    cache = prefill(model, hay)
    seconds, right, logits = time.process_time() - started, [], []
    rounds = -(-asked // len(hay.keys))
    for index in range(rounds):
        pair = torch.randint(hay.keys.shape[1], (len(hay.keys), 1), generator=draw)  # [rows, 1]
        with last_logits(model, on=index < max(1, WATCHED // len(hay.keys))) as seen:
            said = ask(model, cache, hay.keys.gather(1, pair)[:, 0])
        right.append(said == hay.values.gather(1, pair)[:, 0])
        logits += [standing_out(each, pair * PAIR + PAIR - 1) for each in seen]
    result = score(torch.cat(right)) | {"tokens": tokens, "prefill_us_per_token": microseconds(seconds, hay)}
    if logits:
        result |= best_head({name: torch.cat([each[name] for each in logits]) for name in logits[0]})
    return result


def score(right: Tensor) -> dict:
    low, high = wilson(int(right.sum()), len(right))
    return {"right": int(right.sum()), "asked": len(right), "low": round(low, 4), "high": round(high, 4)}


def microseconds(seconds: float, hay: Haystack) -> float:
    return round(1e6 * seconds / (len(hay.keys) * hay.tokens), 2)


class last_logits:
    """`with last_logits(model, on) as seen`: the last layer's logits of the last query, [rows, heads, keys] a call.

    Nothing is read of a local last layer, which cannot see the needle.
    """

    def __init__(self, model: Llama4, on: bool):
        self.layer, self.seen = model.layers[-1].self_attn, []
        self.on = on and self.layer.chunk_size is None

    def __enter__(self) -> list[Tensor]:
        if self.on:
            self.layer.probe = self.read
        return self.seen

    def read(self, q: Tensor, k: Tensor, end: int):
        """q [rows, queries, heads, dim] and k [rows, keys, 1, dim], with all that was done to them before softmax."""
        self.seen.append((q[:, -1] * q.shape[-1] ** -0.5) @ k[:, :, 0].mT)

    def __exit__(self, *error):
        self.layer.probe = None


def standing_out(logits: Tensor, needle: Tensor) -> dict[str, Tensor]:
    """How the needle's value stands out of all others: logits [rows, heads, keys], needle [rows, 1] -> [rows, heads].

    "lead": its logit less the mean of the others. "margin": less log(mean(exp(logit))) of the others, in which few that
    are nearly right count most. "nearest": less the largest of the others. "share": its part of the attention.
    """
    at = needle[:, None].expand(-1, logits.shape[1], 1)  # [rows, heads, 1]
    own, others = logits.gather(2, at)[..., 0], logits.scatter(2, at, -torch.inf)
    count = logits.shape[-1] - 1
    return {
        "lead": own - (logits.sum(-1) - own) / count,
        "margin": own - (others.logsumexp(-1) - math.log(count)),
        "nearest": own - others.amax(-1),
        "share": logits.softmax(-1).gather(2, at)[..., 0],
    }


def best_head(read: dict[str, Tensor]) -> dict:
    """Means over the questions [questions, heads], of the head that pays the needle most."""
    head = int(read["share"].mean(0).argmax())
    return {name: round(float(each[:, head].mean()), 4) for name, each in read.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Where it breaks


def split_pairs(model: Llama4, tokens: int, asked: int, seed: int) -> dict:
    """Rates on pairs with their first 1, 2 or 3 tokens before a border of 16 tokens, and on whole pairs beside them."""
    rows, every, found = rows_for(tokens), 16 // PAIR, {}
    for cut in range(1, PAIR):
        draw = torch.Generator().manual_seed(100_000 * seed + cut)
        hay = haystack(rows, tokens, draw, dropped=cut)
        cache = prefill(model, hay)
        for name, offset in ((f"after {cut}", 0), (f"whole beside {cut}", 2)):
            right = []
            for _ in range(-(-asked // rows)):
                pair = every * torch.randint(1, hay.keys.shape[1] // every, (rows, 1), generator=draw) + offset
                said = ask(model, cache, hay.keys.gather(1, pair)[:, 0])
                right.append(said == hay.values.gather(1, pair)[:, 0])
            found[name] = score(torch.cat(right))
    return found


def crowds(model: Llama4, tokens: int, asked: int, seed: int) -> dict:
    """Rates by how many keys of the context share two of three symbols with the needle's key, of 765 that can."""
    rows, found = rows_for(tokens), {}
    for near in (0, 12, 96, 3 * (SYMBOLS - 1)):
        draw = torch.Generator().manual_seed(100_000 * seed + near)
        right = []
        for _ in range(-(-asked // rows)):
            hay = haystack(rows, tokens, draw)
            needle = torch.randint(hay.keys.shape[1], (rows,), generator=draw)
            for row in range(rows):
                crowd(hay, row, int(needle[row]), near, draw)
            said = ask(model, prefill(model, hay), hay.keys[torch.arange(rows), needle])
            right.append(said == hay.values[torch.arange(rows), needle])
        found[str(near)] = score(torch.cat(right))
    return found


def crowd(hay: Haystack, row: int, needle: int, near: int, draw: torch.Generator):
    """Put `near` keys that differ from the needle's in one symbol in place of others, at random depths."""
    key, weight = int(hay.keys[row, needle]), [SYMBOLS**place for place in range(3)]
    alike = torch.tensor([key + (new - key // w % SYMBOLS) * w for w in weight for new in range(SYMBOLS)])
    alike = alike[alike != key]  # 765, all different
    free = torch.arange(hay.keys.shape[1])
    free = free[free != needle]
    slots = free[torch.randperm(len(free), generator=draw)[:near]]
    hay.keys[row, slots] = alike[torch.randperm(len(alike), generator=draw)[:near]]


# ---------------------------------------------------------------------------------------------------------------------


def job(arm: str, rate: float, seed: int, longest: int, changes: tuple[str, ...] = ("as trained",), **more) -> dict:
    steps = {"train_steps": RECIPE["train_steps"], "finish_steps": RECIPE["finish_steps"]}
    settings = {"longest": longest, "changes": list(changes), "breaks": False, "asked": ASKED}
    return {"arm": arm, "rate": rate, "seed": seed} | steps | settings | more


def arms() -> list[dict]:
    """Four arms at every rate with seed 0, and at their best rate with seeds 1 and 2; one run of each ablation.

    The long runs come first, so that no core is idle at the end.
    """
    decisive = {
        "iRoPE": {"longest": LENGTHS[-1], "changes": ("as trained", "temperature off"), "breaks": True},
        "local only": {"longest": LENGTHS[-1]},
        "all RoPE": {"longest": MIDDLE},
        "all NoPE": {"longest": MIDDLE},
    }
    best = [job(arm, RATES[arm], seed, **tests) for seed in range(3) for arm, tests in decisive.items()]
    sweep = [job(arm, rate, 0, TRAINED) for arm in decisive for rate in RECIPE["rates"] if rate != RATES[arm]]
    ablations = [job(arm, RATES["iRoPE"], 0, MIDDLE) for arm in list(ARMS)[4:] if arm != "chunk 64"]
    ablations += [job("chunk 64", RATES["iRoPE"], 0, MIDDLE, ("as trained", "no chunks", "no chunks, RoPE scaled"))]
    patient = [job(arm, RATES[arm], 0, MIDDLE, train_steps=3000) for arm in ("all RoPE", "all NoPE")]
    ablations += [job("all RoPE", RATES["all RoPE"], 0, MIDDLE, start="iRoPE")]
    return patient + best + ablations + sweep


def quick_arms() -> list[dict]:
    short = {"train_steps": 40, "finish_steps": 20, "asked": 8, "longest": 256}
    return [each | short for each in arms() if each["seed"] == 0 and each["rate"] == RATES["iRoPE"]]


if __name__ == "__main__":
    main("irope", __doc__, arms(), quick_arms(), run, RECIPE)
