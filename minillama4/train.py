"""Train a mini model from nothing on rendered scenes: `minillama4 train mini-scout`.

Muon and AdamW, fp32. Batch i depends on the seed and i alone, so a run that was killed goes on from its last
save exactly as if nothing had happened. The router learns through the score that scales each expert's input; load is
kept even by the auxiliary loss of the Switch Transformer (Llama 4's own method is unpublished).
"""

import json
import math
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .config import Llama4Config
from .documents import PHASES, Batch, Writer
from .model import Llama4
from .tokenizer import load_tokenizer
from .trace import trace

BARRIER_SECONDS = 120  # a worker that waits longer for another takes it for dead and stops


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, besides the config and the data."""

    steps: int = 6900
    batch_size: int = 24
    adam_rate: float = 2e-3  # peak learning rates, reached after `warmup` steps
    muon_rate: float = 5e-3
    warmup: int = 100
    horizon: int = 9000  # steps of the cosine along which they then fall to a twentieth
    cooldown: int = 600  # last steps, over which they fall to zero wherever the cosine is
    weight_decay: float = 0.05  # on matrices
    clip: float = 1.0  # norm of all gradients together
    balance: float = 0.01  # weight of the load-balance loss
    label: float = 1.0  # weight of the patch labels
    curriculum: int = 2250  # first steps, in which scenes grow from one object to six
    seed: int = 0
    workers: int = 2  # processes that share a batch; part of the recipe, because each draws its own documents

    def rate(self, step: int) -> float:
        """Learning rate at `step`, as a share of its peak."""
        rising = min(1.0, (step + 1) / self.warmup)
        done = min(1.0, max(0, step - self.warmup) / (self.horizon - self.warmup))
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
        return rising * cosine * min(1.0, (self.steps - step) / self.cooldown)

    def most_objects(self, step: int) -> int:
        return min(6, 1 + 6 * step // self.curriculum)


def balance_loss(logits: Tensor) -> Tensor:
    """Switch Transformer: experts x sum over experts of (share of tokens) x (mean probability); 1 if perfectly even.

    logits: [batch, tokens, experts]. Only the probability carries a gradient: tokens are counted, not differentiated.
    """
    probability = logits.flatten(0, -2).softmax(-1)  # [tokens, experts]
    share = F.one_hot(logits.argmax(-1).flatten(), logits.shape[-1]).float().mean(0)
    return logits.shape[-1] * (share * probability.mean(0)).sum()


def batch_at(step: int, worker: int, recipe: Recipe, writer: Writer) -> Batch:
    """One worker's share of the batch of one step."""
    mix = [mix for first, mix in PHASES if step >= first][-1]
    sort = Random(f"{recipe.seed}/{step}").choices(list(mix), list(mix.values()))[0]  # the same for all workers
    rng = Random(f"{recipe.seed}/{step}/{worker}")
    size = recipe.batch_size // recipe.workers // (2 if sort == "two pictures" else 1)
    objects, questions = recipe.most_objects(step), 4 if step < recipe.curriculum else 6
    return writer.batch([writer.training_document(rng, sort, objects, questions) for _ in range(size)])


def loss_of(model: Llama4, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(mean cross-entropy of the assistant's words, of the patch labels, balance loss averaged over layers)."""
    with trace(model, router=True) as seen:
        hidden = model.hidden_states(batch.ids, batch.pixels)
    learn = batch.weights > 0  # the head runs only where there is something to learn
    words = F.cross_entropy(model.lm_head(hidden[learn]), batch.targets[learn], reduction="none")
    words = (words * batch.weights[learn]).sum() / batch.weights[learn].sum()
    labels = hidden.new_zeros(())
    if len(batch.labels):
        document, position, word = batch.labels.unbind(1)
        labels = F.cross_entropy(model.lm_head(hidden[document, position]), word)
    even = torch.stack([balance_loss(routes.logits) for routes in seen.router.values()]).mean()
    return words, labels, even


def make_optimizers(model: Llama4, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden states, AdamW for experts (3-D), embeddings, head and vectors.

    Muon makes a step equally large in every direction of a matrix. What it buys here is attention that finds the
    picture early: on captions of one object the loss left the level of blind guessing within 200 steps, while AdamW
    alone had not left it after 300 (one trial each).
    """
    muon, decay, plain = [], [], []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and not name.startswith(("embed_tokens", "lm_head"))
        (muon if hidden else decay if parameter.ndim > 1 else plain).append(parameter)
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(muon, lr=1.0, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), eps=1e-9),
    ]


def set_rates(optimizers: list[torch.optim.Optimizer], recipe: Recipe, step: int):
    for optimizer, peak in zip(optimizers, (recipe.muon_rate, recipe.adam_rate), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * recipe.rate(step)


def train(config: Llama4Config, tokenizer_folder: Path, recipe: Recipe, folder: Path, save_every: int = 100) -> Llama4:
    """Train to the end of the recipe, or go on where `folder` left off. Writes `state.safetensors` and `loss.csv`.

    One process a core, each with one thread and its share of the batch: products this small gain little from two
    threads, and lose much when another program takes one of them away in mid-product.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = torch.multiprocessing.get_context("spawn")
    size = sum(p.numel() for p in Llama4(config).parameters())
    gradients = torch.zeros(recipe.workers, size).share_memory_()
    barrier = context.Barrier(recipe.workers)
    job = (config, tokenizer_folder, recipe, folder, save_every, gradients, barrier)
    helpers = [context.Process(target=_work, args=(rank, *job), daemon=True) for rank in range(1, recipe.workers)]
    for helper in helpers:
        helper.start()
    threads = torch.get_num_threads()
    try:
        return _work(0, *job)
    finally:
        torch.set_num_threads(threads)
        for helper in helpers:
            helper.terminate()


def _work(
    rank: int, config, tokenizer_folder, recipe: Recipe, folder: Path, save_every: int, gradients, barrier
) -> Llama4:
    """What each worker does; all hold the same weights, and worker 0 saves and shows progress."""
    torch.set_num_threads(1)
    if rank > 0:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    writer = Writer(config, load_tokenizer(tokenizer_folder))
    model = Llama4(config)
    model.reset_parameters(generator=torch.Generator().manual_seed(recipe.seed))
    optimizers = make_optimizers(model, recipe)
    state = folder / "state.safetensors"
    step, seconds, losses = load_state(state, model, optimizers, recipe) if state.exists() else (0, 0.0, [])
    barrier.wait(BARRIER_SECONDS)  # nobody saves before all have read
    started = time.time() - seconds
    with tqdm(total=recipe.steps, initial=step, unit="step", disable=None if rank == 0 else True) as bar:
        while step < recipe.steps:
            set_rates(optimizers, recipe, step)
            words, labels, even = loss_of(model, batch_at(step, rank, recipe, writer))
            (words + recipe.label * labels + recipe.balance * even).backward()
            average_gradients(model, rank, gradients, barrier)
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if rank > 0:
                continue
            losses.append(tuple(float(part.detach()) for part in (words, labels, even)))
            bar.update()
            bar.set_postfix_str(f"words {losses[-1][0]:.3f}, labels {losses[-1][1]:.3f}, balance {losses[-1][2]:.2f}")
            if step % save_every == 0 or step == recipe.steps:
                save_state(state, model, optimizers, recipe, step, time.time() - started, losses)
                rows = (f"{i},{a:.5f},{b:.5f},{c:.4f}\n" for i, (a, b, c) in enumerate(losses))
                write_atomically(folder / "loss.csv", "step,words,labels,balance\n" + "".join(rows))
    return model.eval()


def _end_with_parent():
    """A worker whose parent was killed would wait for it at the barrier, and then for its own queues; end at once."""
    parent = torch.multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def average_gradients(model: Llama4, rank: int, gradients: Tensor, barrier):
    """Give all workers the mean of their gradients, through shared memory [workers, parameters]."""
    if len(gradients) == 1:
        return
    parameters = list(model.parameters())
    own = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    torch.cat([grad.flatten() for grad in own], out=gradients[rank])
    barrier.wait(BARRIER_SECONDS)
    mean = gradients.mean(0)
    barrier.wait(BARRIER_SECONDS)  # nobody writes the next step's before all have read this one's
    for parameter, grad in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = grad.view_as(parameter)


def write_atomically(path: Path, text: str):
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_state(path: Path, model, optimizers, recipe: Recipe, step: int, seconds: float, losses: list):
    """Weights, the optimizers' moments and the loss so far in one file that is there whole or not at all."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach()
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    header = {"step": str(step), "seconds": f"{seconds:.1f}", "recipe": json.dumps(asdict(recipe))}
    temporary = path.with_name(path.name + ".new")
    save_file(tensors, temporary, metadata=header)
    os.replace(temporary, path)


def load_state(path: Path, model, optimizers, recipe: Recipe) -> tuple[int, float, list]:
    """(step, seconds, losses) of a saved run, its tensors put into `model` and `optimizers`."""
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
        losses = [tuple(pair) for pair in file.get_tensor("losses").tolist()]
        return step, float(header["seconds"]), losses
