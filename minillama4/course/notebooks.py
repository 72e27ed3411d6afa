"""`make notebooks`: runs the lessons and the solved exercises, and stores what they print.

    python -m minillama4.course.notebooks [FILES...]        without FILES: all of notebooks/ and solutions/

What is stored is what nbval compares (`nbval_strict.py`) and what GitHub shows. So nothing is kept that changes by
itself from run to run: no times, no widget ids, no machine. A second run leaves an unchanged notebook byte for byte.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path

from .nbval_strict import CELL_TIMEOUT, SANITIZE

FOLDERS = ("notebooks", "solutions")
MAX_BYTES = 1_500_000  # above that GitHub's page becomes slow, and the history heavy

# What a person sets. An editor adds more (times, collapsed, scrolled, vscode, colab), which would change at each save.
CELL_METADATA = {"tags", "nbgrader", "slideshow", "jupyter", "deletable", "editable", "name"}
NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},  # without a version: a newer Python is no change of a lesson
}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"  # a random id, of a widget that is gone after the run
LINES_SHOWN = 25  # the end of a traceback says what went wrong
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(ValueError):
    """A cell fails, or what came out cannot be stored; the message says where and what."""


def main(arguments: list[str]) -> int:
    files = [Path(name) for name in arguments] or sorted(
        file for name in FOLDERS for file in Path(name).glob("*.ipynb")
    )
    if not files:
        print(f"notebooks: nothing in {' or '.join(FOLDERS)}; run it in the course's own folder", file=sys.stderr)
        return 1
    try:
        import nbclient  # noqa: F401
        import nbval  # noqa: F401
    except ImportError as error:
        print(f"notebooks: {error.name} is missing; get it with: pip install nbclient nbval", file=sys.stderr)
        return 1
    failed = 0
    for file in files:
        start = time.monotonic()
        try:
            changed = store(file, execute(file))
        except (NotebookError, OSError) as error:
            print(f"notebooks: {error}", file=sys.stderr, flush=True)
            failed = 1
        else:
            print(f"{file}: {time.monotonic() - start:.1f} s{'' if changed else ', unchanged'}", flush=True)
    return failed


def execute(file: Path, timeout: int = CELL_TIMEOUT) -> str:
    """Run every cell in a fresh kernel and return the text of the new file; the file itself is only read.

    NotebookError: not a notebook, a cell that raises, takes more than `timeout` seconds or kills its kernel, or a
    result above MAX_BYTES.
    """
    import nbformat
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = _read(file)
    stored = {cell.get("id"): (cell.source, cell.get("outputs", [])) for cell in notebook.cells}
    client, reached = _client(notebook, file, timeout)
    try:
        client.execute(stderr=subprocess.DEVNULL)  # a warning of the kernel about its own sockets
    except CellExecutionError as error:
        lines = COLOURS.sub("", error.traceback).rstrip().splitlines()[-LINES_SHOWN:]
        raise NotebookError("\n".join([f"{file}, {_name(reached)} fails:", *lines])) from None
    except CellTimeoutError:
        raise NotebookError(f"{file}, {_name(reached)} takes more than {timeout} s") from None
    except (DeadKernelError, RuntimeError) as error:
        raise NotebookError(f"{file}, {_name(reached)}: {error}") from None

    normalise(notebook, stored)
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > MAX_BYTES:
        raise NotebookError(
            f"{file} would have {len(text.encode()) / 1e6:.1f} MB; {MAX_BYTES / 1e6} MB is the limit. "
            "Smaller or fewer figures (dpi, figsize), or less printed text"
        )
    return text


def run(file: Path, timeout: int = CELL_TIMEOUT) -> list:
    """Run every cell, as a learner left it, and return the cells with their outputs; the file itself is only read.

    A failure does not stop the run: the cell ends with one error output, whatever the cell did to its traceback, and
    so does one that takes more than `timeout` seconds or kills its kernel. After a dead kernel the cells have no
    execution count. NotebookError: not a notebook.
    """
    from nbclient.exceptions import DeadKernelError

    notebook = _read(file)
    client, reached = _client(
        notebook,
        file,
        timeout,
        allow_errors=True,
        interrupt_on_timeout=True,
        error_on_timeout={"ename": "TimeoutError", "evalue": f"more than {timeout} s", "traceback": []},
        on_cell_executed=lambda cell, cell_index, execute_reply: _keep_error(cell, execute_reply["content"]),
    )
    try:
        client.execute(stderr=subprocess.DEVNULL)
    except (DeadKernelError, RuntimeError) as error:
        if not reached:
            raise NotebookError(f"{file}, {_name(reached)}: {error}") from None
        _keep_error(reached[-1], {"status": "error", "ename": type(error).__name__, "evalue": str(error)})
    return notebook.cells


def _keep_error(cell, reply: dict):
    """What the kernel replied, in place of what the cell showed of it."""
    from nbformat.v4 import new_output

    if reply["status"] == "error":
        error = {key: reply.get(key, default) for key, default in (("ename", ""), ("evalue", ""), ("traceback", []))}
        kept = [output for output in cell.outputs if output.output_type != "error"]
        cell.outputs = [*kept, new_output("error", **error)]


def _read(file: Path):
    import nbformat

    try:
        return nbformat.read(file, as_version=4)
    except (ValueError, nbformat.ValidationError, AttributeError) as error:  # AttributeError: JSON, but a list
        raise NotebookError(f"{file} is not a notebook: {str(error)[:200]}") from None


def _client(notebook, file: Path, timeout: int, **options):
    """(what runs the notebook, the list of the cells that it started)"""
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbval.kernel import CURRENT_ENV_KERNEL_NAME, NbvalKernelspecManager

    class Client(NotebookClient):
        def on_comm_open_jupyter_widget(self, msg):
            """Nothing. nbclient would play the browser for Output widgets, which hangs now and then (nbclient#312)
            and stores other outputs than those that nbval will see."""

        def create_kernel_manager(self):
            """This Python, also where the user's own kernels include a `python3` of some other environment."""
            specs = NbvalKernelspecManager()
            self.km = AsyncKernelManager(kernel_name=CURRENT_ENV_KERNEL_NAME, kernel_spec_manager=specs)
            return self.km

    for cell in notebook.cells:
        if cell.cell_type == "code":  # so that nothing of an earlier run can stay behind
            cell.update(execution_count=None, outputs=[])
    reached = []  # each cell as it starts; the last one is where a failure happened
    client = Client(
        notebook,
        timeout=timeout,
        resources={"metadata": {"path": str(file.resolve().parent)}},  # the working directory
        store_widget_state=False,
        record_timing=False,
        skip_cells_with_tag="",  # every cell is run
        on_cell_execute=lambda cell, cell_index: reached.append(cell),
        **options,
    )
    return client, reached


def _name(reached: list) -> str:
    return f"code cell {len(reached)} (id {reached[-1].get('id')})" if reached else "before the first cell"


def normalise(notebook, stored: dict[str, tuple[str, list]] | None = None):
    """Keep of a notebook, in place, what a person wrote and what its code printed.

    `stored`: cell id -> source and outputs before this run. Where a new output differs only in what nbval forgives
    (an address, a process id, a speed), the old one stays.
    """
    # A title or authors may stay; whatever else an editor put there may not, `widgets` first of all (GitHub's reader
    # stops at it).
    kept = {key: notebook.metadata[key] for key in ("title", "authors") if key in notebook.metadata}
    notebook.metadata.clear()
    notebook.metadata.update(NOTEBOOK_METADATA | kept)
    count = 0
    for cell in notebook.cells:
        for key in set(cell.metadata) - CELL_METADATA:
            del cell.metadata[key]
        if cell.cell_type != "code":
            continue
        if not cell.source.strip():
            cell.update(execution_count=None, outputs=[])
            continue
        if cell.execution_count is not None:
            count += 1
            cell.execution_count = count
        cell.outputs = _outputs(cell)
        source, outputs = (stored or {}).get(cell.get("id"), (None, None))
        if source == cell.source and _scrub(outputs) == _scrub(cell.outputs):
            cell.outputs = outputs


def _outputs(cell) -> list:
    from nbval.plugin import coalesce_streams

    outputs = []
    for is_stream, group in groupby(cell.outputs, lambda output: output.output_type == "stream"):
        if is_stream:  # also resolves \r; stdout first, because which of the two comes first is a matter of luck
            outputs += sorted(coalesce_streams(list(group)), key=lambda output: output.name != "stdout")
        else:
            outputs += group
    for output in outputs:
        if "data" in output:
            output.data.pop(WIDGET_VIEW, None)
            output.metadata.pop(WIDGET_VIEW, None)
        if "execution_count" in output:
            output.execution_count = cell.execution_count
        if "traceback" in output:  # never compared; a library's path would name this machine
            output.traceback = [f"{output.ename}: {output.evalue}"]
    return outputs


def _scrub(outputs: list) -> str:
    from nbval.plugin import get_sanitize_patterns

    text = json.dumps(outputs, sort_keys=True)
    for regex, replacement in get_sanitize_patterns(SANITIZE.read_text("utf-8")) if SANITIZE.exists() else ():
        text = re.sub(regex, replacement, text)
    return text


def store(file: Path, text: str) -> bool:
    """Write the file whole or not at all; False where it already has this text."""
    if file.read_bytes() == text.encode():
        return False
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as out:
            out.write(text)
        os.chmod(temporary, file.stat().st_mode & 0o777)  # mkstemp's own is for the owner alone
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
