"""Submissions that try to get a point that is not theirs, to read what they should not, or to break something.

Each has an answer; what the verdict must be follows from that answer alone: `solved` says which.
"""

from dataclasses import dataclass, field

from classroom import IDENTITY, RIGHT, answer_cell, check_cell, code, notebook


@dataclass
class Attack:
    made: dict | bytes
    solved: bool
    mistake: str = ""  # what the report calls it, where that matters
    files: dict[str, bytes] = field(default_factory=dict)  # laid beside the notebook
    cells: int = 0  # at least so many cells of it must have failed


def attacks(report: str, solutions: str, other: str, port: int, mark: str) -> dict[str, Attack]:
    """Name -> attack. The arguments are what it goes for: paths, a port on this machine, a folder to write to."""
    found = {}

    def add(name, answer, solved, *, before="", after="", **more):
        found[name] = Attack(notebook(answer, before, after), solved, **more)
        return found[name]

    # ---- to take time, memory, processes or disk
    add("infinite loop in a cell", RIGHT, True, before="while True: pass", cells=1)
    add(
        "infinite loop that catches everything",
        RIGHT,
        True,
        before="""
        while True:
            try:
                while True: pass
            except BaseException: pass
        """,
        cells=1,
    )
    add(
        "infinite loop in the answer",
        "def rms_norm(x, weight, eps):\n    while True: pass",
        False,
        mistake="took too long",
    )
    add(
        "thread that outlives its cell",
        RIGHT,
        True,
        before="""
        import threading, time, torch
        def later():
            time.sleep(0.3)
            torch.rsqrt = torch.sqrt = None
            time.sleep(1000)
        threading.Thread(target=later).start()
        threading.Thread(target=time.sleep, args=(1000,)).start()
        """.replace("torch.rsqrt = torch.sqrt = None", "pass"),
    )
    add(
        "process that leaves its group",
        RIGHT,
        True,
        before="""
        import os, sys, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(3000)", "left-by-a-learner"])
            os._exit(0)
        """,
    )
    add(
        "fork bomb",
        """
        import os
        def rms_norm(x, weight, eps):
            while True:
                try: os.fork()
                except OSError: pass
        """,
        False,
    )
    add(
        "memory bomb",
        """
        def rms_norm(x, weight, eps):
            kept = []
            while True: kept.append(b"x" * 50_000_000)
        """,
        False,
    )
    add(
        "memory bomb of many processes",
        """
        import os, time
        def rms_norm(x, weight, eps):
            for _ in range(20):
                if os.fork() == 0:
                    kept = b"x" * 400_000_000
                    time.sleep(1000)
            time.sleep(1000)
        """,
        False,
    )
    add(
        "10 GB of output",
        RIGHT,
        True,
        before="""
        import os, sys
        for _ in range(10_000): os.write(1, b"x" * 1_000_000), sys.stderr.write("y" * 1000)
        """,
    )
    add(
        "disk filling",
        RIGHT,
        True,
        before="""
        import itertools
        for folder in ("/tmp", "/home", "/dev/shm", "/dev", "/", "/out", "/job", "/view", "."):
            try:
                for n in itertools.count():
                    with open(f"{folder}/{n}", "wb") as file: file.write(b"x" * 30_000_000)
            except OSError: pass
        """,
    )

    # ---- to end or hang what runs it
    add("os._exit in a cell", RIGHT, True, before="import os\nos._exit(0)", cells=1)
    add("os._exit in the answer", "import os\ndef rms_norm(x, weight, eps): os._exit(0)", False, mistake="process died")
    add("kernel kill", RIGHT, True, before="import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", cells=1)
    add("kill everything", RIGHT, True, before="import os, signal\nos.kill(-1, signal.SIGKILL)\nos.kill(1, 9)")
    add(
        "segmentation fault",
        "import ctypes\ndef rms_norm(x, weight, eps): ctypes.string_at(0)",
        False,
        mistake="process died",
    )
    add("input()", RIGHT, True, before="answer = input('?')", cells=1)
    add("SystemExit", RIGHT, True, before="raise SystemExit", cells=1)

    # ---- to look solved
    deleted = add("deleted check cell", IDENTITY, False, mistake="identity").made
    deleted["cells"].remove(check_cell(deleted))
    edited = add("edited check cell", IDENTITY, False, mistake="identity").made
    check_cell(edited)["source"] = "print('start-rms-norm: solved')"
    faked = add("faked outputs", None, False, mistake="not written").made
    check_cell(faked).update(
        execution_count=1, outputs=[{"output_type": "stream", "name": "stdout", "text": "start-rms-norm: solved\n"}]
    )
    add(
        "input transformer",
        IDENTITY,
        False,
        mistake="identity",
        after="""
        get_ipython().input_transformers_cleanup.append(lambda lines: ["pass\\n"])
        get_ipython().input_transformers_post.append(lambda lines: ["pass\\n"])
        """,
    )
    add(
        "always-true __eq__",
        """
        class Yes(torch.Tensor):
            def __eq__(self, other): return True
            __ne__ = __lt__ = __gt__ = lambda self, other: False
            def __bool__(self): return True
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                return args[0] if args else True
        def rms_norm(x, weight, eps): return x.as_subclass(Yes)
        """,
        False,
    )
    add(
        "patched check",
        IDENTITY,
        False,
        before="""
        import sys, minillama4.course as course, minillama4.course.observe as observe
        course.check = course.checking.check = lambda *a, **k: print("start-rms-norm: solved")
        for name, module in list(sys.modules.items()):
            if "check" in name and hasattr(module, "observe"):
                module.judge = lambda inputs, observed: iter(())
        observe._equal = observe.close = lambda *a, **k: True
        """,
    )
    add(
        "patched torch.allclose",
        IDENTITY,
        False,
        mistake="identity",
        before="""
        import torch, numpy
        torch.allclose = torch.equal = numpy.allclose = numpy.array_equal = lambda *a, **k: True
        torch.testing.assert_close = numpy.testing.assert_allclose = lambda *a, **k: None
        """,
    )
    add(
        "patched builtins",
        IDENTITY,
        False,
        before="""
        import builtins
        builtins.all = lambda *a: True
        builtins.AssertionError = type("AssertionError", (Exception,), {})
        builtins.bool = lambda *a: True
        """,
    )
    add(
        "patched pytest and nbval",
        IDENTITY,
        False,
        mistake="identity",
        before="""
        import os, pathlib
        for folder in (".", "/home", "/tmp", os.path.expanduser("~"), "/job", "/out"):
            for name in ("conftest.py", "sitecustomize.py", "usercustomize.py", "pytest.ini"):
                try: pathlib.Path(folder, name).write_text("import nbval.plugin\nnbval.plugin.IPyNbCell.runtest = id")
                except OSError: pass
        import _pytest.python, nbval.plugin
        nbval.plugin.IPyNbCell.runtest = lambda self: None
        """,
    )
    spoof = f"open({mark!r}, 'w').write('1')\nimport nbval.plugin as p\np.IPyNbCell.runtest = lambda self: None\n"
    names = ("conftest.py", "sitecustomize.py", "usercustomize.py", "pytest.py", "torch.py", "minillama4.py")
    add("files beside the notebook", IDENTITY, False, mistake="identity", files={n: spoof.encode() for n in names})
    for name, junk in {
        "forged: nothing in it": '{"exercise": "start-rms-norm", "draw": 0, "observed": {}}',
        "forged: no numbers": '{"exercise": "start-rms-norm", "draw": 0, "observed": {"plain/value": {"text": "1"}}}',
        "forged: a hook for pickle": '{"exercise": "start-rms-norm", "draw": 0, "observed": {"a": {"dtype": "|O", '
        '"shape": [1], "data": "gASVHAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAR0cnVllIWUUpQu"}}}',
        "forged: huge": '{"exercise": "start-rms-norm", "draw": 0, "observed": {"a": {"dtype": "<f8", '
        '"shape": [2000000000, 2000000000], "data": ""}}}',
        "forged: deep": "[" * 200_000,
        "forged: the end": '{"end": true}',
    }.items():
        add(
            name,
            IDENTITY,
            False,
            before=f"""
        import os
        line = {junk!r}.encode() + b"\\n"
        for number in range(3, 128):
            try: os.write(number, line * 2)
            except OSError: pass
        """,
        )
    add(
        "rubbish where results go",
        RIGHT,
        True,
        after="""
        import os
        for number in range(3, 128):
            try: os.write(number, b"\\n\\x00\\xff{]" + b"z" * 1000 + b"\\n")
            except OSError: pass
        """,
    )

    # ---- to hand in somebody else's work
    add(
        "the package's function",
        "from minillama4.model import RMSNorm\n"
        + """
def rms_norm(x, weight, eps):
    norm = RMSNorm(x.shape[-1], eps)
    norm.weight = torch.nn.Parameter(weight)
    return norm(x)
""",
        False,
        mistake="borrowed",
    )
    add(
        "the package's function by importlib",
        """
        import importlib
        norm = getattr(importlib.import_module("minillama" + "4.model"), "RMS" + "Norm")
        def rms_norm(x, weight, eps):
            return norm.forward(type("", (), {"eps": eps, "weight": weight}), x)
        """,
        False,
    )
    add(
        "the package's source",
        """
        import inspect, minillama4.model
        found = inspect.getsource(minillama4.model.RMSNorm).replace("class RMSNorm", "class Mine")
        exec(found)
        def rms_norm(x, weight, eps):
            return Mine.forward(type("", (), {"eps": eps, "weight": weight}), x)
        """,
        False,
    )
    add(
        "a copied source file",
        """
        import mine
        def rms_norm(x, weight, eps):
            return mine.norm(x, weight, eps)
        """,
        False,
        files={"mine.py": RIGHT.replace("rms_norm", "norm").encode()},
    )
    add(
        "transformers' function",
        """
        from transformers.models.llama4.modeling_llama4 import Llama4TextRMSNorm
        def rms_norm(x, weight, eps):
            norm = Llama4TextRMSNorm(x.shape[-1], eps)
            norm.weight = torch.nn.Parameter(weight)
            return norm(x)
        """,
        False,
    )
    borrowed = "return F.rms_norm(x.float(), x.shape[-1:], eps=eps).type_as(x) * weight"
    add(
        "torch's function",
        f"""
        import torch.nn.functional as F
        def rms_norm(x, weight, eps):
            {borrowed}
        """,
        False,
        mistake="borrowed",
    )
    add(
        "torch's function, unprofiled",
        f"""
        import sys, torch.nn.functional as F
        def rms_norm(x, weight, eps):
            sys.setprofile(None)
            sys.settrace(None)
            {borrowed}
        """,
        False,
        mistake="borrowed",
    )
    add(
        "torch's function in a thread",
        """
        import threading, torch.nn.functional as F
        def inner(out, x, weight, eps):
            out.append((lambda: F.rms_norm(x.float(), x.shape[-1:], eps=eps).type_as(x) * weight)())
        def rms_norm(x, weight, eps):
            out = []
            thread = threading.Thread(target=inner, args=(out, x, weight, eps))
            thread.start(); thread.join()
            return out[0]
        """,
        False,
    )
    add(
        "torch's function under a false name",
        """
        import torch.nn.functional as F, minillama4.course.observe as observe
        source = "def rms_norm(x, weight, eps): return F.rms_norm(x.float(), x.shape[-1:], eps=eps).type_as(x) * weight"
        exec(compile(source, observe.__file__, "exec"))
        """,
        False,
    )
    add(
        "comparing with torch's function",
        "import torch.nn.functional as F"
        + RIGHT
        + """
x = torch.ones(2, 3)
assert torch.allclose(rms_norm(x, torch.ones(3), 1e-6), F.rms_norm(x, (3,), eps=1e-6))
""",
        True,
    )

    # ---- to read what it should not
    look = """
        import glob, os
        found = []
        for place in {places!r}:
            for name in [place, *glob.glob(place + "/**", recursive=True)]:
                try:
                    if os.path.isfile(name): found.append("LEAK " + open(name, errors="replace").read()[:2000])
                except OSError: pass
        def rms_norm(x, weight, eps):
            raise RuntimeError(" ".join(found) or "nothing there")
        """
    add("reading the solutions", look.format(places=[solutions]), False, mistake="raises")
    add("reading the report", look.format(places=[report]), False, mistake="raises")
    add("reading another submission", look.format(places=[other]), False, mistake="raises")
    add(
        "reading the checks",
        """
        import glob, sys
        import minillama4.course.checks.start_rms_norm as check
        text = "".join(open(f, errors="replace").read() for f in glob.glob("/view/**/*.py", recursive=True))
        words = [w for w in ("def judge", "def truth", "HINTS =", "x64.square") if w in text]
        words += [w for w in ("judge", "draw", "truth", "HINTS") if hasattr(check, w)]
        said = "LEAK " + " ".join(words) if words else "nothing there"
        def rms_norm(x, weight, eps):
            raise RuntimeError(said)
        """,
        False,
        mistake="raises",
    )
    add(
        "the network",
        """
        import socket
        found = []
        for host, port in (("127.0.0.1", PORT), ("1.1.1.1", 53), ("example.org", 443)):
            try:
                socket.create_connection((host, port), timeout=0.5).close()
                found.append(f"LEAK {host}")
            except OSError: pass
        def rms_norm(x, weight, eps):
            raise RuntimeError(" ".join(found) or "nothing there")
        """.replace("PORT", str(port)),
        False,
        mistake="raises",
    )

    # ---- notebooks that are none, or odd
    found["malformed JSON"] = Attack(b'{"cells": [', False, "cannot be read")
    found["JSON that is a list"] = Attack(b"[1, 2]", False, "cannot be read")
    found["nested without end"] = Attack(b"[" * 1_000_000, False, "cannot be read")
    found["not UTF-8"] = Attack(b"\xff\xfe\x00\x01", False, "cannot be read")
    found["nbformat 3"] = Attack({"nbformat": 3, "nbformat_minor": 0, "metadata": {},
                                  "worksheets": [{"cells": [], "metadata": {}}]}, False, "cannot be read")  # fmt: skip
    found["cells that are numbers"] = Attack({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [1]}, False,
                                             "cannot be read")  # fmt: skip
    kernel = add("wrong kernel name", RIGHT, True).made
    kernel["metadata"]["kernelspec"] = {"name": "../../bin/sh", "display_name": "x", "language": "R"}
    add("a NUL byte", RIGHT, True, before="print('\x00')", cells=1)
    found["a raw NUL byte"] = Attack(b'{"cells": "\x00"}', False, "cannot be read")
    markup = add(
        "markup in messages",
        """
        def rms_norm(x, weight, eps):
            raise RuntimeError('<script>alert(1)</script> =cmd|"/c calc"!A1 \\x1b[2J </pre>')
        """,
        False,
        mistake="raises",
    ).made
    markup["cells"].append(code("'<img src=x onerror=alert(2)>'"))
    shouting = add(
        "a harmless print and a warning",
        RIGHT.replace("    wide", "    print('here', x.shape); import warnings; warnings.warn('careful')\n    wide", 1),
        True,
    ).made
    shouting["cells"].insert(0, code("import logging; logging.getLogger().warning('hello')"))
    raw = add("an answer that is no code", RIGHT, False, mistake="does not run").made
    answer_cell(raw).update(cell_type="raw")
    return found
