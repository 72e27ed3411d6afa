"""Where a learner works: `work/`, a copy of the lessons and exercises that nothing overwrites.

    notebooks/*.ipynb  ->  work/notebooks/     `minillama4 lab` copies what is missing and opens JupyterLab there;
    exercises/*.ipynb  ->  work/exercises/     `minillama4 reset 02` fetches one file again and keeps a backup.

Tests read the course's own files and never `work/`, so nothing that a learner does there can break them.
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

from .checking import MARKER  # the file that says "this is work/"; in it, the hashes of what was copied

FOLDERS = ("notebooks", "exercises")
FIRST = "notebooks/00_start_here.ipynb"

# Defaults of the course, which a learner's own settings still override. The important one is commsOverSubshells:
# JupyterLab would otherwise run a widget's callback on a second thread while a cell is running.
SETTINGS = Path(__file__).with_name("lab_settings")


def find_root() -> Path:
    """The clone that this package is installed from. ValueError: it is installed without one."""
    root = Path(__file__).resolve().parents[2]
    if not ((root / "pyproject.toml").is_file() and (root / "notebooks").is_dir()):
        raise ValueError(f"{root} has no lessons; clone the repository, and run `make lab` inside the clone")
    return root


def find_work() -> Path | None:
    """The learner's folder: the current one or one above it, else that of this clone; None before the first `lab`."""
    places = [Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[2] / "work"]
    return next((place for place in places if (place / MARKER).exists()), None)


# ----------------------------------------------------------------------------------------------------------------------
# Opening


def start(options: Iterable[str] = ()) -> int:
    """What `make lab` does. options: more of them for JupyterLab. Under Linux and macOS this does not return."""
    root = find_root()
    if find_spec("jupyterlab") is None:
        raise ValueError(f"JupyterLab is not installed in {sys.prefix}; `make env` installs it")
    made = fill(root)
    if made:
        print(f"work/: {len(made)} notebooks copied. Work there; nothing overwrites it.")
    for line in newer(root):
        print(line)
    return _become(*jupyter(root / "work", os.environ, options))


def jupyter(work: Path, environ: Mapping[str, str], options: Iterable[str] = ()) -> tuple[list[str], dict[str, str]]:
    """Command and environment of JupyterLab for `work`. It keeps its token: whoever has the port could run code."""
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={work}",
        f"--LabApp.default_url=/lab/tree/{FIRST}",
    ]
    if sys.platform.startswith("linux") and not (environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY")):
        command.append("--no-browser")  # it prints its address instead
    if getattr(os, "geteuid", lambda: 1)() == 0:
        command.append("--allow-root")  # in a container; JupyterLab wants to be told that this is meant
    path = [str(SETTINGS), *filter(None, [environ.get("JUPYTER_CONFIG_PATH")])]
    return [*command, *options], {**environ, "JUPYTER_CONFIG_PATH": os.pathsep.join(path)}


def _become(command: list[str], environ: dict[str, str]) -> int:
    """Go on as that program, so that Ctrl+C and signals reach it alone."""
    sys.stdout.flush()
    if os.name == "posix":
        os.execve(command[0], command, environ)
    with subprocess.Popen(command, env=environ) as process:  # Windows has no exec that keeps the console
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                pass  # JupyterLab gets it too and asks what to do


# ----------------------------------------------------------------------------------------------------------------------
# Copies


def fill(root: Path) -> list[Path]:
    """Copy what is missing in `work/` and return these copies. Whatever exists there is left as it is."""
    work = root / "work"
    if os.path.lexists(work) and not work.is_dir():
        raise ValueError(f"{work} is not a folder; move it away, because your copies of the notebooks go there")
    work.mkdir(exist_ok=True)
    if not (work / MARKER).exists():
        _write(work / MARKER, b"{}")
    made = [source for source in _course(root) if not os.path.lexists(_copy_of(source))]
    for source in made:
        _fetch(source)
    return [_copy_of(source) for source in made]


def newer(root: Path) -> list[str]:
    """A line for each file that has changed in the course since the learner's copy of it was made."""
    copied = _copied(root)
    changed = [source for source in _course(root) if copied.get(_name(source), _hash(source)) != _hash(source)]
    return [
        f"{_name(source)}.ipynb is newer in the course; `minillama4 reset {_name(source)}` fetches it and keeps yours"
        for source in changed
        if _differs(source)
    ]


def reset(name: str, root: Path | None = None) -> str:
    """Fetch one file from the course again, keep a backup of the learner's, and say so.

    name: "02", "02_irope" or a path. Where lesson and exercise share it, the one that the learner has rewritten is
    meant. ValueError: no such file, or both are rewritten.
    """
    root = root or find_root()
    found = _find(name, root)
    # Outputs count only if nothing else differs: whoever ran the lesson and rewrote the exercise means the exercise.
    changed = [source for source in found if _differs(source, _written)] or [s for s in found if _differs(s)]
    if len(changed) > 1:
        commands = " or ".join(f"`minillama4 reset {_name(source)}`" for source in changed)
        raise ValueError(f"you have changed both the lesson and the exercise {name}; say which: {commands}")
    if not changed:
        return f"{' and '.join(map(_name, found))}: already as the course has it"
    source, target = changed[0], _copy_of(changed[0])
    if not target.exists():
        _fetch(source)
        return f"work/{_name(source)}.ipynb is there again"
    backup = _free_name(target)
    _write(backup, target.read_bytes())
    _fetch(source)
    return (
        f"work/{_name(source)}.ipynb is as the course has it; yours is {backup.name} beside it. "
        "If it is open in JupyterLab: File > Reload Notebook from Disk"
    )


def _find(name: str, root: Path) -> list[Path]:
    """The course's files that `name` may mean: one, or a lesson and its exercise."""
    folder, _, last = name.replace("\\", "/").removesuffix(".ipynb").rpartition("/")
    folder = folder.split("/")[-1]
    sources = [source for source in _course(root) if folder not in FOLDERS or source.parent.name == folder]
    found = [source for source in sources if last in (source.stem, source.stem.split("_")[0])]
    if not found:
        there = ", ".join(dict.fromkeys(source.stem for source in sources)) or "none"
        raise ValueError(f"no notebook is called {name!r}; there are {there}")
    return found


def _free_name(target: Path) -> Path:
    """02_irope.backup-20261124-1530.ipynb, or ...-1530-2.ipynb and so on if that exists."""
    stem = f"{target.stem}.backup-{time.strftime('%Y%m%d-%H%M')}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(file for file in (target.with_name(f"{name}.ipynb") for name in names) if not os.path.lexists(file))


# ----------------------------------------------------------------------------------------------------------------------
# Files: a `source` is the course's, its `name` is "exercises/02_irope"


def _course(root: Path) -> list[Path]:
    return [file for folder in FOLDERS for file in sorted((root / folder).glob("*.ipynb"))]


def _name(source: Path) -> str:
    return f"{source.parent.name}/{source.stem}"


def _copy_of(source: Path) -> Path:
    return source.parents[1] / "work" / source.parent.name / source.name


def _written(file: Path):
    """What a person wrote in a notebook, without the outputs; a broken file is whatever it is."""
    content = file.read_bytes()
    try:
        return [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(content)["cells"]]
    except (ValueError, KeyError, TypeError):
        return content


def _differs(source: Path, view=Path.read_bytes) -> bool:
    target = _copy_of(source)
    return not target.exists() or view(target) != view(source)


def _hash(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()


def _copied(root: Path) -> dict[str, str]:
    """Name -> hash of the course's file when the learner's copy was made; empty if the marker is lost or broken."""
    try:
        known = json.loads((root / "work" / MARKER).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _fetch(source: Path):
    """The course's file becomes the learner's."""
    root = source.parents[1]
    known = _copied(root) | {_name(source): _hash(source)}
    _write(_copy_of(source), source.read_bytes())
    _write(root / "work" / MARKER, json.dumps(known, indent=1).encode())


def _write(file: Path, content: bytes):
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.new")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
