"""Submissions as they come: folders, flat files, the zip files of learning platforms, nbgrader's `submitted/`.

Every file is either somebody's notebook or listed with the reason why it is not; nothing is guessed. Files are only
read, up to a size, and never through a link; nothing of a zip file gets onto the disk under a name of its own.
"""

import hashlib
import io
import os
import re
import stat
import unicodedata
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .instructor import Copy
from .plan import Unreadable, ids, parse

MOST_BYTES = 10_000_000  # of a notebook; ours have 20 kB, and 2 MB with pictures in the outputs
MOST_ZIP = 1_000_000_000  # of a zip file as it lies there
MOST_UNZIPPED = 2_000_000_000  # of all that is read out of zip files
MOST_FILES = 20_000
DEEPEST_ZIP = 3  # a zip file in a zip file in a zip file

NOT_MEANT = re.compile(r"(^|/)(\.|__MACOSX/|Thumbs\.db$|desktop\.ini$)|\.backup-\d{8}-\d{4}")
CANVAS = re.compile(r"^(?P<who>[^_]+)(?P<late>_LATE)?_(?P<id>\d+)_\d+(_|$)")
BLACKBOARD = re.compile(r"_(?P<who>[^_]+)_attempt_\d{4}(-\d\d){5}(_|$)")
MOODLE = re.compile(r"_assignsubmission_(file|onlinetext)_?$")
AGAIN = re.compile(r"(?:[-_ ]\(?(\d{1,3})\)?|\s*\((\d{1,3})\))$")  # "-1", " (2)": a later upload or download


@dataclass
class File:
    path: str  # as the report names it: "class.zip/Zoë/00_start_here.ipynb"
    data: bytes = b""
    changed: float = 0.0
    refused: str = ""  # why its content was not read
    listed: bool = False  # and it is no submission either: a link, or a name that leads elsewhere


@dataclass
class Submission:
    learner: str
    copy: Copy
    file: File
    notebook: dict | None = None
    unreadable: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Names its files in the report: safe on every disk, and different for learners whose names look alike."""
        ascii = unicodedata.normalize("NFKD", self.learner).encode("ascii", "ignore").decode().lower()
        slug = re.sub(r"[^a-z0-9]+", "-", ascii).strip("-")[:40] or "learner"
        return f"{slug}-{hashlib.sha256(f'{self.learner}/{self.copy.name}'.encode('utf-8', 'replace')).hexdigest()[:8]}"


def collect(place: Path, copies: dict[str, Copy]) -> tuple[list[Submission], list[tuple[str, str]]]:
    """(one submission for each learner and notebook, (path, why) of each file that is none).

    ValueError: there is no such place, or nothing of a learner's in it.
    """
    place = Path(place)
    if place.is_file() and place.suffix.lower() == ".zip":
        files = list(_zip_file(place, place.name, Budget()))
    elif place.is_dir():
        inner = place / "submitted"  # nbgrader's course folder: beside it lie source, release, autograded
        files = list(_folder(inner if inner.is_dir() and not inner.is_symlink() else place, "", Budget()))
    else:
        raise ValueError(f"{place} is no folder and no zip file of submissions")
    candidates, left_out = [], []
    for file in files:
        if NOT_MEANT.search(file.path):
            left_out.append((file.path, file.refused or "a file of the system or an editor, or a backup"))
        elif file.listed or not file.path.lower().endswith(".ipynb"):
            left_out.append((file.path, file.refused or "not a notebook"))
        else:
            candidates.append(file)
    matched = []
    for file in candidates:
        found = _match(file, copies)
        if isinstance(found, str):
            left_out.append((file.path, found))
        else:
            matched.append(found)
    _name_learners(matched)
    for submission in [submission for submission in matched if not submission.learner]:
        matched.remove(submission)
        left_out.append((submission.file.path, "whose it is stands neither in a folder's name nor in the file's"))
    if not matched:
        reasons = "; ".join(f"{path}: {why}" for path, why in left_out[:3])
        raise ValueError(f"no submission in {place}" + (f" ({reasons})" if reasons else ", which is empty"))
    kept = _one_each(matched, left_out)
    return sorted(kept, key=lambda s: (s.learner.casefold(), s.learner, s.copy.name)), sorted(left_out)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class Budget:
    files: int = MOST_FILES
    unzipped: int = MOST_UNZIPPED

    def take_file(self):
        self.files -= 1
        if self.files < 0:
            raise ValueError(f"there are more than {MOST_FILES:,} files; that is no class's submissions")


def _folder(folder: Path, above: str, budget: Budget):
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = f"{above}{entry.name}".encode("utf-8", "replace").decode()
        budget.take_file()
        if entry.is_symlink():
            yield File(path, refused="a symbolic link, which is never followed", listed=True)
        elif entry.is_dir(follow_symlinks=False):
            yield from _folder(Path(entry.path), f"{path}/", budget)
        elif not entry.is_file(follow_symlinks=False):
            yield File(path, refused="not a regular file", listed=True)
        elif entry.name.lower().endswith(".zip"):
            yield from _zip_file(Path(entry.path), path, budget)
        elif entry.name.lower().endswith(".ipynb"):
            yield _regular(entry.path, path)
        else:
            yield File(path)


def _regular(file: str, path: str) -> File:
    """Read without following a link that was put there a moment ago, and no further than a notebook may go."""
    try:
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(handle, "rb") as opened:
            about = os.fstat(opened.fileno())
            if not stat.S_ISREG(about.st_mode):
                return File(path, refused="not a regular file", listed=True)
            if about.st_size > MOST_BYTES:
                return File(path, refused=_too_large(about.st_size))
            data = opened.read(MOST_BYTES + 1)
    except OSError as error:
        return File(path, refused=f"cannot be read: {error.strerror}")
    return File(path, data[:MOST_BYTES], about.st_mtime)


def _too_large(size: int) -> str:
    return (
        f"{size / 1e6:.0f} MB, and a notebook may have {MOST_BYTES / 1e6:.0f} MB; clearing its outputs makes it small"
    )


def _zip_file(file: Path, path: str, budget: Budget):
    try:
        if file.stat().st_size > MOST_ZIP:
            yield File(path, refused=f"a zip file of more than {MOST_ZIP / 1e9:.0f} GB")
            return
        with open(file, "rb") as opened:
            yield from _zip(opened, path, budget, 1)
    except OSError as error:
        yield File(path, refused=f"cannot be read: {error.strerror}")


def _zip(opened, path: str, budget: Budget, depth: int):
    try:
        archive = zipfile.ZipFile(opened)
        entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, UnicodeDecodeError) as error:
        yield File(path, refused=f"a broken zip file: {error}")
        return
    if len(entries) > MOST_FILES:
        yield File(path, refused=f"a zip file with more than {MOST_FILES:,} entries")
        return
    for entry in entries:
        if entry.is_dir():
            continue
        budget.take_file()
        name = _entry_name(entry)
        at = f"{path}/{name}"
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "\\" in name or re.match(r"[A-Za-z]:", name) or "\0" in name:
            yield File(at, refused="its name leads out of the zip file", listed=True)
        elif stat.S_ISLNK(entry.external_attr >> 16):
            yield File(at, refused="a symbolic link, which is never followed", listed=True)
        elif entry.flag_bits & 1:
            yield File(at, refused="encrypted")
        elif name.lower().endswith(".zip"):
            if depth == DEEPEST_ZIP:
                yield File(at, refused=f"zip files more than {DEEPEST_ZIP} deep")
                continue
            inner = _entry(archive, entry, at, MOST_ZIP // 10, budget)
            yield from [inner] if inner.refused else _zip(io.BytesIO(inner.data), at, budget, depth + 1)
        elif name.lower().endswith(".ipynb") and not NOT_MEANT.search(name):
            yield _entry(archive, entry, at, MOST_BYTES, budget)
        else:
            yield File(at)


def _entry_name(entry: zipfile.ZipInfo) -> str:
    """Accents: platforms write UTF-8 and often forget the flag that says so."""
    name = entry.filename
    if not entry.flag_bits & 0x800:
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            pass
    return name.encode("utf-8", "replace").decode()


def _entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: str, most: int, budget: Budget) -> File:
    """What the entry really holds, whatever size it claims."""
    if entry.file_size > most:
        return File(path, refused=_too_large(entry.file_size))
    try:
        with archive.open(entry) as opened:
            data = opened.read(min(most, budget.unzipped) + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        return File(path, refused=f"broken in the zip file: {error}")
    budget.unzipped -= len(data)
    if budget.unzipped < 0:
        raise ValueError(f"the zip files hold more than {MOST_UNZIPPED / 1e9:.0f} GB; that is no class's submissions")
    if len(data) > most:
        return File(path, refused=_too_large(len(data)))
    year, month, day, hour, minute, second = entry.date_time
    return File(path, data, ((((year * 13 + month) * 32 + day) * 24 + hour) * 60 + minute) * 60 + second)


# ----------------------------------------------------------------------------------------------------------------------
# Which exercise, whose


def _match(file: File, copies: dict[str, Copy]) -> Submission | str:
    """The notebook that it answers, by the ids in it, else by its name; a reason where neither says."""
    named = _by_name(file.path, copies)
    if file.refused:
        return Submission("", copies[named], file, unreadable=file.refused) if named else file.refused
    try:
        notebook = parse(file.data)
    except Unreadable as error:
        return Submission("", copies[named], file, unreadable=str(error)) if named else str(error)
    there = ids(notebook)
    scores = {}
    for name, copy in copies.items():
        rows = [row for row in copy.cells if row["kind"]]
        scores[name] = len(there & {row["grade_id"] or row["id"] for row in rows})
    best = max(scores, key=scores.get)
    chosen = best if scores[best] and list(scores.values()).count(scores[best]) == 1 else named
    if not chosen:
        return "a notebook with none of the course's exercises in it"
    made = Submission("", copies[chosen], file, notebook)
    if chosen != named:
        made.notes.append(f"the file was called {PurePosixPath(file.path).name}; its cells say that it is {chosen}")
    return made


def _by_name(path: str, copies: dict[str, Copy]) -> str:
    """The longest notebook name that stands in the file's name."""
    stem = PurePosixPath(path).name.casefold()
    return max((name for name in copies if name.casefold() in stem), key=len, default="")


def _name_learners(submissions: list[Submission]):
    """The first folder that tells them apart (a zip file is a folder), else what the file's name adds."""
    parts = {id(s): [_plain(part) for part in s.file.path.split("/")] for s in submissions}
    while len({tuple(p[:1]) for p in parts.values()}) == 1 and all(
        len(p) > 2 or (len(p) == 2 and _from_file(p[1], s.copy.name))
        for s, p in ((s, parts[id(s)]) for s in submissions)
    ):
        parts = {key: p[1:] for key, p in parts.items()}  # a folder around everybody's
    for submission in submissions:
        rest = parts[id(submission)]
        submission.learner = _from_folder(rest[0]) if len(rest) > 1 else _from_file(rest[0], submission.copy.name)


def _plain(name: str) -> str:
    name = unicodedata.normalize("NFC", name)
    return " ".join("".join(c if c.isprintable() else " " for c in name).split())


def _from_folder(name: str) -> str:
    name = re.sub(r"\.zip$", "", name, flags=re.IGNORECASE)
    canvas = CANVAS.match(name)
    if canvas:
        return f"{canvas['who']}_{canvas['id']}"
    blackboard = BLACKBOARD.search(name)
    return blackboard["who"] if blackboard else MOODLE.sub("", name)


def _from_file(name: str, assignment: str) -> str:
    """ "Zoë_00_start_here (1).ipynb" -> "Zoë"; "" where the name adds nothing."""
    stem = re.sub(r"\.ipynb$", "", name, flags=re.IGNORECASE)
    blackboard, canvas = BLACKBOARD.search(stem), CANVAS.match(stem)
    if blackboard:
        return blackboard["who"]
    if canvas:
        return f"{canvas['who']}_{canvas['id']}"
    at = stem.casefold().find(assignment.casefold())
    if at < 0:
        return ""
    before, after = stem[:at].strip(" _-."), AGAIN.sub("", stem[at + len(assignment) :]).strip(" _-.")
    return before or after


def _one_each(submissions: list[Submission], left_out: list[tuple[str, str]]) -> list[Submission]:
    """The newest of a learner's files for a notebook counts, and the report says so."""
    groups: dict[tuple[str, str], list[Submission]] = {}
    for submission in submissions:
        groups.setdefault((submission.learner, submission.copy.name), []).append(submission)
    kept = []
    for group in groups.values():
        group.sort(key=lambda s: (s.file.changed, _number(s.file.path), s.file.path))
        last = group[-1]
        for other in group[:-1]:
            same = other.file.data == last.file.data and not other.file.refused
            why = "the same notebook" if same else "a newer or higher numbered notebook"
            left_out.append((other.file.path, f"{why} of the same learner counts: {last.file.path}"))
            if not same:
                last.notes.append(f"handed in more than once; {last.file.path} counts, and not {other.file.path}")
        kept.append(last)
    return kept


def _number(path: str) -> int:
    found = AGAIN.search(re.sub(r"\.ipynb$", "", PurePosixPath(path).name, flags=re.IGNORECASE))
    return int(found[1] or found[2]) if found else 0
