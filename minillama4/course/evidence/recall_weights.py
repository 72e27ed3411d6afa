"""The weights of `minillama4 needle`, with their card: `python -m minillama4.course.evidence.recall_weights`.

One run of the study's iRoPE arm (`irope.py`), trained longer after it has passed its exam: a margin that is enough for
65,536 tokens is not enough for ten million. Stored as bf16, and scored as stored.
"""

import argparse
import hashlib
import json
import platform
import time
from pathlib import Path

import torch

from ...bench import machine
from ...checkpoint import WEIGHTS, load_checkpoint, save_checkpoint
from ...model import Llama4
from ...train import write_atomically
from .irope import ASKED, LENGTHS, RATES, at_length
from .recall import exam, learn, recall_config

COMMAND = "python -m minillama4.course.evidence.recall_weights"
SEED, MOST, FINISH = 0, 4000, 2400  # steps in all, and after the exam
FILE = "model.safetensors"


def make(out: Path, most: int = MOST, finish: int = FINISH, lengths: tuple[int, ...] = tuple(LENGTHS)) -> dict:
    """Train, store as bf16 under `out`, score what was stored, write card.json and card.md; returns the card."""
    model, started = Llama4(recall_config()), time.perf_counter()
    history = learn(model, RATES["iRoPE"], SEED, most, finish)
    minutes = (time.perf_counter() - started) / 60
    save_checkpoint(model, out, dtype=torch.bfloat16)
    stored, facts = load_checkpoint(out), machine()
    card = {
        "command": COMMAND,
        "seed": SEED,
        "rate": RATES["iRoPE"],
        "steps": history["steps"],
        "minutes": round(minutes, 1),
        "machine": f"{facts['cpu']}, {facts['threads']} threads, fp32",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": sha256(out / FILE),
        "exam": round(exam(stored)["accuracy"], 4),
        "lengths": [at_length(stored, tokens, ASKED, seed=77) for tokens in lengths],
    }
    write_atomically(out / "card.json", json.dumps(card, indent=2) + "\n")
    write_atomically(out / "card.md", card_text(card))
    return card


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def card_text(card: dict) -> str:
    """The card as Markdown."""
    rows = (
        f"| {row['tokens']:,} | {row['right']} of {row['asked']} | {row['low']:.1%} to {row['high']:.1%} "
        f"| {row['margin']:.1f} | {row['share']:.0%} |"
        for row in card["lengths"]
    )
    lines = [
        "# recall",
        "",
        f"{card['parameters']:,} parameters, trained from nothing by this package, on contexts of 64 tokens that it",
        "draws itself, to say the value of a key that it has read. MIT licence; nothing of Meta's models was used.",
        "Three local RoPE layers and one NoPE layer, as in Scout; `minillama4 needle` asks it. It knows nothing else.",
        "",
        f"- command: `{card['command']}` ({card['minutes']} minutes on {card['machine']}, {card['date']}, "
        f"torch {card['versions']['torch']})",
        f"- seed {card['seed']}, {card['steps']:,} steps, learning rate {card['rate']}",
        f"- SHA-256 of the weights: `{card['sha256']}`",
        f"- stored as bf16; every score below is of the stored weights, on keys drawn anew; {card['exam']:.1%}",
        "  right in contexts as in training",
        "",
        "| tokens | found | 95 % interval | logit margin | attention on the needle |",
        "|---:|---:|---:|---:|---:|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=WEIGHTS / "recall", help="folder (default: where the package looks)"
    )
    print(card_text(make(parser.parse_args().out)))
