"""Ask a trained model about a picture, and see how the answer came about."""

import time
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image

from .checkpoint import load_checkpoint
from .fusion import build_prompt, token_layout
from .generate import stream
from .model import Llama4
from .tokenizer import Tokenizer, load_tokenizer
from .trace import Trace, trace

MAX_NEW_TOKENS = 128  # the longest caption, of six objects in French, has 83


@lru_cache(maxsize=2)
def _loaded(model: str) -> tuple[Llama4, Tokenizer]:
    return load_checkpoint(model), load_tokenizer(model)


def ask(image: str | Path | Image.Image | None, question: str, model: str | Path = "mini-scout") -> str:
    """The model's answer to `question` about `image`: a file, a PIL image, or None for a question without a picture.

    model: a preset that ships weights, or a checkpoint folder; kept in memory for the next call. Greedy.
    ValueError: an empty question, a file that is no picture, no such model.
    """
    answer = ""
    for part in answer_stream(image, question, *_loaded(str(model))):
        answer = part
    return answer


def answer_stream(image, question: str, model: Llama4, tokenizer: Tokenizer):
    """The answer so far, after each new token: for a chat that types."""
    input_ids, pixel_values = prompt_for(image, question, model, tokenizer)
    tokens = []
    for token in stream(model, input_ids, pixel_values, MAX_NEW_TOKENS, stop_tokens=model.config.stop_tokens):
        tokens.append(token)
        yield tokenizer.decode(tokens).strip()


def prompt_for(image, question: str, model: Llama4, tokenizer: Tokenizer):
    """(input_ids [1, tokens], pixel_values or None): one user turn, the picture before the question."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError('the question is empty; ask something, such as "How many circles are there?"')
    content = [{"type": "text", "text": question.strip()}]
    if image is not None:
        content.insert(0, {"type": "image", "image": image})
    return build_prompt(tokenizer, [{"role": "user", "content": content}], None, model.config)


def explain(image, question: str, model: str | Path = "mini-scout") -> str:
    """The answer, the token layout, every token's expert in every layer, and the time per token, as text."""
    net, tokenizer = _loaded(str(model))
    input_ids, pixel_values = prompt_for(image, question, net, tokenizer)
    prompt, tokens, times = input_ids[0].tolist(), [], []
    with trace(net, router=True) as seen:
        clock = time.perf_counter()
        for token in stream(net, input_ids, pixel_values, MAX_NEW_TOKENS, stop_tokens=net.config.stop_tokens):
            times.append(time.perf_counter() - clock)
            tokens.append(token)
            clock = time.perf_counter()
    lines = [
        f"answer: {tokenizer.decode(tokens).strip()}",
        "",
        f"layout of {len(prompt)} prompt tokens: {token_layout(prompt, tokenizer)}",
        "",
        *_expert_table(prompt + tokens, len(prompt), seen, tokenizer),
        "",
        _timing(times),
    ]
    return "\n".join(lines)


def _expert_table(ids: list[int], prompt: int, seen: Trace, tokenizer: Tokenizer) -> list[str]:
    """One line a token. A MoE layer that computed only the last token of the prompt shows '.' for the others."""
    layers = sorted(seen.router)
    width = max(len(str(layer)) for layer in layers) if layers else 1
    rows = ["position  token" + " " * 23 + "expert in layer " + " ".join(f"{layer:>{width}}" for layer in layers)]
    for position, token in enumerate(ids):
        cells = []
        for layer in layers:
            expert = seen.router[layer].expert[0]
            skipped = len(ids) - len(expert)  # the last layer skips what no logits are wanted of, and the last token
            index = position - (skipped if len(expert) < len(ids) - 1 else 0)
            known = 0 <= index < len(expert) and (len(expert) >= len(ids) - 1 or position >= prompt - 1)
            cells.append(f"{int(expert[index]) if known else '.':>{width}}")
        text = tokenizer.special_names.get(token) or repr(tokenizer.decode([token]))
        mark = ">" if position >= prompt else " "
        rows.append(f"{position:>8}{mark} {text[:27]:<27} " + " " * 16 + " ".join(cells))
    return rows


def _timing(times: list[float]) -> str:
    if not times:
        return "no token was generated"
    rest = f", then {1000 * sum(times[1:]) / len(times[1:]):.1f} ms a token" if len(times) > 1 else ""
    first = f"{1000 * times[0]:.1f} ms to the first token (the whole prompt)"
    return f"time: {first}{rest}, on {torch.get_num_threads()} threads"
