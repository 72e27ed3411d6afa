"""The benchmark: what it reports, that wrong answers are never timed, and the memory of a long prompt.

Speed is asserted only in the slow test, at half of what `minillama4 bench cpu` has to show on a machine of its own.
"""

import getpass
import json
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

from minillama4 import bench
from minillama4.bench import CASES, Case, bench_command, bench_cpu, in_transformers, relative_error
from minillama4.bench_long import bench_long, forget_peak, resident_bytes

TINY = (Case("prefill", 1, 40, 2, 3, 0.1, 0.2), Case("generate", 1, 3, 2, 3), Case("train", 2, 9, 2, 3))
MOE_LAYERS = ((1, 3), (5, 3))
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The JSON file of one run on tiny sizes, and what it printed."""
    file = tmp_path_factory.mktemp("bench") / "cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "QUICK_CASES", TINY)
        patch.setattr(bench, "MOE_LAYERS", MOE_LAYERS)
        assert bench_command("cpu", str(file), rounds=2, quick=True) == 0
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def report(written):
    return json.loads(written)


# ----------------------------------------------------------------------------------------------------------------------
# What it reports


def test_the_report_holds_each_case_with_its_ratio_spread_error_and_bound(report):
    assert set(report) == {"machine", "rounds", "cases", "moe_layer"} and report["rounds"] == 2
    assert [row["kind"] for row in report["cases"]] == ["prefill", "generate", "train"]
    for row in report["cases"] + report["moe_layer"]:
        assert row["ours_ms"] > 0 and row["transformers_ms"] > 0 and row["flop_bound_ms"] > 0
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert 0 <= row["relative_error"] < 2e-5
    first = report["cases"][0]
    assert first["name"] == "prefill 1 x 40, 2 layers, 3 experts"
    assert (first["batch"], first["tokens"], first["num_layers"], first["num_experts"]) == (1, 40, 2, 3)
    assert (first["least"], first["goal"]) == (0.1, 0.2)


def test_the_report_says_on_what_machine_and_versions_but_not_whose(report, written):
    facts = report["machine"]
    assert facts["torch"] == torch.__version__ and facts["threads"] == 2 and facts["cpu"] and facts["cores"] >= 1
    assert facts["gflops"] > 0 and facts["gbytes"] > 0
    assert facts["transformers"].startswith("5.") and facts["date"][:2] == "20"
    names = {socket.gethostname(), str(Path.cwd()), str(Path.home()), getpass.getuser()} - {"root", "/", "/root"}
    assert not [name for name in names if len(name) > 2 and name in written]


@pytest.mark.parametrize("index", [0, 1], ids=["one token", "five tokens"])
def test_bounds_of_a_moe_layer_are_those_of_its_formula(report, index):
    row = report["moe_layer"][index]
    tokens, expert, router = MOE_LAYERS[index][0], 3 * 256 * 512, 256 * 3
    assert row["flops"] == 2 * tokens * (2 * expert + router)  # the routed expert, and the shared one
    assert 1 <= row["experts_touched"] <= min(tokens, 3)
    assert row["bytes"] == 4 * ((row["experts_touched"] + 1) * expert + router + 2 * tokens * 256)


def test_training_counts_three_times_the_products_of_a_forward_pass_and_prefill_saves_most_of_its_last_layer(report):
    prefill, _, train = (row["flops"] for row in report["cases"])
    layer = 256 * (2 * 256 + 2 * 64) + 2 * 3 * 256 * 512 + 256 * 3
    products = 2 * (2 * layer + 256 * 1024)  # a token, without scores
    assert 3 * 18 * products <= train < 1.05 * 3 * 18 * products
    assert 2 * (40 * layer + layer + 256 * 1024 + 39 * 256 * 2 * 64) <= prefill < 0.6 * 40 * products


def test_the_promised_ratios_are_those_of_the_issue():
    assert [(case.least, case.goal) for case in CASES] == [(8, 10), (4, 5), (6, 8), (14, 18)]
    assert [case.name for case in CASES] == [
        "prefill 1 x 2048, 8 layers, 16 experts",
        "generate 1 x 64, 8 layers, 16 experts",
        "train 4 x 256, 8 layers, 16 experts",
        "train 2 x 256, 4 layers, 64 experts",
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Wrong answers are not timed


@pytest.mark.parametrize("case", TINY, ids=[case.kind for case in TINY])
def test_other_weights_are_refused_before_anything_is_timed(monkeypatch, case):
    def other_weights(model):
        theirs = in_transformers(model)
        with torch.no_grad():
            if case.kind == "generate":  # greedy tokens forgive small differences
                theirs.lm_head.weight.copy_(theirs.lm_head.weight.roll(1, dims=0))
            else:
                theirs.model.layers[1].feed_forward.experts.down_proj.mul_(1.001)
        return theirs

    def clock():
        raise AssertionError("timed")

    monkeypatch.setattr(bench, "in_transformers", other_weights)
    with pytest.raises(ValueError, match=f"^{case.name}: relative error .* not timed$"):
        bench_cpu(1, [case], moe_layers=(), clock=clock)


def test_one_wrong_gradient_is_enough_and_nan_is_an_error():
    right = {"logits": torch.ones(9), "a": torch.ones(4)}
    assert relative_error(right, right) == 0
    assert relative_error(right | {"a": torch.tensor([1, 1, 1, 1.001])}, right) == pytest.approx(5e-4, rel=1e-2)
    assert relative_error(right | {"a": torch.full((4,), float("nan"))}, right) == float("inf")
    assert relative_error({"logits": torch.ones(9)}, right) == float("inf")
    assert relative_error({"tokens": torch.tensor([1, 2])}, {"tokens": torch.tensor([1, 3])}) == 0.5


def test_without_transformers_there_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="^bench cpu compares with transformers; install it: [^\n]*$"):
        bench_cpu(1, TINY[:1], moe_layers=())


# ----------------------------------------------------------------------------------------------------------------------
# Memory


@linux
def test_a_long_prompt_adds_the_kv_of_the_nope_layer_and_little_else():
    result = bench_long(1 << 17)
    assert result["kv_bytes"] == 2 * (1 << 17) * 4 * 32 * 4  # keys and values, 4 heads of 32 channels, fp32
    assert result["growth_over_kv"] < 1.25  # less than 1 where earlier tests left free pages to this process


@linux
def test_the_peak_sees_memory_that_is_given_back_at_once():
    forget_peak()
    before = resident_bytes("VmRSS")
    torch.ones(1 << 24).sum()
    assert 0.9 < (resident_bytes("VmHWM") - before) / (4 << 24) < 1.2


# ----------------------------------------------------------------------------------------------------------------------
# Speed


@pytest.mark.slow
def test_at_least_half_of_each_promised_ratio():
    """In process time, because other work on the machine would show in wall time."""
    for row in bench_cpu(3, moe_layers=(), clock=time.process_time)["cases"]:
        assert row["ratio"] > row["least"] / 2, row["name"]
