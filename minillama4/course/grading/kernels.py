"""Kernels that have torch and the judge loaded before they start: half of what grading a notebook would cost.

    python kernels.py serve SOCKET      loads all that once, and becomes a new kernel for each who asks
    python kernels.py ask SOCKET FILE   what Jupyter starts: asks for one, and lives and ends with it

A kernel is a fork of the server, so it has run nothing but the instructor's code. Where there is no Linux, graded
notebooks start ordinary kernels.
"""

import json
import os
import signal
import socket
import sys


def serve(address: str):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)  # whoever asks meanwhile waits
    import runpy
    from pathlib import Path

    here = Path(__file__).resolve()
    runpy.run_path(str(here.with_name("lite.py")))["package_without_model"](str(here.parents[2]))
    import ipykernel.kernelapp  # noqa: F401

    import minillama4.course.grading.judge  # noqa: F401

    signal.signal(signal.SIGCHLD, reap)
    while True:
        asking, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            become(asking)
        asking.close()


def reap(*_):
    """Ended kernels, so that what they computed is counted."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def become(asking: socket.socket):
    """A kernel, until it is shut down or who asked is gone."""
    import threading

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with asking.makefile() as lines:
        wanted = json.loads(lines.readline())
    asking.sendall(f"{os.getpid()}\n".encode())

    def follow():
        asking.recv(1)
        os._exit(1)

    try:
        os.chdir(wanted["cwd"])
        threading.Thread(target=follow, daemon=True).start()
        from ipykernel.kernelapp import IPKernelApp

        IPKernelApp.launch_instance(argv=["-f", wanted["file"]])
    finally:
        os._exit(0)


def ask(address: str, file: str):
    kernel = socket.socket(socket.AF_UNIX)
    kernel.connect(address)
    kernel.sendall(json.dumps({"file": file, "cwd": os.getcwd()}).encode() + b"\n")
    with kernel.makefile() as lines:
        pid = int(lines.readline())
        signal.signal(signal.SIGINT, lambda *_: os.kill(pid, signal.SIGINT))
        lines.read()


if __name__ == "__main__":
    {"serve": serve, "ask": ask}[sys.argv[1]](*sys.argv[2:])
