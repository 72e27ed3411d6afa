"""`minillama4 bench gpu`: what full-size Scout does on one GPU, beside what that GPU can do at best.

The rooflines (copying, one large bf16 product) are measured in the same run; what is measured is in `cuda/bench.py`.
Each row is written as soon as it is there, so that a run that is killed keeps what it has; one that fails says why, and
the others go on.
"""

import json
import os
import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from .cuda import bench
from .cuda.bench import CAP, Sizes
from .cuda.decode import FAST

LIMIT = 480.0  # seconds: no row begins later, and none takes long
LAYER_ROWS = (bench.one_nope_layer, bench.moe_layer, bench.chunks)
MODEL_ROWS = (bench.logits, bench.decode, bench.prefill_8k, bench.memory)


class Card:
    """A CUDA device and its clock. Tests put a fake in its place."""

    def __init__(self):
        if not torch.cuda.is_available():
            raise ValueError(f"bench gpu needs a CUDA device, and torch {torch.__version__} sees none")
        self.device, self.ops = torch.device("cuda"), FAST
        self.memory = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / self.memory))

    def seconds(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def forget_peak(self):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes that were reserved at most, since `forget_peak`."""
        return torch.cuda.max_memory_reserved()

    def facts(self) -> dict:
        name, file = torch.cuda.get_device_name(), Path("/proc/driver/nvidia/version")
        driver = re.search(r"\d+\.\d+[.\d]*", file.read_text()) if file.exists() else None
        gpu = "h200" if "H200" in name else "h100"
        return {"device": name, "gpu": gpu, "memory": self.memory, "driver": driver[0] if driver else "unknown"}


class Report:
    """The JSON file: `card`, `roofline`, `rows` and `points` (what the roofline explorer draws)."""

    def __init__(self, file: Path | None, card: dict):
        self.file, self.data = file, {"card": card, "roofline": {}, "rows": [], "points": []}

    def write(self):
        """Whole or not at all: a run that is killed leaves the file as it was after the last row."""
        if self.file is not None:
            part = self.file.with_name(self.file.name + ".part")
            part.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
            os.replace(part, self.file)

    def add(self, row: dict):
        """A row, and its point if it has one and passed its check."""
        point = row.pop("point", None)
        self.data["rows"].append(row)
        if point is not None and row["correct"]:
            self.data["points"].append(point)
        self.write()


def bench_gpu(file: Path | None, sizes: Sizes, card, clock: Callable[[], float] = time.perf_counter) -> dict:
    """Measure all rows, print and store each; returns what the file holds."""
    torch.manual_seed(0)
    started, facts = clock(), card.facts()
    facts |= {"torch": torch.__version__, "triton": _version("triton"), "transformers": _version("transformers")}
    facts |= {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), "command": "minillama4 bench gpu"}
    report = Report(file, facts)
    rate = report.data["roofline"] = bench.rates(card, sizes)
    report.write()
    print(f"{facts['device']}: copies {rate['bandwidth'] / 1e12:.2f} TB/s, {rate['flops'] / 1e12:.0f} TFLOP/s in bf16")

    def measure(what: Callable[..., dict], *arguments):
        name, begun = what.__name__, clock()
        if begun - started > LIMIT:
            row = {"name": name, "skipped": f"{LIMIT:.0f} s were over"}
        else:
            card.forget_peak()
            try:
                row = what(card, sizes, rate, *arguments)
            except Exception as error:  # whatever it is, the rows that follow do not need this one
                row = {"name": name, "error": f"{type(error).__name__}: {str(error)[:500]}"}
        report.add(row | {"seconds_in_all": round(clock() - begun, 1)})
        print(line(row), flush=True)

    for what in LAYER_ROWS:
        measure(what)
    if clock() - started < LIMIT:
        model = bench.random_int4(sizes.config, card.device)
        for what in MODEL_ROWS:
            measure(what, model)
    report.data["seconds"] = round(clock() - started, 1)
    report.write()
    return report.data


def line(row: dict) -> str:
    """One row, as it is printed."""
    if "median" not in row:
        return f"{row['name']}: not measured, {row.get('error') or row['skipped']}"
    numbers = f"{row['median']:.4g} {row['unit']} ({row['min']:.4g} to {row['max']:.4g})"
    check = "" if row["correct"] else f"; WRONG: {row['check']}"
    return f"{row['name']}: {numbers}, accepted {row['accepted']:g}, goal {row['goal']:g}: {row['reached']}{check}"


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "not installed"


def bench_gpu_command(file: str | None = None) -> int:
    """ValueError: there is no CUDA device. Returns 1 if a row is missing or wrong, else 0."""
    card = Card()
    data = bench_gpu(None if file is None else Path(file), bench.full_size(), card)
    return 0 if all(row.get("correct") for row in data["rows"]) else 1
