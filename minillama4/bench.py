"""How fast on a CPU, as a ratio to `transformers` with the same weights in the same process: `minillama4 bench cpu`.

Every case first proves that both give the same answer. Then they take turns, A B A B, so that whatever else the machine
does hits both; a ratio is the median over the rounds, with the smallest and the largest beside it. A bound says what
our products alone would take at the speed that one large product reached in the same run.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from .bench_long import bench_long
from .checkpoint import _hub_name, _our_name
from .config import Llama4Config, RopeScaling, TextConfig, every
from .generate import generate
from .hub import to_hub
from .model import Llama4
from .trace import trace

TOLERANCE = 2e-5  # relative error, fp32
TIE = 1e-5  # two router logits this close may fall either way, and both answers would be right
Run = Callable[[], dict[str, Tensor]]  # does the work once, and returns what both sides must agree on


@dataclass(frozen=True)
class Case:
    kind: str  # "prefill" (last logits of a prompt), "generate" (greedy, after 16 tokens) or "train" (one step)
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
QUICK_CASES = tuple(Case(kind, 1, tokens, 4, 4) for kind, tokens in (("prefill", 160), ("generate", 4), ("train", 64)))
MOE_LAYERS = tuple((tokens, experts) for experts in (16, 128) for tokens in (1, 8, 64, 512, 2048))


def bench_config(num_layers: int, num_experts: int) -> Llama4Config:
    """A small Scout: experts in every layer, NoPE every 4th, chunks of 128 tokens, four query heads to a key head."""
    text = TextConfig(
        vocab_size=1024, hidden_size=256, num_layers=num_layers, num_heads=8, num_kv_heads=2, head_dim=32,
        num_experts=num_experts, expert_width=512, dense_width=1024, moe_layers=every(1, num_layers),
        nope_layers=every(4, num_layers), chunk_size=128, max_positions=1 << 20, floor_scale=128,
        rope_scaling=RopeScaling(16, 1, 1, 128),
    )  # fmt: skip
    return Llama4Config(text, None, bos_token=0, stop_tokens=(), pad_token=0, patch_token=1)


def in_transformers(model: Llama4) -> nn.Module:
    """A `Llama4ForCausalLM` with a copy of the model's weights. ValueError: transformers is not installed."""
    try:
        from transformers import Llama4ForCausalLM, Llama4TextConfig, logging
    except ImportError:
        raise ValueError("bench cpu compares with transformers; install it: pip install transformers") from None
    logging.set_verbosity_error()  # it warns of Scout's own RoPE settings
    settings = to_hub(model.config, "float32")
    for name in ("architectures", "model_type", "torch_dtype", "rope_theta", "rope_scaling"):
        settings.pop(name)
    theirs = Llama4ForCausalLM(Llama4TextConfig(**settings)).eval()
    theirs.generation_config.eos_token_id = None  # no token ends the text
    theirs.load_state_dict({_hub_name(name, False): weight for name, weight in model.state_dict().items()})
    return theirs


def runs(case: Case, ours: Llama4, theirs: nn.Module) -> tuple[Run, Run]:
    """One case as two functions that do the same work: ours, and that of transformers."""
    draw, vocab = torch.Generator().manual_seed(1), ours.config.text.vocab_size
    length = 16 if case.kind == "generate" else case.tokens
    ids = None
    while ids is None or finds_a_tie(ours, ids):
        ids = torch.randint(1, vocab, (case.batch, length), generator=draw)  # not 0: transformers pads with it
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
    targets = torch.randint(vocab, ids.shape, generator=draw)
    return (
        lambda: train_step(ours, lambda: ours(ids), targets),
        lambda: train_step(theirs, lambda: theirs(ids, use_cache=False).logits, targets),
    )


@torch.no_grad()
def finds_a_tie(model: Llama4, ids: Tensor) -> bool:
    with trace(model, router=True) as seen:
        model(ids)
    best_two = [routes.logits.topk(2).values for routes in seen.router.values()]
    return any((two[..., 0] - two[..., 1]).min() < TIE for two in best_two)


def train_step(model: nn.Module, logits_of: Callable[[], Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Forward, cross-entropy on all tokens, backward, zero_grad; the logits and gradients that came out."""
    logits = logits_of()
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    gradients = {_our_name(name): parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return {"logits": logits.detach(), **gradients}


def relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """|ours - theirs| / |theirs| of the worst tensor; of tokens, the share that differs."""
    if {name: a.shape for name, a in ours.items()} != {name: b.shape for name, b in theirs.items()}:
        return math.inf
    pairs = [(ours[name], theirs[name]) for name in ours]
    errors = [(a - b).norm() / b.norm() if a.is_floating_point() else (a != b).float().mean() for a, b in pairs]
    return float(torch.stack(errors).nan_to_num(nan=math.inf).max())


def compare(name: str, ours: Run, theirs: Run, rounds: int, bar: tqdm, clock: Callable[[], float]) -> dict:
    """Check, which also warms up; then take turns. ValueError: the answers differ, and then nothing is timed."""
    bar.set_description(name)
    error = relative_error(ours(), theirs())
    if not error < TOLERANCE:
        raise ValueError(f"{name}: relative error {error:.1e} to transformers is above {TOLERANCE}; not timed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # where no group of an expert is padded: a bound counts what has to be done
    with FlopCounterMode(display=False) as counter:
        ours()
    torch.set_num_threads(threads)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, run in zip(seconds, (ours, theirs), strict=True):
            started = clock()
            run()
            side.append(clock() - started)
        bar.update()
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    ours_ms, theirs_ms = (round(1e3 * median(side), 3) for side in seconds)
    return {
        "name": name, "flops": counter.get_total_flops(), "relative_error": error,
        "ours_ms": ours_ms, "transformers_ms": theirs_ms,
        "ratio": round(median(ratios), 2), "ratio_min": round(min(ratios), 2), "ratio_max": round(max(ratios), 2),
    }  # fmt: skip


def moe_layer(tokens: int, num_experts: int, rounds: int, bar: tqdm, clock: Callable[[], float]) -> dict:
    """One MoE layer alone, and the bytes it must move: router, chosen experts, the shared one, input, output."""
    model = Llama4(bench_config(1, num_experts))
    ours, theirs = model.layers[0].feed_forward, in_transformers(model).model.layers[0].feed_forward
    x = torch.randn(1, tokens, model.config.text.hidden_size, generator=torch.Generator().manual_seed(2))
    run_ours = torch.no_grad()(lambda: {"y": ours(x)})
    run_theirs = torch.no_grad()(lambda: {"y": theirs(x)[0].view_as(x)})
    name = f"MoE layer alone, {tokens} tokens, {num_experts} experts"
    touched, shared = len(ours.router(x).argmax(-1).unique()), sum(p.nbytes for p in ours.shared_expert.parameters())
    nbytes = (touched + 1) * shared + ours.router.weight.nbytes + 2 * x.nbytes  # all experts are of one size
    sizes = {"tokens": tokens, "experts": num_experts, "experts_touched": touched, "bytes": nbytes}
    return sizes | compare(name, run_ours, run_theirs, rounds, bar, clock)


def bench_cpu(rounds=9, cases=CASES, moe_layers=MOE_LAYERS, threads=2, clock=time.perf_counter) -> dict:
    """Time all cases against transformers and print a table; returns what `--json` writes.

    ValueError: transformers is not installed, or an answer differs from its answer.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)  # weights
    rows, models = [], {}
    with tqdm(total=rounds * (len(cases) + len(moe_layers)), unit="round", disable=None, dynamic_ncols=True) as bar:
        for case in cases:
            size = case.num_layers, case.num_experts
            if size not in models:
                ours = Llama4(bench_config(*size)).eval()
                models = {size: (ours, in_transformers(ours))}  # one pair in memory
            rows.append(asdict(case) | compare(case.name, *runs(case, *models[size]), rounds, bar, clock))
        layers = [moe_layer(tokens, experts, rounds, bar, clock) for tokens, experts in moe_layers]
    facts = machine("transformers") | measured_peak()
    for row in rows + layers:
        row["flop_bound_ms"] = round(row["flops"] / facts["gflops"] / 1e6, 4)
        row["byte_bound_ms"] = round(row.get("bytes", 0) / facts["gbytes"] / 1e6, 4)
    report = {"machine": facts, "rounds": rounds, "cases": rows, "moe_layer": layers}
    print_table(report)
    return report


def measured_peak() -> dict:
    """What this machine reaches at best: GFLOP/s in one large fp32 product, and GB/s in reading 256 MB."""
    data, threads = {"a": torch.randn(1024, 1024), "b": torch.randn(1 << 26)}, torch.get_num_threads()
    product = Timer("a @ a", globals=data, num_threads=threads).blocked_autorange(min_run_time=1)
    read = Timer("b.sum()", globals=data, num_threads=threads).blocked_autorange(min_run_time=1)
    return {
        "gflops": round(2 * 1024**3 / min(product.times) / 1e9, 1),
        "gbytes": round(data["b"].nbytes / min(read.times) / 1e9, 1),
    }


def machine(*packages: str) -> dict:
    """The facts that decide a speed; no names of hosts, users or folders."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": (names + [platform.processor() or platform.machine()])[0],
        "cores": os.cpu_count(), "simd": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "torch": torch.__version__, **{name: version(name) for name in packages},
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def print_table(report: dict):
    print("; ".join(f"{name} {value}" for name, value in report["machine"].items()))
    title = f"milliseconds, medians of {report['rounds']} rounds"
    print(f"\n{title:46}{'bound':>9}{'ours':>10}{'theirs':>10}{'ratio':>8}  min..max      at least (goal)")
    for row in report["cases"] + report["moe_layer"]:
        bound, spread = max(row["flop_bound_ms"], row["byte_bound_ms"]), f"{row['ratio_min']}..{row['ratio_max']}"
        wanted = f"{row['least']:g} ({row['goal']:g})" if row.get("least") else ""
        numbers = f"{bound:9.2f}{row['ours_ms']:10.2f}{row['transformers_ms']:10.2f}{row['ratio']:8.2f}"
        print(f"{row['name']:46}{numbers}  {spread:14}{wanted}")


def bench_command(what: str, json_file: str | None = None, rounds: int | None = None, quick: bool = False) -> int:
    """`minillama4 bench cpu` or `long`. `quick`: small sizes, a check that all runs and compares equal."""
    if what == "long":
        report = {"machine": machine()} | bench_long(1 << 17 if quick else 1 << 20)
    else:
        report = bench_cpu(rounds or 3, QUICK_CASES, MOE_LAYERS[:2]) if quick else bench_cpu(rounds or 9)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0
