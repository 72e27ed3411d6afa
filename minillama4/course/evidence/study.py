"""Run a study's training runs side by side, one core each, and keep each result as soon as it is there.

A study is a list of jobs (plain dicts) and a function that turns one job into one row of results. The result file holds
a card and the rows; it is replaced whole after every run, so a study that was killed goes on where it was.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ...bench import machine
from ...model import Llama4
from ...train import write_atomically

RESULTS = Path(__file__).parent / "results"
Job = dict


def load(name: str) -> dict:
    """The stored results of a study: {"card": {...}, "rows": [{...}, ...]}."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def store(out: Path, report: dict):
    """A row a line, so that a difference between two versions of the file is one of rows."""
    rows = ",\n  ".join(json.dumps(row) for row in report["rows"])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, f'{{"card": {json.dumps(report["card"], indent=1)},\n "rows": [\n  {rows}\n ]}}\n')


def main(name: str, doc: str, jobs: list[Job], quick: list[Job], run: Callable[[Job], dict], recipe: dict) -> dict:
    """The command of a study: `python -m minillama4.course.evidence.<name> [--quick] [--out FILE]`."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few and short runs: a check that it runs, not a result")
    parser.add_argument("--out", type=Path, help="result file (default: the stored one; quick: none)")
    options = parser.parse_args()
    out = options.out or (None if options.quick else RESULTS / f"{name}.json")
    command = f"python -m minillama4.course.evidence.{name}" + (" --quick" if options.quick else "")
    return study(quick if options.quick else jobs, run, recipe | {"command": command}, out)


def study(jobs: list[Job], run: Callable[[Job], dict], recipe: dict, out: Path | None, workers: int = 2) -> dict:
    """Rows of all jobs, each `job | run(job)`. Those that `out` holds already are not run again.

    recipe: what all runs have in common; it goes into the card. `run` must be a function of a module, since each run is
    a call in another process. ValueError: `out` holds rows that were made by another recipe.
    """
    report = {"card": recipe | {"core_minutes": 0.0}, "rows": []}
    if out is not None and out.exists():
        report = json.loads(out.read_text("utf-8"))
        kept = {name: report["card"].get(name) for name in recipe}
        if kept != json.loads(json.dumps(recipe)):
            raise ValueError(f"{out} holds results of another recipe, {kept}; give another --out or delete it")
    order, settings = [_plain(job) for job in jobs], {name for job in jobs for name in job}

    def job_of(row: dict) -> Job:
        """All its settings: a job that says one thing more is another job."""
        return {name: value for name, value in row.items() if name in settings}

    done = [job_of(row) for row in report["rows"]]
    todo = [job for job, plain in zip(jobs, order, strict=True) if plain not in done]
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = pool.imap_unordered(_Timed(run), todo)
        for row, seconds in tqdm(results, "runs", len(todo), unit="run", disable=None):
            report["rows"].append(row)
            facts = machine()
            report["card"] |= {
                "core_minutes": round(report["card"]["core_minutes"] + seconds / 60, 2),  # of all runs together
                "machine": f"{facts['cpu']}, {facts['simd']}, {workers} runs side by side, one thread each, fp32",
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "date": time.strftime("%Y-%m-%d"),
            }
            if out is not None:
                store(out, report)
    report["rows"].sort(key=lambda row: order.index(job_of(row)) if job_of(row) in order else 0)
    if out is not None:
        store(out, report)
    return report


def answers(model: Llama4, ids: Tensor, say: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy in nats, whether the likeliest token is right) of each token to say: [said] each."""
    hidden = model.hidden_states(ids[:, :-1])
    logits, targets = model.lm_head(hidden[say[:, 1:]]), ids[:, 1:][say[:, 1:]]
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


class _Timed:
    """`run`, with the job put beside its result and the seconds that it took."""

    def __init__(self, run: Callable[[Job], dict]):
        self.run = run

    def __call__(self, job: Job) -> tuple[dict, float]:
        started = time.process_time()
        row = _plain(job | self.run(job))
        return row, time.process_time() - started


def _plain(row: dict) -> dict:
    """As it comes back from a file."""
    return json.loads(json.dumps(row))
