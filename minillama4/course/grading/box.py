"""What runs inside the sandbox: a learner's cells, and then `observe` of each check, which writes arrays to one file.

    python box.py JOB VIEW        says that it is there; the name of the file to write comes on standard input

Everything here is in a learner's reach, since their code runs in the same process. So nothing here decides anything: it
knows inputs and no answers, and whatever it writes is read as arrays for inputs that nobody knew before.

Cells run in an IPython shell without a kernel: magics, `!`, top-level `await` and `display` work, and no sockets, no
heartbeat thread and no second process have to be watched, nor does a cell that talks to its kernel get anywhere.
"""

import json
import os
import pkgutil
import signal
import sys
import time
from types import FunctionType

AFTER = 1.0  # seconds after which a cell that ignored its time limit is told again
PATIENCE, LEAST = 4, 60  # seconds of waiting (sleep, a lock, a busy machine) for one of computing, and at least


class TimeUp(BaseException):
    """Not an Exception, so that `except Exception` in a loop does not outlive it."""


def main(job_folder: str, view: str):
    os.write(2, b"ready\n")
    name = sys.stdin.readline().strip()
    if not name:  # the grader is gone
        return
    out = os.open(name, os.O_WRONLY | os.O_APPEND)
    try:  # where memory runs out, this goes first and not the grader
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass
    with open(os.path.join(job_folder, "job.json"), encoding="utf-8") as file:
        job = json.load(file)
    sys.path.insert(0, view)
    from lite import package_without_model

    package_without_model(os.path.join(view, "minillama4"))
    import importlib

    import torch
    from wire import encode

    from minillama4.course import observe

    torch.set_num_threads(1)
    names = {id: f"minillama4.course.checks.{id.replace('-', '_')}" for id in job["exercises"]}
    checks = {id: importlib.import_module(name) for id, name in names.items()}
    arm = Guards(view, observe.call.__code__, observe.LIBRARIES)
    for check in checks.values():
        for name in check.ANSWERED_BY:
            if not name.startswith("minillama4."):
                arm.watch(name)
    shell = make_shell()
    say = Writer(out)

    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what a cell prints or asks for concerns nobody: 10 GB of it would
        os.dup2(nothing, stream)

    functions, errors, again = {}, {}, []
    for cell in job["cells"]:
        error = run_cell(shell, cell, job["seconds"], say, observe)
        if error is not None:
            errors[cell["number"]] = error[1]
            if error[0]:
                again.append(cell)
        bind(shell, cell["tasks"], job["names"], functions)
    for cell in again:  # a name that only a later cell defines: moved cells
        error = run_cell(shell, cell, job["seconds"], say, observe)
        if error is None:
            errors.pop(cell["number"])
            say(again=cell["number"])
        bind(shell, cell["tasks"], job["names"], functions)
    bind(shell, [id for id in job["exercises"] if id not in functions], job["names"], functions)

    for id in job["exercises"]:
        if id not in functions:
            numbers = [cell["number"] for cell in job["cells"] if id in cell["tasks"]]
            failed = [errors[number] for number in numbers if number in errors]
            say(failed=id, error=failed[-1] if failed else f"there is no `{job['names'][id]}` in the notebook")
            continue
        if not callable(functions[id]):
            kind = type(functions[id]).__name__
            say(failed=id, error=f"`{job['names'][id]}` must be a function, and it is of type {kind}")
            continue
        for draw in range(job["draws"]):
            say(at="observe", exercise=id, draw=draw)
            start = time.process_time()
            # A file of the grader's, made a moment ago; what a learner's code has done to torch.load harms itself.
            inputs = torch.load(os.path.join(job_folder, f"{id}-{draw}.pt"), weights_only=False)
            try:
                with limit(job["seconds"]), arm(checks[id].ANSWERED_BY):
                    observed = checks[id].observe(functions[id], inputs)
                line = encode(observed)
            except BaseException as error:
                say(failed=id, error=describe(error, observe))
                break
            say.raw(f'{{"exercise": {json.dumps(id)}, "draw": {draw}, "observed": {line}}}')
            say(seconds=time.process_time() - start)
    say(end=True, cpu=time.process_time())
    os._exit(0)  # threads that a cell left behind are not waited for


class Writer:
    """One line of JSON a call, whole."""

    def __init__(self, out: int):
        self.out = out

    def __call__(self, **row):
        self.raw(json.dumps(row))

    def raw(self, line: str):
        data = line.encode("utf-8", "replace") + b"\n"
        while data:
            data = data[os.write(self.out, data) :]


# ----------------------------------------------------------------------------------------------------------------------
# Cells


def make_shell():
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Shell(InteractiveShell):
        def enable_gui(self, gui=None):
            """`%matplotlib inline` asks for one."""

    config = Config()
    config.HistoryManager.enabled = False  # no database on disk
    return Shell.instance(config=config, user_ns={})


def run_cell(shell, cell: dict, seconds: float, say: Writer, observe) -> tuple[bool, str] | None:
    """None, or (a name was missing, the error in one line)."""
    say(at="cell", cell=cell["number"])
    start = time.process_time()
    try:
        with limit(seconds):
            result = shell.run_cell(cell["source"], store_history=True)
        error = result.error_before_exec or result.error_in_exec
    except BaseException as caught:  # TimeUp between two statements of the shell's own
        error = caught
    say(seconds=time.process_time() - start)
    if error is None:
        return None
    said = describe(error, observe)
    say(cell=cell["number"], error=said)
    return isinstance(error, NameError), said


def describe(error: BaseException, observe) -> str:
    try:
        return f"it took {error}" if isinstance(error, TimeUp) else str(observe.explain(error))
    except BaseException:
        return "an exception that cannot be shown"


def bind(shell, ids: list[str], names: dict[str, str], functions: dict):
    """Keep the function as it is now: a later exercise may use its name again."""
    for id in ids:
        try:
            functions[id] = eval(names[id], shell.user_ns)
        except BaseException:
            pass


class limit:
    """TimeUp after so many seconds of computing, or PATIENCE times as many of waiting; and again each second.

    Computing, because a grader's machine may be busy with other submissions.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __enter__(self):
        computed, waited = time.process_time() + self.seconds, time.monotonic() + max(LEAST, PATIENCE * self.seconds)

        def ring(signum, frame):
            if time.process_time() > computed or time.monotonic() > waited:
                raise TimeUp(f"more than {self.seconds:g} s")

        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, self.seconds, AFTER)

    def __exit__(self, *error):
        signal.setitimer(signal.ITIMER_REAL, 0)


# ----------------------------------------------------------------------------------------------------------------------
# Answers that are not the package's, such as torch.nn.functional.rms_norm


class Guards:
    """While a check looks on, functions that would answer its exercise raise, whoever calls them and in which thread.

    Not a profiler, which a learner's code could switch off. At all other times, and where the course's own code is what
    calls, they work: comparing with them in a cell is good practice.
    """

    def __init__(self, view: str, call, libraries: tuple[str, ...]):
        self.ours, self.call, self.libraries = os.path.join(view, "minillama4", ""), call, libraries
        self.active: frozenset[str] = frozenset()

    def __call__(self, names):
        guards = self

        class Armed:
            def __enter__(self):
                guards.active = frozenset(names)

            def __exit__(self, *error):
                guards.active = frozenset()

        return Armed()

    def watch(self, name: str):
        parent_name, _, attribute = name.rpartition(".")
        try:
            parent, target = pkgutil.resolve_name(parent_name), pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            return  # it is not there, so nobody can call it
        if isinstance(target, type):
            for method, function in list(vars(target).items()):
                if isinstance(function, FunctionType):
                    setattr(target, method, self._guarded(function, name))
            return
        guarded = self._guarded(target, name)
        for module in list(sys.modules.values()):  # wherever else its name was imported
            for key, value in list((getattr(module, "__dict__", None) or {}).items()):
                if value is target:
                    setattr(module, key, guarded)
        places = [parent]
        if name.startswith("torch."):
            import torch

            places += [torch._C._VariableFunctions, torch.ops.aten]
        for place in places:
            try:
                if hasattr(place, attribute):
                    setattr(place, attribute, guarded)
            except (AttributeError, TypeError, RuntimeError):
                pass

    def _guarded(self, function, name: str):
        guards = self

        def guarded(*arguments, **named):
            if name in guards.active and not guards._by_the_course(sys._getframe(1)):
                raise RuntimeError(f"{name} is not there while you are graded: it would answer the exercise")
            return function(*arguments, **named)

        guarded.__name__ = getattr(function, "__name__", "guarded")
        guarded.__doc__ = getattr(function, "__doc__", None)
        return guarded

    def _by_the_course(self, frame) -> bool:
        """Is the nearest caller that is no library the course's own code? A file name alone may be a learner's lie."""
        while frame is not None and frame.f_code is not self.call:
            file, module = frame.f_code.co_filename, sys.modules.get(frame.f_globals.get("__name__"))
            if file.startswith(self.ours) and getattr(module, "__dict__", None) is frame.f_globals:
                return True
            if not file.startswith((*self.libraries, "<frozen ")):
                return False
            frame = frame.f_back
        return False


if __name__ == "__main__":
    main(*sys.argv[1:])
