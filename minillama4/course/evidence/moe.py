"""What more experts buy at equal active size: `python -m minillama4.course.evidence.moe` (50 minutes, two idle cores).

A tiny Llama 4 (2 layers, hidden 64, plain causal attention, so that nothing but the feed-forward differs) reads two
kinds of text, and is tested on both.

- Facts to remember: "first second = object", 16,384 of them with an object drawn once and for all. How often a fact is
  read falls as 1 / its rank (Zipf), as in real text, so there are always rarer ones to learn. Nothing but memory helps.
- A rule to compute: sums of two numbers of three digits, lowest digit first. One of ten pairs is held out, and the
  million pairs are far too many to remember. Nothing but the rule helps.

All arms read the same batches in the same order, and take the same number of steps.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import Llama4Config, TextConfig, every
from ...evaluate import load_entropy
from ...model import Llama4
from ...moe import MoE
from ...train import balance_loss
from .study import answers, main

NAMES = 128  # first names, and second names; a fact is a pair of them
OBJECTS = 256  # so an object is 8 bits
FACTS = NAMES * NAMES
TOKENS = 64  # of a row: 16 facts, or 5 sums
BLANK, EQUALS, DIGIT = 2 * NAMES + OBJECTS, 2 * NAMES + OBJECTS + 1, 2 * NAMES + OBJECTS + 2
VOCAB = DIGIT + 10
HIDDEN, WIDTH, LAYERS = 64, 64, 2  # WIDTH: of a routed and of the shared expert
LOGGED = 50  # steps between two entries of a row's histories

RECIPE = {"train_steps": 2000, "batch": {"facts": 48, "sums": 16}, "row_tokens": TOKENS}
QUICK_STEPS = 60
SWEEP = (
    0.002,
    0.004,
    0.008,
    0.016,
    0.032,
)  # learning rates that every size was tried with, for 600 steps, on another seed
EXPERT_RATES = {1: 0.016, 4: 0.016, 16: 0.008, 64: 0.008}  # number of experts -> what was best there, on facts
DENSE_RATES = {5 * WIDTH: 0.016, 17 * WIDTH: 0.004}  # width -> likewise; as wide as 4 and 16 experts and the shared one


@dataclass
class World:
    """What is true: the object of each fact, and how often each is read."""

    objects: Tensor  # [FACTS]
    chance: Tensor  # [FACTS], sums to 1

    @classmethod
    def draw(cls, seed: int) -> "World":
        draw = torch.Generator().manual_seed(seed)
        rank = torch.randperm(FACTS, generator=draw) + 1.0
        return cls(torch.randint(OBJECTS, (FACTS,), generator=draw), (1 / rank) / (1 / rank).sum())

    def fact_rows(self, facts: Tensor) -> tuple[Tensor, Tensor]:
        """Facts [rows, 16] -> token ids [rows, TOKENS], and which of them the model has to say."""
        first, second = facts // NAMES, NAMES + facts % NAMES
        equals, said = torch.full_like(facts, EQUALS), 2 * NAMES + self.objects[facts]
        ids = torch.stack([first, second, equals, said], -1).flatten(1)
        return ids, (torch.arange(TOKENS) % 4 == 3).expand_as(ids)

    def batch(self, draw: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        sizes = RECIPE["batch"]
        facts = torch.multinomial(self.chance, sizes["facts"] * TOKENS // 4, replacement=True, generator=draw)
        return [self.fact_rows(facts.view(-1, TOKENS // 4)), sum_rows(sizes["sums"], draw, held_out=False)]


def sum_rows(rows: int, draw: torch.Generator, held_out: bool) -> tuple[Tensor, Tensor]:
    """ "a0 a1 a2 b0 b1 b2 = s0 s1 s2 s3 _" five times, lowest digit first: as in `World.fact_rows`."""
    pairs = torch.randint(1000, (20 * rows * 5, 2), generator=draw)
    kept = (pairs[:, 0] * 613 + pairs[:, 1] * 271) % 997 < 100  # one pair in ten, whatever its digits
    a, b = pairs[kept if held_out else ~kept][: rows * 5].unbind(1)
    parts = [digits(a, 3), digits(b, 3), torch.full((rows * 5, 1), EQUALS), digits(a + b, 4)]
    ids = torch.cat([*parts, torch.full((rows * 5, 1), BLANK)], 1).view(rows, -1)  # [rows, 5 * 12]
    say = ((torch.arange(60) % 12 >= 7) & (torch.arange(60) % 12 <= 10)).expand_as(ids)
    return F.pad(ids, (0, TOKENS - 60), value=BLANK), F.pad(say, (0, TOKENS - 60))


def digits(number: Tensor, count: int) -> Tensor:
    return DIGIT + torch.stack([number // 10**place % 10 for place in range(count)], -1)


class StudiedMoE(MoE):
    """The package's layer, of which one thing can be changed, and whose routes are kept."""

    def __init__(self, num_experts: int, width: int, output_softmax: bool = False, shared: bool = True):
        super().__init__(HIDDEN, num_experts, width)
        self.output_softmax = output_softmax  # as in the Switch Transformer: softmax over experts scales the output
        if not shared:
            self.shared_expert = nn.Identity()  # never called; takes the shared expert's weights away
        self.shared = shared
        self.register_buffer("bias_E", torch.zeros(num_experts), persistent=False)  # for choosing only, never a score

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        self.logits_TE = self.router(x_TD)
        self.expert_T = (self.logits_TE + self.bias_E).argmax(-1)
        if self.output_softmax:
            score_T = self.logits_TE.softmax(-1).gather(1, self.expert_T[:, None])
            routed_TD = score_T * self.experts(x_TD, self.expert_T)
        else:
            score_T = self.logits_TE.gather(1, self.expert_T[:, None]).sigmoid()
            routed_TD = self.experts(score_T * x_TD, self.expert_T)
        return (routed_TD + self.shared_expert(x_TD) if self.shared else routed_TD).view_as(x)

    def load(self) -> Tensor:
        """Share of the last forward pass's tokens that each expert got: [experts]."""
        return torch.bincount(self.expert_T, minlength=len(self.bias_E)) / len(self.expert_T)


def build(job: dict) -> Llama4:
    """The arm's model: "experts" of a width, or "dense" with one feed-forward of that width."""
    text = TextConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=4, num_kv_heads=2, head_dim=16,
        num_experts=job.get("experts", 0), expert_width=job.get("width", WIDTH), dense_width=job.get("dense", 1),
        moe_layers=() if "dense" in job else every(1, LAYERS), nope_layers=(), chunk_size=None, max_positions=TOKENS,
        temperature_tuning=False,
    )  # fmt: skip
    model = Llama4(Llama4Config(text, None, bos_token=0, stop_tokens=(), pad_token=0, patch_token=1))
    if "dense" not in job:
        for block in model.layers:
            block.feed_forward = StudiedMoE(
                job["experts"], job.get("width", WIDTH), job.get("output_softmax", False), job.get("shared", True)
            )
    model.reset_parameters(torch.Generator().manual_seed(job["seed"]))
    return model


@torch.no_grad()
def tests(model: Llama4, world: World) -> dict:
    """Held-out: fresh rows of facts by how often each is read, and sums whose pairs were never read."""
    loss, right = answers(model, *world.fact_rows(torch.arange(FACTS).view(-1, TOKENS // 4)))  # every fact once
    sum_loss, sum_right = answers(model, *sum_rows(400, torch.Generator().manual_seed(99), held_out=True))
    read = (
        world.chance * RECIPE["train_steps"] * RECIPE["batch"]["facts"] * TOKENS // 4
    )  # times in a whole run, on average
    bands = {"below 10": read < 10, "10 to 50": (read >= 10) & (read < 50), "50 and more": read >= 50}
    return {
        "fact_loss": round(float((loss * world.chance).sum()), 4),  # as they come in text
        "facts_known": int(right.sum()),
        "known_by_times_read": {name: round(float(right[band].float().mean()), 4) for name, band in bands.items()},
        "sum_loss": round(float(sum_loss.mean()), 4),
        "sums_right": round(float(sum_right.view(-1, 4).all(1).float().mean()), 4),  # all four digits
    }


def train(job: dict) -> dict:
    """One run: its row without the job. `cure` is none, aux (auxiliary loss) or bias (update), of a `strength`."""
    world, draw = World.draw(job["seed"]), torch.Generator().manual_seed(1000 + job["seed"])
    model = build(job)
    layers = [block.feed_forward for block in model.layers if isinstance(block.feed_forward, StudiedMoE)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["rate"], betas=(0.9, 0.98), weight_decay=0.0)
    steps, cure, strength = job["train_steps"], job.get("cure", "aux"), job.get("strength", 0.01)
    history = {"steps": [], "fact_losses": [], "sum_losses": [], "load": []}
    started = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:  # up over 100 steps, down over the last 40 %
            group["lr"] = job["rate"] * min(1.0, (step + 1) / 100, (steps - step) / (0.4 * steps))
        rows = world.batch(draw)
        # Both kinds in one forward pass, so that the load is that of the whole batch.
        loss, _ = answers(model, torch.cat([ids for ids, _ in rows]), torch.cat([say for _, say in rows]))
        fact_loss, sum_loss = (part.mean() for part in loss.split([int(say.sum()) for _, say in rows]))
        total = fact_loss + sum_loss
        if cure == "aux" and layers:
            total = total + strength * torch.stack([balance_loss(layer.logits_TE) for layer in layers]).mean()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if cure == "bias":
            for layer in layers:  # DeepSeek-V3: a step up for who has too little, a step down for who has too much
                layer.bias_E += strength * (1 / len(layer.bias_E) - layer.load()).sign()
        if step % LOGGED == 0 or step == steps - 1:
            history["steps"].append(step)
            history["fact_losses"].append(round(fact_loss.item(), 4))
            history["sum_losses"].append(round(sum_loss.item(), 4))
            if layers:
                history["load"].append([round(share, 4) for share in layers[-1].load().tolist()])
    seconds = time.process_time() - started
    parameters = sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() * (len(p) - 1) // len(p) for layer in layers for p in layer.experts.parameters())
    row = tests(model, world) | {"total": parameters, "active": parameters - idle}
    row["ms_per_step"] = round(1000 * seconds / steps, 1)
    if layers:
        loads = test_loads(model, world, layers)
        row |= {
            "dead": sum(int((load < 0.1 / len(load)).sum()) for load in loads),
            "entropy": [round(load_entropy(load.tolist()), 4) for load in loads],
        }
    return row | history


@torch.no_grad()
def test_loads(model: Llama4, world: World, layers: list[StudiedMoE]) -> list[Tensor]:
    """Each layer's load on text as it comes: facts by how often they are read, and sums."""
    draw, loads = torch.Generator().manual_seed(98), []
    rows = [world.batch(draw) for _ in range(8)]
    answers(model, *(torch.cat([pair[i] for batch in rows for pair in batch]) for i in range(2)))
    for layer in layers:
        loads.append(layer.load())
    return loads


def arms(steps: int) -> list[dict]:
    def job(arm: str, seed: int, **settings) -> dict:
        rate = DENSE_RATES.get(settings.get("dense")) or EXPERT_RATES.get(settings.get("experts"))
        return {"arm": arm, "seed": seed, "rate": rate, "train_steps": steps} | settings

    sizes = [{"experts": e} for e in EXPERT_RATES] + [{"dense": width} for width in DENSE_RATES]
    sweep = [job("sweep", 9, rate=r, train_steps=min(steps, 600), **size) for r in SWEEP for size in sizes]
    experts = [job("experts", seed, experts=e) for seed in range(3) for e in EXPERT_RATES]
    # Is it the rate or the number of experts that decides about sums? Both rates with the two sizes in the middle.
    other = [job("other rate", 0, experts=e, rate=rate) for e, rate in ((4, 0.008), (16, 0.016))]
    dense = [job("dense", 0, dense=width) for width in DENSE_RATES]
    variants = [
        job("softmax on output", 0, experts=16, output_softmax=True),
        # The shared expert's width goes to the routed ones: the same active size, and nearly the same total.
        job("no shared expert", 0, experts=8, width=2 * WIDTH, shared=False, rate=EXPERT_RATES[16]),
    ]
    cures = [("none", 0.0)] + [(cure, strength) for cure in ("aux", "bias") for strength in (0.001, 0.01, 0.1)]
    balance = [job("balance", 0, experts=16, cure=cure, strength=strength) for cure, strength in cures]
    return sweep + experts + other + dense + variants + balance


def quick_arms() -> list[dict]:
    return [job for job in arms(QUICK_STEPS) if job["seed"] == 0 and job["arm"] != "dense"]


if __name__ == "__main__":
    main("moe", __doc__, arms(RECIPE["train_steps"]), quick_arms(), train, RECIPE)
