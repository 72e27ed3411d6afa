"""Train a mini model on rendered scenes: mini-scout from nothing, mini-maverick with mini-scout as its teacher.

Muon and AdamW, fp32. Batch i depends on the seed and i alone, so a run that was killed goes on from its last
save exactly as if nothing had happened. The router learns through the score that scales each expert's input; load is
kept even by the auxiliary loss of the Switch Transformer (Llama 4's own method is unpublished).
"""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .checkpoint import load_checkpoint
from .config import Llama4Config
from .distill import hard_loss, inherit, soft_loss
from .documents import PHASES, Batch, Writer
from .model import Llama4
from .muon import Muon
from .tokenizer import load_tokenizer
from .trace import trace

# (from this share of the horizon on, weight of the load-balance loss, weight of -log(score), weight decay of the shared
# experts). Left alone, routers turned their experts down to a score of 0.1, and the shared experts did all the work.
ROUTING = ((0.0, 0.003, 0.0, 0.05), (0.6, 0.008, 0.02, 0.05), (0.74, 0.02, 0.02, 0.05), (0.7833, 0.06, 0.02, 0.6))
LABEL_SCALE = 0.25  # of picture vectors (length sqrt(hidden)) against embeddings; it keeps early logits near 1
COLUMNS = ("words", "labels", "balance", "volume", "points")  # of loss.csv: the parts of `Losses`
BARRIER_SECONDS = 120  # a worker that waits longer for another takes it for dead and stops


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, besides the config and the data."""

    steps: int = 5500
    horizon: int = 6000  # where the learning rate would reach zero if training went on
    batch_size: int = 24
    adam_rate: float = 2e-3  # peak learning rates, reached after `warmup` steps
    muon_rate: float = 5e-3
    warmup: int = 100
    cooldown: float = 0.4  # share of the horizon, its end, over which they fall
    finish: int = 500  # last steps, over which they fall to zero wherever they are
    weight_decay: float = 0.05  # on matrices, but for shared experts: see ROUTING
    clip: float = 1.0  # norm of all gradients together
    label: float = 1.0  # weight of the picture's labels
    point: float = 0.3  # weight of words pointing at what they name, until scenes are full
    eye: int = 500  # first steps, in which only the way from pixels to the picture's vectors learns, from labels alone
    curriculum: int = 1800  # steps after that, in which scenes grow from one object to six
    seed: int = 0
    workers: int = 2  # processes that share a batch; part of the recipe, because each draws its own documents
    teacher: str = ""  # a preset that ships weights: the student starts from what both have, and learns from its words
    soft: float = 0.0  # weight of the teacher's probabilities, against 1 - soft of the text's own tokens

    def rate(self, step: int) -> float:
        """Learning rate at `step`, as a share of its peak."""
        slow = min((step + 1) / self.warmup, 1.0, (self.horizon - step) / (self.cooldown * self.horizon))
        return slow * min(1.0, (self.steps - step) / self.finish)

    def routing(self, step: int) -> tuple[float, float, float]:
        return [row[1:] for row in ROUTING if step >= row[0] * self.horizon][-1]

    def most_objects(self, step: int) -> int:
        return 6 if step < self.eye else min(6, 1 + 6 * (step - self.eye) // self.curriculum)


def balance_loss(logits: Tensor) -> Tensor:
    """Switch Transformer: experts x sum over experts of (share of tokens) x (mean probability); 1 if perfectly even.

    logits: [batch, tokens, experts]. Only the probability carries a gradient: tokens are counted, not differentiated.
    """
    probability = logits.flatten(0, -2).softmax(-1)  # [tokens, experts]
    share = F.one_hot(logits.argmax(-1).flatten(), logits.shape[-1]).float().mean(0)
    return logits.shape[-1] * (share * probability.mean(0)).sum()


def batch_at(step: int, worker: int, recipe: Recipe, writer: Writer) -> Batch:
    """One worker's share of the batch of one step."""
    mix = [mix for first, mix in PHASES if step >= first * recipe.horizon][-1]
    sort = Random(f"{recipe.seed}/{step}").choices(list(mix), list(mix.values()))[0]  # the same for all workers
    sort = "caption" if step < recipe.eye else sort
    rng = Random(f"{recipe.seed}/{step}/{worker}")
    size = recipe.batch_size // recipe.workers // (2 if sort == "two pictures" else 1)
    return writer.batch([writer.training_document(rng, sort, recipe.most_objects(step)) for _ in range(size)])


@dataclass
class Losses:
    words: Tensor  # mean over the assistant's words: cross-entropy, with a teacher mixed with the KL from it
    labels: Tensor  # and of the picture's labels
    balance: Tensor  # mean over the MoE layers
    volume: Tensor  # mean of -log(score) over all tokens and MoE layers
    points: Tensor  # see `point_loss`; 0 if not asked for

    def weighted(self, recipe: Recipe, step: int) -> Tensor:
        balance, volume, _ = recipe.routing(step)
        routing = balance * self.balance + volume * self.volume
        return self.words + recipe.label * self.labels + recipe.point * self.points + routing


def loss_of(
    model: Llama4, batch: Batch, point: bool = False, teacher: Llama4 | None = None, soft: float = 0.0
) -> Losses:
    """All parts of a text batch's loss, not yet weighted."""
    pictures = []  # [tiles, tokens_per_tile, hidden], as the projector hands them to the text side
    projector = model.multi_modal_projector["linear_1"]
    hook = projector.register_forward_hook(lambda module, inputs, output: pictures.append(output))
    look = model.config.text.nope_layers[:1] if point else ()
    with hook, trace(model, attention=look, router=True) as seen:
        hidden = model.hidden_states(batch.ids, batch.pixels)
    learn = batch.weights > 0  # the head runs only where there is something to learn
    student_TV = model.lm_head(hidden[learn])
    words_T = hard_loss(student_TV, batch.targets[learn])
    if teacher is not None and soft:
        with torch.no_grad():
            teacher_TV = teacher.lm_head(teacher.hidden_states(batch.ids, batch.pixels)[learn])
        words_T = (1 - soft) * words_T + soft * soft_loss(student_TV, teacher_TV)
    words = (words_T * batch.weights[learn]).sum() / batch.weights[learn].sum()
    labels = label_loss(model, pictures[0], batch.labels) if len(batch.labels) else hidden.new_zeros(())
    balance = torch.stack([balance_loss(routes.logits) for routes in seen.router.values()]).mean()
    volume = torch.stack([-F.logsigmoid(r.logits.amax(-1)).mean() for r in seen.router.values()]).mean()
    points = point_loss(seen.attention[look[0]], batch) if point and len(batch.points) else hidden.new_zeros(())
    return Losses(words, labels, balance, volume, points)


def point_loss(attention: Tensor, batch: Batch) -> Tensor:
    """-log of what a word's first two heads pay to the patches it names. attention: [batch, heads, queries, keys]."""
    document, position = batch.points.unbind(1)
    paid = attention[document, :2, position]  # [points, 2, keys]
    return -(paid * batch.pointed[:, None, : paid.shape[-1]]).sum(-1).clamp_min(1e-6).log().mean()


def label_loss(model: Llama4, pictures: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each labelled picture vector, compared with all embeddings, against its words.

    pictures: [tiles, tokens_per_tile, hidden], of the projector. labels: [labels, 2], see `Batch`.
    """
    vector, word = labels.unbind(1)
    chosen = F.rms_norm(pictures.flatten(0, 1), pictures.shape[-1:])[vector]  # [labels, hidden]
    return F.cross_entropy(LABEL_SCALE * chosen @ model.embed_tokens.weight.T, word)


def make_optimizers(model: Llama4, recipe: Recipe, team: "Team | None" = None) -> list[torch.optim.Optimizer]:
    """Muon for all matrices between hidden states, AdamW for embeddings, head and vectors."""
    muon, shared, decay, plain = [], [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            plain.append(parameter)
        elif name.startswith(("embed_tokens", "lm_head")):
            decay.append(parameter)
        else:
            (shared if ".shared_expert." in name else muon).append(parameter)
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [
        Muon([{"params": muon}, {"params": shared}], lr=1.0, weight_decay=recipe.weight_decay, team=team),
        torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), eps=1e-9),
    ]


def set_rates(optimizers: list[torch.optim.Optimizer], recipe: Recipe, step: int):
    for optimizer, peak in zip(optimizers, (recipe.muon_rate, recipe.adam_rate), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * recipe.rate(step)
    optimizers[0].param_groups[1]["weight_decay"] = recipe.routing(step)[2]


def train(config: Llama4Config, tokenizer_folder: Path, recipe: Recipe, folder: Path, save_every: int = 100) -> Llama4:
    """Train to the end of the recipe, or go on where `folder` left off. Writes `state.safetensors` and `loss.csv`.

    One process a core, each with one thread and its share of the batch: products this small gain little from two
    threads, and lose much when another program takes one of them away in mid-product.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = torch.multiprocessing.get_context("spawn")
    size = sum(p.numel() for p in Llama4(config).parameters())
    buffer = torch.zeros(recipe.workers, size).share_memory_()
    barrier = context.Barrier(recipe.workers)
    job = (config, tokenizer_folder, recipe, folder, save_every)
    teams = [Team(rank, buffer, barrier) for rank in range(recipe.workers)]
    helpers = [context.Process(target=_work, args=(team, *job), daemon=True) for team in teams[1:]]
    for helper in helpers:
        helper.start()
    threads = torch.get_num_threads()
    try:
        return _work(teams[0], *job)
    finally:
        torch.set_num_threads(threads)
        for helper in helpers:
            helper.terminate()


def _work(team: "Team", config, tokenizer_folder, recipe: Recipe, folder: Path, save_every: int) -> Llama4:
    """What each worker does; all hold the same weights, and worker 0 saves and shows progress."""
    torch.set_num_threads(1)
    rank = team.rank
    if rank > 0:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    writer = Writer(config, load_tokenizer(tokenizer_folder))
    model = Llama4(config)
    model.reset_parameters(generator=torch.Generator().manual_seed(recipe.seed))
    teacher = load_checkpoint(recipe.teacher) if recipe.teacher else None
    if teacher is not None:
        inherit(model, teacher)
    optimizers = make_optimizers(model, recipe, team)
    state = folder / "state.safetensors"
    step, seconds, history = load_state(state, model, optimizers, recipe) if state.exists() else (0, 0.0, [])
    no_loss = torch.zeros(())
    team.wait()  # nobody saves before all have read
    started = time.time() - seconds
    with tqdm(total=recipe.steps, initial=step, unit="step", disable=None if rank == 0 else True) as bar:
        while step < recipe.steps:
            set_rates(optimizers, recipe, step)
            batch = batch_at(step, rank, recipe, writer)
            if step < recipe.eye:
                labels = label_loss(model, model.encode_images(batch.pixels), batch.labels)
                losses = Losses(no_loss, labels, no_loss, no_loss, no_loss)
            else:
                losses = loss_of(model, batch, step < recipe.eye + recipe.curriculum, teacher, recipe.soft)
            losses.weighted(recipe, step).backward()
            team.average_gradients(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if rank > 0:
                continue
            history.append([float(getattr(losses, name).detach()) for name in COLUMNS])
            bar.update()
            bar.set_postfix_str(", ".join(f"{name} {x:.3f}" for name, x in zip(COLUMNS, history[-1], strict=True)))
            if step % save_every == 0 or step == recipe.steps:
                save_state(state, model, optimizers, recipe, step, time.time() - started, history)
                rows = (",".join([str(i), *(f"{x:.5f}" for x in row)]) for i, row in enumerate(history))
                write_atomically(folder / "loss.csv", "\n".join([",".join(["step", *COLUMNS]), *rows, ""]))
    return model.eval()


def _end_with_parent():
    """A worker whose parent was killed would wait for it at the barrier, and then for its own queues; end at once."""
    parent = torch.multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@dataclass
class Team:
    """This worker's place among those that share a batch, and the memory that all of them see."""

    rank: int
    buffer: Tensor  # [workers, parameters] in shared memory
    barrier: object

    def wait(self):
        self.barrier.wait(BARRIER_SECONDS)

    def average_gradients(self, model: Llama4):
        """Give all workers the mean of their gradients."""
        if len(self.buffer) == 1:
            return
        parameters = [p for p in model.parameters() if p.grad is not None]  # the same ones for all workers
        sizes = [p.numel() for p in parameters]
        torch.cat([p.grad.flatten() for p in parameters], out=self.buffer[self.rank, : sum(sizes)])
        self.wait()
        mean = self.buffer[:, : sum(sizes)].mean(0)
        self.wait()  # nobody writes again before all have read
        for parameter, grad in zip(parameters, mean.split(sizes), strict=True):
            parameter.grad = grad.view_as(parameter)

    def share(self, function: Callable[[Tensor], Tensor], stacks: list[Tensor]) -> list[Tensor]:
        """`function` of each stack [n, ...], of which each worker does every so-manieth item."""
        workers, first, results = len(self.buffer), 0, []
        for stack in stacks:
            result = self.buffer[0, first : first + stack.numel()].view_as(stack)
            mine = stack[self.rank :: workers]
            if len(mine):
                result[self.rank :: workers] = function(mine)
            results.append(result)
            first += stack.numel()
        self.wait()
        results = [result.clone() for result in results]
        self.wait()
        return results


def write_atomically(path: Path, text: str):
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_state(path: Path, model, optimizers, recipe: Recipe, step: int, seconds: float, history: list):
    """Weights, the optimizers' moments and the loss so far in one file that is there whole or not at all."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach()
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
    tensors["losses"] = torch.tensor(history, dtype=torch.float64)
    header = {"step": str(step), "seconds": f"{seconds:.1f}", "recipe": json.dumps(asdict(recipe))}
    temporary = path.with_name(path.name + ".new")
    save_file(tensors, temporary, metadata=header)
    os.replace(temporary, path)


def load_state(path: Path, model, optimizers, recipe: Recipe) -> tuple[int, float, list]:
    """(step, seconds, losses so far) of a saved run, its tensors put into `model` and `optimizers`."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
        if json.loads(header["recipe"]) != asdict(recipe):
            raise ValueError(f"{path} is a run of another recipe, {header['recipe']}; give another --out or delete it")
        step = int(header["step"])
        owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        parameters = dict(model.named_parameters())
        for stored in file.keys():
            key, _, name = stored.partition("/")
            if key == "weight":
                parameters[name].data.copy_(file.get_tensor(stored))
            elif name:
                owner[parameters[name]].state[parameters[name]][key] = file.get_tensor(stored)
        return step, float(header["seconds"]), file.get_tensor("losses").tolist()
