"""`minillama4 bench long`: a prompt of a million tokens adds the NoPE layer's keys and values to memory, no more.

Local layers hold one chunk however long the prompt, pieces bound the activations, and no mask exists. The NoPE layer is
the last, as in Llama 4, so a prompt costs it only keys and values: time grows with the tokens, not with their square.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from .config import Llama4Config, every
from .model import Llama4


def resident_bytes(which: str) -> int:
    """Memory of this process, from Linux's /proc: "VmRSS" now, or "VmHWM", the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which + ":"))


def forget_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        raise ValueError("bench long measures memory through /proc/self/clear_refs, which only Linux has") from None


@torch.no_grad()
def feed(model: Llama4, tokens: int, piece: int, bar: tqdm) -> int:
    """Feed random ids, drawn piece by piece so that not even they are held; bytes of the last layer's KV."""
    draw, cache = torch.Generator().manual_seed(0), model.new_cache(1, tokens)
    for start in range(0, tokens, piece):
        ids = torch.randint(model.config.text.vocab_size, (1, min(piece, tokens - start)), generator=draw)
        model(ids, cache=cache, logits="last" if start + piece >= tokens else "none")
        bar.update(ids.shape[1])
    return cache.layers[-1].k.nbytes + cache.layers[-1].v.nbytes


def bench_long(tokens: int = 1 << 20, piece: int = 4096) -> dict:
    """How much memory a long prompt takes in a mini model of 3 local layers and 1 NoPE layer; printed and returned."""
    config = Llama4Config.preset("mini-scout")
    text = replace(config.text, num_layers=4, moe_layers=every(1, 4), nope_layers=every(4, 4))
    model = Llama4(replace(config, text=text, vision=None)).eval()
    with tqdm(total=tokens + 2 * piece, unit="token", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        feed(model, 2 * piece, piece, bar)  # what it takes to work on a piece is there from the start
        forget_peak()
        before, started = resident_bytes("VmRSS"), time.perf_counter()
        kv_bytes = feed(model, tokens, piece, bar)
        seconds, growth = time.perf_counter() - started, resident_bytes("VmHWM") - before
    ratio = round(growth / kv_bytes, 4)
    print(f"{tokens:,} tokens in {seconds:.1f} s, in pieces of {piece:,}; memory grew by {growth / 2**20:.1f} MiB")
    print(f"the keys and values of the NoPE layer are {kv_bytes / 2**20:.1f} MiB (ratio {ratio:.3f})")
    sizes = {"growth_bytes": growth, "kv_bytes": kv_bytes, "growth_over_kv": ratio}
    return {"tokens": tokens, "piece": piece, "seconds": round(seconds, 2), **sizes}
