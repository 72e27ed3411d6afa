"""Key-value recall: the task on which lesson 02 compares ways of giving a model positions, and how it is learned.

A context is a list of pairs, four tokens each: a key of three symbols, then its value. At the end comes one of the keys
again, and the model has to say its value. Three symbols of 256 make 16.7 million keys, so that even ten million tokens
hold no key twice. A context is `TRAINED` tokens long in training and up to 160,000 times that in the tests.

Pairs begin at every fourth token and chunks are a multiple of that, so no pair is split by a chunk border, unless a
test wants that (`haystack(..., dropped=2)`).

Shapes: keys [rows, pairs] are numbers below KEYS, values [rows, pairs] are numbers below VALUES.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cache import KVCache
from ...config import Llama4Config, TextConfig
from ...model import Llama4
from ...muon import Muon
from ...trace import trace
from .study import answers

SYMBOLS, KEY, VALUES = 256, 3, 32  # a key is KEY symbols; the values have ids of their own, above the symbols
PAIR = KEY + 1  # tokens
KEYS = SYMBOLS**KEY
TRAINED = 64  # tokens of a training row, which is also from where on temperature acts, as Scout's 8,192
PIECE = 8192  # tokens a call in prefill, over all rows

ROWS, WARMUP, LOGGED = 64, 50, 50  # rows a step; steps; steps between two exams
ENOUGH = 0.99  # of the repeated keys in fresh rows: from here on the learning rate falls


def recall_config(**changes) -> Llama4Config:
    """Scout in small: three local RoPE layers, then one NoPE layer that sees everything; `changes` are TextConfig's."""
    text = TextConfig(
        vocab_size=SYMBOLS + VALUES, hidden_size=64, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=48,
        num_experts=0, expert_width=0, dense_width=32, moe_layers=(), nope_layers=(3,), chunk_size=16,
        max_positions=10_485_760, rope_theta=10_000.0, qk_norm=False, floor_scale=TRAINED,
    )  # fmt: skip
    return Llama4Config(replace(text, **changes), None, bos_token=0, stop_tokens=(), pad_token=0, patch_token=200092)


def changed(model: Llama4, **changes) -> Llama4:
    """The same weights (shared, not copied) under another config: what a mechanism does that has no weights."""
    with torch.device("meta"):
        other = Llama4(replace(model.config, text=replace(model.config.text, **changes)))
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Data


def symbols(keys: Tensor) -> Tensor:
    """Key numbers -> token ids, one more axis of KEY at the end."""
    return torch.stack([keys // SYMBOLS**place % SYMBOLS for place in range(KEY)], -1)


def as_tokens(keys: Tensor, values: Tensor) -> Tensor:
    """[rows, pairs] each -> token ids [rows, pairs * PAIR]."""
    return torch.cat([symbols(keys), SYMBOLS + values[..., None]], -1).flatten(-2)


def training_rows(rows: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids [rows, TRAINED], and which of them are values of a key that came before: what the model has to say.

    About half of the pairs are copies, each of any pair before it; so what was copied is copied again more often, as
    names are in texts. (In two trials with all pairs copied equally often, iRoPE had not learned the task after 1,000
    steps.) Half of the rows take their keys from all 16.7 million; the others from the 27 keys that three symbols a
    place make, so that most keys share one or two symbols, and only all three together name a pair.
    """
    slots, near = TRAINED // PAIR, rows // 2
    wide_keys = torch.randint(KEYS, (rows - near, slots), generator=draw)  # one row in 100,000 holds a key twice
    menu = torch.rand(near, KEY, SYMBOLS, generator=draw).argsort(-1)[..., :3]  # [near, KEY, 3 symbols]
    chosen = torch.rand(near, 3**KEY, generator=draw).argsort(-1)[:, :slots]  # no key twice
    choice = torch.stack([chosen // 3**place % 3 for place in range(KEY)], 1)  # [near, KEY, slots]
    near_keys = (menu.gather(2, choice) * SYMBOLS ** torch.arange(KEY)[:, None]).sum(1)
    keys, values = torch.cat([wide_keys, near_keys]), torch.randint(VALUES, (rows, slots), generator=draw)

    slot = torch.arange(slots)
    repeated = torch.rand(rows, slots, generator=draw) < 0.5
    repeated[:, 0] = False
    source = torch.where(repeated, (torch.rand(rows, slots, generator=draw) * slot).long(), slot)  # any earlier slot
    for i in range(1, slots):  # an earlier slot may itself repeat one
        source[:, i] = source.gather(1, source[:, i : i + 1])[:, 0]
    say = F.pad(repeated[..., None], (KEY, 0)).flatten(1)  # the last token of its pair
    return as_tokens(keys.gather(1, source), values.gather(1, source)), say


@dataclass
class Haystack:
    """Pairs without a key twice in a row, and their tokens; the question comes behind them."""

    keys: Tensor  # [rows, pairs]
    values: Tensor  # [rows, pairs]
    dropped: int = 0  # tokens missing in front, so that borders lie elsewhere

    @property
    def tokens(self) -> int:
        return self.keys.shape[1] * PAIR - self.dropped

    def ids(self, start: int, end: int) -> Tensor:
        """Tokens start ... end - 1 of the context: [rows, end - start]. Made when asked for: ten million are 84 MB."""
        start, end = start + self.dropped, end + self.dropped
        pairs = slice(start // PAIR, -(-end // PAIR))
        ids = as_tokens(self.keys[:, pairs], self.values[:, pairs])
        return ids[:, start - pairs.start * PAIR : end - pairs.start * PAIR]


def distinct_keys(count: int, draw: torch.Generator) -> Tensor:
    """[count] different keys in random order. ValueError: more than a quarter of all keys, where this gets slow."""
    if count > KEYS // 4:
        raise ValueError(f"count is {count:,}; at most {KEYS // 4:,} distinct keys can be drawn")
    keys = torch.randint(KEYS, (2 * count + 64,), generator=draw).unique()
    return keys[torch.randperm(len(keys), generator=draw)[:count]]


def haystack(rows: int, tokens: int, draw: torch.Generator, dropped: int = 0) -> Haystack:
    """A context of `tokens` tokens with its question: the last PAIR of them are left for that."""
    pairs = tokens // PAIR - 1
    keys = torch.stack([distinct_keys(pairs, draw) for _ in range(rows)])
    return Haystack(keys, torch.randint(VALUES, (rows, pairs), generator=draw), dropped)


# ---------------------------------------------------------------------------------------------------------------------
# Asking


@torch.no_grad()
def prefill(model: Llama4, hay: Haystack, bar=None) -> KVCache:
    """A cache that holds the haystack, with room for a question. The last layer computes no query."""
    rows, tokens = len(hay.keys), hay.tokens
    cache, piece = model.new_cache(rows, tokens + PAIR), max(PAIR, PIECE // rows)
    for start in range(0, tokens, piece):
        ids = hay.ids(start, min(start + piece, tokens))
        model(ids, cache=cache, logits="none")
        if bar is not None:
            bar.update(ids.shape[1])
    return cache


@torch.no_grad()
def ask(model: Llama4, cache: KVCache, keys: Tensor) -> Tensor:
    """The value that the model says for each key: [rows] -> [rows]. The cache then forgets the question.

    Forgetting is to go back: what comes next is written over the question. In a local layer that works while the
    question lies in one chunk, for the next chunk would be written over what the question must still find.
    ValueError: a question that crosses a chunk border.
    """
    held, chunk = cache.length, model.config.text.chunk_size
    if chunk is not None and held % chunk + KEY > chunk:
        raise ValueError(f"the cache holds {held} tokens; the question would cross the border of a chunk of {chunk}")
    logits = model(symbols(keys), cache=cache, logits="last")[:, 0]  # [rows, vocab]
    cache.length = held
    return logits[:, SYMBOLS:].argmax(-1)


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % interval of a rate (Wilson, 1927): unlike right / asked +- 2 s it is sound near 0 and 1."""
    z, rate = 1.96, right / asked
    middle, half = rate + z * z / (2 * asked), z * math.sqrt(rate * (1 - rate) / asked + (z / (2 * asked)) ** 2)
    scale = 1 + z * z / asked
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


# ---------------------------------------------------------------------------------------------------------------------
# Learning


@torch.no_grad()
def exam(model: Llama4, rows: int = 256) -> dict:
    """On fresh training rows: the accuracy, and the two steps of recall, each as the best head's share of attention.

    "bind": what a value pays to the three symbols of its own pair, below the last layer. "match": what the last symbol
    of a repeated key pays, in the last layer, to the values that followed this key before.
    """
    ids, say = training_rows(rows, torch.Generator().manual_seed(7))
    _, right = answers(model, ids, say)
    ids, say, layers = ids[-64:], say[-64:], range(model.config.text.num_layers)  # of these, near keys
    with trace(model, attention=layers) as seen:
        model.hidden_states(ids)
    by_pair = (-1, PAIR)
    paid = torch.stack([seen.attention[layer].unflatten(3, by_pair).unflatten(2, by_pair) for layer in layers])
    # paid: [layers, rows, heads, pair, place, pair, place], from query to key
    bind = paid[:-1, ..., KEY, :, :KEY].sum(-1).diagonal(dim1=-2, dim2=-1).mean((1, 3))  # [layers - 1, heads]
    keys = ids.unflatten(1, by_pair)[..., :KEY]  # [rows, pair, KEY]
    same = (keys[:, :, None] == keys[:, None]).all(-1).tril(-1)  # [rows, pair, earlier pair]
    match = (paid[-1][..., KEY - 1, :, KEY] * same[:, None]).sum(-1)  # [rows, heads, pair]
    match = match.transpose(1, 2)[say.unflatten(1, by_pair)[..., -1]].mean(0)  # [heads]
    return {"accuracy": float(right.float().mean()), "bind": float(bind.max()), "match": float(match.max())}


def learn(model: Llama4, rate: float, seed: int, most: int, finish: int, fresh: bool = True) -> dict:
    """Train until the exam is passed, then `finish` steps more while the learning rate falls to zero.

    most: steps after which training ends, passed or not; the last `finish` of them are the falling ones. Returned:
    whether it passed, the step at which it did, all steps, and the exams as lists. fresh: from random weights.
    """
    draw, passed = torch.Generator().manual_seed(1000 + seed), None
    if fresh:
        model.reset_parameters(torch.Generator().manual_seed(seed))
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or not name.startswith("layers.")]
    optimizers = [
        Muon(matrices, lr=rate, weight_decay=0.0),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    history = {"steps": [], "losses": [], "accuracy": [], "bind": [], "match": []}
    step, end = 0, most
    while step < end:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP, (end - step) / finish)
        losses, _ = answers(model, *training_rows(ROWS, draw))
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % LOGGED == 0 or step == end:
            result = exam(model)
            if passed is None and result["accuracy"] >= ENOUGH:
                passed, end = step, min(end, step + finish)
            history["steps"].append(step)
            history["losses"].append(round(losses.mean().item(), 4))
            for name in ("accuracy", "bind", "match"):
                history[name].append(round(result[name], 4))
    model.eval()
    return {"learned": passed is not None, "passed_at": passed, "steps": step, "history": history}
