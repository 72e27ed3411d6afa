"""What do fewer bits a weight cost a trained model? `python -m minillama4.course.evidence.quantise`, 15 core-minutes.

mini-scout's weights are rounded to few bits and back (symmetric, to nearest; no training, no calibration; activations
stay float32), and the model answers the same held-out questions each time. Rows differ in

- "bits": 8 to 2; None is the model as it ships. 4 bits, groups of 128, signed scale: that is what `cuda.int4` does.
- "group": how many neighbours in a row share a float32 scale, or all of a "row" or "matrix". mini-scout's rows are 128
  long, only experts' down_proj has 112 and attention's o_proj 256: a group of 128 is nearly always a whole row here.
- "scale": "signed" as in `cuda.int4`; "textbook" is max |w| / (2^(bits - 1) - 1), which never uses the lowest code.
- "parts": whose matrices are rounded, all others being left as they are. By default what `to_int4` packs.
- "outlier": one channel of what a norm gives becomes so many times smaller, and the column that reads it as many times
  larger. The model computes what it did before; but each row of these matrices now has one very large weight.
"""

import copy
import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoint import WEIGHTS, load_checkpoint
from ...distill import soft_loss
from ...documents import Batch, Writer
from ...evaluate import chance, held_out_questions
from ...model import Llama4
from ...tokenizer import load_tokenizer
from . import study
from .recall import wilson

PARTS = {  # part -> its matrices, by name
    "routed experts": r"\.experts\.",
    "shared experts": r"\.shared_expert\.",
    "attention": r"^layers\.\d+\.self_attn\.",
    "head": r"^lm_head\.",
    "vision": r"^(vision_model|multi_modal_projector)\..*\.weight$",
    "embedding": r"^embed_tokens\.",
    "router": r"\.router\.",
}
INT4 = ("routed experts", "shared experts", "attention", "head")  # what `to_int4` packs
PER_CELL = 100  # questions a kind and language, 1,600: a 95 % interval of +-2.4 points at most, of +-1 above 95 %

# ---------------------------------------------------------------------------------------------------------------------
# Rounding


def rounded(weight: Tensor, bits: int, group: int | str, scale: str = "signed") -> tuple[Tensor, int]:
    """(what is left of [..., outputs, inputs] after `bits` a weight, the number of scales that this takes).

    group: how many neighbours along the inputs share a scale, or "row", or "matrix". ValueError: bits not in 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}; it must be 2 to 8")
    lines = weight.flatten(-2)[..., None, :] if group == "matrix" else weight  # [..., lines, length]
    length, steps = lines.shape[-1], 2 ** (bits - 1)
    size = group if isinstance(group, int) else length
    x = F.pad(lines, (0, -length % size)).unflatten(-1, (-1, size))  # [..., lines, groups, size]
    lowest, highest = x.aminmax(dim=-1, keepdim=True)
    if scale == "signed":  # the largest weight gets the code -steps, of which there is no positive twin
        step = torch.where(highest > -lowest, highest, lowest) / -steps
    else:
        step = torch.maximum(highest, -lowest) / (steps - 1)
    code = (x / torch.where(step == 0, 1, step)).round().clamp(-steps, steps - 1)
    return (code * step).flatten(-2)[..., :length].reshape(weight.shape), step.numel()


@torch.no_grad()
def quantise(model: Llama4, bits: int, group: int | str, scale: str, parts: tuple[str, ...]) -> dict:
    """Round the matrices of `parts` in place. How many weights these are, bits of each with scales, relative error."""
    weights, scales, lost, whole = 0, 0, 0.0, 0.0
    for name, parameter in model.named_parameters():
        part = next((part for part, pattern in PARTS.items() if re.search(pattern, name)), None)
        if part not in parts or parameter.ndim == 1:
            continue
        weight = parameter.mT if part == "routed experts" else parameter  # those lie the other way round
        back, count = rounded(weight, bits, group, scale)
        lost += float((back - weight).double().square().sum())
        whole += float(weight.double().square().sum())
        weights, scales = weights + weight.numel(), scales + count
        weight.copy_(back)
    width = round(bits + 32 * scales / weights, 3)
    return {"weights": weights, "bits_a_weight": width, "error": round((lost / whole) ** 0.5, 5)}


@torch.no_grad()
def plant(model: Llama4, times: float, seed: int):
    """Norms give one channel `times` smaller, and who reads it makes up for it: exact, if `times` is a power of two."""
    draw = torch.Generator().manual_seed(seed)
    readers = [(model.norm, [model.lm_head.weight])]
    for layer in model.layers:
        moe, shared = layer.feed_forward, layer.feed_forward.shared_expert
        readers.append((layer.input_layernorm, [getattr(layer.self_attn, f"{x}_proj").weight for x in "qkv"]))
        inputs = [moe.router.weight, shared.gate_proj.weight, shared.up_proj.weight, moe.experts.gate_up_proj.mT]
        readers.append((layer.post_attention_layernorm, inputs))
    for norm, matrices in readers:
        channel = int(torch.randint(len(norm.weight), (), generator=draw))
        norm.weight[channel] /= times
        for matrix in matrices:  # [..., outputs, inputs]
            matrix[..., channel] *= times


# ---------------------------------------------------------------------------------------------------------------------
# The exam


@dataclass(frozen=True)
class Exam:
    """The questions, and what the model said to them before it was rounded."""

    model: Llama4
    batches: list[Batch]
    vectors: list[Tensor]  # of each batch's pictures, as they come among the words
    logits: list[Tensor]  # of each batch [T, vocab]: T tokens of answers, with the end of each


@lru_cache(maxsize=1)
@torch.no_grad()
def exam(per_cell: int) -> Exam:
    """Every run of a process meets the same questions."""
    model = load_checkpoint("mini-scout")
    writer = Writer(model.config, load_tokenizer("mini-scout"))
    documents = [writer.question(item.picture, item.question) for item in held_out_questions(per_cell)]
    documents.sort(key=lambda document: len(document.ids))  # little padding
    batches = [writer.batch(documents[first : first + 32]) for first in range(0, len(documents), 32)]
    vectors = [model.encode_images(batch.pixels) for batch in batches]
    return Exam(model, batches, vectors, [said(model, batch, batch.pixels) for batch in batches])


@torch.no_grad()
def said(model: Llama4, batch: Batch, pictures: Tensor) -> Tensor:
    """Logits [T, vocab] where the batch has answers, each token given the true ones before it."""
    return model.lm_head(model.hidden_states(batch.ids, pictures)[batch.weights > 0])


def right(batch: Batch, logits: Tensor) -> Tensor:
    """[questions] bool: is each token of the answer the likeliest?"""
    answer = batch.weights > 0
    wrong = torch.zeros_like(answer)
    wrong[answer] = logits.argmax(-1) != batch.targets[answer]
    return ~wrong.any(1)


def run(job: dict) -> dict:
    """Answers right, with Wilson's interval, how many were lost and won; KL from what was said before rounding."""
    test = exam(job["per_cell"])
    model, row = copy.deepcopy(test.model), {}
    plant(model, job["outlier"], job["seed"])
    if job["bits"] is not None:
        row = quantise(model, job["bits"], job["group"], job["scale"], tuple(job["parts"]))
    pictures = [batch.pixels for batch in test.batches]
    if "vision" not in job["parts"]:  # nearly half of the time, and always the same vectors
        model.encode_images, pictures = Tensor.detach, test.vectors
    logits = [said(model, *each) for each in zip(test.batches, pictures, strict=True)]
    before, now = (torch.cat(list(map(right, test.batches, each))) for each in (test.logits, logits))
    kl = torch.cat([soft_loss(new.double(), old.double()) for old, new in zip(test.logits, logits, strict=True)])
    low, high = wilson(int(now.sum()), len(now))
    row |= {"right": int(now.sum()), "asked": len(now), "low": round(low, 4), "high": round(high, 4)}
    row |= {"lost": int((before & ~now).sum()), "won": int((now & ~before).sum())}
    return row | {"kl": float(f"{kl.mean():.3g}")}


def job(bits: int | None, group: int | str = 128, **changes) -> dict:
    usual = {"scale": "signed", "parts": list(INT4), "outlier": 1, "seed": 0, "per_cell": PER_CELL}
    return {"bits": bits, "group": group} | usual | changes


def plan(**changes) -> list[dict]:
    """Bits; group sizes; the other scale; one part alone; outliers, in three draws of their channels."""
    jobs = [job(bits) for bits in (None, 8, 6, 5, 4, 3, 2)]
    jobs += [job(bits, group) for bits in (4, 3) for group in (32, 64, "row", "matrix")]
    jobs += [job(bits, scale="textbook") for bits in (4, 3, 2)]
    jobs += [job(bits, parts=[part]) for part in PARTS for bits in (4, 3, 2)]
    jobs += [job(bits, parts=list(PARTS)) for bits in (4, 3)]
    jobs += [job(bits, group, outlier=16) for bits, group in ((None, 128), (8, 128), (4, "matrix"))]
    jobs += [job(4, group, outlier=16, seed=seed) for group in (32, 64, 128) for seed in range(3)]
    return [each | changes for each in jobs]


def recipe() -> dict:
    guess = chance(held_out_questions(PER_CELL)).values()
    file = WEIGHTS / "mini-scout" / "model.safetensors"
    return {
        "model": "mini-scout",
        "model_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "seeds": {"questions": 1_000_003, "channels": [0, 1, 2]},
        "guess": round(sum(guess) / len(guess), 4),  # right without seeing the picture
    }


if __name__ == "__main__":
    study.main("quantise", __doc__, plan(), plan(per_cell=1)[:8], run, recipe())
