"""What is known so far: one small file a submission, written whole or not at all, so that a killed run can go on.

A row belongs to what it was made from: the submission's bytes, the seed, the instructor's copy and the checks. If any
of them has changed, the row is made again.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path

from .judge import write

VERSION = 1  # of grades.json and of the rows
MARK = "minillama4-grading"  # a report's folder holds this file; no other folder is written to


class Table:
    """The folder of a report. Use as a context: it is locked meanwhile."""

    def __init__(self, out: Path):
        self.out = Path(out).absolute()  # other processes, elsewhere, are told of files in it
        self.run = self.out / "run"
        if self.out.is_dir() and any(self.out.iterdir()) and not (self.out / MARK).is_file():
            raise ValueError(
                f"{self.out} is not empty and holds no report of this command; --out takes a folder of its own"
            )
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file; --out takes a folder")

    def __enter__(self) -> "Table":
        for folder in (self.out, self.run, self.run / "rows", self.run / "graded"):
            folder.mkdir(parents=True, exist_ok=True)
        os.chmod(self.run, 0o700)  # submissions and verdicts
        self.handle = os.open(self.out / MARK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.handle)
            raise ValueError(f"another run is writing to {self.out}; wait for it, or take another --out") from None
        self._sweep()  # after a run that was killed
        return self

    def __exit__(self, *error):
        self._sweep()
        os.close(self.handle)

    def _sweep(self):
        for left in [*self.run.rglob(".*.new"), *self.run.glob("job-*")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def seed(self, wanted: str | None) -> str:
        """The given one, else that of the run that is being continued, else a new one."""
        file = self.run / "seed"
        kept = file.read_text("utf-8").strip() if file.is_file() else ""
        wanted = (wanted or "").strip()
        if wanted and kept and wanted != kept:
            raise ValueError(f"{self.out} was graded with seed {kept}; take another --out for seed {wanted}")
        seed = wanted or kept or str(secrets.randbelow(10**9))
        write(file, seed + "\n")
        return seed

    def row(self, key: str, fingerprint: str) -> dict | None:
        return self._made_from(self.run / "rows" / f"{key}.json", fingerprint)

    def finish(self, key: str, row: dict):
        write(self.run / "rows" / f"{key}.json", json.dumps(row))

    def arrays(self, key: str, fingerprint: str) -> dict | None:
        return self._made_from(self.run / "graded" / f"{key}.json", fingerprint)

    def keep_arrays(self, key: str, entry: dict):
        write(self.run / "graded" / f"{key}.json", json.dumps(entry))

    @staticmethod
    def _made_from(file: Path, fingerprint: str) -> dict | None:
        try:
            entry = json.loads(file.read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return entry if entry.get("fingerprint") == fingerprint else None

    def forget(self, keys: set[str]):
        """Rows of submissions that are not there any more."""
        for file in (self.run / "rows").glob("*.json"):
            if file.stem not in keys:
                file.unlink()


def fingerprint(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode("utf-8", "replace") if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
