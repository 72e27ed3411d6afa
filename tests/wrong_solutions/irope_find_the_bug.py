"""Answers to `irope-find-the-bug`."""

import torch
from bank import right, wrong

from minillama4.course.checks.irope_find_the_bug import (
    CHUNK,
    DECODE,
    INDEX,
    LAYERS,
    NORM,
    RIGHT,
    WINDOW,
    suspect,
)

TOKENS = 4 * CHUNK


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def weights(attend, layer, tokens=TOKENS, new=None, q=None):
    """[new, heads, tokens]: who looks at whom, of the last `new` of `tokens` tokens; all of them if it is None."""
    q = normal(TOKENS, 3, 8) if q is None else q
    k = normal(TOKENS, 3, 8).flip(0)[:tokens]
    v = torch.eye(tokens)[:, None].expand(-1, 3, -1)
    return attend(q[:tokens][-(new or tokens) :], k, v, layer)


def sees_from_far(attend, layer=0, new=None):
    return bool((weights(attend, layer, new=new)[-1, :, 0] > 0).any())


def sees_the_chunk_before(attend, layer=0, new=None):
    """Does the first query of the third chunk?"""
    return bool((weights(attend, layer, 2 * CHUNK + 1, new)[-1, :, 2 * CHUNK - 1] > 0).any())


def alone_is_other(attend, layer, tokens=TOKENS, q=None):
    together, alone = weights(attend, layer, tokens, q=q)[-1:], weights(attend, layer, tokens, new=1, q=q)
    return not torch.allclose(together, alone, atol=1e-5)


def one_norm(attend, layer=0, heads=(0,), watch=2):
    q = normal(TOKENS, 3, 8)
    louder = q.clone()
    louder[:, list(heads)] *= 50
    return not torch.allclose(weights(attend, layer)[:, watch], weights(attend, layer, q=louder)[:, watch], atol=1e-3)


def investigation(**changes):
    """Asks for one bug after another, with other experiments, or none (None), for what is given."""
    experiments = {
        "layers": sees_from_far,
        "window": sees_the_chunk_before,
        "decode": lambda attend: alone_is_other(attend, 1),
        "norm": one_norm,
        "index": lambda attend: alone_is_other(attend, 7),
    }
    assert set(changes) <= set(experiments)
    order = [*changes, *(name for name in experiments if name not in changes)]  # what is given comes first
    found = {"layers": LAYERS, "window": WINDOW, "decode": DECODE, "norm": NORM, "index": INDEX}

    def find_bug(attend):
        for name in order:
            experiment = changes.get(name, experiments[name])
            if experiment is not None and experiment(attend):
                return found[name]
        return RIGHT

    return find_bug


other_experiments = right(investigation())


@right
def by_gradients(attend):
    """Who sees whom, and what acts on what, by derivatives instead of weights; v is noise."""
    k, v = normal(TOKENS, 2, 4), normal(TOKENS, 2, 6)

    def push(layer, row, new, head=0):
        q, values = normal(TOKENS, 2, 4).flip(0).requires_grad_(), v.clone().requires_grad_()
        out = attend(q[row + 1 - new : row + 1], k[: row + 1], values[: row + 1], layer)[-1, head]
        return (out, *torch.autograd.grad(out.square().sum(), [q, values]))

    border, last = 2 * CHUNK, TOKENS - 1
    if push(3, last, last + 1)[2][0].abs().sum() == 0:
        return LAYERS
    _, by_q, by_v = push(0, border, border + 1)
    if by_v[border - 1].abs().sum() > 0:
        return WINDOW
    if push(0, border, 1)[2][border - 1].abs().sum() > 0:
        return DECODE
    if push(0, last, last + 1)[1][last, 1].abs().sum() > 0:
        return NORM
    return RIGHT if torch.allclose(push(3, last, 1)[0], push(3, last, 2 * CHUNK)[0], atol=1e-5) else INDEX


@wrong("not written")
def stub(attend):
    raise NotImplementedError()


@wrong("type")
def in_words(attend):
    return "window"


@wrong("type")
def a_truth_value(attend):
    return sees_the_chunk_before(attend)


@wrong("type")
def nothing_found(attend):
    if sees_the_chunk_before(attend):
        return WINDOW


@wrong("raises")
def called_without_a_cache(attend):
    return int(attend(normal(CHUNK, 3, 8), 0).sum())


@wrong("raises")
def with_a_batch(attend):
    x = normal(1, TOKENS, 3, 8)
    return int(attend(x, x, x, 0).sum())


@wrong("raises")
def more_queries_than_keys(attend):
    x = normal(TOKENS, 3, 8)
    return int(attend(x, x[:CHUNK], x[:CHUNK], 0).sum())


@wrong("no bug")
def counts_from_one(attend):
    return 1 + other_experiments(attend)


@wrong("one answer for all")
def always_the_first(attend):
    return WINDOW


@wrong("one answer for all")
def looks_at_shapes(attend):
    out = weights(attend, 0)
    return RIGHT if out.shape == (TOKENS, 3, TOKENS) and out.dtype == torch.float32 else NORM


@wrong("one answer for all")
def reads_the_name(attend):
    said = f"{attend.__name__} {attend.__qualname__} {attend.__doc__} {attend.__defaults__} {attend.__code__.co_consts}"
    words = {WINDOW: "window", LAYERS: "elsewhere", DECODE: "decode", NORM: "norm", INDEX: "index"}
    return next((bug for bug, word in words.items() if word in said), RIGHT)


@wrong("one answer for all")
def reads_the_closure(attend):
    """Whatever whole number it holds, if that is the number of a bug."""
    held = [cell.cell_contents for cell in attend.__closure__ or ()]
    return next((value for value in held if value in range(1, 6)), RIGHT)


@wrong("one answer for all")
def compared_with_each_suspect(attend):
    """No use: a planted one has another theta and another scale."""
    for bug in (RIGHT, WINDOW, LAYERS, DECODE, NORM, INDEX):
        if all(
            torch.allclose(weights(attend, layer, new=new), weights(suspect(bug), layer, new=new), atol=1e-5)
            for layer in (0, 1, 3)
            for new in (1, TOKENS)
        ):
            return bug
    return RIGHT


# What an experiment does not see.
in_one_chunk = wrong("window missed")(
    investigation(window=lambda attend: bool((weights(attend, 0, CHUNK)[-1, :, 0] == 0).any()))
)
a_chunk_away = wrong("window missed")(
    investigation(window=lambda attend: bool((weights(attend, 0, 2 * CHUNK)[-1, :, CHUNK - 1] > 0).any()))
)
layers_1_and_2 = wrong("NoPE elsewhere missed")(
    investigation(
        layers=lambda attend: sees_from_far(attend, 1) or sees_from_far(attend, 2),
        window=lambda attend: sees_the_chunk_before(attend, 1),
        norm=lambda attend: one_norm(attend, 1),
    )
)
a_call_of_two = wrong("decode without chunk missed")(
    investigation(
        decode=lambda attend: not torch.allclose(weights(attend, 0)[-2:], weights(attend, 0, new=2), atol=1e-5)
    )
)
decode_in_the_first_chunk = wrong("decode without chunk missed")(
    investigation(decode=lambda attend: alone_is_other(attend, 0, tokens=CHUNK))
)
decode_on_a_global_layer = wrong("decode without chunk missed")(
    investigation(decode=None, index=lambda attend: alone_is_other(attend, 3))
)
all_heads_louder = wrong("one norm missed")(
    investigation(norm=lambda attend: one_norm(attend, layer=1, heads=(0, 1, 2)))
)
norm_on_a_global_layer = wrong("one norm missed")(
    investigation(norm=lambda attend: one_norm(attend, layer=3) and one_norm(attend, layer=7))
)
short_of_floor_scale = wrong("call index missed")(
    investigation(index=lambda attend: alone_is_other(attend, 3, tokens=3))
)
equal_logits = wrong("call index missed")(
    investigation(index=lambda attend: alone_is_other(attend, 3, q=torch.zeros(TOKENS, 3, 8)))
)
index_on_a_local_layer = wrong("call index missed")(
    investigation(decode=lambda attend: alone_is_other(attend, 0), index=lambda attend: alone_is_other(attend, 1))
)
prefills_alone = wrong("decode without chunk missed")(investigation(decode=None, index=None))

# One taken for another.
any_other_chunk_is_a_window = wrong("NoPE elsewhere taken for a window")(investigation(window=sees_the_chunk_before))
any_other_chunk_is_a_layer = wrong("window taken for NoPE elsewhere")(investigation(layers=sees_the_chunk_before))
the_window_in_decode = wrong("window taken for decode without chunk")(
    investigation(decode=lambda attend: sees_the_chunk_before(attend, new=1))
)
one_query_at_a_time = wrong("decode without chunk taken for a window")(
    investigation(window=lambda attend: sees_the_chunk_before(attend, new=1) and not sees_from_far(attend))
)
one_query_from_far = wrong("decode without chunk taken for NoPE elsewhere")(
    investigation(layers=lambda attend: sees_from_far(attend, new=1))
)
far_in_decode = wrong("NoPE elsewhere taken for decode without chunk")(
    investigation(decode=lambda attend: sees_from_far(attend, new=1))
)
no_norm_at_all = wrong("NoPE elsewhere taken for one norm")(
    investigation(norm=lambda attend: one_norm(attend, heads=(2,)))
)
decode_is_not_prefill = wrong("decode without chunk taken for call index")(
    investigation(index=lambda attend: alone_is_other(attend, 0) or alone_is_other(attend, 3))
)
prefill_is_not_decode = wrong("call index taken for decode without chunk")(
    investigation(decode=lambda attend: alone_is_other(attend, 0) or alone_is_other(attend, 3))
)


@wrong("NoPE elsewhere taken for call index")
def scaled_on_layer_0(attend):
    """Twice the query on a rotary layer changes nothing; where it does, a temperature is blamed."""
    louder = weights(attend, 0, q=2 * normal(TOKENS, 3, 8))
    return INDEX if not torch.allclose(louder, weights(attend, 0), atol=1e-3) else other_experiments(attend)


# False alarms.
expects_a_window = wrong("right taken for a window")(
    investigation(window=lambda attend: bool((weights(attend, 0)[2 * CHUNK + 2, :, 2 * CHUNK - 1] == 0).all()))
)
counts_layers_from_one = wrong("right taken for NoPE elsewhere")(
    investigation(layers=lambda attend: not sees_from_far(attend, 4))
)
asks_a_global_layer = wrong("right taken for decode without chunk")(
    investigation(decode=lambda attend: sees_from_far(attend, 3, new=1))
)
watches_the_loud_head = wrong("right taken for one norm")(
    investigation(norm=lambda attend: one_norm(attend, layer=3, heads=(0,), watch=0))
)


@wrong("right taken for call index")
def compares_with_another_query(attend):
    equal = torch.allclose(weights(attend, 3)[CHUNK], weights(attend, 3, new=1)[0], atol=1e-5)
    return other_experiments(attend) or (RIGHT if equal else INDEX)


EQUIVALENT = {
    "3  ->  4": "a longer context shows the same",
    "3  ->  2": "one border is enough to be out of a window too",
    "2  ->  3": "three heads show what two heads show",
    "1  ->  2": "the query or the key beside it is in the same chunk",
    "0  ->  1": "another seed, local layer, head or early key shows the same",
    "0  ->  -1": "another seed, and of two heads the last is the other one",
    "9  ->  10": "any loud head will do",
    "9  ->  8": "any loud head will do",
    "q[:, 0] *= 9  ->  q[:, 0] /= 9": "a head that falls silent betrays one norm as well",
    "CHUNK - 1  ->  1": "a window that ends at position CHUNK begins at 1",
    "torch.randn(2, tokens, heads, 6, generator=torch.Generator().manual_seed(0))  ->  "
    "torch.randn(2, tokens, heads, 6)": ("any numbers will do, drawn anew or not"),
    "torch.Generator().manual_seed(0)  ->  torch.Generator()": "any numbers will do, and torch has a seed of its own",
    "torch.allclose(attend(q[-1:], k, v, layer), attend(q, k, v, layer)[-1:], atol=1e-05)  ->  "
    "torch.allclose(attend(q[-1:], k, v, layer), attend(q, k, v, layer)[-1:])": (
        "rounding may be within the relative tolerance alone"
    ),
    "torch.allclose(attend(q[-1:], k, v, layer), attend(q, k, v, layer)[-1:], atol=1e-05)  ->  "
    "torch.allclose(attend(q, k, v, layer)[-1:], attend(q[-1:], k, v, layer), atol=1e-05)": (
        "either of two may be compared with the other"
    ),
    "torch.allclose(attend(q, k, v, 0)[:, 1], local[:, 1], atol=1e-05)  ->  "
    "torch.allclose(attend(q, k, v, 0)[:, 1], local[:, 1])": ("rounding may be within the relative tolerance alone"),
    "torch.allclose(attend(q, k, v, 0)[:, 1], local[:, 1], atol=1e-05)  ->  "
    "torch.allclose(local[:, 1], attend(q, k, v, 0)[:, 1], atol=1e-05)": (
        "either of two may be compared with the other"
    ),
}
