"""One process for a learner's code that sees a Python, one job and nothing else, and leaves nothing behind.

bubblewrap makes the room (no network, own processes, a read-only world, a private /tmp in memory), prlimit and a watch
over the whole room's memory the limits, an outer `timeout -k` the end. As root the process becomes an ordinary user
first, another one for each of the `-j` places, so that a fork bomb meets its own limit and nobody else's.
"""

import os
import secrets
import shutil
import signal
import site
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("bwrap", "prlimit", "setpriv", "timeout")
FIRST_UID, UIDS = 62_000, 3_000  # users that no distribution gives out
START_SECONDS = 60  # of computing, for Python and torch to load
GRACE = 5.0  # seconds after a limit that the process itself should have kept
PATIENCE, LEAST = 4, 60  # seconds of waiting for one of computing, and at least; more where only a busy machine waits
START_PATIENCE = 15
POLL = 0.1
MOST_WRITTEN = 64 * 2**20  # bytes of the one file that comes out
MOST_PROCESSES = 100
LONGEST_LINE = 40_000_000
READY = b"ready\n"  # what box.py says on standard error before anything else
ROOM = 256 * 2**20  # bytes of /tmp and of the home, each
HIDDEN = ("minillama4", "transformers")  # of the libraries: the answers, and the partner that holds them too

INSTALL = "install it: `sudo apt-get install bubblewrap util-linux coreutils` (Fedora: `sudo dnf install bubblewrap`)"
TRUSTED = "Or --trusted, which lets every submission do on this machine what you may do"


class NoSandbox(ValueError):
    """The message says what to do."""


@dataclass
class Outcome:
    """How a room ended."""

    ended: str  # "" by itself; else why it was ended
    code: int | None
    said: str  # on standard error, before any cell ran
    cpu: float  # seconds, of all its processes
    wall: float


class Sandbox:
    def __init__(self, seconds: float, memory: int, hide: list[Path], trusted: bool = False):
        """seconds: for a cell, and for one look of a check. memory: bytes. hide: folders that may lie inside /usr."""
        self.seconds, self.memory, self.trusted = seconds, memory, trusted
        self.hide = [path.resolve() for path in hide]
        if not trusted:
            self._probe()

    def run(self, job: Path, view: Path, slot: int, watch=None) -> Outcome:
        """box.py on a job. slot: the number of the place, below which nothing else runs now.

        watch(line) -> None is called with each line as it is written; a new line means that it is getting on.
        """
        token = secrets.token_hex(16)
        out = job.parent / f"{job.name}-{token}"
        out.touch(mode=0o600)
        uid = FIRST_UID + (64 * os.getpid() + slot) % UIDS  # and another grader's places have others, nearly always
        try:
            if self.trusted:
                home = job.parent / f"{job.name}-home"
                home.mkdir(exist_ok=True)
                command = [sys.executable, "-s", "-P", str(view / "box.py"), str(job), str(view)]
                name, env, cwd = str(out), {**os.environ, **self._environ(str(view))}, home
                env["HOME"] = str(home)
            else:
                if os.geteuid() == 0:
                    os.chown(out, uid, uid)
                name, env, cwd = f"/out/{token}", None, None
                inside = [sys.executable, "-s", "-P", "/view/box.py", "/job", "/view"]
                binds = ["--ro-bind", str(job), "/job", "--ro-bind", str(view), "/view", "--bind", str(out), name]
                command = self._command(binds, inside, uid, self._total())
            return self._watched(command, env, cwd, f"{name}\n", out, watch)
        finally:
            out.unlink(missing_ok=True)
            shutil.rmtree(job.parent / f"{job.name}-home", ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------------------
    # The room

    def _command(self, binds: list[str], inside: list[str], uid: int, total: float) -> list[str]:
        root = os.geteuid() == 0
        room = ["bwrap", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
        if root:  # without a user namespace: only so may an ordinary user's limits hold, and a Python in /root be seen
            room += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
            room += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            room += ["--unshare-all"]
        hidden = [path for path in self.hide if any(path.is_relative_to(place) for place in self._places())]
        later = [p for p in self._places() if any(p.is_relative_to(path) for path in hidden)]
        mounts = []
        for folder in ("/tmp", "/home"):  # first, because this Python may lie below one of them
            mounts += ["--perms", "1777", "--size", str(ROOM), "--tmpfs", folder]
        for place in [place for place in self._places() if place not in later]:
            mounts += [*_parents(place), "--ro-bind", str(place), str(place)]
        for path in hidden:
            mounts += ["--size", "65536", "--tmpfs", str(path)]
        for place in later:
            mounts += [*_parents(place), "--ro-bind", str(place), str(place)]
        for folder in {*site.getsitepackages(), *_site_folders()}:
            for name in HIDDEN:
                if os.path.isdir(os.path.join(folder, name)):
                    mounts += ["--size", "65536", "--tmpfs", os.path.join(folder, name)]
        for name in ("bin", "sbin", "lib", "lib32", "lib64"):
            if os.path.islink(f"/{name}"):
                mounts += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
            elif os.path.isdir(f"/{name}"):
                mounts += ["--ro-bind", f"/{name}", f"/{name}"]
        for name in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"):
            mounts += ["--ro-bind-try", name, name]
        mounts += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(ROOM), "--tmpfs", "/dev/shm"]
        mounts += ["--perms", "0755", "--dir", "/out", *binds, "--remount-ro", "/dev", "--remount-ro", "/"]
        for key, value in {**self._environ("/view"), "HOME": "/home"}.items():
            mounts += ["--setenv", key, value]
        leave = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all"]
        limits = ["prlimit", f"--nproc={MOST_PROCESSES}", f"--fsize={MOST_WRITTEN}", "--nofile=128", "--core=0"]
        limits += [f"--cpu={int(self._computing())}", *([] if _has_cuda() else [f"--as={self.memory}"])]
        # The grader may be killed at any moment: each of these then dies with the one before it.
        outer = ["setpriv", "--pdeathsig=KILL", "timeout", "-k", "2", str(int(total))]
        return [*outer, *room, *mounts, "--chdir", "/home", "--", *(leave if root else []), *limits, *inside]

    def _places(self) -> list[Path]:
        """/usr, and where this Python and its packages are."""
        places = [Path("/usr"), Path(sys.base_prefix), Path(sys.prefix), *map(Path, _site_folders())]
        places = [place for place in dict.fromkeys(p.resolve() for p in places) if place.is_dir()]
        inner = [p for p in places if not any(p != q and p.is_relative_to(q) for q in places)]
        return inner + [p for p in places if p not in inner and any(p.is_relative_to(path) for path in self.hide)]

    @staticmethod
    def _environ(view: str) -> dict[str, str]:
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")}
        return threads | {
            "PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin",
            "PYTHONPATH": view,
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "MPLBACKEND": "agg",
            "LANG": "C.UTF-8",
            "IPYTHONDIR": "/tmp/ipython",
            "MPLCONFIGDIR": "/tmp/matplotlib",
        }

    def _probe(self):
        """NoSandbox: it cannot be made here."""
        if not sys.platform.startswith("linux"):
            raise NoSandbox(f"the sandbox needs Linux; grade on Linux or in a Linux virtual machine. {TRUSTED}")
        missing = [name for name in TOOLS if shutil.which(name) is None]
        if missing:
            raise NoSandbox(f"{missing[0]} is missing, and submissions run in a sandbox; {INSTALL}. {TRUSTED}")
        command = self._command([], [sys.executable, "-I", "-S", "-c", "pass"], FIRST_UID, 60)
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            return
        said = " ".join(done.stderr.split())[:300] or f"exit code {done.returncode}"
        if "uid map" in said or "RTM_NEWADDR" in said:
            what = "AppArmor (Ubuntu's rule) forbids it; docs/instructors.md has the profile that allows it"
        else:
            what = "in a container, start that with `--privileged`, or grade outside it"
        raise NoSandbox(f"bubblewrap cannot make a sandbox here ({said}): {what}. {TRUSTED}")

    # ------------------------------------------------------------------------------------------------------------------
    # The watch

    def _computing(self) -> float:
        """Seconds that a room may compute in all."""
        return START_SECONDS + 6 * self.seconds

    def _total(self) -> float:
        """Seconds after which it is ended, whatever it says that it is doing."""
        return START_SECONDS * START_PATIENCE + 6 * PATIENCE * self.seconds

    def _watched(self, command, env, cwd, first: str, out: Path, watch) -> Outcome:
        start = moved = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, cwd=cwd,
            start_new_session=True,
        )  # fmt: skip
        said: list[bytes] = []
        reader = threading.Thread(target=_attend, args=(process, first.encode(), said), daemon=True)
        reader.start()
        allowed, patience = START_SECONDS, START_PATIENCE
        ended, polls, rest, computed, base, held = "", 0, b"", 0.0, 0.0, 0
        with open(out, "rb") as written:
            while True:
                pid, status = os.waitpid(process.pid, os.WNOHANG)
                new = written.read(MOST_WRITTEN)
                *lines, rest = (rest + new).split(b"\n") if new else (rest,)
                rest = rest if len(rest) <= LONGEST_LINE else b"!"  # which is no JSON
                for line in lines:
                    moved, base = time.monotonic(), computed
                    allowed, patience = self.seconds + GRACE, PATIENCE
                    if watch:
                        watch(line)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                polls += 1
                if polls % 3 == 0 and sys.platform == "linux":
                    held, now = _used(process.pid)
                    computed = max(computed, now)  # where a process ends unseen, its time is gone
                waited = time.monotonic() - moved
                if waited > max(LEAST + GRACE, allowed * patience) or computed - base > allowed:
                    ended = f"it took more than {self.seconds:g} s"
                elif computed > self._computing() or time.monotonic() - start > self._total():
                    ended = f"the notebook took more than {self._computing():.0f} s"
                elif held > self.memory:
                    ended = f"it used more than {self.memory / 2**30:g} GB of memory"
                if ended:
                    _end(process)
                    os.waitpid(process.pid, 0)
                    process.returncode = -signal.SIGKILL
                    break
                time.sleep(POLL)
            if self.trusted:
                _end(process)  # what it left in its session
        reader.join(2)
        return Outcome(
            ended, process.returncode, b"".join(said).decode("utf-8", "replace").strip()[:600],
            computed, time.monotonic() - start,
        )  # fmt: skip


def _end(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        pass
    if process.returncode is None:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except OSError:
            pass


def _attend(process, first: bytes, said: list[bytes]):
    """Tell box.py its first line once it says that it is there, and keep some of what else is said.

    Not earlier: where the grader is killed while bubblewrap starts, what should die with it is not tied to it yet
    (containers/bubblewrap, issue 633). What comes up then is told nothing, and ends.
    """
    try:
        for line in iter(lambda: process.stderr.readline(65536), b""):
            if line == READY:
                with process.stdin as its:
                    its.write(first)
            elif len(said) < 20:
                said.append(line)
    except (OSError, ValueError):  # it has just ended
        pass


def _used(top: int) -> tuple[int, float]:
    """(bytes that `top` and all processes below it hold for themselves, seconds that they have computed)"""
    parents, held, ticks = {}, {}, {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as stat, open(f"/proc/{name}/statm", "rb") as statm:
                    fields = stat.read().rpartition(b")")[2].split()  # from the third on: see proc(5)
                    _, resident, shared, *_ = map(int, statm.read().split())
            except OSError:
                continue  # it has just ended
            pid = int(name)
            parents[pid], held[pid] = int(fields[1]), resident - shared
            ticks[pid] = sum(map(int, fields[11:15]))  # its own and its ended children's
    pages = time_used = 0
    for pid in parents:
        above = pid
        while above in parents and above != top:
            above = parents[above]
        if above == top:
            pages, time_used = pages + held[pid], time_used + ticks[pid]
    return pages * os.sysconf("SC_PAGE_SIZE"), time_used / os.sysconf("SC_CLK_TCK")


def _parents(place: Path) -> list[str]:
    """Else bubblewrap makes them for root alone."""
    words = []
    for parent in reversed(place.parents[:-1]):
        words += ["--perms", "0755", "--dir", str(parent)]
    return words


def _site_folders() -> list[str]:
    return [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]


def _has_cuda() -> bool:
    """Then torch reserves far more address space than it uses."""
    import torch

    return torch.version.cuda is not None
