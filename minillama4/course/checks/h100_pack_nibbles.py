"""Pack nibbles: two numbers of 4 bits a byte, and back with their signs, in an order that both ends know."""

import random
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode

from ..exercise import Card, Step, runs, same
from ..observe import call
from .fusion_patchify import calls_of

CARD = Card(
    "05", "Pack nibbles", difficulty=2, importance=4, minutes=15, trains="bits, unsigned bytes, order in memory"
)

HINTS = (
    "A byte is 16 * high + low, each from 0 to 15. What do you add to -8, ..., 7 to get there, and which two halves of "
    "a row meet in its bytes?",
    "low, high = (numbers + 8).to(torch.uint8).chunk(2, dim=-1) are the two halves. `high << 4` moves one out of the "
    "way, and `|` joins two numbers that have no bit in common.",
    "packed & 15 is the low half and packed >> 4 the high one; torch.cat lays them one behind the other. Make them "
    "int8 before the 8 is taken off, since a uint8 has no -5.",
)

ANSWERED_BY = ("minillama4.cuda.int4.quantise", "minillama4.cuda.int4.dequantise")

FEW, MORE = (2, 3, 8), {"numbers": (2, 3, 40), "rows": (4, 15, 8)}  # shapes whose calls of torch are counted
TO_THE_HOST = ("item", "tolist", "numpy", "cpu", "__array__", "__int__", "__index__", "__bool__", "__float__")


def draw(rng: random.Random) -> dict:
    """Everything is drawn from what tells mistakes apart: one number below 0 and one above, and no halves alike."""
    n = 2 * rng.choice((5, 7, 8, 11))
    low, high = rng.choice([(low, high) for low in range(-7, -1) for high in range(2, 7) if high != low + 8])
    every = [(low, high) for low in range(-8, 8) for high in range(-8, 8)]
    rng.shuffle(every)
    return {
        "pair": torch.tensor([low, high], dtype=torch.int8),
        "row": _numbers(rng, n),
        "rows": torch.stack([_numbers(rng, 6) for _ in range(2 * 4)]).unflatten(0, (2, 4)),
        "all": torch.tensor(every, dtype=torch.int8).T.flatten(),  # [512]
        "byte": torch.tensor([16 * (high + 8) + low + 8], dtype=torch.uint8),
        "bytes": torch.tensor(rng.sample(range(256), n // 2 + 3), dtype=torch.uint8),
        "table": torch.tensor(rng.sample(range(256), 3 * 4 * 5), dtype=torch.uint8).view(3, 4, 5),
        "every": torch.tensor(rng.sample(range(256), 256), dtype=torch.uint8),
    }


def _numbers(rng: random.Random, n: int) -> torch.Tensor:
    """[n] int8 in which no other pairs give the same bytes."""
    while True:
        row = torch.tensor([rng.randint(-8, 7) for _ in range(n)], dtype=torch.int8)
        low, high = row[: n // 2], row[n // 2 :]
        if not torch.equal(low, row[0::2]) and not torch.equal(high, row[1::2]) and not torch.equal(high, high.flip(0)):
            return row


def observe(functions, inputs: dict) -> dict:
    def pack(numbers):
        return functions.pack(numbers)

    def unpack(packed):
        return functions.unpack(packed)

    seen = {}
    for name in ("pair", "row", "rows", "all"):
        seen |= call(name, pack, inputs[name])
    for name in ("byte", "bytes", "table", "every"):
        seen |= call(name, unpack, inputs[name])
    for name, function, dtype in (("pack", pack, torch.int8), ("unpack", unpack, torch.uint8)):
        for what, shape in {"few": FEW, **MORE}.items():
            seen |= call(f"{name}_{what}", calls_of(function), torch.zeros(shape, dtype=dtype))
        seen |= call(f"{name}_host", on_the_device(function), torch.zeros(FEW, dtype=dtype))
    return seen


def on_the_device(function):
    """`function`, where whatever would bring a tensor of a GPU to the host is an error.

    (A tensor without values, of device "meta", would do the same, but torch takes seconds to get ready for it.)
    """

    class Watch(TorchFunctionMode):
        def __torch_function__(self, operation, types, args=(), kwargs=None):
            name = getattr(operation, "__name__", "")
            kwargs = kwargs or {}
            if name in TO_THE_HOST or name == "to" and "cpu" in [*args[1:], *kwargs.values()]:
                raise RuntimeError(f"{name} brings numbers of a GPU to the host")
            return operation(*args, **kwargs)

    def watched(*arguments):
        with Watch():
            return function(*arguments)

    return watched


def judge(inputs: dict, observed: dict):
    yield from _packed(inputs, observed)
    yield from _unpacked(inputs, observed)
    for name in ("pack", "unpack"):
        yield from _all_at_once(name, observed)


def _packed(inputs: dict, observed: dict) -> Iterator[Step]:
    pair = inputs["pair"]
    low, high = pair.tolist()
    given = f"pack of numbers {pair.tolist()}, so number 0 is {low} and number n / 2 is {high}"
    yield from runs(observed, "pair", [1], given, dtype="uint8")

    def byte(value: int) -> torch.Tensor:
        return torch.tensor([value % 256])

    yield same(
        "8 is added, and the first half goes low", observed["pair/value"], byte(low + 8 + 16 * (high + 8)), given,
        "Write both numbers plus 8 as four bits, and your byte as eight. Where is each of them?",
        {
            "halves exchanged": (byte(high + 8 + 16 * (low + 8)), "Which of the two is in your lowest four bits?"),
            "8 not added": (
                byte(low % 16 + 16 * (high % 16)),
                "Is nibble 0 the number 0 in yours? The task adds 8: which number has nibble 0 then?",
            ),
            "8 not added, halves exchanged": (
                byte(high % 16 + 16 * (low % 16)),
                "Is nibble 0 the number 0 in yours? The task adds 8. And which of the two is in your lowest four bits?",
            ),
            "a sign over both halves": (
                byte(low | 16 * high), f"What is {low} in eight bits? Which of them reach into the other half?",
            ),
            "not moved": (
                byte((low + 8) | (high + 8)), "Both nibbles are in the same four bits. Which operation moves bits up?",
            ),
            "moved too far": (byte(low + 8 + 32 * (high + 8)), "By how many places must bits move to lie above four?"),
        },
    )  # fmt: skip

    row = inputs["row"]
    n = len(row)
    given = f"pack of numbers {row.tolist()}, n = {n}"
    yield from runs(observed, "row", [n // 2], given, dtype="uint8")
    code = row.long() + 8
    yield same(
        "number j meets number j + n / 2", observed["row/value"], _joined(code[: n // 2], code[n // 2 :]), given,
        "Take your byte 0 apart. Which two numbers of the row are in it?",
        {
            "neighbours": (
                _joined(code[0::2], code[1::2]), f"Which number is beside number 0 in your byte 0: 1, or {n // 2}?",
            ),
            "halves against each other": (
                _joined(code[: n // 2], code[n // 2 :].flip(0)), "Which number is beside number 0 in your byte 0?",
            ),
        },
    )  # fmt: skip
    rows = inputs["rows"]
    given = f"pack of numbers {list(rows.shape)}, such as {rows[0, 0].tolist()}"
    yield from runs(observed, "rows", [*rows.shape[:-1], 3], given, dtype="uint8")
    yield same(
        "each row is packed by itself", observed["rows/value"], packed_truth(rows), given,
        "One row alone came out right. Which axis do you take halves of when there are three?",
    )  # fmt: skip
    given = "pack of all 256 pairs of numbers, in any order"
    yield from runs(observed, "all", [256], given, dtype="uint8")
    yield same(
        "every pair has its byte", observed["all/value"], packed_truth(inputs["all"]), given,
        "Which two numbers are in the pair that comes out wrong? What is special about them, or about their bits?",
    )  # fmt: skip


def _unpacked(inputs: dict, observed: dict) -> Iterator[Step]:
    byte = inputs["byte"]
    low, high = int(byte) % 16, int(byte) // 16
    given = f"unpack of byte {int(byte)}, which is 16 * {high} + {low}"
    yield from runs(observed, "byte", [2], given, dtype="int8")
    yield same(
        "low half first, and 8 is taken off", observed["byte/value"], torch.tensor([low - 8, high - 8]), given,
        "Which number has the lowest four bits, and what becomes of it after they are cut out?",
        {
            "halves exchanged": (torch.tensor([high - 8, low - 8]), "From which half of the byte is number 0?"),
            "8 not taken off": (torch.tensor([low, high]), "Which number is stored as 8, and what do you make of it?"),
            "a sign bit": (
                torch.tensor([low, high - 16]), "Is number -1 stored as 15 here? How does `pack` say below zero?",
            ),
            "the shift keeps the sign": (
                torch.tensor([low - 8, high - 24]),
                "How do the upper bits of a byte above 127 come down in yours: with zeros behind them, or with ones?",
            ),
            "low half not cut out": (
                torch.tensor([int(byte) - 8, high - 8]).to(torch.int8), "How many bits has your first number?",
            ),
        },
    )  # fmt: skip

    for name, what in (("bytes", "each half of a row lies together"), ("table", "each row is unpacked by itself")):
        packed = inputs[name]
        given = f"unpack of bytes {packed.tolist() if packed.ndim == 1 else list(packed.shape)}"
        *before, m = packed.shape
        yield from runs(observed, name, [*before, 2 * m], given, dtype="int8")
        low, high = packed.long() % 16 - 8, packed.long() // 16 - 8
        yield same(
            what, observed[f"{name}/value"], unpacked_truth(packed), given,
            "Write down where your first numbers come from: which byte, and which half of it?",
            {
                "neighbours": (
                    torch.stack([low, high], -1).flatten(-2), "Are your numbers 0 and 1 from the same byte?",
                ),
            },
        )  # fmt: skip
    given = "unpack of all 256 bytes, in any order"
    yield from runs(observed, "every", [512], given, dtype="int8")
    yield same(
        "every byte has its pair", observed["every/value"], unpacked_truth(inputs["every"]), given,
        "Which byte is it that comes out wrong? What does each line of yours make of its bits?",
    )  # fmt: skip


def _all_at_once(name: str, observed: dict) -> Iterator[Step]:
    for what, shape in {"few": FEW, **MORE}.items():  # what is returned was looked at above
        yield from list(runs(observed, f"{name}_{what}", [], f"{name} of {list(shape)}", dtype="int"))[:1]
    few = int(observed[f"{name}_few/value"])
    for what, shape in MORE.items():
        calls = int(observed[f"{name}_{what}/value"])
        yield Step(
            f"{name}: no loop over {what}", calls <= few, f"{name} of {list(shape)}", f"{calls} calls of torch",
            f"{few}, as many as for {list(FEW)}",
            f"Which line runs once for each of the {what}? What would do all of them at once?", f"loop over {what}",
        )  # fmt: skip
    error = str(observed[f"{name}_host/error"])
    yield Step(
        f"{name}: no number leaves for the host", not error,
        f"{name} of {list(FEW)}, watched as if on a GPU", error, "operations of torch only",
        "Which of your calls makes a list, an array or one number of a tensor? Which of torch does the same?",
        "leaves torch",
    )  # fmt: skip


def _joined(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return low + 16 * high


def packed_truth(numbers: torch.Tensor) -> torch.Tensor:
    """Number by number, as strings of bits."""
    rows = numbers.flatten(0, -2).tolist() if numbers.ndim > 1 else [numbers.tolist()]
    half = numbers.shape[-1] // 2
    packed = [[int(f"{row[j + half] + 8:04b}{row[j] + 8:04b}", 2) for j in range(half)] for row in rows]
    return torch.tensor(packed).view(*numbers.shape[:-1], half)


def unpacked_truth(packed: torch.Tensor) -> torch.Tensor:
    """Byte by byte, likewise."""
    rows = packed.flatten(0, -2).tolist() if packed.ndim > 1 else [packed.tolist()]
    numbers = []
    for row in rows:
        bits = [f"{byte:08b}" for byte in row]
        numbers.append([int(b[4:], 2) - 8 for b in bits] + [int(b[:4], 2) - 8 for b in bits])
    return torch.tensor(numbers).view(*packed.shape[:-1], -1)
