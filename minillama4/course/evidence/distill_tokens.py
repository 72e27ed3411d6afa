"""Ten real tokens for lesson 04's lab: `python -m minillama4.course.evidence.distill_tokens`, after the study.

Each with what the teacher and a student say of all 1,024 tokens. The student has had a quarter of its run, on hard
targets alone. The tokens are chosen to differ, one of each sort in each language; all are of unread documents.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...scenes import SIZES, size_word
from ...tokenizer import Tokenizer, load_tokenizer
from ...train import write_atomically
from .distill import RECIPE, RUNS, build, load_teacher, quarter_file, student_job
from .study import RESULTS
from .told import ANSWER, CAPTION, LANGUAGES, Documents, kept_documents

BEFORE = 80  # characters of text before a token


def sorts(teacher_TV: Tensor, student_TV: Tensor, target_T: Tensor, part_T: Tensor) -> dict[str, Tensor]:
    """Sort -> how well each token shows it, [T]; 0 and less: not at all."""
    p_TV, q_TV = teacher_TV.softmax(-1), student_TV.softmax(-1)
    p_true, q_true = (x.gather(1, target_T[:, None])[:, 0] for x in (p_TV, q_TV))
    entropy_T = -(p_TV * p_TV.clamp_min(1e-30).log()).sum(-1)
    wrong = p_TV.argmax(-1) != target_T
    misled = (q_TV.argmax(-1) != target_T) & (p_TV.argmax(-1) == target_T)
    caption, answer = part_T == CAPTION, part_T >= ANSWER
    return {
        "sure and right": p_true * (p_true - q_true) * ~wrong,
        "thought impossible": -p_true.clamp_min(1e-30).log() * wrong,  # held-out combinations never came in training
        "open": entropy_T * caption * (p_true > 0.05),
        "the student errs": (p_true - q_true) * misled * answer,
        "both are unsure": torch.minimum(entropy_T, torch.tensor(1.0)) * (q_TV.amax(-1) < 0.6) * answer,
    }


def hundredths(logits: Tensor) -> list[int]:
    """How far below the likeliest each is, in 1/100 nat; cut at 9999. [V]"""
    return (100 * (logits.max() - logits)).round().clamp(max=9999).int().tolist()


@torch.no_grad()
def chosen(teacher, student, read: Documents, tokenizer: Tokenizer) -> list[dict]:
    """One token of each sort in each language, no two from one document."""
    teacher_TV, student_TV = (
        model.lm_head(model.hidden_states(read.inputs)[read.learn]) for model in (teacher, student)
    )
    target_T, part_T = read.targets, read.part[:, 1:][read.learn]
    row_T, place_T = read.learn.nonzero().unbind(1)
    words = {size_word("fr", size) for size in SIZES}  # one of them is in each French document
    french = torch.tensor([bool(words & set(tokenizer.decode(ids).split())) for ids in read.ids])[row_T]
    found, used = [], torch.zeros(len(target_T), dtype=torch.bool)
    for sort, merit_T in sorts(teacher_TV, student_TV, target_T, part_T).items():
        for language in LANGUAGES:
            merit = merit_T.masked_fill(used | (french != (language == "fr")), -1.0)
            best = int(merit.argmax())
            if merit[best] <= 0:
                continue
            used |= row_T == row_T[best]
            before = tokenizer.decode(read.ids[row_T[best], : place_T[best] + 1])
            found.append({
                "sort": sort, "language": language, "before": before[-BEFORE:], "true": int(target_T[best]),
                "teacher": hundredths(teacher_TV[best]), "student": hundredths(student_TV[best]),
            })  # fmt: skip
    return found


def main(out: Path = RESULTS / "distill_tokens.json"):
    tokenizer, job = load_tokenizer("mini-scout"), student_job("hard", 1.0, 0, RECIPE)
    student = build("mini-maverick", 0)
    student.load_state_dict(load_file(quarter_file(job)))
    teacher = load_teacher("mini-behemoth", RECIPE)
    tokens = chosen(
        teacher, student.eval(), kept_documents(RUNS, "exam", "held-out", RECIPE["held_out"])[:200], tokenizer
    )
    card = {
        "teacher": f"mini-behemoth, {RECIPE['teacher_steps']:,} steps",
        "student": f"mini-maverick after {job['train_steps'] // 4} of {job['train_steps']} steps on hard targets alone",
        "documents": "unread, of scenes with held-out combinations",
        "command": "python -m minillama4.course.evidence.distill_tokens",
    }
    vocabulary = [tokenizer.decode([id], skip_special=False) for id in range(tokenizer.vocab_size)]
    lines = ",\n".join(json.dumps(token, separators=(",", ":"), ensure_ascii=False) for token in tokens)
    head = f'"card": {json.dumps(card)},\n"vocabulary": {json.dumps(vocabulary, ensure_ascii=False)}'
    write_atomically(out, f'{{{head},\n"tokens": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
