"""Answers to `irope-kv-bytes`."""

from bank import right, wrong


@right
def layer_by_layer(config, tokens, bytes_per_value):
    values = 0
    for layer in range(config["num_layers"]):
        ends = config["chunk_size"] is not None and layer not in config["nope_layers"]
        kept = config["chunk_size"] if ends and config["chunk_size"] < tokens else tokens
        for _ in ("key", "value"):
            values += kept * config["num_kv_heads"] * config["head_dim"]
    return values * bytes_per_value


def formula(config, tokens, size, *, vectors=2, heads=None, dim=None, nope=None, local=None, kept=None, chunk=None):
    """The right number, but for what is given. kept: of `tokens` in chunks of some size, what a local layer keeps."""
    heads = config["num_kv_heads"] if heads is None else heads
    dim = config["head_dim"] if dim is None else dim
    nope = len(config["nope_layers"]) if nope is None else nope
    local = config["num_layers"] - nope if local is None else local
    chunk = chunk or config["chunk_size"] or tokens
    return (nope * tokens + local * (kept or min)(tokens, chunk)) * vectors * heads * dim * size


@wrong("not written")
def stub(config, tokens, bytes_per_value):
    raise NotImplementedError()


@wrong("raises")
def as_attributes(config, tokens, bytes_per_value):
    return config.num_layers * tokens * bytes_per_value


@wrong("raises")
def always_a_chunk_size(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, chunk=min(tokens, config["chunk_size"]))


@wrong("type")
def in_gib(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value) / 2**30


@wrong("another unit")
def in_whole_gib(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value) // 2**30


@wrong("another unit")
def in_whole_gb(config, tokens, bytes_per_value):
    return round(formula(config, tokens, bytes_per_value) / 1e9)


@wrong("type")
def in_words(config, tokens, bytes_per_value):
    return f"{formula(config, tokens, bytes_per_value)} bytes"


@wrong("changes its input")
def takes_the_layers_out(config, tokens, bytes_per_value):
    nope = len(config.pop("nope_layers"))
    return formula(config, tokens, bytes_per_value, nope=nope)


@wrong("in less than a chunk, every layer keeps a key and a value of every token")
def tokens_alone(config, tokens, bytes_per_value):
    return tokens


@wrong("keys or values")
def keys_only(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, vectors=1)


@wrong("queries as well")
def q_k_and_v(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, vectors=3)


@wrong("query heads")
def query_heads(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, heads=config["num_heads"])


@wrong("hidden size")
def hidden_size(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, heads=1, dim=config["hidden_size"])


@wrong("one head")
def one_head(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, heads=1)


@wrong("no head_dim")
def one_number_a_head(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, dim=1)


@wrong("values counted, not bytes")
def counts_values(config, tokens, bytes_per_value):
    return formula(config, tokens, 1)


@wrong("bf16 by heart")
def two_bytes(config, tokens, bytes_per_value):
    return formula(config, tokens, 2)


@wrong("bits")
def bits(config, tokens, bytes_per_value):
    return formula(config, tokens, 8 * bytes_per_value)


@wrong("one layer")
def one_layer(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value) // config["num_layers"]


@wrong("NoPE layers only")
def nope_layers_only(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, local=0)


@wrong("local layers only")
def local_layers_only(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, nope=0, local=config["num_layers"] - len(config["nope_layers"]))


@wrong("always a whole chunk")
def whole_chunk_at_once(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, kept=lambda tokens, chunk: chunk)


@wrong("no cap")
def all_layers_global(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, nope=config["num_layers"])


@wrong("no cap")
def a_chunk_of_8192(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, chunk=8192)


@wrong("a chunk everywhere")
def all_layers_local(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, nope=0)


@wrong("kinds swapped")
def kinds_swapped(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, nope=config["num_layers"] - len(config["nope_layers"]))


@wrong("what the last chunk holds")
def sawtooth(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, kept=lambda tokens, chunk: tokens % chunk)


@wrong("what the last chunk holds")
def sawtooth_of_the_last_token(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, kept=lambda tokens, chunk: (tokens - 1) % chunk + 1)


@wrong("whole chunks")
def rounded_up(config, tokens, bytes_per_value):
    """As if a local layer kept all its chunks; right while there is one, since that one grows token by token."""

    def kept(tokens, chunk):
        return tokens if tokens <= chunk else -(-tokens // chunk) * chunk

    return formula(config, tokens, bytes_per_value, kept=kept)


@wrong("finished chunks")
def rounded_down(config, tokens, bytes_per_value):
    def kept(tokens, chunk):
        return tokens if tokens <= chunk else tokens // chunk * chunk

    return formula(config, tokens, bytes_per_value, kept=kept)


@wrong("two chunks")
def the_chunk_before_too(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, kept=lambda tokens, chunk: min(tokens, 2 * chunk))


@wrong("one token less")
def all_before_the_query(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, kept=lambda tokens, chunk: min(tokens, chunk - 1))


@wrong("one token more")
def and_the_next_one(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, kept=lambda tokens, chunk: min(tokens, chunk + 1))


@wrong("every fourth layer")
def nope_by_the_rhythm(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, nope=config["num_layers"] // 4)


@wrong("every fourth layer")
def empty_means_every_fourth(config, tokens, bytes_per_value):
    nope = len(config["nope_layers"]) or config["num_layers"] // 4
    return formula(config, tokens, bytes_per_value, nope=nope)


@wrong("no layers at all")
def nothing_without_nope(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value) if config["nope_layers"] else 0


@wrong("NoPE layers only")
def no_chunk_no_cache(config, tokens, bytes_per_value):
    return formula(config, tokens, bytes_per_value, local=None if config["chunk_size"] else 0)


@wrong("Scout, 1,048,576 tokens in bf16: 49.125 GiB")
def at_most_262144_tokens(config, tokens, bytes_per_value):
    return formula(config, min(tokens, 262_144), bytes_per_value)


@wrong("Scout, 131,072 tokens in bf16: 7.125 GiB")
def in_32_bits(config, tokens, bytes_per_value):
    """As a program in C may do, or numpy where it is told to."""
    return (formula(config, tokens, bytes_per_value) + 2**31) % 2**32 - 2**31


@wrong("Scout, 10,485,760 tokens in bf16: 481.125 GiB")
def at_most_a_million_tokens(config, tokens, bytes_per_value):
    return formula(config, min(tokens, 1_048_576), bytes_per_value)


@wrong("Scout, 10,485,760 tokens in fp8: 240.5625 GiB")
def at_least_two_bytes(config, tokens, bytes_per_value):
    return formula(config, tokens, max(2, bytes_per_value))


EQUIVALENT = {
    "min(tokens, chunk_size)  ->  min(chunk_size, tokens)": "the smaller of two numbers, in any order",
}
