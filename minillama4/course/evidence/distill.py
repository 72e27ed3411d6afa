"""What a teacher is good for: `python -m minillama4.course.evidence.distill` (about 95 minutes on one core).

A mini-behemoth (experts in every layer) reads documents of `told.py` that never end, each once. Then it teaches
mini-mavericks, all of one size, that take equally many steps over the same batches of a fixed pool of documents, or of
a tenth of it. Arms differ in the weight of the soft loss: 0 (hard), 1 (soft), one half (fixed), from 1 down to 0 by
step (ramp), or the teacher's probability of the true token (confidence).

Then one thing at a time changes, with soft targets on the tenth: how many of the teacher's tokens are kept, the
temperature, the teacher. All scores are on scenes that no student has read. Costs are in FLOPs, the teacher's own
training apart, since whether to charge it is a choice.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...budget import count, shape
from ...config import Llama4Config, TextConfig, every
from ...distill import TopK, codistill, hard_loss, load_targets, mix, ramp, save_targets, top_k, top_k_loss
from ...model import Llama4
from ...trace import Trace, trace
from ...train import Recipe, balance_loss, make_optimizers
from ...train_cost import Cost, training_cost
from .study import RESULTS, study
from .told import LINE, TOKENS, Documents, documents, exam, kept_documents

SHIPPED = RESULTS / "distill.targets"  # mini-behemoth's 8 likeliest for the tenth: all of it that is kept with the code
RUNS = Path("runs/distill")  # documents, teachers and their targets: made again if they are gone
TENTH = 0.1  # of the pool
ARMS = ("hard", "soft", "fixed", "ramp", "confidence")
SIZES = {
    "mini-behemoth": {"hidden_size": 96, "num_layers": 6, "expert_width": 64, "moe_step": 1},
    "mini-maverick": {"hidden_size": 64, "num_layers": 4, "expert_width": 64, "moe_step": 2},
}
TEACHERS = {  # name -> (size, share of the teacher's steps, whether it reads only the students' tenth)
    "mini-behemoth": ("mini-behemoth", 1.0, False),
    "untrained": ("mini-behemoth", 0.0, False),
    "under-trained": ("mini-behemoth", 0.1, False),
    "of the student's size": ("mini-maverick", 1.0, False),
    "read no more than the student": ("mini-behemoth", 0.3, True),
}
RECIPE = {
    "train_steps": 550, "batch": 24, "rate": 0.007, "balance": 0.01,  # documents a step; of the load-balance loss
    "teacher_steps": 1200, "teacher_batch": 48, "teacher_rate": 0.007,
    "pool": 4000, "held_out": 600, "points": 8,  # documents; steps of a curve
    "soft_weight": 0.5, "temperature": 1.0, "top_k": 64,
    "sizes": SIZES, "world": "told.py: four to six objects, English and French",
}  # fmt: skip
QUICK = RECIPE | {"train_steps": 20, "teacher_steps": 20, "pool": 200, "held_out": 40, "points": 2}


def config(hidden_size: int, num_layers: int, expert_width: int, moe_step: int) -> Llama4Config:
    """Maverick's shape in small; with `moe_step` 1, Behemoth's."""
    text = TextConfig(
        vocab_size=1024, hidden_size=hidden_size, num_layers=num_layers, num_heads=hidden_size // 16,
        num_kv_heads=hidden_size // 32, head_dim=16, num_experts=16, expert_width=expert_width,
        dense_width=2 * expert_width, moe_layers=every(moe_step, num_layers), nope_layers=(num_layers - 1,),
        chunk_size=2 * LINE, max_positions=TOKENS, rope_theta=10_000.0, qk_norm=False, floor_scale=TOKENS,
    )  # fmt: skip
    tokens = {"bos_token": 1000, "stop_tokens": (1001,), "pad_token": 1018, "patch_token": 1015}
    return Llama4Config(text, None, **tokens)


def build(size: str, seed: int) -> Llama4:
    model = Llama4(config(**SIZES[size]))
    model.reset_parameters(torch.Generator().manual_seed(seed))
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Students


def run(job: dict) -> dict:
    """One row: held-out scores, a curve of them, and what it cost."""
    return train_teacher(job) if job["arm"] == "teacher" else train_student(job)


def train_student(job: dict) -> dict:
    steps, recipe = job["train_steps"], recipe_of(job)
    pool = pool_of(job["data"], recipe)
    model, curve = build("mini-maverick", job["seed"]), Curve(steps, recipe)
    learner = Learner(model, recipe["rate"], steps)
    lessons = None if job["arm"] == "hard" else Lessons(job, pool)
    for step, rows in enumerate(batches(len(pool), recipe["batch"], steps, job["seed"])):
        curve.look(model, step)
        if job["arm"] == "hard" and step == steps // 4:
            keep(model, quarter_file(job))  # for the lab of lesson 04
        with trace(model, router=True) as seen:
            if lessons is None:
                read, weight = pool[rows], 0.0
                loss = hard_loss(model.lm_head(model.hidden_states(read.inputs)[read.learn]), read.targets).mean()
            else:
                loss, weight = lessons.loss(model, rows, step, steps)
        learner.learn(loss + recipe["balance"] * balance(seen), step)
        curve.weights.append(weight)
    curve.look(model, steps)
    cost = {"own": flops(model).total * recipe["batch"] * steps, "teacher_passes": 0, "teacher_training": 0}
    cost |= lessons.cost(recipe["batch"] * steps) if lessons else {}
    return exam(model, RUNS, recipe["held_out"]) | {"curve": curve.points, "flops": cost} | sizes(model)


def pool_of(data: float, recipe: dict) -> Documents:
    """What students read; the tenth is the pool's first documents."""
    return kept_documents(RUNS, "pool", "train", recipe["pool"])[: round(data * recipe["pool"])]


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Document numbers [size], one a step: all documents in a new order each epoch. The same for all arms."""
    draw, left = torch.Generator().manual_seed(1000 + seed), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left) < size:
            left = torch.cat([left, torch.randperm(count, generator=draw)])
        yield left[:size]
        left = left[size:]


class Learner:
    """One optimizer step: `train`'s Muon and AdamW; up over 50 steps, down over the second half."""

    def __init__(self, model: Llama4, rate: float, steps: int):
        self.model, self.rates = model, (rate, rate / 2)
        self.recipe = Recipe(steps=steps, horizon=steps, warmup=50, cooldown=0.5, finish=1)
        self.optimizers = make_optimizers(model, self.recipe)

    def learn(self, loss: Tensor, step: int):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * self.recipe.rate(step)
            optimizer.step()
            optimizer.zero_grad()


def balance(seen: Trace) -> Tensor:
    return torch.stack([balance_loss(routes.logits) for routes in seen.router.values()]).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Teachers


def train_teacher(job: dict) -> dict:
    """A teacher of `TEACHERS`; its weights go to `RUNS`."""
    recipe, (size, _, confined) = recipe_of(job), TEACHERS[job["teacher"]]
    steps, batch = job["train_steps"], recipe["teacher_batch"]
    model, curve = build(size, 100), Curve(steps, recipe)
    pool = pool_of(TENTH, recipe)
    order = batches(len(pool), batch, steps, 100)
    if steps:
        learner = Learner(model, recipe["teacher_rate"], steps)
    for step in range(steps):
        curve.look(model, step)
        read = pool[next(order)] if confined else documents("stream", "train", batch, first=step * batch)
        with trace(model, router=True) as seen:
            loss = hard_loss(model.lm_head(model.hidden_states(read.inputs)[read.learn]), read.targets).mean()
        learner.learn(loss + recipe["balance"] * balance(seen), step)
        curve.weights.append(0.0)
    curve.look(model, steps)
    keep(model, teacher_file(job["teacher"], recipe))
    return (
        exam(model, RUNS, recipe["held_out"])
        | {"curve": curve.points, "flops": {"own": flops(model).total * batch * steps}}
        | sizes(model)
    )


def keep(model: Llama4, file: Path):
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".new")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
    temporary.replace(file)


def teacher_file(name: str, recipe: dict) -> Path:
    """Another recipe has another file."""
    facts = json.dumps([TEACHERS[name], recipe], sort_keys=True)
    return RUNS / f"{name.replace(' ', '-')}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}.safetensors"


def quarter_file(job: dict) -> Path:
    return RUNS / f"quarter-{job['data']}-{job['seed']}-{job['train_steps']}.safetensors"


def load_teacher(name: str, recipe: dict) -> Llama4:
    """Trained now if its weights are gone."""
    file = teacher_file(name, recipe)
    if not file.exists():
        train_teacher(teacher_job(name, recipe))
    model = build(TEACHERS[name][0], 100)
    model.load_state_dict(load_file(file))
    return model.eval().requires_grad_(False)


class Lessons:
    """One teacher's soft targets for the documents of a pool, and the loss of a student who gets them.

    The K likeliest are computed once and kept in a file; with "all" there is no file: the teacher reads every batch.
    One such file ships, so what it teaches can be learned without training the teacher first.
    """

    def __init__(self, job: dict, pool: Documents):
        self.job, self.recipe, self.pool = job, recipe_of(job), pool
        self.teacher, self.online = None, job["top_k"] == "all"
        self.ends = pool.learn.sum(1).cumsum(0)  # [documents]: learned tokens up to and including each
        if self.online:
            self.teacher = load_teacher(job["teacher"], self.recipe)
            return
        of = teacher_file(job["teacher"], self.recipe)
        file = of.with_name(f"{of.stem}-{len(pool)}-{job['top_k']}-{job['temperature']}.targets")
        if not file.exists() and not of.exists() and is_shipped(job):  # a teacher trained here is asked itself
            file = SHIPPED
        elif not file.exists():
            teacher = load_teacher(job["teacher"], self.recipe)
            save_targets(file, teacher_targets(teacher, pool, job["top_k"], job["temperature"]))
        self.kept = load_targets(file)

    def targets(self, rows: Tensor) -> TopK:
        """What is kept for the learned tokens of some documents, in their order."""
        starts = self.ends - self.pool.learn.sum(1)
        index = torch.cat([torch.arange(int(starts[row]), int(self.ends[row])) for row in rows])
        return TopK(*(part[index] for part in self.kept[:3]), self.kept.temperature)

    def loss(self, model: Llama4, rows: Tensor, step: int, steps: int) -> tuple[Tensor, float]:
        """(loss of the batch, mean soft weight)."""
        read, temperature = self.pool[rows], self.job["temperature"]
        if self.online:
            weight = soft_weight(self.job["arm"], step, steps, self.recipe)
            batch = (read.inputs, read.targets, read.learn)
            return codistill(self.teacher, [model], *batch, weight, temperature)[0], weight
        logits_TV, cached = model.lm_head(model.hidden_states(read.inputs)[read.learn]), self.targets(rows)
        weight = soft_weight(self.job["arm"], step, steps, self.recipe, sure(cached, read.targets))
        loss = mix(hard_loss(logits_TV, read.targets), top_k_loss(logits_TV, cached), weight)
        return loss, float(torch.as_tensor(weight).mean())

    def cost(self, documents_read: int) -> dict:
        """FLOPs of the teacher's passes (each document once, or in each epoch), and of its own training."""
        job = teacher_job(self.job["teacher"], self.recipe)
        one = flops(build(TEACHERS[self.job["teacher"]][0], 100))
        return {
            "teacher_passes": one.forward * (documents_read if self.online else len(self.pool)),
            "teacher_training": one.total * self.recipe["teacher_batch"] * job["train_steps"],
        }


def is_shipped(job: dict) -> bool:
    wanted = {"teacher": "mini-behemoth", "top_k": 8, "temperature": 1.0, "data": TENTH, "quick": False}
    return wanted == {name: job[name] for name in wanted}


@torch.no_grad()
def teacher_targets(teacher: Llama4, pool: Documents, k: int, temperature: float) -> TopK:
    parts = []
    for first in range(0, len(pool), 50):
        read = pool[first : first + 50]
        parts.append(top_k(teacher.lm_head(teacher.hidden_states(read.inputs)[read.learn]), k, temperature))
    return TopK(*(torch.cat([part[i] for part in parts]) for i in range(3)), temperature)


def sure(cached: TopK, target_T: Tensor) -> Tensor:
    """`distill.confidence` from what is kept: a token that is not among the K likeliest counts as chance 0. [T]"""
    return (cached.log_prob_TK.exp() * (cached.index_TK == target_T[:, None])).sum(-1)


def soft_weight(arm: str, step: int, steps: int, recipe: dict, sure_T: Tensor | None = None) -> float | Tensor:
    if arm == "confidence":
        return sure_T.clamp(max=1.0)
    return {"soft": 1.0, "fixed": recipe["soft_weight"], "ramp": ramp(step, steps)}[arm]


# ---------------------------------------------------------------------------------------------------------------------
# Scores and costs


class Curve:
    """Scores on the first quarter of the held-out documents, at evenly spread steps from the first to the last."""

    def __init__(self, steps: int, recipe: dict):
        self.recipe, self.weights = recipe, []  # soft weights since the last point
        self.at = {round(steps * point / recipe["points"]) for point in range(recipe["points"] + 1)}
        self.points = {name: [] for name in ("steps", "answer_loss", "caption_loss", "answer_right", "soft_weight")}

    def look(self, model: Llama4, step: int):
        if step in self.at:
            found = exam(model, RUNS, self.recipe["held_out"], share=0.25)
            mean = sum(self.weights) / len(self.weights) if self.weights else None
            answers, captions = found["answers"], found["captions"]
            new = (step, answers["loss"][0], captions["loss"][0], answers["right"][0], mean)
            for values, value in zip(self.points.values(), new, strict=True):
                values.append(value if value is None else round(value, 4))
            self.weights = []


def flops(model: Llama4) -> Cost:
    """Of one document, with half of its tokens at the head, as is usual here."""
    return training_cost(model.config, TOKENS - 1, head_tokens=TOKENS // 2)


def sizes(model: Llama4) -> dict:
    counts = count(shape(model.config))
    return {"total": counts.total, "active": counts.total - counts.routed + counts.routed_active}


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def recipe_of(job: dict) -> dict:
    return QUICK if job["quick"] else RECIPE


def teacher_job(name: str, recipe: dict) -> dict:
    steps = round(TEACHERS[name][1] * recipe["teacher_steps"])
    return {"arm": "teacher", "teacher": name, "train_steps": steps, "quick": recipe is QUICK}


def student_job(arm: str, data: float, seed: int, recipe: dict, control: str | None = None, **changes) -> dict:
    taught = {name: recipe[name] for name in ("temperature", "top_k")} | {"teacher": "mini-behemoth"}
    if arm == "hard":
        taught = dict.fromkeys(taught)  # nobody teaches
    job = {"arm": arm, "data": data, "seed": seed, "control": control} | taught | changes
    return job | {"train_steps": recipe["train_steps"], "quick": recipe is QUICK}


def plan(recipe: dict) -> list[dict]:
    """The teacher, the five arms with three seeds on all data and on a tenth, then one change at a time."""

    def control(kind: str, **changes) -> dict:
        return student_job("soft", TENTH, 0, recipe, kind, **changes)

    main = [student_job(arm, data, seed, recipe) for seed in range(3) for data in (1.0, TENTH) for arm in ARMS]
    kept = [control("top-k", top_k=k) for k in (1, 8, "all")]
    hot = [control("temperature", temperature=t, top_k="all") for t in (2.0, 4.0)]
    teachers = {name: teacher_job(name, recipe) for name in TEACHERS}
    others = [control("teacher", teacher=name) for name in TEACHERS if name != "mini-behemoth"]
    others = [job for pupil in others for job in (teachers[pupil["teacher"]], pupil)]
    alone, taught = ([job for job in main if (job["arm"] == "hard") == hard] for hard in (True, False))
    first = 2 * (len(ARMS) - 1)  # of seed 0
    return [*alone, teachers["mini-behemoth"], *taught[:first], *kept, *hot, *others, *taught[first:]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few and short runs: a check that it runs, not a result")
    parser.add_argument("--out", type=Path, help="result file (default: the stored one; quick: none)")
    options = parser.parse_args()
    recipe, out = QUICK if options.quick else RECIPE, options.out
    jobs = [job for job in plan(recipe) if not options.quick or job.get("seed", 0) == 0]
    if out is None and not options.quick:
        out = RESULTS / "distill.json"
    command = "python -m minillama4.course.evidence.distill" + (" --quick" if options.quick else "")
    study(jobs, run, recipe | {"command": command}, out, workers=1)


if __name__ == "__main__":
    main()
