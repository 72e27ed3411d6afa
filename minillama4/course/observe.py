"""Runs a learner's function and writes down what it did, as plain arrays.

Whatever the function does becomes data: values, gradients, exceptions, changed arguments. So a judge elsewhere needs
nothing but numbers and strings, and nothing that a learner's code returns is ever called, compared or unpickled there.
"""

import copy
import inspect
import linecache
import os
import pkgutil
import site
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import BuiltinFunctionType, FrameType, FunctionType, MethodDescriptorType

import numpy as np
import torch

MOST = 10_000_000  # numbers in a result: a grader keeps and sends them
NOT_WRITTEN = "the function is not written yet (it still raises NotImplementedError)"


class TooMuch(Exception):
    """A result that is not copied; the message is for the learner."""


def call(name: str, function, *arguments, cotangent=None, wrt: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """What `function(*arguments)` did, under keys that start with `name`.

    name/error: "" or the learner's own last line and the exception. name/type: dtype of the tensor it returned, or the
    name of another type. name/value. name/changed: numbers of the arguments that it changed. With a cotangent (shaped
    like the value): name/grad0, ... of (value * cotangent).sum() by the arguments numbered in `wrt`. What could not be
    had is words instead of numbers: the value of a function that raised is its error.
    """
    seen = {"error": "", "type": "", "changed": ""}
    with fresh_torch():
        given = [_copy(argument) for argument in arguments]
        for i in wrt:
            given[i].requires_grad_(True)
        try:
            value = function(*given)
            seen |= {"type": _type(value), "value": plain(value)}
            if wrt:
                seen |= _gradients(value, _copy(cotangent), given, wrt)
            changed = [i for i, argument in enumerate(arguments) if not _equal(given[i], argument)]
            seen["changed"] = ", ".join(str(i + 1) for i in changed)
        except (Exception, SystemExit) as error:
            seen["error"] = explain(error)
    for key in ("value", *(f"grad{i}" for i in wrt)):
        seen.setdefault(key, seen["error"])
    return {f"{name}/{key}": np.asarray(value) for key, value in seen.items()}


@contextmanager
def fresh_torch():
    """torch as every notebook finds it, whatever the learner's has switched since."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            with nullcontext() if device.type == "cpu" else torch.device("cpu"):
                yield
    finally:
        torch.set_default_dtype(dtype)


def _gradients(value, cotangent: torch.Tensor, given: list, wrt: tuple[int, ...]) -> dict[str, np.ndarray | str]:
    if not isinstance(value, torch.Tensor) or value.shape != cotangent.shape:
        return {f"grad{i}": "none: the result has another shape" for i in wrt}
    if not value.requires_grad:
        return {f"grad{i}": "none: the result is cut off from all arguments" for i in wrt}
    grads = torch.autograd.grad((value * cotangent).sum(), [given[i] for i in wrt], allow_unused=True)
    return {f"grad{i}": plain(torch.zeros_like(given[i]) if g is None else g) for i, g in zip(wrt, grads, strict=True)}


# ----------------------------------------------------------------------------------------------------------------------
# Values


def plain(value) -> np.ndarray:
    """A tensor, number, string, or (nested) sequence of equal shapes as an array; else its type's name.

    TooMuch: more than MOST numbers.
    """
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, (list, tuple)):
        try:
            array = np.array([plain(item) for item in value])
        except ValueError:
            return np.array(f"a {type(value).__name__} of unequal shapes")
    elif isinstance(value, (bool, int, float, complex, str, np.ndarray, np.generic)):
        _limit(value.size if isinstance(value, np.ndarray) else 1, value)
        array = np.array(value[:1000] if isinstance(value, str) else value)
    else:
        array = np.array(None)
    return array if array.dtype.kind in "biufcU" else np.array(type(value).__name__)  # no objects: they hold code


def _tensor(value: torch.Tensor) -> np.ndarray:
    with torch._C.DisableTorchFunctionSubclass():  # a learner's subclass decides what it computes, not what we read
        value = torch.Tensor.detach(value)
        _limit(value.numel(), value)
        value = value.cpu().resolve_conj().resolve_neg()
        if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
            value = value.float()  # numpy knows few of the others
        return value.numpy().copy()


def _limit(size: int, value):
    if size > MOST:
        raise TooMuch(f"it returned {size:,} numbers, of shape {list(value.shape)}; at most {MOST:,} are looked at")


def _type(value) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else type(value).__name__


def _copy(argument):
    return argument.detach().clone() if isinstance(argument, torch.Tensor) else copy.deepcopy(argument)


def _equal(a, b) -> bool:
    """Has `a`, a copy of `b` that a learner's function was given, kept its values?"""
    if isinstance(b, torch.Tensor):
        same = isinstance(a, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return same and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if type(a) is not type(b):
        return False
    if isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(b, dict):
        return list(a) == list(b) and all(_equal(a[key], b[key]) for key in b)
    if isinstance(b, torch.nn.Module):
        return _equal(a.state_dict(), b.state_dict())
    if isinstance(b, np.ndarray):
        return np.array_equal(a, b, equal_nan=b.dtype.kind in "fc")
    return a == b if isinstance(b, (bool, int, str)) else True  # what else there may be is not looked into


# ----------------------------------------------------------------------------------------------------------------------
# Exceptions


def explain(error: BaseException) -> str:
    """The exception in one line, after the last line of the learner's own code that led to it."""
    if isinstance(error, TooMuch):
        return str(error)
    try:
        said = " ".join(str(error).split())
    except Exception:  # of a class that a learner wrote
        said = ""
    if isinstance(error, NotImplementedError) and not said:
        return NOT_WRITTEN
    said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    said = said if len(said) <= 300 else f"{said[:297]}..."
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        line = linecache.getline(frame.filename, frame.lineno or 0).strip()
        if line and not _is_library(frame.filename) and not _is_ours(frame.filename):
            # A cell has a file name too, but there is no such file.
            place = os.path.basename(frame.filename) if os.path.isfile(frame.filename) else "your cell"
            return f"line {frame.lineno} of {place}, `{line}`: {said}"
    return said


OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
CHECKS = os.path.join(os.path.dirname(__file__), "checks") + os.sep
# Not `sys.base_prefix`: that may be /usr, or a folder in which people keep their notebooks as well.
LIBRARIES = tuple(
    os.path.join(folder, "")
    for folder in {
        *(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")),
        *site.getsitepackages(),
        os.path.dirname(os.path.dirname(torch.__file__)),
    }
)


def _is_library(file: str) -> bool:
    return file.startswith((*LIBRARIES, "<frozen "))


def _is_ours(file: str) -> bool:
    return file.startswith(OURS)


# ----------------------------------------------------------------------------------------------------------------------
# Whose work it is


@contextmanager
def borrowing(answers: tuple[str, ...]) -> Iterator[list[str]]:
    """A list, which fills with those of `answers` that the learner's own code calls meanwhile.

    answers: functions or classes, "torch.nn.functional.rms_norm". What counts is what is called, under whatever name
    and through whatever helper; so a function of the same name that the learner wrote is not mistaken for it, and
    neither is one that the course's own code calls on the way. Looks on as a profiler does, in this thread.
    """
    python, builtin, method = {}, {}, {}
    for name in answers:
        target = pkgutil.resolve_name(name)
        if hasattr(target, "cache_clear"):
            target.cache_clear()  # an answer from the cache would be no call
        if isinstance(target, BuiltinFunctionType):
            builtin[target] = name
        elif isinstance(target, MethodDescriptorType):  # torch.Tensor.softmax
            method[target.__name__] = (target.__objclass__, name)
        for function in _functions(target):
            python[id(function.__code__)] = name  # equal code may be the learner's own, so the object itself

    found = []

    def look(frame: FrameType, event: str, function):
        name, caller = None, frame
        if event == "call":
            name, caller = python.get(id(frame.f_code)), frame.f_back
        elif event == "c_call" and (builtin or method):
            name = builtin.get(function)
            kind, called = method.get(function.__name__, (None, None))
            if kind is not None and issubclass(type(function.__self__), kind):
                name = called
        if name and name not in found and _is_learners(caller):
            found.append(name)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(before)


def _functions(target) -> list[FunctionType]:
    """The Python functions of a function or class."""
    parts = vars(target).values() if isinstance(target, type) else [target]
    parts = (getattr(part, "__func__", part) for part in parts)  # of class methods and static ones
    return [part for part in map(inspect.unwrap, parts) if isinstance(part, FunctionType)]


def _is_learners(frame: FrameType | None) -> bool:
    """Did a learner's code get here, through libraries at most?"""
    while frame is not None:
        file = frame.f_code.co_filename
        if frame.f_code is call.__code__:
            return True  # what the learner handed in is the function itself
        if _is_ours(file) and not file.startswith(CHECKS):
            return False
        if not _is_ours(file) and not _is_library(file):
            return True
        frame = frame.f_back
    return False
