"""Loading streams: the peak is the model and one tensor, measured in a process of its own."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import SCOUT_LIKE, build, with_text

from minillama4 import Llama4, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LOADER = """
import sys
from pathlib import Path
from minillama4 import load_checkpoint

def resident(field):  # of this process, in bytes; `ru_maxrss` would start from the parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

load_checkpoint(sys.argv[1])  # a small one: everything that is imported on the way is now there
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
model = load_checkpoint(sys.argv[2])
sizes = [p.nbytes for p in model.parameters()]
print(sum(sizes), max(sizes), resident("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("shard_bytes", [2**40, 30_000_000], ids=["one file", "many shards"])
def test_loading_needs_the_model_and_one_tensor_at_most(tmp_path, shard_bytes):
    """200 MB of parameters: the peak resident memory of a process of its own, pages of mapped files included."""
    config = with_text(
        replace(SCOUT_LIKE, vision=None),
        vocab_size=1000,
        hidden_size=512,
        num_layers=4,
        moe_layers=(1, 3),
        nope_layers=(3,),
        num_experts=16,
        expert_width=832,
        dense_width=1500,
    )
    small, big = tmp_path / "small", tmp_path / "big"
    save_checkpoint(build(SCOUT_LIKE), small)
    with torch.device("meta"):
        model = Llama4(config)
    save_checkpoint(model.to_empty(device="cpu"), big, shard_bytes=shard_bytes)
    run = subprocess.run([sys.executable, "-c", LOADER, small, big], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    size, largest, grown = map(int, run.stdout.split())
    print(f"model {size / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB, peak + {grown / 1e6:.0f} MB")
    assert 180e6 < size < 230e6
    assert size < grown < size + 1.5 * largest, "reading everything first would need twice the model"
