"""Makes `.venv`. `make env` runs this file by its path: it needs nothing but Python 3.11, 3.12 or 3.13 itself.

On Linux, PyTorch's ordinary wheel brings CUDA along and is more than ten times the download of the CPU build. So a
machine without an NVIDIA GPU is offered PyTorch's own CPU index first, provided that it answers soon.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
SUPPORTED = ((3, 11), (3, 12), (3, 13))
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PATIENCE = 5.0  # seconds for the CPU index to answer

# Measured in November 2026 with torch 2.13 on x86-64 Linux.
CPU_TORCH = "about 200 MB"
CUDA_TORCH = "about 3 GB"
THE_REST = "about 400 MB"


def main():
    start = time.monotonic()
    if sys.version_info[:2] not in SUPPORTED:
        version = sys.version.split()[0]
        sys.exit(f"minillama4 needs Python 3.11, 3.12 or 3.13, and this is {version}. Try: make env PYTHON=python3.12")
    if not venv_works():
        if VENV.exists():
            say(".venv does not work; making it anew")
        if call(sys.executable, "-m", "venv", "--clear", VENV):
            sys.exit("Python could not make a virtual environment; what it says above names the reason")
    if not has_pinned_torch():
        get_torch()
    if pip_install("-e", ".[test]"):
        sys.exit("pip could not install everything; `make env` goes on from where it stopped")
    say(f".venv is ready after {time.monotonic() - start:.0f} s")


def get_torch():
    """Say what there is to download, and install PyTorch's CPU build where that is what fits.

    If it does not fit or does not work, torch comes with all the rest from the ordinary index.
    """
    if sys.platform != "linux":  # elsewhere the ordinary build has no CUDA in it
        say(f"To download: PyTorch, {CPU_TORCH}, and {THE_REST} for the rest")
    elif shutil.which("nvidia-smi"):
        say(f"NVIDIA GPU found. To download: PyTorch with CUDA, {CUDA_TORCH}, and {THE_REST} for the rest")
    elif answers(CPU_INDEX + "/torch/", PATIENCE):
        say(f"No NVIDIA GPU. To download: PyTorch's CPU build, {CPU_TORCH}, and {THE_REST} for the rest")
        if pip_install("--no-deps", "--index-url", CPU_INDEX, "torch"):
            say(f"PyTorch's CPU index failed; the ordinary index follows: PyTorch with CUDA, {CUDA_TORCH}")
    else:
        say(f"No NVIDIA GPU, but no answer from PyTorch's CPU index within {PATIENCE:.0f} s. The ordinary index it is.")
        say(f"To download: PyTorch, {CUDA_TORCH} with CUDA ({CPU_TORCH} where that index has a CPU build),")
        say(f"and {THE_REST} for the rest")


def answers(url: str, seconds: float) -> bool:
    """Does `url` answer in time? Asked by a process of its own, because name resolution has no time limit."""
    code = f"import urllib.request; urllib.request.urlopen({url!r})"
    try:
        return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def venv_works() -> bool:
    code = f"import pip, sys; sys.exit(sys.version_info[:2] not in {SUPPORTED})"
    return PYTHON.exists() and subprocess.run([PYTHON, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def has_pinned_torch() -> bool:
    pin = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    return any(VENV.glob(f"lib/python3*/site-packages/torch-{pin}*.dist-info"))


def pip_install(*what: str) -> int:
    return call(PYTHON, "-m", "pip", "install", "-c", "constraints.txt", *what)


def call(*command) -> int:
    return subprocess.call(list(map(str, command)), cwd=ROOT)


def say(line: str):
    print(line, flush=True)  # before pip's own output, also in a log file


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted; `make env` goes on from where it stopped")
