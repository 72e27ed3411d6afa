"""Joint training or frozen parts: `python -m minillama4.course.evidence.fusion` (about 80 minutes on one core).

Five ways to make one tiny model answer questions about pictures (`fusion_task.py`), compared at equal training FLOPs:

- "encoder-free": patches through one linear map, everything trained together from the first step.
- "joint": the same with a ViT, as in Llama 4's early fusion.
- "frozen": a language model that has learned from text alone and an encoder that has learned labels alone; both stay
  as they are, and a projector between them is trained.
- "unfrozen": the same, and the language model learns from pictures too. "unfrozen, with text": and goes on with text.

FLOPs are those of `train_cost.training_cost` with each batch's own lengths. What frozen parts cost before is in
"parts_flops": charged in full, an arm stands at flops + parts_flops; free, at flops. The rate stays constant and the
averaged weights are examined, so each point of a curve is what a run of so many FLOPs would have given.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from random import Random

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ...model import Llama4
from ...train import Recipe, make_optimizers
from ...train_cost import PARTS, training_cost
from .fusion_cost import cross_attention, memory, step_flops, trained_names
from .fusion_task import (
    EYES,
    TEXT,
    TILES,
    Exams,
    config,
    examine,
    guessed,
    held_out,
    held_out_labels,
    labels_only,
    losses,
)
from .study import RESULTS, study

ARMS = {  # name -> eye, what is trained (in the first phase, of labels alone; then), a text batch every so many steps
    "encoder-free": ("linear", PARTS, PARTS, 4),
    "joint": ("vit", PARTS, PARTS, 4),
    "frozen": ("vit", ("projector",), ("projector",), None),
    "unfrozen": ("vit", ("projector",), ("projector", "text"), None),
    "unfrozen, with text": ("vit", ("projector",), ("projector", "text"), 4),
}
ALONE = {"text alone": 1.2e12, "encoder alone": 0.6e12}  # parts that an arm finds ready, and their FLOPs
LATE = ("frozen", "unfrozen", "unfrozen, with text")
FLOPS = 4.5e12  # of a main run
SWEEP = 1e12  # of an arm's sweep run; a part's is a quarter of its own
RATES = (0.5, 1, 2, 4)  # times the rates of `train.Recipe`
EYE = 0.1  # share of a run's FLOPs, its start, in which only labels are learned
BATCH, WARMUP, POINTS = 16, 50, 8
CACHE = Path(__file__).parents[3] / "runs" / "fusion"
Job = dict


class Averaged:
    """A moving average of the trained weights; inside `with`, the model has them."""

    def __init__(self, model: Llama4):
        self.model, self.steps = model, 0
        self.mean = [p.detach().clone() for p in model.parameters()]

    def update(self):
        self.steps += 1
        kept = min(0.99, self.steps / (self.steps + 9))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.model.parameters()], 1 - kept)

    def __enter__(self):
        self.live = [p.detach().clone() for p in self.model.parameters()]
        self._set(self.mean)

    def __exit__(self, *error):
        self._set(self.live)

    @torch.no_grad()
    def _set(self, values):
        for parameter, value in zip(self.model.parameters(), values, strict=True):
            parameter.copy_(value)


def train(job: Job, model: Llama4, exams: Exams, phases: list, at_point) -> dict:
    """Train for the job's FLOPs, and call `at_point(flops)` with averaged weights at each eighth of them.

    phases: of (share of the FLOPs where it ends, trained parts, sorts of batch to take in turn).
    """
    recipe, average = Recipe(), Averaged(model)
    optimizers = make_optimizers(model, recipe)
    row = {"steps": 0, "pictures": 0, "texts": 0, "seconds": 0.0}
    flops, points, trained = 0, 1, None
    while flops < job["flops"]:
        started = time.process_time()
        _, parts, sorts = next(phase for phase in phases if flops < phase[0] * job["flops"])
        if parts != trained:
            trained, names = parts, set(trained_names(model, parts))
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in names)
        sort = sorts[row["steps"] % len(sorts)]
        batch = exams.batch(Random(f"{job['seed']}/{row['steps']}"), BATCH, sort)
        for optimizer, peak in zip(optimizers, (recipe.muon_rate, recipe.adam_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = job["rate"] * peak * min(1.0, (row["steps"] + 1) / WARMUP)
        loss = labels_only(model, batch) if sort == "labels" else sum(losses(model, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update()
        flops += step_flops(model.config, batch, parts, sort != "labels")
        row["steps"] += 1
        row["texts" if sort == "text" else "pictures"] += BATCH
        row["seconds"] += time.process_time() - started
        if flops >= points * job["flops"] / POINTS:
            points = int(flops * POINTS / job["flops"]) + 1
            with average:
                at_point(flops)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), average.mean, strict=True):
            parameter.copy_(value)
    return row | {"seconds": round(row["seconds"], 1)}


# ---------------------------------------------------------------------------------------------------------------------
# Parts that are trained alone, and kept


def part(job: Job) -> tuple[dict, dict]:
    """(row, weights by name) of a part; made once, then read from `runs/fusion`, by all that decides it."""
    settings = json.dumps([job, repr(TEXT), repr(EYES["vit"]), BATCH, WARMUP], sort_keys=True)
    path = CACHE / f"{job['arm'].replace(' ', '-')}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        row, weights = _make_part(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file(weights, temporary, metadata={"row": json.dumps(row), "settings": settings})
        os.replace(temporary, path)
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["row"]), {name: file.get_tensor(name) for name in file.keys()}


def _make_part(job: Job) -> tuple[dict, dict]:
    exams, model = Exams("vit"), _fresh("vit", job["seed"])
    curve, text = {}, job["arm"] == "text alone"
    items, labels = held_out(20, "curve"), held_out_labels(exams, 60)

    @torch.no_grad()
    def at_point(flops: int):
        found = {"text_" + name: value for name, value in examine(model, exams, items, True).items()} if text else {
            "label_loss": round(labels_only(model, labels).item(), 4)}  # fmt: skip
        _append(curve, {"flops": flops} | found)

    trained, sorts = (("text",), ["text"]) if text else (PARTS, ["labels"])
    row = train(job, model, exams, [(1, trained, sorts)], at_point)
    row |= {"curve": curve} | ({"text": examine(model, exams, held_out(100, "end"), True)} if text else {})
    kept = trained_names(model, ("text",) if text else ("encoder",))
    return row, {name: p.detach().clone() for name, p in model.named_parameters() if name in kept}


def _fresh(eye: str, seed: int) -> Llama4:
    model = Llama4(config(eye))
    model.reset_parameters(torch.Generator().manual_seed(seed))
    return model


def _append(curve: dict, point: dict):
    for name, value in point.items():
        curve.setdefault(name, []).append(value)


# ---------------------------------------------------------------------------------------------------------------------
# Arms


def run(job: Job) -> dict:
    """One row: a part trained alone, or an arm."""
    if job["arm"] in ALONE:
        return part(job)[0]
    eye, first, then, text_every = ARMS[job["arm"]]
    exams, model, parts_flops = Exams(eye), _fresh(eye, job["seed"]), 0
    for name, rate in job.get("parts", {}).items():
        row, weights = part(alone(name, job["seed"], rate, job["parts_share"]))
        model.load_state_dict(weights, strict=False)
        parts_flops += row["curve"]["flops"][-1]
    curve, items = {}, held_out(20, "sweep" if job["sweep"] else "curve")

    def at_point(flops: int):
        seen, read = examine(model, exams, items, False), examine(model, exams, items, True)
        _append(curve, {"flops": flops} | seen | {"text_loss": read["loss"], "text_all": read["all"]})

    end = held_out(100, "end")
    before = examine(model, exams, end, True)
    sorts = ["pictures"] * (text_every - 1) + ["text"] if text_every else ["pictures"]
    row = train(job, model, exams, [(EYE, first, ["labels"]), (1, then, sorts)], at_point)
    row |= {"parts_flops": parts_flops, "curve": curve, "text_before": before}
    row |= {"pictures_right": examine(model, exams, end, False), "text_after": examine(model, exams, end, True)}
    cost = training_cost(model.config, 100, TILES, then)
    row |= {"parameters": cost.parameters, "trained_parameters": cost.trained_parameters}
    row["tokens_per_picture"] = TILES * model.config.vision.tokens_per_tile
    return row | {"bytes": memory(model, exams.batch(Random("memory"), BATCH, "pictures"), then)}


# ---------------------------------------------------------------------------------------------------------------------
# The plan: parts' rates, then arms' rates, then the main runs


def alone(name: str, seed: int, rate: float, share: float, part_of: float = 1.0) -> Job:
    return {"arm": name, "seed": seed, "rate": rate, "flops": ALONE[name] * share * part_of}


def best_rate(rows: list[dict], arm: str) -> float:
    """The rate whose run on seed 9 ended with the lowest held-out loss: of labels for the encoder, else of answers."""
    loss = {"encoder alone": "label_loss", "text alone": "text_loss"}.get(arm, "loss")
    ends = {row["rate"]: row["curve"][loss][-1] for row in rows if (row["arm"], row["seed"]) == (arm, 9)}
    return min(ends, key=ends.get)


def plan(rows: list[dict], share: float = 1.0, rates=RATES, seeds=(0, 1, 2)) -> list[Job]:
    """All jobs that can be named yet: those of a stage need the rates that the stage before has found."""
    jobs = [alone(name, 9, rate, share, 0.25) for name in ALONE for rate in rates]
    if not _all_done(jobs, rows):
        return jobs
    parts = {name: best_rate(rows, name) for name in ALONE}

    def arm(name: str, seed: int, rate: float, flops: float, sweep: bool) -> Job:
        job = {"arm": name, "seed": seed, "rate": rate, "flops": flops * share, "sweep": sweep}
        return job | ({"parts": parts, "parts_share": share} if name in LATE else {})

    swept = [name for name in ARMS if name != "unfrozen, with text"]  # takes the rate of "unfrozen"
    jobs += [arm(name, 9, rate, SWEEP, True) for name in swept for rate in rates]
    if not _all_done(jobs, rows):
        return jobs
    found = {name: best_rate(rows, name) for name in swept}
    found["unfrozen, with text"] = found["unfrozen"]
    jobs += [alone(name, seed, rate, share) for name, rate in parts.items() for seed in seeds]
    for seed in seeds:
        for name in ARMS if seed == seeds[0] else ("joint", "frozen"):
            jobs.append(arm(name, seed, found[name], FLOPS, False))
    return jobs


def _all_done(jobs: list[Job], rows: list[dict]) -> bool:
    return all(any(row.items() >= job.items() for row in rows) for job in jobs)


def card(share: float) -> dict:
    return {
        "flops": FLOPS * share, "parts_flops": {name: flops * share for name, flops in ALONE.items()},
        "rates": RATES, "batch": BATCH, "labels_only": EYE, "guessed": guessed(held_out(100, "end")),
        "cross_attention": {eye: cross_attention(config(eye), 100, TILES) for eye in EYES},
        "memory": "bytes counted in one step of 16 documents; activations are all that is kept for the backward pass",
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few and short runs: a check that it runs, not a result")
    parser.add_argument("--out", type=Path, help="result file (default: the stored one; quick: none)")
    options = parser.parse_args()
    command = "python -m minillama4.course.evidence.fusion" + (" --quick" if options.quick else "")
    settings = {"share": 0.01, "rates": (2,), "seeds": (0,)} if options.quick else {}
    recipe = card(settings.get("share", 1.0)) | {"command": command}
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or (Path(folder) / "quick.json" if options.quick else RESULTS / "fusion.json")
        rows, jobs = [], plan([], **settings)
        while not _all_done(jobs, rows):
            rows = study(jobs, run, recipe, out, workers=1)["rows"]
            jobs = plan(rows, **settings)


if __name__ == "__main__":
    main()
