"""`minillama4 needle --tokens 10M`: find one pair among millions, in a context 160,000 times as long as in training.

A haystack of key-value pairs (`evidence/recall.py`), of which no key comes twice, is read once; then its keys are asked
for, one at a time, each question being forgotten before the next. The model was trained on 64 tokens. Its local layers
never see more than a chunk of 16, so nothing in them is new at ten million tokens; the NoPE layer compares the question
with every token that there is. The keys of the NoPE layer do not depend on temperature, which acts on queries alone: so
one and the same cache also tells what is found without it.

What this is not: reading. A pair is four tokens side by side, never split by a border, and found by equal symbols.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..budget import cached_tokens, shape
from ..checkpoint import load_checkpoint
from ..roofline import parse_tokens
from .evidence.recall import KEYS, PAIR, TRAINED, ask, changed, haystack, prefill, wilson

LEAST, MOST = TRAINED, KEYS // 4 * PAIR  # tokens; more than a quarter of all keys cannot be drawn without repeating one
INSIDE, BESIDE = "inside a chunk", "beside a chunk border"


@dataclass(frozen=True)
class Question:
    """One needle, and whether its value was said."""

    token: int  # where its pair begins
    place: str  # INSIDE, or BESIDE: the first or the last pair of its chunk
    found: bool
    found_cold: bool  # without temperature


@dataclass(frozen=True)
class Needles:
    """What `needle` saw."""

    tokens: int  # of the context: the haystack, and room for the question
    pairs: int
    cache_bytes: int  # reserved for keys and values, nearly all in the NoPE layer
    prefill_seconds: float
    ask_seconds: float  # of all questions, with and without temperature
    questions: list[Question]

    @property
    def rate(self) -> float:
        return sum(question.found for question in self.questions) / len(self.questions)


def needle(
    tokens: int = 1 << 20, questions: int = 20, seed: int = 0, said: Callable[[str], None] = lambda line: None
) -> Needles:
    """Read a haystack of `tokens` tokens, then ask for `questions` of its pairs, every other one beside a border.

    said: is told what comes next, before it takes its time and memory. ValueError: fewer tokens than a training row,
    more than keys can be drawn for, or no question.
    """
    if not LEAST <= tokens <= MOST:
        raise ValueError(f"tokens is {tokens:,}; it must be {LEAST} to {MOST:,}")
    if questions < 1:
        raise ValueError(f"questions is {questions}; it must be at least 1")
    model = load_checkpoint("recall")
    cold = changed(model, temperature_tuning=False)
    draw = torch.Generator().manual_seed(seed)
    hay = haystack(1, tokens, draw)
    in_chunk = model.config.text.chunk_size // PAIR  # pairs a chunk
    chunks = hay.keys.shape[1] // in_chunk  # whole ones
    gib = kv_bytes(model, tokens) / 2**30
    said(f"{hay.keys.shape[1]:,} pairs, no key twice; their keys and values will take {gib:.2f} GiB")

    started = time.perf_counter()
    with tqdm(total=hay.tokens, desc="reading", unit="token", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        cache = prefill(model, hay, bar)
    read = time.perf_counter()
    answered = []
    for index in tqdm(range(questions), desc="asking", unit="question", disable=None, dynamic_ncols=True):
        beside = index % 2 == 1
        places = [0, in_chunk - 1] if beside else list(range(1, in_chunk - 1))
        place = places[int(torch.randint(len(places), (1,), generator=draw))]
        pair = int(torch.randint(chunks, (1,), generator=draw)) * in_chunk + place
        value = int(hay.values[0, pair])
        found, found_cold = (int(ask(each, cache, hay.keys[:, pair])) == value for each in (model, cold))
        answered.append(Question(pair * PAIR, BESIDE if beside else INSIDE, found, found_cold))
    asked = time.perf_counter()
    return Needles(tokens, hay.keys.shape[1], cache.nbytes, read - started, asked - read, answered)


def kv_bytes(model, tokens: int) -> int:
    """Of one sequence, in fp32."""
    return 4 * cached_tokens(model.config, tokens) * shape(model.config).kv_values


def report(seen: Needles) -> str:
    """The lines that the command prints."""
    lines = [
        f"{seen.tokens:,} tokens ({seen.tokens // TRAINED:,} times those of training) read in "
        f"{seen.prefill_seconds:.1f} s, {len(seen.questions)} questions asked twice in {seen.ask_seconds:.1f} s",
        f"{'needle':24}{'found':>10}{'without temperature':>24}",
    ]
    for place in (INSIDE, BESIDE):
        there = [question for question in seen.questions if question.place == place]
        if there:
            with_it, without = sum(q.found for q in there), sum(q.found_cold for q in there)
            lines.append(f"{place:24}{f'{with_it} of {len(there)}':>10}{f'{without} of {len(there)}':>24}")
    found, asked = sum(question.found for question in seen.questions), len(seen.questions)
    low, high = wilson(found, asked)
    lines.append(f"found {found} of {asked}: {found / asked:.0%} (95 % interval {low:.0%} to {high:.0%})")
    return "\n".join(lines)


def needle_command(tokens: str, questions: int, seed: int) -> str:
    """`minillama4 needle`: the report of a context such as "1M"."""
    return report(needle(parse_tokens(tokens, "--tokens"), questions, seed, said=print))
