"""Distillation: a student learns from the text's tokens (hard targets) and from a teacher's probabilities (soft ones).

Llama 4 Maverick was codistilled from Behemoth during pre-training, with a loss whose weights of soft and hard targets
change over training; the formula is unpublished. These are the parts that the field uses: Hinton et al. (2015) for the
temperature, forward and reverse KL, the K likeliest tokens of a teacher kept in a file.

Shapes: T tokens that have something to learn (batch and time flattened, only the wanted ones), V vocabulary, K kept.
Losses are in nats.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .model import Llama4


def hard_loss(student_TV: Tensor, target_T: Tensor) -> Tensor:
    """Cross-entropy with the text's own tokens: logits [T, V], ids [T] -> [T].

    ValueError: shapes that do not fit, a target out of range.
    """
    _check_logits("student_TV", student_TV)
    _check_targets(target_T, student_TV)
    return F.cross_entropy(_precise(student_TV), target_T, reduction="none")


def soft_loss(student_TV: Tensor, teacher_TV: Tensor, temperature: float = 1.0, reverse: bool = False) -> Tensor:
    """temperature² · KL(teacher ‖ student) of softmax(logits / temperature): [T, V] twice -> [T].

    temperature²: the gradient is temperature · (q - p), and q - p shrinks as 1 / temperature; so it keeps its size.
    reverse: KL(student ‖ teacher). The teacher gets no gradient. A teacher's logit of -inf is a probability of 0; the
    reverse loss is infinite if the student gives such a token anything.
    ValueError: shapes that differ, a temperature of 0 or less.
    """
    _check_logits("student_TV", student_TV)
    _check_logits("teacher_TV", teacher_TV)
    if student_TV.shape != teacher_TV.shape:
        raise ValueError(f"student_TV is {list(student_TV.shape)} and teacher_TV {list(teacher_TV.shape)}; same wanted")
    log_q_TV = _log_softmax(student_TV, temperature)
    log_p_TV = _log_softmax(teacher_TV.detach(), temperature)
    if reverse:
        log_p_TV, log_q_TV = log_q_TV, log_p_TV
    return temperature**2 * _kl(log_p_TV, log_q_TV)


def mix(hard_T: Tensor, soft_T: Tensor, soft_weight: float | Tensor) -> Tensor:
    """Mean over tokens of (1 - w) · hard + w · soft: [T] twice -> scalar. soft_weight: one number, or [T].

    ValueError: shapes that differ, no tokens, a weight outside 0..1.
    """
    if hard_T.ndim != 1 or hard_T.shape != soft_T.shape or len(hard_T) == 0:
        shapes = f"hard_T is {list(hard_T.shape)} and soft_T {list(soft_T.shape)}"
        raise ValueError(f"{shapes}; both must be [T] with at least one token")
    if isinstance(soft_weight, Tensor) and soft_weight.ndim and soft_weight.shape != hard_T.shape:
        raise ValueError(f"soft_weight is {list(soft_weight.shape)}; it must be a number or {list(hard_T.shape)}")
    _check_weight("soft_weight", soft_weight)
    return ((1 - soft_weight) * hard_T + soft_weight * soft_T).mean()


def ramp(step: int, steps: int, first: float = 1.0, last: float = 0.0) -> float:
    """A soft weight by step: `first` at step 0, `last` at step `steps`, a straight line between.

    ValueError: a step outside 0..steps, a weight outside 0..1.
    """
    if steps < 1 or not 0 <= step <= steps:
        raise ValueError(f"step is {step} of {steps}; steps must be at least 1, and step 0 to {steps}")
    _check_weight("first", first)
    _check_weight("last", last)
    return first + (last - first) * step / steps


@torch.no_grad()
def confidence(teacher_TV: Tensor, target_T: Tensor) -> Tensor:
    """A soft weight by the teacher: its probability of the true token, [T] in 0..1. A wrong teacher counts little.

    ValueError: shapes that do not fit, a target out of range.
    """
    _check_logits("teacher_TV", teacher_TV)
    _check_targets(target_T, teacher_TV)
    return _log_softmax(teacher_TV, 1.0).gather(1, target_T[:, None])[:, 0].exp()


# ----------------------------------------------------------------------------------------------------------------------
# A teacher in a file: its K likeliest tokens, and how much is left for all others together


class TopK(NamedTuple):
    """What is kept of a teacher's distribution over V tokens. The K + 1 probabilities sum to 1."""

    index_TK: Tensor  # int64, the likeliest first
    log_prob_TK: Tensor  # at the temperature
    log_tail_T: Tensor  # log of the mass of all other tokens; -inf if there is none
    temperature: float


@torch.no_grad()
def top_k(teacher_TV: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The K likeliest tokens of each row of logits [T, V]. ValueError: k outside 1..V, a temperature of 0 or less."""
    _check_logits("teacher_TV", teacher_TV)
    if not 1 <= k <= teacher_TV.shape[1]:
        raise ValueError(f"k is {k}; of {teacher_TV.shape[1]} tokens it must be 1 to {teacher_TV.shape[1]}")
    log_p_TV = _log_softmax(teacher_TV, temperature)
    log_prob_TK, index_TK = log_p_TV.topk(k, dim=-1)
    # log(1 - sum) would be noise, or -inf, where the kept tokens have nearly everything.
    rest_TV = log_p_TV.scatter(1, index_TK, -torch.inf)
    return TopK(index_TK, log_prob_TK, rest_TV.logsumexp(-1), temperature)


def top_k_loss(student_TV: Tensor, cached: TopK) -> Tensor:
    """temperature² · KL(teacher ‖ student) over K + 1 outcomes, the kept tokens and "any other": [T, V] -> [T].

    With K = V it is `soft_loss`. With fewer it is at most that (merging outcomes loses information), and what it says
    of the others is right: how much they have together, not how it is shared out among them.
    ValueError: shapes that do not fit, a kept token that the student does not have.
    """
    _check_logits("student_TV", student_TV)
    index_TK = cached.index_TK
    tokens, vocabulary = student_TV.shape
    if index_TK.ndim != 2 or len(index_TK) != tokens or cached.log_prob_TK.shape != index_TK.shape:
        shapes = f"{list(index_TK.shape)} and {list(cached.log_prob_TK.shape)}"
        raise ValueError(f"cached holds {shapes}; both must be [{tokens}, K], as student_TV is {[tokens, vocabulary]}")
    if cached.log_tail_T.shape != (tokens,):
        raise ValueError(f"cached.log_tail_T is {list(cached.log_tail_T.shape)}; it must be [{tokens}]")
    if tokens and not 0 <= int(index_TK.min()) <= int(index_TK.max()) < vocabulary:
        held = f"{int(index_TK.min())} to {int(index_TK.max())}"
        raise ValueError(f"cached keeps tokens {held}; the student's ids run from 0 to {vocabulary - 1}")
    log_q_TV = _log_softmax(student_TV, cached.temperature)
    # Not -inf: with K = V nothing is left, and log(0) has no gradient (torch makes it 0 today; it used to be nan).
    rest_TV = log_q_TV.scatter(1, index_TK, torch.finfo(log_q_TV.dtype).min)
    log_q = torch.cat([log_q_TV.gather(1, index_TK), rest_TV.logsumexp(-1, keepdim=True)], -1)  # [T, K + 1]
    log_p = torch.cat([cached.log_prob_TK, cached.log_tail_T[:, None]], -1).detach()  # [T, K + 1]
    return cached.temperature**2 * _kl(log_p.type_as(log_q), log_q)


def save_targets(file: str | Path, cached: TopK):
    """Safetensors, whole or not at all: 4 bytes a kept token (6 above 32,768 tokens), 2 bytes a tail."""
    file = Path(file)
    small = not cached.index_TK.numel() or int(cached.index_TK.max()) <= torch.iinfo(torch.int16).max
    tensors = {
        "index": cached.index_TK.to(torch.int16 if small else torch.int32).contiguous(),
        "log_prob": cached.log_prob_TK.half().contiguous(),
        "log_tail": cached.log_tail_T.half().contiguous(),
    }
    temporary = file.with_name(file.name + ".new")
    save_file(tensors, temporary, metadata={"temperature": repr(float(cached.temperature))})
    os.replace(temporary, file)


def load_targets(file: str | Path) -> TopK:
    """What `save_targets` wrote, in fp32. ValueError: no such file, or one that holds something else."""
    try:
        with safe_open(file, "pt") as stored:
            temperature = float((stored.metadata() or {})["temperature"])
            index, log_prob, log_tail = (stored.get_tensor(name) for name in ("index", "log_prob", "log_tail"))
        if index.shape != log_prob.shape or log_tail.shape != index.shape[:1]:
            shapes = f"{list(index.shape)}, {list(log_prob.shape)} and {list(log_tail.shape)}"
            raise ValueError(f"index, log_prob and log_tail are {shapes}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} holds no teacher's targets ({error}); `save_targets` makes such a file") from None
    # fp16 rounds each to 1 part in 2,000; all K + 1 together are made to sum to 1 again, so that no KL is negative.
    log_p = torch.cat([log_prob, log_tail[:, None]], -1).float().log_softmax(-1)  # [T, K + 1]
    return TopK(index.long(), log_p[:, :-1], log_p[:, -1], temperature)


# ----------------------------------------------------------------------------------------------------------------------


def codistill(
    teacher: Llama4,
    students: Sequence[Llama4],
    input_ids: Tensor,
    target_T: Tensor,
    learn: Tensor,
    soft_weight: float | Tensor = 0.5,
    temperature: float = 1.0,
) -> list[Tensor]:
    """One batch for a teacher and several students: the loss of each student, ready for `backward`.

    The teacher reads the batch once, whatever the number of students, and gets no gradient; its training mode is what
    it was. Heads run only on the tokens that are learned from.

    input_ids: [batch, tokens]. learn: [batch, tokens] bool, where there is something to learn. target_T: the tokens to
    say there. ValueError: shapes that do not fit, nothing to learn, vocabularies that differ, the teacher as a student.
    """
    _check_batch(teacher, students, input_ids, target_T, learn)
    was_training = teacher.training
    teacher.eval()
    try:
        with torch.no_grad():
            teacher_TV = teacher.lm_head(teacher.hidden_states(input_ids)[learn])
    finally:
        teacher.train(was_training)
    losses = []
    for student in students:
        student_TV = student.lm_head(student.hidden_states(input_ids)[learn])
        hard_T = hard_loss(student_TV, target_T)
        losses.append(mix(hard_T, soft_loss(student_TV, teacher_TV, temperature), soft_weight))
    return losses


@torch.no_grad()
def inherit(student: Llama4, teacher: Llama4) -> list[str]:
    """Copy into the student every tensor that the teacher has by the same name and shape; the names of what was copied.

    Where QK norm scales the teacher's queries and keys and not the student's, the copied projections are divided, head
    by head, by the RMS that they give to inputs of RMS 1: else attention would start two to four times too sharp.
    """
    given, copied = dict(teacher.named_parameters()), []
    for name, parameter in student.named_parameters():
        if name in given and given[name].shape == parameter.shape:
            parameter.copy_(given[name])
            copied.append(name)
    text = student.config.text
    if not teacher.config.text.qk_norm or text.qk_norm:
        return copied
    for layer, block in enumerate(student.layers):
        if text.is_nope(layer) or teacher.config.text.is_nope(layer):
            continue  # not normed on one of the two sides
        for projection in ("q_proj", "k_proj"):
            name = f"layers.{layer}.self_attn.{projection}.weight"
            if name in copied:
                weight = getattr(block.self_attn, projection).weight  # [heads * dim, hidden]
                heads = weight.unflatten(0, (-1, text.head_dim))  # [heads, dim, hidden], a view
                seen = heads * block.input_layernorm.weight
                heads /= seen.square().sum(-1).mean(-1).sqrt()[:, None, None]
    return copied


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) over the last axis; an outcome that p gives 0 adds 0, whatever q gives it."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)


def _log_softmax(logits_TV: Tensor, temperature: float) -> Tensor:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be above 0 and finite")
    return (_precise(logits_TV) / temperature).log_softmax(-1)


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_logits(name: str, logits: Tensor):
    if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ValueError(f"{name} is {list(logits.shape)} {logits.dtype}; it must be logits [T, V]")


def _check_targets(target_T: Tensor, logits_TV: Tensor):
    tokens, vocabulary = logits_TV.shape
    if target_T.shape != (tokens,) or target_T.dtype != torch.int64:
        raise ValueError(f"target_T is {list(target_T.shape)} {target_T.dtype}; it must be [{tokens}] int64")
    if tokens and not 0 <= int(target_T.min()) <= int(target_T.max()) < vocabulary:
        held = f"{int(target_T.min())} to {int(target_T.max())}"
        raise ValueError(f"target_T holds {held}; ids run from 0 to {vocabulary - 1}")


def _check_weight(name: str, weight: float | Tensor):
    if not bool(((0 <= torch.as_tensor(weight)) & (torch.as_tensor(weight) <= 1)).all()):
        shown = weight if not isinstance(weight, Tensor) else f"{float(weight.min())} to {float(weight.max())}"
        raise ValueError(f"{name} is {shown}; it must be 0 (only hard targets) to 1 (only soft ones)")


def _check_batch(teacher: Llama4, students: Sequence[Llama4], input_ids: Tensor, target_T: Tensor, learn: Tensor):
    if not students:
        raise ValueError("students is empty; it must hold at least one model")
    if any(student is teacher for student in students):
        raise ValueError("students holds the teacher itself; it would get no soft target but its own")
    if input_ids.ndim != 2 or learn.shape != input_ids.shape or learn.dtype != torch.bool:
        shapes = f"input_ids is {list(input_ids.shape)} and learn {list(learn.shape)} {learn.dtype}"
        raise ValueError(f"{shapes}; they must be [batch, tokens], learn as bool")
    if int(learn.sum()) == 0 or target_T.shape != (int(learn.sum()),):
        raise ValueError(
            f"target_T is {list(target_T.shape)}; learn marks {int(learn.sum())} tokens, each with a target"
        )
    sizes = [model.config.text.vocab_size for model in (teacher, *students)]
    if len(set(sizes)) > 1:
        raise ValueError(f"teacher and students have vocabularies of {sizes}; soft targets need the same one")
