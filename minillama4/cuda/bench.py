"""What `minillama4 bench gpu` measures: one layer's parts, and the whole of Scout in int4.

Each function proves its answer before it times it, and returns one row (see `row`). `card` is a `bench_gpu.Card`;
`rate` holds the rooflines of the same run. Weights are random and go through the real quantiser; so are tokens, and
therefore routes: experts differ from token to token and from layer to layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..attention import causal_attention, chunked_attention
from ..config import Llama4Config
from ..model import Llama4
from ..moe import MoE
from ..roofline import GPUS, Bound, Gpu, decode_bound, prefill_bound
from ..trace import trace
from .decode import Decoder
from .int4 import Int4Matrix, to_int4
from .prefill import fast_attention, prefill

CAP = 80e9  # bytes that this process may take: an H100's memory, whatever card it runs on


@dataclass(frozen=True)
class Sizes:
    """What is measured. Tests run the same on a small model."""

    config: Llama4Config
    prompt: int = 640  # tokens before decoding
    steps: int = 32  # tokens of a round
    rounds: int = 9
    prefill: int = 8192
    long: int = 131_072
    longest: int = 300 * 1024
    sequences: int = 32  # of three tokens, whose logits are compared
    moe_tokens: int = 8192
    keys: int = 10_485_760
    product: int = 8192  # rows and columns of the matrices that show the rate
    copy: int = 2**32  # bytes


def full_size() -> Sizes:
    return Sizes(replace(Llama4Config.preset("scout"), vision=None))


def row(
    name: str, unit: str, values: list[float], accepted: float, goal: float, check: dict[str, float],
    allowed: dict[str, float], **more,
) -> dict:  # fmt: skip
    """One measurement. check: what was found, allowed: at most how much of it; `correct` if that holds for all.

    More is better, except where the goal is below what is accepted.
    """
    middle, sign = median(values), 1 if goal >= accepted else -1
    reached = "goal" if sign * middle >= sign * goal else "accepted" if sign * middle >= sign * accepted else "missed"
    correct = all(abs(check[key]) <= most for key, most in allowed.items())  # and never with NaN
    spread = {"median": middle, "min": min(values), "max": max(values), "rounds": len(values)}
    wanted = {"accepted": accepted, "goal": goal, "reached": reached}
    return {
        "name": name,
        "unit": unit,
        **spread,
        **wanted,
        "correct": correct,
        "check": check,
        "allowed": allowed,
    } | more


def point(name: str, tokens_per_second: float, bound: Bound) -> dict:
    """What the roofline explorer reads: counted work of one token, and how many there were a second."""
    work = {"bytes": bound.bytes / bound.tokens, "flops": bound.flops / bound.tokens}
    return {"name": name, "model": "scout", "dtype": "int4", "tokens_per_second": tokens_per_second} | work


def relative_error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm())


def taking_turns(card, rounds: int, *runs: Callable[[], object]) -> list[list[float]]:
    """Seconds of each run, A B A B …, after one of each that does not count."""
    for run in runs:
        run()
    return [list(each) for each in zip(*([card.seconds(run) for run in runs] for _ in range(rounds)), strict=True)]


def rates(card, sizes: Sizes) -> dict:
    """Bytes/s of copying (read and written) and FLOP/s of one large bf16 product: the best of the rounds' medians."""
    source = torch.randint(256, (sizes.copy,), dtype=torch.uint8, device=card.device)  # zeros would run cooler
    target = torch.empty_like(source)
    a, b = (torch.randn(sizes.product, sizes.product, device=card.device).bfloat16() for _ in range(2))
    copying, product = taking_turns(card, sizes.rounds, lambda: target.copy_(source), lambda: a @ b)
    return {"bandwidth": 2 * sizes.copy / median(copying), "flops": 2 * sizes.product**3 / median(product)}


# ----------------------------------------------------------------------------------------------------------------------
# One layer


@torch.no_grad()
def moe_layer(card, sizes: Sizes, rate: dict) -> dict:
    """All tokens of a prompt through one MoE layer in bf16, against transformers with the same weights."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    text, tokens = sizes.config.text, sizes.moe_tokens
    with torch.device(card.device):
        ours = MoE(text.hidden_size, text.num_experts, text.expert_width).bfloat16()
        x = torch.randn(1, tokens, text.hidden_size).bfloat16()
    for weight in ours.parameters():
        weight.normal_(std=text.hidden_size**-0.5)
    settings = dict(hidden_size=text.hidden_size, intermediate_size=text.expert_width)
    with torch.device("meta"):
        theirs = Llama4TextMoe(Llama4TextConfig(num_local_experts=text.num_experts, num_experts_per_tok=1, **settings))
    theirs.load_state_dict(ours.state_dict(), assign=True)
    error = relative_error(ours(x), theirs(x)[0].view_as(x))
    mine, others = taking_turns(card, sizes.rounds, lambda: ours(x), lambda: theirs(x))
    flops = 2 * tokens * 2 * 3 * text.hidden_size * text.expert_width / median(mine)
    return row(
        f"MoE layer, {tokens:,} tokens, against transformers", "times",
        [b / a for a, b in zip(mine, others, strict=True)], 6, 7, {"relative_error": error}, {"relative_error": 1e-2},
        seconds=median(mine), transformers_seconds=median(others), flops=flops, share_of_rate=flops / rate["flops"],
        experts_touched=len(ours.router(x).argmax(-1).unique()),
    )  # fmt: skip


@torch.no_grad()
def chunks(card, sizes: Sizes, rate: dict) -> dict:
    """One layer's attention over a long prompt: in chunks, and causal over everything."""
    text, tokens = sizes.config.text, sizes.long
    heads = (text.num_heads, text.num_kv_heads, text.num_kv_heads)
    q, k, v = (torch.randn(1, tokens, h, text.head_dim, device=card.device).bfloat16() for h in heads)
    last = (tokens - 1) // text.chunk_size * text.chunk_size
    group = text.num_heads // text.num_kv_heads
    keys, values = (x[0, last:].float().repeat_interleave(group, dim=1) for x in (k, v))  # [keys, heads, dim]
    logits = torch.einsum("hd,khd->hk", q[0, -1].float(), keys) * text.head_dim**-0.5
    with fast_attention(card.device):
        got = chunked_attention(q, k, v, text.chunk_size)[0, -1]
        error = relative_error(got, torch.einsum("hk,khd->hd", logits.softmax(-1), values))
        mine, full = taking_turns(
            card, min(sizes.rounds, 5), lambda: chunked_attention(q, k, v, text.chunk_size),
            lambda: causal_attention(q, k, v),
        )  # fmt: skip
    flops = 2 * text.num_heads * text.head_dim * tokens * text.chunk_size / median(mine)
    return row(
        f"chunked against full attention, {tokens:,} tokens", "times", [b / a for a, b in zip(mine, full, strict=True)],
        12, 14.5, {"relative_error": error}, {"relative_error": 1e-2}, seconds=median(mine), full_seconds=median(full),
        flops=flops, share_of_rate=flops / rate["flops"],
    )  # fmt: skip


@torch.no_grad()
def one_nope_layer(card, sizes: Sizes, rate: dict) -> dict:
    """One token's attention over the longest context, as a NoPE layer has it."""
    text, keys = sizes.config.text, sizes.keys
    q = torch.randn(text.num_heads, text.head_dim, device=card.device).bfloat16()
    k, v = (torch.empty(keys, text.num_kv_heads, text.head_dim, dtype=q.dtype, device=card.device) for _ in range(2))
    for cache in (k, v):
        for piece in cache.split(2**20):
            piece.normal_()
    last = torch.tensor([keys - 1], device=card.device)
    plain = in_float64(q, k, v)
    got = card.ops.attend(q, k, v, last, None)
    error = relative_error(got, card.ops.order(plain.flatten()[None]))
    (seconds,) = taking_turns(card, 2 * sizes.rounds, lambda: card.ops.attend(q, k, v, last, None))
    moved = k.nbytes + v.nbytes
    return row(
        f"{keys:,} tokens, one NoPE layer, decode", "ms", [1e3 * s for s in seconds], 14, 11.1,
        {"relative_error": error}, {"relative_error": 1e-2}, bytes=moved,
        share_of_bandwidth=moved / median(seconds) / rate["bandwidth"],
    )  # fmt: skip


def in_float64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(dim)) v of one token over all keys, [heads, dim], piece after piece."""
    heads, dim = q.shape
    grouped = q.double().unflatten(0, (k.shape[1], -1)) * dim**-0.5  # [kv_heads, group, dim]
    top = torch.full((*grouped.shape[:2], 1), -torch.inf, dtype=torch.float64, device=q.device)
    mass, out = torch.zeros_like(top), torch.zeros_like(grouped)
    for keys, values in zip(k.split(2**16), v.split(2**16), strict=True):
        logit = torch.einsum("hgd,khd->hgk", grouped, keys.double())
        higher = torch.maximum(top, logit.amax(-1, keepdim=True))
        weight, shrink = (logit - higher).exp(), (top - higher).exp()
        mass = mass * shrink + weight.sum(-1, keepdim=True)
        out, top = out * shrink + torch.einsum("hgk,khd->hgd", weight, values.double()), higher
    return (out / mass).view(heads, dim)


# ----------------------------------------------------------------------------------------------------------------------
# The whole model


@torch.no_grad()
def random_int4(config: Llama4Config, device: torch.device) -> Llama4:
    """A model of random weights, made on the device and quantised matrix by matrix; nothing is there in bf16 twice."""
    with torch.device("meta"):
        model = to_int4(Llama4(config), torch.bfloat16)
    modules = [m for m in model.modules() if isinstance(m, Int4Matrix)]
    for matrix in tqdm(modules, unit="matrix", disable=None, dynamic_ncols=True):
        std = matrix.shape[-1] ** -0.5
        matrix.fill(torch.randn(matrix.shape, dtype=torch.bfloat16, device=device).mul_(std), device)
    for name, parameter in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        fresh = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
        if parameter.ndim > 1:
            fresh.normal_(std=0.5 if "embed" in name else parameter.shape[-1] ** -0.5)
        setattr(model.get_submodule(parent), leaf, nn.Parameter(fresh))
    return model.eval()


def random_ids(model: Llama4, *shape: int) -> Tensor:
    return torch.randint(model.config.text.vocab_size, shape, device=model.lm_head.weight.device)


@torch.no_grad()
def logits(card, sizes: Sizes, rate: dict, model: Llama4) -> dict:
    """Each step's logits against the model's own, whose weights are dequantised to bf16.

    A router's two best logits can be so close that rounding decides. Then both answers are right and differ by a whole
    expert; so what counts are the tokens of which all experts agree, up to them, in all layers.
    """
    ids = random_ids(model, sizes.sequences, 3)
    with trace(model, router=True) as seen:
        wanted = model(ids)
    wanted_expert = torch.stack([seen.router[layer].expert for layer in sorted(seen.router)], dim=-1)  # [rows, 3, L]
    decoder, errors = Decoder(model, sizes.prompt, card.ops), []
    for sequence, tokens in enumerate(ids):
        for position, token in enumerate(tokens):
            decoder.start(token[None], position)
            decoder.advance()
            expert = torch.stack([each.argmax() for each in decoder.router_logits])
            if not torch.equal(expert, wanted_expert[sequence, position]):
                break
            errors.append(relative_error(decoder.logits, wanted[sequence, position]))
    if not errors:
        raise ValueError(f"of {ids.numel()} tokens not one took the same experts")
    agree = len(errors) / ids.numel()
    return row(
        "int4 logits against dequantised bf16", "relative error", errors, 2e-2, 1e-2,
        {"median": median(errors), "share_without_the_same_experts": 1 - agree},
        {"median": 2e-2, "share_without_the_same_experts": 0.95},
    )  # fmt: skip


@torch.no_grad()
def decode(card, sizes: Sizes, rate: dict, model: Llama4) -> dict:
    """Tokens a second of greedy decoding, one graph a step.

    The check is coarse: the last logits after so many steps, against those of a prompt of the same tokens. Routes that
    rounding decides (see `logits`) make them differ by tenths; tokens that have nothing in common, by 1.4.
    """
    length = sizes.prompt + sizes.rounds * sizes.steps + 2
    decoder = Decoder(model, length, card.ops)
    decoder.generate(random_ids(model, 1, sizes.prompt), 2)  # prefill, and the graph
    (seconds,) = taking_turns(card, sizes.rounds - 1, lambda: [decoder.advance() for _ in range(sizes.steps)])
    before = decoder.tokens[None, : int(decoder.position)]
    cache = model.new_cache(1, length)
    error = relative_error(decoder.logits, prefill(model, before, cache)[0])
    bound = decode_bound(model.config, "int4", before.shape[1], gpu=measured(rate))
    speeds = [sizes.steps / s for s in seconds]
    return row(
        f"int4 Scout, batch 1, context up to {before.shape[1]:,}", "tokens/s", speeds, 250, 330,
        {"relative_error_of_last_logits": error}, {"relative_error_of_last_logits": 0.5}, bound=bound.tokens_per_second,
        share_of_roofline=median(speeds) / bound.tokens_per_second,
        point=point("decode, batch 1, context 1K", median(speeds), bound),
    )  # fmt: skip


@torch.no_grad()
def prefill_8k(card, sizes: Sizes, rate: dict, model: Llama4) -> dict:
    """Tokens a second of a long prompt. The check: the last layer's keys are those of the model's own forward pass."""
    ids = random_ids(model, 1, sizes.prefill)
    mine, its = (model.new_cache(1, sizes.prefill) for _ in range(2))
    prefill(model, ids, mine)
    model(ids, cache=its, logits="none")
    a, b = (cache.layers[-1].k[0].flatten(1).float() for cache in (mine, its))
    errors = (a - b).norm(dim=-1) / b.norm(dim=-1)

    def run():
        mine.length = 0
        prefill(model, ids, mine)

    (seconds,) = taking_turns(card, min(sizes.rounds, 5), run)
    bound = prefill_bound(model.config, "int4", sizes.prefill, measured(rate))
    speeds = [sizes.prefill / s for s in seconds]
    return row(
        f"prefill of {sizes.prefill:,} tokens, int4 weights", "tokens/s", speeds, 10_000, 13_000,
        {"median_error_of_last_keys": float(errors.median())}, {"median_error_of_last_keys": 3e-2},
        bound=bound.tokens_per_second, share_of_roofline=median(speeds) / bound.tokens_per_second,
        point=point("prefill of 8K tokens", median(speeds), bound),
    )  # fmt: skip


@torch.no_grad()
def memory(card, sizes: Sizes, rate: dict, model: Llama4) -> dict:
    """The most that prefill and decoding take with a long context, under a cap of 80 GB; and whether 300K fit."""
    peaks, speeds, numbers = {}, {}, True
    for tokens in (sizes.long, sizes.longest):
        card.forget_peak()
        try:
            decoder = Decoder(model, tokens, card.ops)
            prefill(model, random_ids(model, 1, min(sizes.prefill, tokens)), decoder.cache)
            for layer in decoder.cache.layers:
                layer.k.normal_(), layer.v.normal_()
            decoder.start(random_ids(model, 1), tokens - sizes.steps * 3 - 1)
            (seconds,) = taking_turns(card, 2, lambda: [decoder.advance() for _ in range(sizes.steps)])  # noqa: B023
            speeds[tokens] = sizes.steps / median(seconds)
            numbers = numbers and bool(decoder.logits.isfinite().all())
            peaks[tokens] = card.peak()
        except torch.OutOfMemoryError:
            if tokens == sizes.long:
                raise
        decoder = None
    bound = decode_bound(model.config, "int4", sizes.long, gpu=measured(rate))
    return row(
        f"peak memory with {sizes.long:,} tokens of context", "GB", [peaks[sizes.long] / 1e9], CAP / 1e9, CAP / 1e9,
        {"infinities_or_nan": float(not numbers)}, {"infinities_or_nan": 0},
        fits={f"{tokens}": peaks.get(tokens, CAP + 1) <= CAP for tokens in (sizes.long, sizes.longest)},
        peak_bytes={f"{tokens}": peak for tokens, peak in peaks.items()},
        tokens_per_second={f"{tokens}": speed for tokens, speed in speeds.items()},
        point=point("decode, batch 1, context 128K", speeds[sizes.long], bound),
    )  # fmt: skip


def measured(rate: dict) -> Gpu:
    """A GPU of this run's rates, for the bounds."""
    return replace(GPUS["h200"], bandwidth=rate["bandwidth"], flops=rate["flops"])
