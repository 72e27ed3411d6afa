"""`minillama4 train PRESET`: tokenizer, training, rounding to bf16, scores, and the card that goes with the weights."""

import hashlib
import json
import platform
import shlex
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import safe_open

from . import scenes
from .checkpoint import load_checkpoint, save_checkpoint
from .config import Llama4Config
from .documents import Writer
from .evaluate import report_card
from .tokenizer import load_tokenizer, train_tokenizer
from .train import Recipe, train, write_atomically

RECIPES = {
    "mini-scout": Recipe(),
    # Its teacher has learned to see already, and where to look: no steps for the eye alone, few for small scenes.
    "mini-maverick": Recipe(
        steps=2000, horizon=2200, adam_rate=1e-3, muon_rate=3e-3, eye=0, curriculum=200, teacher="mini-scout", soft=0.5
    ),
}

# What a mini model is meant to reach on held-out pictures, after rounding: (what, its value in a card, at least).
GOALS = (
    ("attribute", lambda c: c["full"]["kind"]["attribute"], 0.90),
    ("place", lambda c: c["full"]["kind"]["place"], 0.90),
    ("relation", lambda c: c["full"]["kind"]["relation"], 0.75),
    ("count", lambda c: c["full"]["kind"]["count"], 0.75),
    ("worst language against the mean", lambda c: min(c["full"]["language"].values()) - c["full"]["mean"], -0.10),
    (
        "chance + 5 points against another picture, worst kind",
        lambda c: min(c["chance"][k] + 0.05 - c["another picture"]["kind"][k] for k in c["chance"]),
        0.0,
    ),
    ("lost with NoPE layers off", lambda c: c["full"]["mean"] - c["nope layers off"]["mean"], 0.20),
    ("lost with random experts", lambda c: c["full"]["mean"] - c["random experts"]["mean"], 0.20),
    ("smallest load entropy of a layer, on questions", lambda c: c["smallest load entropy"], 0.80),
    ("smallest share of an expert, on all sorts of documents", lambda c: c["smallest expert share"], 0.01),
)


def train_command(preset: str, out: str | None, steps: int | None, seed: int) -> str:
    """Train (or go on), and write `checkpoint/`: weights, tokenizer, card.json, card.md. Returns the card's text.

    ValueError: a preset that has no recipe, or a folder that holds a run of another recipe.
    """
    if preset not in RECIPES:
        Llama4Config.preset(preset)  # an unknown name gets the nearest ones
        raise ValueError(f"preset is {preset!r}; only {' and '.join(RECIPES)} are small enough to train here")
    recipe = replace(RECIPES[preset], seed=seed)
    if steps:
        recipe = replace(recipe, steps=steps, horizon=max(1, recipe.horizon * steps // recipe.steps))
    folder = Path(out or f"runs/{preset}")
    command = ["minillama4", "train", preset, *(["--steps", str(steps)] if steps else []), "--seed", str(seed)]
    config, tokens = Llama4Config.preset(preset), folder / "tokenizer"
    if not (tokens / "tokenizer.json").is_file():
        # A student shares its teacher's vocabulary: probabilities over other tokens would mean nothing to it.
        (load_tokenizer(recipe.teacher) if recipe.teacher else train_tokenizer(scenes.words())).save(tokens)
    tokenizer = load_tokenizer(tokens)

    model = train(config, tokens, recipe, folder)
    with safe_open(folder / "state.safetensors", "pt") as state:
        minutes = float(state.metadata()["seconds"]) / 60
    save_checkpoint(model, folder / "checkpoint", tokenizer, dtype=torch.bfloat16)
    plot_loss(folder / "loss.csv", folder / "checkpoint" / "loss.png")
    stored = load_checkpoint(folder / "checkpoint")  # scored as stored: rounded to bf16
    card = {
        "preset": preset,
        "command": shlex.join(command),
        "recipe": asdict(recipe),
        "minutes": round(minutes, 1),
        "machine": f"{recipe.workers} CPU cores, fp32, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "parameters": sum(p.numel() for p in model.parameters()),
        "frozen": frozen(preset, tokens),
        **_rounded(report_card(stored, Writer(config, tokenizer))),
    }
    text = card_text(card)
    write_atomically(folder / "checkpoint" / "card.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / "checkpoint" / "card.md", text)
    return text


def frozen(preset: str, tokenizer: Path) -> dict[str, str]:
    """SHA-256 of everything the weights depend on and that may not change under them."""
    texts = {
        "tokenizer": (tokenizer / "tokenizer.json").read_text("utf-8"),
        "config": repr(Llama4Config.preset(preset)),
    }
    return {"data": scenes.data_fingerprint()} | {k: hashlib.sha256(v.encode()).hexdigest() for k, v in texts.items()}


def plot_loss(table: Path, picture: Path):
    """The loss curve of a run: the words of each step, and the means of fifty."""
    from matplotlib.figure import Figure  # only a training run needs it

    rows = torch.tensor([[float(cell) for cell in line.split(",")] for line in table.read_text().splitlines()[1:]])
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(rows[:, 1], color="#b0b0b0", linewidth=0.5, label="words, one step")
    for column, name, colour in ((1, "words", "#0072b2"), (2, "picture labels", "#d55e00")):
        if len(rows) >= 50:
            mean = rows[:, column].unfold(0, 50, 1).mean(1)
            mean[mean == 0] = float("nan")  # no words are learned at first
            axes.plot(range(49, len(rows)), mean, color=colour, label=f"{name}, mean of 50 steps")
    axes.set(xlabel="step", ylabel="loss (nats)", yscale="log")
    axes.legend()
    figure.savefig(picture, dpi=110)


def card_text(card: dict) -> str:
    """The card as Markdown."""
    kinds = list(card["chance"])
    recipe, teacher = card["recipe"], card["recipe"].get("teacher")
    start = f"from {teacher}" if teacher else "from nothing"
    variants = ("full", "another picture", "nope layers off", "random experts")
    lines = [
        f"# {card['preset']}",
        "",
        f"{card['parameters']:,} parameters, trained {start} by this package on scenes that it draws itself. MIT",
        "licence; no weights or outputs of Meta's models were used. It knows these pictures and a short glossary, that",
        "it recites from memory, and nothing else.",
        "",
        *(inheritance(recipe) if teacher else ()),
        f"- command: `{card['command']}` ({card['minutes']} minutes on {card['machine']}, {card['date']}, "
        f"torch {card['versions']['torch']})",
        f"- seed {card['recipe']['seed']}, {card['recipe']['steps']:,} steps",
        *(f"- SHA-256 of the {name}: `{value}`" for name, value in card["frozen"].items()),
        f"- stored as bf16; every score below is of the stored weights, on {card['questions']} held-out questions",
        "  whose objects are (colour, shape, digit) combinations that no training picture holds",
        "",
        "| accuracy | " + " | ".join(kinds) + " | mean |",
        "|---|" + "---:|" * (len(kinds) + 1),
        *(
            f"| {name} | "
            + " | ".join(f"{card[name]['kind'][k]:.1%}" for k in kinds)
            + f" | {card[name]['mean']:.1%} |"
            for name in variants
        ),
        "| best guess without the picture | " + " | ".join(f"{card['chance'][k]:.1%}" for k in kinds) + " | |",
        "",
        "By language: " + ", ".join(f"{name} {value:.1%}" for name, value in card["full"]["language"].items()) + ".",
        "",
        "| goal | at least | reached | |",
        "|---|---:|---:|---|",
        *(
            f"| {what} | {least:+.2f} | {value(card):+.3f} | {'yes' if value(card) >= least else 'NO'} |"
            for what, value, least in GOALS
        ),
        "",
        "![Training loss by step, falling](loss.png)",
        "",
    ]
    return "\n".join(lines)


def inheritance(recipe: dict) -> list[str]:
    """What a student's card says of its teacher."""
    return [
        f"Its teacher, {recipe['teacher']}, gave it to start from every tensor that both have by name and shape",
        "(queries and keys rescaled where only the teacher has QK norm), and then its probabilities: they are",
        f"{recipe['soft']:.0%} of the loss of a word, the text's own tokens the rest.",
        "",
    ]


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value
