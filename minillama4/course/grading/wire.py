"""Arrays as JSON, both ways. What a sandbox wrote is read by someone who trusts none of it: never a pickle.

Needs nothing but numpy, because it also runs inside the sandbox, where most of the package is missing.
"""

import base64
import json
import math
import re

import numpy as np

MOST_BYTES = 16_000_000  # of one observation as it is written
LONGEST = 4_000  # characters of a text
MOST_TEXTS = 10_000
MOST_KEYS = 2_000
NUMBERS = re.compile(r"[<|][bifuc](1|2|4|8|16)")  # dtypes, as numpy names them


def encode(observed: dict[str, np.ndarray]) -> str:
    """One line of JSON. An observation that is too large becomes words, which no judge takes for numbers."""
    line = json.dumps({str(key): _encode(np.asarray(value)) for key, value in observed.items()})
    if len(line) <= MOST_BYTES:
        return line
    size = sum(np.asarray(value).size for value in observed.values())
    said = f"the function returned too much to look at: {size:,} numbers in all"
    return json.dumps({str(key): {"text": said} for key in observed})


def _encode(array: np.ndarray) -> dict:
    if array.dtype.kind in "bifuc" and array.dtype.itemsize <= 16:
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)
        return {
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "data": base64.b64encode(array.tobytes()).decode(),
        }
    if array.dtype.kind == "U" and array.ndim and array.size <= MOST_TEXTS:
        return {"texts": [str(text)[:LONGEST] for text in array.flat], "shape": list(array.shape)}
    return {"text": str(array)[:LONGEST]}


def decode(table) -> dict[str, np.ndarray]:
    """What `encode` wrote, after JSON has read it. ValueError: something else."""
    if not isinstance(table, dict) or len(table) > MOST_KEYS:
        raise ValueError("not an observation")
    return {key: _decode(value) for key, value in table.items()}


def _decode(value) -> np.ndarray:
    if not isinstance(value, dict):
        raise ValueError("not an array")
    if set(value) == {"text"} and isinstance(value["text"], str):
        return np.array(clean(value["text"]))
    shape = value.get("shape")
    if not (isinstance(shape, list) and len(shape) <= 32 and all(type(n) is int and 0 <= n < 2**31 for n in shape)):
        raise ValueError("not a shape")
    if set(value) == {"texts", "shape"}:
        texts = value["texts"]
        if not (isinstance(texts, list) and len(texts) <= MOST_TEXTS and all(isinstance(text, str) for text in texts)):
            raise ValueError("not texts")
        if math.prod(shape) != len(texts):
            raise ValueError("texts of another shape")
        return np.array([clean(text) for text in texts], dtype=str).reshape(shape)
    dtype, data = value.get("dtype"), value.get("data")
    if set(value) != {"dtype", "shape", "data"} or not (isinstance(dtype, str) and NUMBERS.fullmatch(dtype)):
        raise ValueError("not numbers")
    if not isinstance(data, str):
        raise ValueError("not data")
    try:
        kind, raw = np.dtype(dtype), base64.b64decode(data, validate=True)
    except (TypeError, ValueError):
        raise ValueError("not numbers") from None
    if len(raw) != math.prod(shape) * kind.itemsize:
        raise ValueError("data of another size")
    return np.frombuffer(raw, kind).reshape(shape).copy()


def clean(text: str, longest: int = LONGEST) -> str:
    """What a learner's code said, without what a terminal, HTML or JSON would act on or choke at."""
    text = text[:longest].encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
