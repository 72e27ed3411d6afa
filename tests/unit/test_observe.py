"""What a learner's function does becomes plain arrays, whatever it does; and whose work it is comes out as well."""

import functools
import inspect
import linecache
import os
import random
import sys
import sysconfig
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minillama4
from minillama4 import attention
from minillama4.course import exercise, observe
from minillama4.course.observe import NOT_WRITTEN, borrowing, call
from minillama4.model import RMSNorm

X = torch.tensor([[1.0, -2.0, 3.0], [4.0, 0.0, -6.0]])


def seen(function, *arguments, **options) -> dict[str, np.ndarray]:
    """`call`, without the name in front of the keys. An object in it could hold a learner's code, so there is none."""
    observed = call("it", function, *(arguments or (X,)), **options)
    assert all(type(value) is np.ndarray and value.dtype.kind in "biufcU" for value in observed.values())
    return {key.removeprefix("it/"): value for key, value in observed.items()}


def cell(source: str, file: str = "") -> dict:
    """The names that a notebook's cell defines. IPython gives a cell a file name, and its source to `linecache`."""
    file = file or f"/tmp/ipykernel_42/{abs(hash(source))}.py"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names = {"torch": torch, "Tensor": torch.Tensor, "F": F}
    exec(compile(source, file, "exec"), names)
    return names


# ----------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("value, type, wanted", [
    (torch.tensor([1.5, 2.0]), "float32", [1.5, 2.0]),
    (torch.tensor([1.5], dtype=torch.bfloat16), "bfloat16", [1.5]),
    (torch.tensor([1.5], dtype=torch.float8_e4m3fn), "float8_e4m3fn", [1.5]),
    (torch.tensor([True, False]), "bool", [True, False]),
    (torch.tensor([1 + 2j]).conj(), "complex64", [1 - 2j]),
    (torch.tensor([[1, 2], [3, 4]]).T, "int64", [[1, 3], [2, 4]]),
    (nn.Parameter(torch.ones(1)), "float32", [1.0]),
    (torch.tensor([float("inf"), float("-inf")]), "float32", [float("inf"), float("-inf")]),
    (3, "int", 3),
    ("text", "str", "text"),
    (np.float32(0.5), "float32", 0.5),
    ([torch.ones(2), torch.zeros(2)], "list", [[1, 1], [0, 0]]),
    ((1, (2, 3)), "tuple", "a tuple of unequal shapes"),
    (None, "NoneType", "NoneType"),
    ({"a": 1}, "dict", "dict"),
    (10**40, "int", "int"),
    (np.array([object()]), "ndarray", "ndarray"),
    (lambda: None, "function", "function"),
])  # fmt: skip
def test_any_value_becomes_a_plain_array(value, type, wanted):
    got = seen(lambda x: value)
    assert got["error"] == "" and got["value"].tolist() == wanted
    assert got["type"] == type or isinstance(value, np.generic)


def test_bits_of_float16_survive():
    half = torch.randn(100, generator=torch.Generator().manual_seed(0)).half()
    assert (seen(lambda x: half)["value"] == half.double().numpy()).all()


def test_a_tensor_subclass_is_read_as_the_numbers_it_holds():
    class AlwaysRight(torch.Tensor):
        def __eq__(self, other):
            return True

        def detach(self):
            return "whatever you expect"

        numpy = detach

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return 7

    assert seen(lambda x: X.as_subclass(AlwaysRight))["value"].tolist() == X.tolist()


def test_an_object_that_equals_everything_is_known_by_its_type_only():
    class Yes:
        def __eq__(self, other):
            return True

        def __array__(self, *_, **__):
            return X.numpy()

    got = seen(lambda x: Yes())
    assert got["type"] == "Yes" and got["value"] == "Yes"
    assert not exercise.same("", got["value"], X, "", "?").passed


@pytest.mark.parametrize(
    "make", [lambda x: x[0, 0].expand(10**5, 10**5), lambda x: np.broadcast_to(1.0, (10**5, 10**5))]
)
def test_a_huge_result_is_not_copied_but_named(make):
    got = seen(make)
    assert (
        got["error"]
        == "it returned 10,000,000,000 numbers, of shape [100000, 100000]; at most 10,000,000 are looked at"
    )


def test_what_the_function_returns_is_copied():
    kept = X.clone()
    got = seen(lambda x: kept)
    kept.zero_()
    assert got["value"].tolist() == X.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Gradients


def test_gradients_are_those_of_the_value_times_the_cotangent():
    scale, push = torch.tensor([2.0, 3.0, 5.0]), torch.arange(6.0).view(2, 3)
    got = seen(lambda x, w: x.square() * w, X, scale, cotangent=push, wrt=(0, 1))
    assert torch.equal(torch.from_numpy(got["grad0"]), 2 * X * scale * push)
    assert torch.equal(torch.from_numpy(got["grad1"]), (X.square() * push).sum(0))


def test_the_gradient_of_an_argument_that_plays_no_part_is_zero():
    got = seen(lambda x, w: 2 * x, X, torch.ones(3), cotangent=torch.ones(2, 3), wrt=(0, 1))
    assert got["grad1"].tolist() == [0, 0, 0] and (got["grad0"] == 2).all()


@pytest.mark.parametrize("function, words", [
    (lambda x: x.detach(), "none: the result is cut off from all arguments"),
    (lambda x: torch.tensor(x.tolist()), "none: the result is cut off from all arguments"),
    (lambda x: x.sum(), "none: the result has another shape"),
    (lambda x: None, "none: the result has another shape"),
    (lambda x: x.mul_(2), "RuntimeError: a leaf Variable that requires grad is being used in an in-place operation."),
])  # fmt: skip
def test_a_gradient_that_cannot_be_had_is_words(function, words):
    assert str(seen(function, cotangent=torch.ones(2, 3), wrt=(0,))["grad0"]).endswith(words)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_do_not_depend_on_what_the_notebook_has_switched_off(off):
    with off():
        got = seen(lambda x: x * x, cotangent=torch.ones(2, 3), wrt=(0,))
        assert torch.is_grad_enabled() is False
    assert torch.equal(torch.from_numpy(got["grad0"]), 2 * X)


def test_no_gradient_is_left_on_the_arguments():
    x = X.clone()
    seen(lambda x: x * 2, x, cotangent=torch.ones(2, 3), wrt=(0,))
    assert not x.requires_grad and x.grad is None


# ----------------------------------------------------------------------------------------------------------------------
# Changed arguments


def doubles(x):
    x *= 2


def goes_half(x):
    x.data = x.data.half()


def grows(x):
    x.resize_(9)


@pytest.mark.parametrize("function, argument", [
    (doubles, X),
    (goes_half, X),
    (grows, X),
    (lambda x: doubles(x[0]), [X]),
    (lambda x: doubles(x["a"]["b"]), {"a": {"b": X}}),
    (lambda x: x.append(1), [0]),
    (lambda x: x.update(b=1), {"a": 0}),
    (lambda x: x.fill(0), np.ones(2)),
    (lambda x: doubles(x.weight.data), nn.Linear(2, 2)),
])  # fmt: skip
def test_a_changed_argument_is_named_and_the_original_is_left(function, argument):
    before = observe._copy(argument)
    assert seen(lambda first, second: function(second), 0, argument)["changed"] == "2"
    assert observe._equal(argument, before)


@pytest.mark.parametrize("argument", [
    X, torch.tensor([float("nan"), float("inf")]), np.array([np.nan]), [X, {"a": X}], None, 1.5, float("nan"), "text",
    nn.Linear(2, 2), torch.Generator().manual_seed(0), minillama4.Llama4Config.preset("mini-scout"), torch.tensor([1j]),
])  # fmt: skip
def test_an_argument_that_was_left_alone_is_not_named(argument):
    got = seen(lambda x: 0, argument)
    assert got["changed"] == "" and got["error"] == ""


# ----------------------------------------------------------------------------------------------------------------------
# Exceptions

MISTAKE = """
def scale(x):
    half = x / 2
    return half * weights
"""


@pytest.mark.parametrize("file", [
    "/tmp/ipykernel_42/1234567.py",
    "<ipython-input-3-0123456789ab>",
    r"C:\Users\me\AppData\Local\Temp\ipykernel_42\1234567.py",
    os.path.join(sys.base_prefix, "notebooks", "cell.py"),  # an interpreter in /usr, or people's files beside conda's
    os.path.join(sys.prefix, "notebooks", "cell.py"),
    sysconfig.get_paths()["stdlib"] + "-notebooks/cell.py",
])  # fmt: skip
def test_an_exception_shows_the_learners_own_line(file):
    got = seen(cell(MISTAKE, file)["scale"])
    assert got["error"] == "line 4 of your cell, `return half * weights`: NameError: name 'weights' is not defined"
    assert got["value"] == got["error"] and got["type"] == "" and got["changed"] == ""


@pytest.mark.parametrize("line, said", [
    ("return F.softmax(x, dim=9)", "IndexError: Dimension out of range"),  # raised in torch's own Python
    ("return minillama4.attention.rotate(x, 1)", "RuntimeError: unflatten"),  # raised in this package
    ("return json.loads(x)", "TypeError: the JSON object must be"),  # raised in the standard library
    ("exit()", "SystemExit"),
    ("raise ValueError", "ValueError"),
])  # fmt: skip
def test_a_line_inside_a_library_is_not_the_learners(line, said):
    names = cell(f"import json, minillama4.attention\nfrom sys import exit\ndef f(x):\n    {line}\n")
    assert str(seen(names["f"])["error"]).startswith(f"line 4 of your cell, `{line}`: {said}")


def test_the_last_of_the_learners_own_lines_is_shown():
    names = cell("def helper(x):\n    return x.no_such_thing\n\ndef f(x):\n    return helper(x)\n")
    assert str(seen(names["f"])["error"]).startswith("line 2 of your cell, `return x.no_such_thing`: AttributeError")


def test_a_line_of_a_file_is_named_with_the_file(tmp_path):
    file = tmp_path / "answers.py"
    file.write_text(MISTAKE)
    names = {}
    exec(compile(MISTAKE, str(file), "exec"), names)
    assert str(seen(names["scale"])["error"]).startswith("line 4 of answers.py, `return half * weights`: NameError")


def test_without_a_line_there_is_still_the_exception():
    names = {}
    exec("def f(x):\n    return x + missing\n", names)  # as in `python -c`
    assert seen(names["f"])["error"] == "NameError: name 'missing' is not defined"
    assert "takes 0 positional arguments but 1 was given" in str(seen(lambda: 0)["error"])


@pytest.mark.parametrize("line", ["raise NotImplementedError", "raise NotImplementedError()"])
def test_a_stub_is_not_written_yet(line):
    assert seen(cell(f"def f(x):\n    # YOUR CODE HERE\n    {line}\n")["f"])["error"] == NOT_WRITTEN


def test_not_implemented_with_words_is_an_error_like_others():
    got = seen(cell("def f(x):\n    raise NotImplementedError('no such kernel')\n")["f"])
    assert got["error"] == (
        "line 2 of your cell, `raise NotImplementedError('no such kernel')`: NotImplementedError: no such kernel"
    )


def test_an_unbound_local_says_which():
    error = str(seen(cell("def f(x):\n    total += x\n    return total\n")["f"])["error"])
    assert "`total += x`: UnboundLocalError" in error and "'total'" in error


def test_an_exception_that_cannot_be_printed_and_one_that_is_very_long():
    class Broken(Exception):
        def __str__(self):
            raise RuntimeError

    def f(x):
        raise Broken

    def g(x):
        raise ValueError("several\n   lines " * 1000)

    assert str(seen(f)["error"]).endswith("`raise Broken`: Broken")
    assert len(str(seen(g)["error"])) < 450 and "several lines several" in str(seen(g)["error"])


def test_the_learner_can_still_interrupt():
    def f(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call("it", f, X)


# ----------------------------------------------------------------------------------------------------------------------
# Borrowed answers

NORMS = ("torch.nn.functional.rms_norm", "torch.rms_norm", "torch.nn.RMSNorm", "minillama4.model.RMSNorm")
SOFTMAX = ("torch.nn.functional.softmax", "torch.softmax", "torch.Tensor.softmax")


def lender(function, *arguments, answers=NORMS) -> str:
    with borrowing(answers) as found:
        seen(function, *arguments)
    return found[0] if found else ""


class Norm:
    def plain(self, x):
        return F.rms_norm(x, x.shape[-1:])

    @classmethod
    def of_class(cls, x):
        return F.rms_norm(x, x.shape[-1:])

    __call__ = plain


def renamed(x):
    from torch.nn.functional import rms_norm as size_one

    return size_one(x, x.shape[-1:])


def by_attribute(x):
    return getattr(torch.nn.functional, "rms_" + "norm")(x, x.shape[-1:])


def through_a_helper(x):
    return renamed(x)


def decorated(function):
    @functools.wraps(function)
    def wrapper(x):
        return function(x)

    return wrapper


def package(x):
    return RMSNorm(x.shape[-1], 1e-5)(x)


@pytest.mark.parametrize("function, name", [
    (renamed, NORMS[0]),
    (by_attribute, NORMS[0]),
    (through_a_helper, NORMS[0]),
    (decorated(renamed), NORMS[0]),
    (lambda x: F.rms_norm(x, x.shape[-1:]), NORMS[0]),
    (functools.partial(F.rms_norm, normalized_shape=(3,)), NORMS[0]),
    (Norm().plain, NORMS[0]),
    (Norm.of_class, NORMS[0]),
    (Norm(), NORMS[0]),
    (lambda x: torch.vmap(lambda row: F.rms_norm(row, (3,)))(x), NORMS[0]),
    (lambda x: torch.rms_norm(x, (3,)), NORMS[1]),
    (lambda x: nn.RMSNorm(3)(x), NORMS[2]),
    (nn.RMSNorm(3), NORMS[2]),
    (package, NORMS[3]),
    (RMSNorm(3, 1e-5), NORMS[3]),
])  # fmt: skip
def test_an_answer_is_known_whatever_name_and_way_it_is_called_by(function, name):
    assert lender(function) == name


@pytest.mark.parametrize(
    "function", [lambda x: F.softmax(x, -1), lambda x: torch.softmax(x, -1), lambda x: x.softmax(-1)]
)
def test_the_three_ways_to_call_a_function_of_torch_are_known(function):
    assert lender(function, answers=SOFTMAX) in SOFTMAX
    assert lender(function, answers=NORMS) == ""


def test_a_function_of_torch_may_be_handed_in_itself():
    assert lender(F.rms_norm, X, (3,)) == NORMS[0]
    assert lender(torch.rms_norm, X, (3,)) == NORMS[1]


def test_a_function_of_the_same_name_that_the_learner_wrote_is_not_mistaken():
    names = cell(
        "class RMSNorm:\n    def forward(self, x):\n        return rms_norm(x)\n\n"
        "def rms_norm(x):\n    return x * x.square().mean(-1, keepdim=True).rsqrt()\n\n"
        "def f(x):\n    return RMSNorm().forward(x)\n"
    )
    assert lender(names["f"]) == ""


def test_a_copy_of_an_answers_source_is_the_learners_own_work():
    """The same code at the same line: only the file differs, and the code object is another."""
    lines, number = inspect.getsourcelines(attention.rotate)
    names = cell("\n" * (number - 1) + "".join(lines))
    turn = attention.rotation(torch.arange(2), torch.ones(1))
    answers = ("minillama4.attention.rotate",)
    assert lender(names["rotate"], torch.ones(1, 2, 1, 2), turn, answers=answers) == ""
    assert lender(attention.rotate, torch.ones(1, 2, 1, 2), turn, answers=answers) == answers[0]


def test_an_answer_that_is_only_mentioned_is_not_called():
    def f(x):
        if x.ndim > 5:
            return F.rms_norm(x, x.shape[-1:])
        return x

    assert lender(f) == ""


def test_what_the_package_calls_on_the_way_is_not_the_learners_call():
    answers = ("torch.nn.functional.scaled_dot_product_attention",)

    def allowed(x):
        return attention.causal_attention(x, x, x)

    assert lender(allowed, torch.ones(1, 4, 2, 8), answers=answers) == ""
    q = torch.ones(1, 4, 2, 8)
    assert lender(lambda x: F.scaled_dot_product_attention(x, x, x), q, answers=answers) == answers[0]


def test_what_the_check_itself_calls_is_not_the_learners_call():
    source = (
        "from minillama4.course.observe import call\n"
        "def observe(function, inputs):\n"
        "    x = F.rms_norm(inputs['x'], (3,))\n"
        "    return call('it', lambda x: function(x, (3,))[0], x)\n"
    )
    names = cell(source, os.path.join(observe.CHECKS, "of_a_test.py"))
    module = SimpleNamespace(observe=names["observe"], ANSWERED_BY=NORMS)
    for function, name in ((lambda *_: _, ""), (lambda x, size: F.rms_norm(x, size), NORMS[0]), (F.rms_norm, NORMS[0])):
        assert exercise.Exercise("of-a-test", module).observe(function, {"x": X})["borrowed"] == name


def test_an_answer_that_is_in_a_cache_is_still_a_call():
    config = minillama4.Llama4Config.preset("mini-scout").text
    attention.inverse_frequencies(config)
    answers = ("minillama4.attention.inverse_frequencies",)
    assert lender(lambda x: attention.inverse_frequencies(config), answers=answers) == answers[0]


def test_a_profiler_that_was_there_before_is_there_again():
    def mine(*_):
        return None

    def fails(x):
        raise KeyboardInterrupt

    sys.setprofile(mine)
    try:
        with pytest.raises(KeyboardInterrupt), borrowing(NORMS):
            call("it", fails, X)
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(None)


# ----------------------------------------------------------------------------------------------------------------------
# Comparing what came out


@pytest.mark.parametrize("want, got, passed", [
    ([100_000.0, 1.0], [100_001.0, 1.0], True),  # a float: within 1e-4 of the largest
    ([100_000.0, 1.0], [100_011.0, 1.0], False),
    ([100_000, 1], [100_001, 1], False),  # a whole number: exactly
    ([100_000, 1], [100_000.0, 1.0], True),
    ([True, False], [True, True], False),
    ([True, False], [True, False], True),
    ([1j, 2.0], [1j, 2.0], True),
    ([1j, 2.0], [-1j, 2.0], False),
    ([float("inf"), 1.0], [float("inf"), 1.0], True),
    ([float("inf"), 1.0], [float("-inf"), 1.0], False),
    ([float("inf"), 1.0], [1e30, 1.0], False),
    ([2.0, 1.0], [float("inf"), 1.0], False),
    ([2.0, 1.0], [float("nan"), 1.0], False),
    ([float("nan"), 1.0], [float("nan"), 1.0], True),
    ([0.0, 0.0], [1e-20, 0.0], False),  # nothing to be near to
    ([1.0, 2.0], [[1.0, 2.0]], False),
    ([1.0], "NoneType", False),
    (1.0, "NoneType", False),
])  # fmt: skip
def test_values_are_the_same(want, got, passed):
    for wanted in (np.array(want), torch.tensor(want)):
        step = exercise.same("name", np.array(got), wanted, "given", "question?")
        assert step.passed is passed
        assert (step.came_out, step.expected) == ("", "") if passed else step.came_out and step.expected


@pytest.mark.parametrize("got, want, words", [
    ([[1.0, 2.0], [3.5, 4.5]], [[1.0, 2.0], [3.0, 4.0]], ("3.5 at [1, 0]; 2 of 4 values differ", "3")),
    ([7, 8], [7, 9], ("8 at [1]; 1 of 2 values differ", "9")),
    ([True], [False], ("True at [0]", "False")),
    (0.25, 0.5, ("0.25", "0.5")),
    ([1.0, 2.0], [1.0], ("shape [2]", "shape [1]")),
    ("NoneType", [1.0], ("NoneType", "numbers of shape [1]")),
    ([1 + 1j], [1 - 1j], ("1+1j at [0]", "1-1j")),
    ([float("nan")], [1.0], ("nan at [0]", "1")),
])  # fmt: skip
def test_the_first_difference_is_shown(got, want, words):
    step = exercise.same("name", np.array(got), np.array(want), "given", "question?")
    assert (step.came_out, step.expected) == words


def test_the_first_known_mistake_that_gives_what_came_out_is_asked_about():
    mistakes = {"adds": (X + 1, "adds?"), "doubles": (2 * X, "doubles?"), "twice": (X + X, "twice?")}
    step = exercise.same("name", (2 * X).numpy(), X, "given", "general?", mistakes)
    assert (step.mistake, step.question) == ("doubles", "doubles?")
    step = exercise.same("name", (3 * X).numpy(), X, "given", "general?", mistakes)
    assert (step.mistake, step.question) == ("", "general?")


def steps(function, *arguments, shape=(2, 3), dtype="float32") -> exercise.Step:
    """The first that fails of what `runs` looks at, or the last."""
    observed = call("it", function, *(arguments or (X,)))
    for step in exercise.runs(observed, "it", shape, "given", dtype):
        if not step.passed:
            break
    return step


@pytest.mark.parametrize("function, mistake, came_out, expected, question", [
    (cell("def f(x):\n    raise NotImplementedError()\n")["f"], "not written", "not written yet", "a tensor of float32",
     "first thing"),
    (cell(MISTAKE)["scale"], "raises", "line 4 of your cell, `return half * weights`", "a tensor", "line shown above"),
    (lambda: 0, "raises", "TypeError: ", "a tensor", "how your function is called"),
    (lambda x: None, "type", "NoneType", "a tensor of float32", "end in `return`?"),
    (lambda x: x.double(), "type", "float64", "a tensor of float32", "What type"),
    (lambda x: x.T, "shape", "[3, 2]", "[2, 3]", "Where does it first differ?"),
    (lambda x: x.mul_(2), "changes its input", "argument 1 was changed", "no change", "underscore"),
])  # fmt: skip
def test_what_must_hold_of_any_call(function, mistake, came_out, expected, question):
    step = steps(function)
    assert not step.passed and step.mistake == mistake and step.given == "given"
    assert came_out in step.came_out and expected in step.expected and question in step.question


def test_a_function_may_also_have_to_return_a_number():
    assert steps(lambda x: 1.5, shape=(), dtype="float").passed
    assert steps(lambda x: x, shape=(), dtype="float").expected == "a value of type float"
    assert steps(lambda x: x, shape=(), dtype="int64").expected == "a tensor of int64"


def test_sizes_differ_so_that_a_mixed_up_axis_shows():
    rng = random.Random(0)
    for _ in range(100):
        sizes = exercise.different(rng, 2, 5, 3)
        assert len(set(sizes)) == 3 and min(sizes) >= 2 and max(sizes) <= 5
