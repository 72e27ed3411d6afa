"""What nbval as it comes passes, or waits for, fails here: the proof of `course/nbval_strict.py`.

One notebook holds every false pass, each in a cell of its own. nbval runs over it twice, hardened and as it comes.
"""

import sys
from pathlib import Path
from queue import Empty
from types import SimpleNamespace
from typing import NamedTuple

import nbformat
import pytest
from nbformat import v4
from nbval_run import SANITIZE, run_nbval

from minillama4.course import nbval_strict, notebooks

ROOT = Path(__file__).resolve().parents[2]


class Hole(NamedTuple):
    source: str
    message: str  # it must fail with
    stderr: str = ""  # what it prints, and what is stored of it
    tags: tuple[str, ...] = ()
    count: int | None = 1
    after: str = ""  # a cell that heals the kernel


HOLES = {
    "line magic that does not exist": Hole(
        "%nosuchmagic\nassert False",
        "hid it: UsageError: Line magic function `%nosuchmagic` not found",
        "UsageError: Line magic function `%nosuchmagic` not found.\n",
    ),
    "cell magic that does not exist": Hole(
        "%%nosuchmagic\nassert False",
        "hid it: UsageError: Cell magic `%%nosuchmagic` not found",
        "UsageError: Cell magic `%%nosuchmagic` not found.\n",
    ),
    "handler that swallows exceptions": Hole(
        "get_ipython().set_custom_exc((Exception,), lambda *a, **k: None)\nassert False, 'swallowed'",
        "hid it: AssertionError: swallowed",
        after="get_ipython().set_custom_exc((), None)",
    ),
    "traceback that is not shown": Hole(
        "get_ipython().showtraceback = lambda *a, **k: None\nassert False, 'not shown'",
        "hid it: AssertionError: not shown",
        after="del get_ipython().showtraceback",
    ),
    "tag for an exception that does not come": Hole(
        "one = 1", "tagged as one that raises an exception, and it raised none", tags=("raises-exception",)
    ),
    "comment for an exception that does not come": Hole(
        "# NBVAL_RAISES_EXCEPTION\none = 1", "tagged as one that raises an exception, and it raised none"
    ),
    "cell that was never run": Hole("print('anything')", "never ran this cell", count=None),
}


def code(source: str, *, stdout: str = "", stderr: str = "", tags=(), count: int | None = 1):
    outputs = [v4.new_output("stream", name=name, text=text) for name, text in
               (("stdout", stdout), ("stderr", stderr)) if text]  # fmt: skip
    return v4.new_code_cell(source, execution_count=count, outputs=outputs, metadata={"tags": list(tags)})


def write(file: Path, *cells):
    theirs = {"kernelspec": {"name": "of-another-machine", "display_name": "conda", "language": "python"}}
    nbformat.write(v4.new_notebook(cells=[v4.new_markdown_cell("# A lesson"), *cells], metadata=theirs), file)


def honest_cells():
    """All that a lesson may do, also what changes from run to run and what nbclient by itself would store wrongly."""
    yield "print('plain')\n1 + 1"
    yield "from IPython.display import HTML\nHTML('<b>bold</b>')"
    yield "object()"
    yield "import os\nprint(f'ipykernel_{os.getpid()}/1.py [00:01<00:02, {os.getpid()}.5it/s]')"
    yield "import ipywidgets as widgets\nslider = widgets.IntSlider(3, 0, 9)\nslider"
    yield "slider.value = 99\nprint(slider.value)"
    yield "out = widgets.Output()\nwith out:\n    print('inside')\nprint(len(out.outputs))"
    yield ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """holes.ipynb, dying.ipynb, and honest.ipynb, whose outputs are made as those of the course are."""
    folder = tmp_path_factory.mktemp("notebooks")
    cells = []
    for hole in HOLES.values():
        cells.append(code(hole.source, stderr=hole.stderr, tags=hole.tags, count=hole.count))
        cells.append(code(hole.after or "print('healthy')", stdout="" if hole.after else "healthy\n"))
    write(folder / "holes.ipynb", *cells)
    write(folder / "dying.ipynb", code("print(2)", stdout="1\n"), code("import os\nos._exit(0)"), code("1 + 1"))
    honest = folder / "honest.ipynb"
    raising = code("# raises: a shape that does not fit\nraise ValueError('on purpose')", tags=["raises-exception"])
    write(honest, *map(code, honest_cells()), raising)
    notebooks.store(honest, notebooks.execute(honest))
    return folder


@pytest.fixture(scope="module")
def hardened(folder, tmp_path_factory):
    """(notebook, number of the cell) -> the cell, as hardened nbval saw it."""
    cells, _ = run_nbval(folder, scratch=tmp_path_factory.mktemp("hardened"))
    return {(cell.notebook, cell.number): cell for cell in cells}


@pytest.fixture(scope="module")
def stock(folder, tmp_path_factory):
    cells, _ = run_nbval(folder / "holes.ipynb", scratch=tmp_path_factory.mktemp("stock"), hardened=False)
    return {(cell.notebook, cell.number): cell for cell in cells}


@pytest.mark.parametrize("number, name", list(enumerate(HOLES)), ids=list(HOLES))
def test_hardened_nbval_fails_what_stock_nbval_passes(hardened, stock, number, name):
    at = "holes.ipynb", 2 * number
    assert stock[at].failure == "", "nbval closes this hole by itself now; ours can go"
    assert HOLES[name].message in hardened[at].failure


def test_a_failing_cell_does_not_fail_the_cells_after_it(hardened):
    for number in range(1, 2 * len(HOLES), 2):
        assert hardened["holes.ipynb", number].failure == ""


def test_honest_notebooks_pass(hardened):
    cells = [cell for (notebook, _), cell in hardened.items() if notebook == "honest.ipynb"]
    assert len(cells) == len(list(honest_cells())) + 1
    assert [cell.failure for cell in cells if cell.failure] == []


def test_the_stored_outputs_are_those_of_the_kernel_alone(folder):
    """Nothing ended up in the state of a widget that no reader will see, and nothing of this machine is kept."""
    notebook = nbformat.read(folder / "honest.ipynb", as_version=4)
    texts = [output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output]
    assert "inside\n0\n" in texts and "widgets" not in notebook.metadata
    assert notebook.cells[-1].outputs[0].traceback == ["ValueError: on purpose"]


def test_a_changed_result_fails(hardened):
    assert "Cell outputs differ" in hardened["dying.ipynb", 0].failure


def test_a_dead_kernel_fails_at_once_and_fails_all_that_follow(hardened):
    died, after = hardened["dying.ipynb", 1], hardened["dying.ipynb", 2]
    assert "The kernel died while it ran this cell" in died.failure
    assert died.seconds < 30, "half of what a cell may take, which is how long nbval as it comes would wait"
    assert "Kernel dead" in after.failure


@pytest.mark.slow  # the timeout passes, and then nbval's own five seconds
def test_an_endless_cell_fails_at_the_timeout(tmp_path):
    write(tmp_path / "endless.ipynb", code("while True:\n    pass"))
    (cell,), _ = run_nbval(tmp_path / "endless.ipynb", scratch=tmp_path / "scratch", timeout=3)
    assert "Timeout of 3 seconds exceeded" in cell.failure


# ----------------------------------------------------------------------------------------------------------------------
# The wait for a reply, without a kernel


class Kernel:
    """Gives these messages and then none; lives for so many looks."""

    def __init__(self, *messages, looks: float = float("inf")):
        self.messages, self.looks, self.reply = list(messages), looks, None

    def get_message(self, stream, timeout):
        assert stream == "shell" and 0 <= timeout <= 1, "a longer wait would not notice that the kernel is dead"
        if not self.messages:
            raise Empty
        return self.messages.pop(0)

    def is_alive(self):
        self.looks -= 1
        return self.looks > 0


def message(msg_id: str, status: str) -> dict:
    return {"parent_header": {"msg_id": msg_id}, "content": {"status": status, "of": msg_id}}


def test_the_reply_to_the_own_request_is_remembered():
    kernel = Kernel(message("before", "error"), message("mine", "ok"), message("after", "error"))
    nbval_strict.await_reply(kernel, "mine", timeout=1)
    assert kernel.reply == {"status": "ok", "of": "mine"}


def test_no_reply_in_time_raises_what_nbval_expects():
    kernel = Kernel()
    kernel.reply = {"status": "ok"}  # to an earlier cell
    with pytest.raises(Empty):
        nbval_strict.await_reply(kernel, "mine", timeout=0.01)
    assert kernel.reply is None


@pytest.mark.parametrize("timeout", [60, None])
def test_a_dead_kernel_is_noticed_before_the_timeout(timeout):
    with pytest.raises(nbval_strict.KernelDied):
        nbval_strict.await_reply(Kernel(looks=3), "mine", timeout)


def test_an_aborted_request_is_an_error():
    with pytest.raises(RuntimeError, match="aborted"):
        nbval_strict.await_reply(Kernel(message("mine", "aborted")), "mine", timeout=1)


# ----------------------------------------------------------------------------------------------------------------------
# The options


def options(**given) -> SimpleNamespace:
    stock = {"nbval": True, "nbval_lax": False, "nbval_kernel_name": None, "nbval_current_env": False}
    return SimpleNamespace(**stock | {"nbval_cell_timeout": 2000.0, "nbval_sanitize_with": None} | given)


@pytest.fixture
def configure(monkeypatch):
    hardenings = []
    monkeypatch.setattr(nbval_strict, "harden", lambda: hardenings.append(1))

    def configure(**given):
        option = options(**given)
        nbval_strict.pytest_configure(SimpleNamespace(option=option))
        return option, len(hardenings)

    return configure


@pytest.mark.parametrize("mode", [{"nbval": True}, {"nbval": False, "nbval_lax": True}])
def test_plain_nbval_gets_this_python_sixty_seconds_a_cell_and_the_sanitize_file(configure, mode):
    option, hardenings = configure(**mode)
    assert option.nbval_current_env and option.nbval_cell_timeout == 60 and hardenings == 1
    assert Path(option.nbval_sanitize_with) == SANITIZE


def test_options_that_were_given_stay(configure):
    given = {"nbval_kernel_name": "theirs", "nbval_cell_timeout": 5.0, "nbval_sanitize_with": "theirs.cfg"}
    option, _ = configure(**given)
    assert option == options(**given)


def test_a_pytest_without_nbval_is_left_alone(configure):
    assert configure(nbval=False) == (options(nbval=False), 0)


def test_the_checkout_loads_the_plugin_by_itself(request):
    """So that `pytest --nbval notebooks/` is the strict one."""
    assert request.config.pluginmanager.has_plugin("minillama4.course.nbval_strict")
    assert Path(sys.modules["minillama4.course.nbval_strict"].__file__).is_relative_to(ROOT)
