"""How fast on a CPU, as a ratio to `transformers` with the same weights in the same process: `minillama4 bench cpu`.

Every case first proves that both give the same answer, then takes turns, A B A B, so that whatever else the machine
does hits both; ratios are the median of the rounds, with the smallest and the largest beside it. A bound says what the
arithmetic alone would cost at the speed that a plain matrix product reached in the same run.
`minillama4 bench long`: a prompt of a million tokens adds the KV of the NoPE layer to memory, and nothing else.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import _hub_name, _our_name
from .config import Llama4Config, RopeScaling, TextConfig, every
from .generate import generate
from .hub import to_hub
from .model import Llama4
from .moe import MoE

TOLERANCE = 2e-5  # relative error, fp32
Run = Callable[[], dict[str, Tensor]]  # does the work once and returns what both sides must agree on


@dataclass(frozen=True)
class Case:
    kind: str  # "prefill" (last logits of a prompt), "generate" (greedy, prompt of 16) or "train" (one step)
    batch: int
    tokens: int
    num_layers: int = 8
    num_experts: int = 16
    least: float = 0.0  # the ratio to transformers that this project promises
    goal: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.kind} {self.batch} x {self.tokens}, {self.num_layers} layers, {self.num_experts} experts"


CASES = (
    Case("prefill", 1, 2048, least=8, goal=10),
    Case("generate", 1, 64, least=4, goal=5),
    Case("train", 4, 256, least=6, goal=8),
    Case("train", 2, 256, num_layers=4, num_experts=64, least=14, goal=18),
)
MOE_TOKENS, MOE_EXPERTS = (1, 8, 64, 512, 2048), (16, 128)


def bench_config(num_layers: int, num_experts: int, hidden_size: int = 256, width: int = 512) -> Llama4Config:
    """A small Scout: experts in every layer, NoPE every 4th, chunks of 128 tokens, four query heads to a key head."""
    text = TextConfig(
        vocab_size=1024, hidden_size=hidden_size, num_layers=num_layers, num_heads=8, num_kv_heads=2,
        head_dim=hidden_size // 8, num_experts=num_experts, expert_width=width, dense_width=2 * width,
        moe_layers=every(1, num_layers), nope_layers=every(4, num_layers), chunk_size=128, max_positions=1 << 20,
        rope_scaling=RopeScaling(16, 1, 1, 128), floor_scale=128,
    )  # fmt: skip
    return Llama4Config(text, None, bos_token=0, stop_tokens=(), pad_token=0, patch_token=1)


def in_transformers(model: Llama4) -> nn.Module:
    """A `Llama4ForCausalLM` with a copy of the model's weights. ValueError: transformers is not installed."""
    try:
        from transformers import Llama4ForCausalLM, Llama4TextConfig
    except ImportError:
        raise ValueError("bench cpu compares with transformers, which is not installed: pip install transformers") from None
    settings = to_hub(model.config, "float32")
    for name in ("architectures", "model_type", "torch_dtype", "rope_theta", "rope_scaling"):
        settings.pop(name)
    theirs = Llama4ForCausalLM(Llama4TextConfig(**settings)).eval()
    theirs.generation_config.eos_token_id = None  # all tokens are wanted
    theirs.load_state_dict({_hub_name(name, False): weight for name, weight in model.state_dict().items()})
    return theirs


def runs(case: Case, ours: Llama4, theirs: nn.Module) -> tuple[Run, Run]:
    """The same work for both."""
    draw = torch.Generator().manual_seed(1)
    length = 16 if case.kind == "generate" else case.tokens
    ids = torch.randint(1, ours.config.text.vocab_size, (case.batch, length), generator=draw)  # transformers never trains 0
    if case.kind == "prefill":
        return (
            torch.no_grad()(lambda: {"logits": ours(ids, logits="last")}),
            torch.no_grad()(lambda: {"logits": theirs(ids, logits_to_keep=1, use_cache=False).logits}),
        )
    if case.kind == "generate":
        options = dict(max_new_tokens=case.tokens, do_sample=False, attention_mask=torch.ones_like(ids))
        return (
            lambda: {"tokens": generate(ours, ids, max_new_tokens=case.tokens)},
            lambda: {"tokens": theirs.generate(ids, **options)[:, length:]},
        )
    targets = torch.randint(ours.config.text.vocab_size, ids.shape, generator=draw)
    return (
        lambda: train_step(ours, lambda: ours(ids), targets),
        lambda: train_step(theirs, lambda: theirs(ids, use_cache=False).logits, targets),
    )


def train_step(model: nn.Module, logits_of: Callable[[], Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Forward, cross-entropy on all tokens, backward, zero_grad; the logits and gradients that came out."""
    logits = logits_of()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    gradients = {_our_name(name): parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return {"logits": logits.detach(), **gradients}


def relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The worst tensor's |ours - theirs| / |theirs| (tokens: the share that differs)."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"only one side has {sorted(ours.keys() ^ theirs.keys())[:3]}")
    worst = 0.0
    for name, b in theirs.items():
        a = ours[name]
        if a.is_floating_point():
            error = (a - b).norm() / b.norm()
        else:
            error = (a != b).float().mean() if a.shape == b.shape else torch.tensor(1.0)
        worst = max(worst, float(error)) if error == error else float("inf")
    return worst


def compare(name: str, ours: Run, theirs: Run, rounds: int, bar: tqdm, clock=time.perf_counter) -> dict:
    """Check once, warm up, then take turns: milliseconds and ratios of both. ValueError: the answers differ."""
    error = relative_error(ours(), theirs())
    if not error < TOLERANCE:
        raise ValueError(f"{name}: relative error {error:.1e} to transformers is not below {TOLERANCE}; nothing was timed")
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(rounds):
        for side, run in (("ours", ours), ("transformers", theirs)):
            started = clock()
            run()
            seconds[side].append(clock() - started)
        bar.update()
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {
        "ours_ms": round(1e3 * median(seconds["ours"]), 3),
        "transformers_ms": round(1e3 * median(seconds["transformers"]), 3),
        "ratio": round(median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "relative_error": error,
    }


def counted_flops(case: Case, text: TextConfig) -> int:
    """Multiplications and additions of all matrix products, of chosen experts only; training costs three forwards."""
    q, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    attention, mlp = text.hidden_size * (2 * q + 2 * kv), 3 * text.hidden_size * text.expert_width
    layer = 2 * (attention + 2 * mlp + text.hidden_size * text.num_experts)  # the routed expert, and the shared one
    head = 2 * text.hidden_size * text.vocab_size
    length = 16 + case.tokens - 1 if case.kind == "generate" else case.tokens
    seen_NoPE = length * (length + 1) // 2  # query-key pairs
    whole, rest = divmod(length, text.chunk_size)
    seen_local = whole * text.chunk_size * (text.chunk_size + 1) // 2 + rest * (rest + 1) // 2
    last = 1 if case.kind == "prefill" else length  # the last layer's queries and experts; its keys and values for all
    total = (text.num_layers - 1) * length * layer + last * layer + (length - last) * 4 * text.hidden_size * kv
    for index in range(text.num_layers):
        pairs = seen_NoPE if text.is_nope(index) else seen_local
        total += 4 * q * (pairs if index < text.num_layers - 1 or last == length else length)
    heads = {"prefill": 1, "generate": case.tokens, "train": length}[case.kind]
    return case.batch * (total + heads * head) * (3 if case.kind == "train" else 1)


def moe_layer(tokens: int, num_experts: int, rounds: int, bar: tqdm, peak: dict, clock=time.perf_counter) -> dict:
    """One MoE layer alone, with what it must compute and read at least: the chosen experts, the shared one, the router."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    model = Llama4(bench_config(1, num_experts))
    text, ours, theirs = model.config.text, model.layers[0].feed_forward, in_transformers(model).model.layers[0].feed_forward
    assert isinstance(ours, MoE) and isinstance(theirs, Llama4TextMoe)
    x = torch.randn(1, tokens, text.hidden_size, generator=torch.Generator().manual_seed(2))
    run = [
        torch.no_grad()(lambda: {"y": ours(x)}),
        torch.no_grad()(lambda: {"y": theirs(x)[0].view_as(x)}),
    ]
    result = compare(f"MoE layer, {tokens} tokens, {num_experts} experts", *run, rounds, bar, clock)
    touched = len(ours.router(x).argmax(-1).unique())
    mlp, router = 3 * text.hidden_size * text.expert_width, text.hidden_size * num_experts
    flops = 2 * tokens * (2 * mlp + router)
    nbytes = 4 * ((touched + 1) * mlp + router + 2 * tokens * text.hidden_size)
    return {
        "tokens": tokens, "experts": num_experts, "experts_touched": touched, **result, "flops": flops, "bytes": nbytes,
        "flop_bound_ms": round(flops / peak["gflops"] / 1e6, 4), "byte_bound_ms": round(nbytes / peak["gbytes"] / 1e6, 4),
    }  # fmt: skip


def measured_peak() -> dict:
    """GFLOP/s of a plain fp32 matrix product, GB/s of reading 256 MB."""
    a, long = torch.randn(1024, 1024), torch.randn(1 << 26)

    def best(work: Callable[[], Tensor]) -> float:
        seconds = []
        for _ in range(6):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    return {"gflops": round(2 * 1024**3 / best(lambda: a @ a) / 1e9, 1), "gbytes": round(long.nbytes / best(long.sum) / 1e9, 1)}


def machine() -> dict:
    """Facts that decide a speed; no names of hosts, users or paths."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    import transformers

    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "simd": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def bench_cpu(
    rounds: int = 9, cases=CASES, moe_layers: bool = True, json_file: str | Path | None = None, clock=time.perf_counter
) -> dict:
    """Time all cases against transformers, print a table, and write everything as JSON if a file is named.

    ValueError: transformers is missing, or one answer differs from its answer (then nothing of that case is timed).
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    torch.manual_seed(0)  # weights
    models = {}
    alone = [(tokens, experts) for experts in MOE_EXPERTS for tokens in MOE_TOKENS] if moe_layers else []
    report: dict = {"cases": [], "moe_layer": []}
    with tqdm(total=rounds * (len(cases) + len(alone)), unit="round", disable=None, dynamic_ncols=True) as bar:
        for case in cases:
            bar.set_description(case.name)
            size = case.num_layers, case.num_experts
            if size not in models:
                models = {size: (model := Llama4(bench_config(*size)).eval(), in_transformers(model))}  # one pair at a time
            ours, theirs = models[size]
            result = compare(case.name, *runs(case, ours, theirs), rounds, bar, clock)
            flops = counted_flops(case, ours.config.text)
            report["cases"].append({"name": case.name, **asdict(case), **result, "flops": flops})
        models.clear()
        peak = measured_peak()
        for tokens, experts in alone:
            bar.set_description(f"MoE layer, {tokens} tokens, {experts} experts")
            report["moe_layer"].append(moe_layer(tokens, experts, rounds, bar, peak, clock))
    for result in report["cases"]:
        result["flop_bound_ms"] = round(result["flops"] / peak["gflops"] / 1e6, 3)
    report = {"machine": machine() | peak, "rounds": rounds, **report}
    print_table(report)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def print_table(report: dict):
    facts = report["machine"]
    print(f"{facts['cpu']}, {facts['threads']} threads, {facts['simd']}, torch {facts['torch']}, transformers "
          f"{facts['transformers']}, fp32; a plain matrix product reaches {facts['gflops']} GFLOP/s, reading {facts['gbytes']} GB/s")  # fmt: skip
    print(f"{'median of ' + str(report['rounds']) + ' rounds':46}{'bound':>9}{'ours':>9}{'theirs':>9}  ratio (min..max)       least, goal")
    for row in report["cases"] + report["moe_layer"]:
        name = row.get("name") or f"MoE layer alone, {row['tokens']} tokens, {row['experts']} experts"
        bound = max(row["flop_bound_ms"], row.get("byte_bound_ms", 0))
        wanted = f"{row['least']:g}, {row['goal']:g}" if row.get("least") else ""
        print(f"{name:46}{bound:7.2f}ms{row['ours_ms']:7.1f}ms{row['transformers_ms']:7.1f}ms"
              f"{row['ratio']:7.2f} ({row['ratio_min']:.2f}..{row['ratio_max']:.2f}){wanted:>18}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# A prompt of a million tokens.


def resident_bytes(peak: bool = False) -> int:
    """Memory of this process now, or the most since `forget_peak`, from Linux's /proc."""
    name = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")


def forget_peak():
    """From here on, the peak counts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def bench_long(tokens: int = 1 << 20, piece: int = 4096) -> dict:
    """Feed a prompt of `tokens` to a 4-layer mini model (3 local, 1 NoPE); how much does memory grow beyond the KV?

    The prompt comes from a generator, piece by piece, so that not even its ids are held. ValueError: not on Linux.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError("bench long reads peak memory from /proc, which only Linux has")
    config = Llama4Config.preset("mini-scout")
    text = replace(config.text, num_layers=4, moe_layers=every(1, 4), nope_layers=every(4, 4))
    model = Llama4(replace(config, text=text, vision=None)).eval()
    draw = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def feed(total: int, bar: tqdm) -> Tensor:
        cache = model.new_cache(1, total)
        for start in range(0, total, piece):
            ids = torch.randint(text.vocab_size, (1, min(piece, total - start)), generator=draw)
            logits = model(ids, cache=cache, logits="last" if start + piece >= total else "none")
            bar.update(ids.shape[1])
        return cache.layers[-1].k.nbytes + cache.layers[-1].v.nbytes, bool(logits.isfinite().all())

    with tqdm(total=tokens + 2 * piece, unit="token", unit_scale=True, disable=None) as bar:
        feed(2 * piece, bar)  # the working memory of a piece, and torch's own, are there from the start
        forget_peak()
        before, started = resident_bytes(), time.perf_counter()
        kv_bytes, finite = feed(tokens, bar)
        seconds, growth = time.perf_counter() - started, resident_bytes(peak=True) - before
    result = {"tokens": tokens, "seconds": round(seconds, 1), "growth_bytes": growth, "kv_bytes": kv_bytes,
              "ratio": round(growth / kv_bytes, 3), "finite": finite}  # fmt: skip
    print(f"{tokens:,} tokens in {seconds:.0f} s: peak memory grew by {growth / 2**20:.1f} MiB, the NoPE layer's keys and "
          f"values take {kv_bytes / 2**20:.1f} MiB (ratio {result['ratio']:.3f})")  # fmt: skip
    return result
