"""Memory of the KV cache of any decoder with local and global layers: why 10M tokens are possible, and not cheap."""

import random

from ..exercise import Card, as_published, runs, same
from ..observe import call

CARD = Card("02", "KV bytes", difficulty=2, importance=5, minutes=15, trains="KV cache, what 10M tokens cost")

HINTS = (
    "Count for one layer and one token first: two vectors are kept, by each of which heads, and how long is each? Then "
    "ask of each kind of layer how many tokens it must keep.",
    "A NoPE layer may look back at everything, so it keeps every token. A local layer never looks out of its chunk: "
    "when a new chunk begins, the old one may go. How many tokens is that, at the most?",
    "per_token = 2 * num_kv_heads * head_dim * bytes_per_value. A NoPE layer keeps `tokens` of them, a local layer "
    "min(tokens, chunk_size), or `tokens` where chunk_size is None. Add up the layers of both kinds.",
)

ANSWERED_BY = ("minillama4.cache.KVCache", "minillama4.cache.LayerCache")

SCOUT = {
    "hidden_size": 5120, "num_layers": 48, "num_heads": 40, "num_kv_heads": 8, "head_dim": 128,
    "nope_layers": (3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47), "chunk_size": 8192,
}  # fmt: skip
# name -> (tokens, bytes a value, bytes). In bf16 36 local layers take 1.125 GiB and 12 NoPE layers all the rest.
KNOWN = {
    "Scout, 131,072 tokens in bf16: 7.125 GiB": (131_072, 2, 7_650_410_496),
    "Scout, 1,048,576 tokens in bf16: 49.125 GiB": (1_048_576, 2, 52_747_567_104),
    "Scout, 10,485,760 tokens in bf16: 481.125 GiB": (10_485_760, 2, 516_604_035_072),
    "Scout, 10,485,760 tokens in fp8: 240.5625 GiB": (10_485_760, 1, 258_302_017_536),
}


def draw(rng: random.Random) -> dict:
    """Sizes for which no two known mistakes give the same number; the NoPE layers have no rhythm."""
    layers, kv_heads = rng.choice((7, 10, 11)), rng.choice((3, 5))
    chunk_size = rng.choice((11, 13, 17))
    config = {
        "hidden_size": rng.choice((181, 191, 193, 197, 199)),
        "num_layers": layers,
        "num_heads": kv_heads * rng.randint(2, 4),
        "num_kv_heads": kv_heads,
        "head_dim": rng.choice((14, 22, 26)),
        "nope_layers": tuple(sorted(rng.sample(range(layers), 3))),
        "chunk_size": chunk_size,
    }
    short = chunk_size - rng.randint(2, 3)
    long = chunk_size * rng.randint(4, 6) + rng.randint(2, chunk_size - 2)
    return {"config": config, "short": short, "long": long, "bytes": 8}


def observe(function, inputs: dict) -> dict:
    config, size = inputs["config"], inputs["bytes"]
    seen = call("short", function, config, inputs["short"], size) | call("long", function, config, inputs["long"], size)
    for name, changes in _other(config).items():
        seen |= call(name, function, config | changes, inputs["long"], size)
    for name, (tokens, size, _) in KNOWN.items():
        seen |= call(name, function, SCOUT, tokens, size)
    return seen


def _other(config: dict) -> dict[str, dict]:
    """Models of another kind: all layers global, as in Llama Guard 4, and all local."""
    return {"global": {"chunk_size": None}, "local": {"nope_layers": ()}}


def judge(inputs: dict, observed: dict):
    config, tokens, size = inputs["config"], inputs["short"], inputs["bytes"]
    layers, chunk_size = config["num_layers"], config["chunk_size"]
    nope = len(config["nope_layers"])
    local = layers - nope
    vector = config["num_kv_heads"] * config["head_dim"] * size  # bytes of a token's keys, or of its values

    given = _given(config, tokens, size)
    right = truth(config, tokens, size)
    yield from runs(observed, "short", (), given, dtype="int")
    yield same(
        "in less than a chunk, every layer keeps a key and a value of every token", observed["short/value"], right,
        given, "Set sizes to 1 one by one: by how much does your number shrink? Which of them does it not depend on?",
        {
            "keys or values": (right // 2, "Attention compares with keys; what does it then add up, weighted?"),
            "queries as well": (right // 2 * 3, "Which later token will ever need the query of this one?"),
            "query heads": (
                right // config["num_kv_heads"] * config["num_heads"],
                "Five query heads of Scout share one key head. How many heads are kept for a token?",
            ),
            "hidden size": (
                2 * tokens * layers * config["hidden_size"] * size,
                "A key is what comes out of k_proj. How long is that, for all of its heads?",
            ),
            "one head": (right // config["num_kv_heads"], "How many heads have a key of their own?"),
            "no head_dim": (right // config["head_dim"], "How many numbers is the key of one head?"),
            "values counted, not bytes": (right // size, "What does your function do with bytes_per_value?"),
            "bf16 by heart": (right // size * 2, f"bytes_per_value is {size} here. Where is it in your function?"),
            "bits": (right * 8, "Is your number in bytes, or in bits?"),
            "another unit": (0, "Is your number in bytes? Dividing a small cache by 2**30 leaves what?"),
            "one layer": (right // layers, "How many layers have a cache?"),
            "NoPE layers only": (right // layers * nope, "Do local layers keep nothing?"),
            "local layers only": (right // layers * local, "Do NoPE layers keep nothing? No rotation, or no keys?"),
            "always a whole chunk": (
                2 * vector * (nope * tokens + local * chunk_size),
                "A chunk has room for more tokens than there are yet. How many of them are used?",
            ),
        },
    )  # fmt: skip

    tokens = inputs["long"]
    given = _given(config, tokens, size)

    def kept(by_nope: int, by_local: int, nope: int = nope) -> int:
        return 2 * vector * (nope * by_nope + (layers - nope) * by_local)

    rest = tokens % chunk_size
    yield from runs(observed, "long", (), given, dtype="int")
    yield same(
        "in a long context, local layers keep one chunk at the most, and NoPE layers everything",
        observed["long/value"], truth(config, tokens, size), given,
        "For one layer of each kind: what is the earliest key that the last query may see?",
        {
            "no cap": (kept(tokens, tokens), "May a query of a local layer see the chunk before its own?"),
            "a chunk everywhere": (
                kept(chunk_size, chunk_size), "Which layers carry information from one chunk to another, and how?",
            ),
            "kinds swapped": (
                kept(chunk_size, tokens), "Which kind sees the whole context: the rotary layers, or the NoPE layers?",
            ),
            "what the last chunk holds": (
                kept(tokens, rest), "Yours shrinks when a chunk begins. How much room did the one before it need?",
            ),
            "whole chunks": (
                kept(tokens, tokens - rest + chunk_size), "How many chunks must a local layer keep at a time?",
            ),
            "finished chunks": (kept(tokens, tokens - rest), "How many chunks must a local layer keep at a time?"),
            "two chunks": (
                kept(tokens, 2 * chunk_size), "Does a query of a local layer look into the chunk before its own?",
            ),
            "one token less": (
                kept(tokens, chunk_size - 1), "How many keys does the last query of a chunk see, its own included?",
            ),
            "one token more": (
                kept(tokens, chunk_size + 1), "When the first token of the next chunk comes, who needs the old chunk?",
            ),
            "every fourth layer": (
                kept(tokens, chunk_size, layers // 4), "Which layers are NoPE layers here? Does yours ask nope_layers?",
            ),
        },
    )  # fmt: skip

    asks = {
        "global": (
            "without chunks (chunk_size None), every layer keeps everything",
            "A layer that is not cut into chunks: how far back does it look?",
            {
                "NoPE layers only": (kept(tokens, 0), "Are layers without chunks layers without a cache?"),
            },
        ),
        "local": (
            "without NoPE layers, the cache stops growing",
            "No layer looks out of its chunk here. Where in your function could a NoPE layer come from?",
            {
                "every fourth layer": (
                    kept(tokens, chunk_size, layers // 4), "nope_layers is empty here. Which layers are NoPE layers?",
                ),
                "no layers at all": (0, "Without NoPE layers, how many local ones are left?"),
            },
        ),
    }  # fmt: skip
    for name, changes in _other(config).items():
        step, question, mistakes = asks[name]
        given = _given(config | changes, tokens, size)
        yield from runs(observed, name, (), given, dtype="int")
        want = truth(config | changes, tokens, size)
        yield same(step, observed[f"{name}/value"], want, given, question, mistakes)
    for name, (tokens, size, known) in KNOWN.items():
        given = _given(SCOUT, tokens, size)
        yield from as_published(name, observed, known, given)


def _given(config: dict, tokens: int, size: int) -> str:
    return f"{tokens:,} tokens, bytes_per_value {size}, " + ", ".join(f"{key} {value}" for key, value in config.items())


def truth(config: dict, tokens: int, size: int) -> int:
    """Token by token: what a layer still needs, and the most that this ever was."""
    total = 0
    for layer in range(config["num_layers"]):
        local = config["chunk_size"] is not None and layer not in config["nope_layers"]
        held, most = [], 0
        for position in range(tokens):
            if local:  # only what is in the same chunk as the token that comes now
                held = [old for old in held if old // config["chunk_size"] == position // config["chunk_size"]]
            held.append(position)
            most = max(most, len(held))
        keys = values = most * config["num_kv_heads"] * config["head_dim"] * size
        total += keys + values
    return total
