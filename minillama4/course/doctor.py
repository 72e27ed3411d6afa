"""`minillama4 doctor`: one line for each thing that the course needs, which says "ok" or what to do.

Everything is imported where it is looked at. So `python minillama4/course/doctor.py` also works where even torch is
missing, and with it the command.
"""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
DISK = 2e9  # bytes: what a learner's runs, checkpoints and backups may come to


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'TO DO':<6} {self.name:<9} {self.text}"


def doctor() -> int:
    """Print the report; 0 if nothing needs doing, else 1."""
    findings = report()
    print(*findings, sep="\n")
    return 0 if all(finding.ok for finding in findings) else 1


def report() -> list[Finding]:
    return [_look(name, find) for name, find in LOOKS.items()]


def _look(name, find) -> Finding:
    """A look that fails is a finding as well: a broken torch must not hide what else there is to say."""
    try:
        return Finding(name, *find())
    except Exception as error:
        said = " ".join(str(error).split())
        return Finding(name, False, f"{type(error).__name__}: {said}")


def python() -> tuple[bool, str]:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version().rstrip("+")  # which builds between two releases have
    wanted = metadata.metadata("minillama4")["Requires-Python"]
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return True, version
    return False, f"{version}, and the course needs {wanted}: remove .venv and run `make env PYTHON=python3.12`"


def packages() -> tuple[bool, str]:
    """Those that pyproject.toml names; in a clone those that the tests need too, as `make env` installs them."""
    extra = "test" if (ROOT / "pyproject.toml").is_file() else ""
    wrong, right = {}, 0
    for requirement in _requirements(extra):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong[requirement] = f"{requirement.name} is missing"
            continue
        if requirement.specifier.contains(version, prereleases=True):
            right += 1
        else:
            wrong[requirement] = f"{requirement.name} is {version}"
    if not wrong:
        return True, f"{right}, all in their ranges"
    wanted = " ".join(f'"{requirement.name}{requirement.specifier}"' for requirement in wrong)
    return False, f"{', '.join(wrong.values())}: run `{sys.executable} -m pip install {wanted}`"


def _requirements(extra: str) -> Iterator:
    from packaging.requirements import Requirement

    for line in metadata.requires("minillama4") or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def threads() -> tuple[bool, str]:
    import torch

    used = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if used > cores:
        return False, f"PyTorch uses {used} threads on {cores} cores, which is slow: set OMP_NUM_THREADS={cores}"
    return True, f"PyTorch uses {used} threads on {cores} cores"


def gpu() -> tuple[bool, str]:
    import torch

    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return True, f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
    unused = f" (an NVIDIA driver is here, but PyTorch {torch.__version__} finds no GPU)" if _has_driver() else ""
    return True, f"none: everything in the course runs on the CPU{unused}"


def _has_driver() -> bool:
    return shutil.which("nvidia-smi") is not None


def disk() -> tuple[bool, str]:
    free = shutil.disk_usage(ROOT).free
    if free < DISK:
        return False, f"{free / 1e9:.1f} GB free where {ROOT} is: make room, at least {DISK / 1e9:.0f} GB"
    return True, f"{free / 1e9:.0f} GB free"


def jupyter() -> tuple[bool, str]:
    try:
        version = metadata.version("jupyterlab")
    except metadata.PackageNotFoundError:
        return False, f'JupyterLab is missing: run `{sys.executable} -m pip install "jupyterlab>=4.4,<5"`'
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    again = f"run `{sys.executable} -m ipykernel install --sys-prefix`"
    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        return False, f"JupyterLab {version} has no kernel python3: {again}"
    program = Path(spec.argv[0])
    # A kernel spec of the user's can point to another Python, where `import minillama4` fails or is another one.
    if program.is_absolute() and program.parent != Path(sys.executable).parent:
        return False, f"the kernel python3 in {spec.resource_dir} runs {program}, not this Python: {again}"
    return True, f"JupyterLab {version}, kernel python3"


def browser() -> tuple[bool, str]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    return True, found or "no Chromium: only needed for the browser tests"


LOOKS = {
    "Python": python,
    "packages": packages,
    "threads": threads,
    "GPU": gpu,
    "disk": disk,
    "Jupyter": jupyter,
    "browser": browser,
}

if __name__ == "__main__":
    sys.exit(doctor())
