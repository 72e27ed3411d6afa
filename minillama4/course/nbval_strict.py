"""nbval without its false passes: a pytest plugin.

    pytest -p minillama4.course.nbval_strict --nbval notebooks/            (in this checkout: pytest --nbval notebooks/)
    ... -n 2 --dist loadscope                                              in parallel: a notebook is one kernel's

Stock nbval 0.11 looks for an `error` message and never at the kernel's reply, so that a cell which hides its traceback
passes, and so does a bad magic. It waits 2000 s for a kernel that is dead. It passes a cell that was never run,
whatever it prints, and a `raises-exception` tag on a cell that raises nothing. Here each of these fails, the kernel is
the Python that runs pytest, and a cell has 60 s. What still passes: `!exit 3`, which is no error to IPython either,
and a task that fails and that nobody awaits. Source: nbval/plugin.py, nbval/kernel.py; nbval#147, #231.
"""

import functools
import time
from pathlib import Path
from queue import Empty

CELL_TIMEOUT = 60  # seconds
NBVAL_TIMEOUT = 2000.0  # nbval's own default: who asks for exactly this gets ours
SANITIZE = Path(__file__).parents[2] / "tests" / "notebooks" / "sanitize.cfg"  # in a checkout; a wheel has none


def pytest_configure(config):
    option = config.option
    if not (getattr(option, "nbval", False) or getattr(option, "nbval_lax", False)):
        return
    if not option.nbval_kernel_name:
        option.nbval_current_env = True
    if option.nbval_cell_timeout == NBVAL_TIMEOUT:
        option.nbval_cell_timeout = CELL_TIMEOUT
    if not option.nbval_sanitize_with and SANITIZE.exists():
        option.nbval_sanitize_with = str(SANITIZE)
    harden()


class KernelDied(Exception):
    pass


def harden():
    """Replace the two methods of nbval that see too little."""
    from nbval.kernel import RunningKernel
    from nbval.plugin import IPyNbCell

    if RunningKernel.await_reply is not await_reply:
        RunningKernel.await_reply = await_reply
        IPyNbCell.runtest = checked(IPyNbCell.runtest)


def await_reply(kernel, msg_id, timeout=None):
    """Wait for the answer to `msg_id` and remember it; look every second whether the kernel still lives.

    Raises Empty after `timeout` seconds, as nbval's own does, and KernelDied.
    """
    kernel.reply = None
    end = time.monotonic() + (timeout or float("inf"))
    while True:
        try:
            message = kernel.get_message("shell", timeout=max(0.0, min(1.0, end - time.monotonic())))
        except Empty:
            if not kernel.is_alive():
                raise KernelDied from None
            if time.monotonic() >= end:
                raise
            continue
        if message["parent_header"].get("msg_id") == msg_id:
            kernel.reply = message["content"]
            if kernel.reply["status"] == "aborted":
                raise RuntimeError("the kernel aborted an execution request")
            return


def checked(runtest):
    """nbval's `runtest`, and what the reply says about the same cell."""

    @functools.wraps(runtest)
    def wrapper(cell):
        if cell.options["check"] and cell.cell.execution_count is None and cell.cell.source.strip():
            cell.raise_cell_error("The stored notebook never ran this cell, so there is nothing to compare with")
        try:
            runtest(cell)
        except KernelDied:
            cell.raise_cell_error("The kernel died while it ran this cell")
        reply = cell.parent.kernel.reply or {}
        tagged = cell.options["check_exception"]
        if reply.get("status") == "error" and not tagged:
            cell.raise_cell_error(f"The cell failed and hid it: {reply.get('ename')}: {reply.get('evalue')}")
        if reply.get("status") == "ok" and tagged:
            cell.raise_cell_error("The cell is tagged as one that raises an exception, and it raised none")

    return wrapper
