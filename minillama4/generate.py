"""From a prompt to new tokens: prefill once, then one token a step on the cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .decode import Step, is_plain
from .model import Llama4

PIECE = 4096  # prompt tokens a call: bounds activations, while the cache grows only in its NoPE layers


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token a row: [rows, vocab] -> [rows] int64.

    temperature 0 takes the largest logit. Otherwise from softmax(logits / temperature), of which `top_p` keeps the
    most likely tokens up to that mass: always the first, and the one that crosses the line.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probability = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, token = probability.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)  # mass before this token
        probability = torch.zeros_like(probability).scatter(-1, token, ordered)
    return torch.multinomial(probability, 1, generator=generator)[:, 0]


@torch.no_grad()
def prefill(model: Llama4, input_ids: Tensor, pixel_values: Tensor | None, cache, piece: int = PIECE) -> Tensor:
    """Feed a prompt [batch, tokens] in pieces; logits [batch, vocab] after its last token."""
    pieces = input_ids.split(piece, dim=1) if len(input_ids) == 1 else [input_ids]
    for ids in pieces[:-1]:
        model(ids, pixel_values, cache, logits="none")
        pixel_values = None  # the cache keeps what the later pieces need
    return model(pieces[-1], pixel_values, cache, logits="last")[:, -1]


@torch.inference_mode()  # cheaper than no_grad, and nobody else sees this cache
def steps(
    model: Llama4, prompt: Tensor, pixel_values=None, max_new_tokens=64, temperature=0.0, top_p=1.0, generator=None
) -> Iterator[Tensor]:
    """Tokens of equally long prompts, [rows] a step, without looking for stop tokens. prompt: [rows, tokens]."""
    cache = model.new_cache(len(prompt), prompt.shape[1] + max_new_tokens)
    logits = prefill(model, prompt, pixel_values, cache)
    step = Step(model, cache) if len(prompt) == 1 and is_plain(model) else None
    for left in reversed(range(max_new_tokens)):
        token = sample(logits, temperature, top_p, generator)
        yield token
        if left and step is not None:
            logits = step(int(token))[None]
        elif left:
            logits = model(token[:, None], cache=cache, logits="last")[:, -1]


def generate(
    model: Llama4,
    prompts: Tensor | Sequence[Tensor],
    pixel_values: Tensor | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    """New tokens [batch, new] int64; a row is padded with the config's pad token after its stop token, which is kept.

    prompts: [batch, tokens] int64, or a list of 1-D tensors of any lengths. Prompts of one length run together, others
    after each other, so each gets exactly what it would get alone: padding would move chunk borders.
    pixel_values: [tiles, 3, side, side], the tiles of all prompts in order. Greedy unless temperature > 0.
    """
    rows = list(prompts)
    if not rows or any(row.ndim != 1 or not len(row) for row in rows):
        raise ValueError(
            "prompts must be a [batch, tokens] tensor or a list of 1-D tensors, with at least one token each"
        )
    _check(max_new_tokens, temperature, top_p)
    tiles = _tiles_of(model, rows, pixel_values)
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=rows[0].device)
    result = rows[0].new_full((len(rows), max_new_tokens), model.config.pad_token)
    longest = 0
    for length in sorted({len(row) for row in rows}):
        index = [i for i, row in enumerate(rows) if len(row) == length]
        pixels = None if tiles is None else torch.cat([tiles[i] for i in index])
        running = torch.ones(len(index), dtype=torch.bool, device=rows[0].device)
        prompt = torch.stack([rows[i] for i in index])
        options = (
            pixels if pixels is not None and len(pixels) else None,
            max_new_tokens,
            temperature,
            top_p,
            generator,
        )
        tokens = []
        for token in steps(model, prompt, *options):
            tokens.append(token.masked_fill(~running, model.config.pad_token))
            if len(stops):
                running = running & ~torch.isin(token, stops)
                if not running.any():
                    break
        result[index, : len(tokens)] = torch.stack(tokens, dim=1)
        longest = max(longest, len(tokens))
    return result[:, :longest]


def stream(
    model: Llama4,
    prompt: Tensor,
    pixel_values: Tensor | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """The tokens of one prompt ([tokens] or [1, tokens]) as they come; the stop token ends the stream unseen."""
    _check(max_new_tokens, temperature, top_p)
    if prompt.numel() != prompt.shape[-1] or not prompt.numel():
        raise ValueError(f"prompt is {list(prompt.shape)}; it must be one prompt: [tokens] or [1, tokens], not empty")
    prompt = prompt.view(1, -1)
    _tiles_of(model, [prompt[0]], pixel_values)  # here only to refuse tiles that no token stands for
    for token in steps(model, prompt, pixel_values, max_new_tokens, temperature, top_p, generator):
        if int(token) in stop_tokens:
            return
        yield int(token)


def _check(max_new_tokens: int, temperature: float, top_p: float):
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or above")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")


def _tiles_of(model: Llama4, rows: list[Tensor], pixel_values: Tensor | None) -> list[Tensor] | None:
    """Which tiles belong to which prompt, from its count of patch tokens."""
    if pixel_values is None:
        return None
    vision = model.config.vision
    if vision is None:
        raise ValueError("pixel_values were given, but this config has no vision")
    patches = [int((row == model.config.patch_token).sum()) for row in rows]
    if (
        any(count % vision.tokens_per_tile for count in patches)
        or sum(patches) != len(pixel_values) * vision.tokens_per_tile
    ):
        raise ValueError(
            f"pixel_values holds {len(pixel_values)} tiles of {vision.tokens_per_tile} tokens, "
            f"the prompts hold {patches} patch tokens"
        )
    return list(pixel_values.split([count // vision.tokens_per_tile for count in patches]))
