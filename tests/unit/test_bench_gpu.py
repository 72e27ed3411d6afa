"""The GPU benchmark without a GPU: all of it on a tiny model, with a clock whose times are known."""

import json
from dataclasses import replace
from statistics import median

import pytest
import torch
from tiny_models import SCOUT_LIKE, text_only
from triton_interpreter import DEVICE  # noqa: F401, and before the kernels

from minillama4 import bench_gpu as command
from minillama4.bench_gpu import Report, bench_gpu, line
from minillama4.cli import main
from minillama4.cuda import bench
from minillama4.cuda.bench import Sizes, full_size, in_float64, point, row, taking_turns
from minillama4.cuda.decode import PLAIN
from minillama4.roofline import decode_bound

TINY = Sizes(
    text_only(SCOUT_LIKE), prompt=12, steps=2, rounds=3, prefill=30, long=47, longest=60, sequences=6, moe_tokens=40,
    keys=100, product=16, copy=1 << 12,
)  # fmt: skip


class FakeCard:
    """Runs what it is given, and says that it took 1, 2, 3 … ms."""

    device, ops, memory = torch.device("cpu"), PLAIN, 100

    def __init__(self):
        self.calls = 0

    def seconds(self, run):
        run()
        self.calls += 1
        return self.calls * 1e-3

    def forget_peak(self):
        pass

    def peak(self):
        return 1234

    def facts(self):
        return {"device": "a fake", "gpu": "h200"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(what was returned, what the file holds) of one run of everything."""
    file = tmp_path_factory.mktemp("bench") / "gpu.json"
    data = bench_gpu(file, TINY, FakeCard(), clock=lambda: 0.0)
    return data, json.loads(file.read_text(encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------------
# The whole run


def test_all_rows_of_the_issue_are_there_and_proved_their_answers(stored):
    data, read = stored
    assert read == data
    assert [(r["unit"], r["accepted"], r["goal"]) for r in read["rows"]] == [
        ("ms", 14, 11.1), ("times", 6, 7), ("times", 12, 14.5), ("relative error", 2e-2, 1e-2),
        ("tokens/s", 250, 330), ("tokens/s", 10_000, 13_000), ("GB", 80, 80),
    ]  # fmt: skip
    for r in read["rows"]:
        assert r["correct"], r
        assert r["min"] <= r["median"] <= r["max"] and r["rounds"] >= 1


def test_the_run_says_on_what_and_when(stored):
    card = stored[1]["card"]
    assert card["device"] == "a fake" and card["torch"] == torch.__version__ and card["date"][:2] == "20"
    assert {"triton", "transformers", "python", "command"} <= set(card)


def test_points_have_what_the_roofline_explorer_reads(stored):
    assert [p["name"] for p in stored[1]["points"]] == [
        "decode, batch 1, context 1K", "prefill of 8K tokens", "decode, batch 1, context 128K",
    ]  # fmt: skip
    for p in stored[1]["points"]:
        assert set(p) == {"name", "model", "dtype", "tokens_per_second", "bytes", "flops"}
        assert len(p["name"]) <= 32 and all(p[key] > 0 for key in ("tokens_per_second", "bytes", "flops"))


def test_rates_are_bytes_and_flops_over_the_median_of_the_rounds():
    """Rounds take 1 and 2, 3 and 4, 5 and 6 ms; a copy is read and written."""
    assert bench.rates(FakeCard(), TINY) == pytest.approx({"bandwidth": 2 * 4096 / 3e-3, "flops": 2 * 16**3 / 4e-3})


def test_the_full_size_is_that_of_the_issue():
    sizes = full_size()
    assert (sizes.prefill, sizes.long, sizes.moe_tokens, sizes.keys) == (8192, 131_072, 8192, 10_485_760)
    assert sizes.config.text.num_layers == 48 and sizes.config.vision is None
    assert sizes.prompt + sizes.rounds * sizes.steps + 2 <= 1024  # "context up to 1K"


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_a_row_that_fails_says_why_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(card, sizes, rate):
        raise RuntimeError("out of something")

    monkeypatch.setattr(command, "LAYER_ROWS", (broken, bench.one_nope_layer))
    monkeypatch.setattr(command, "MODEL_ROWS", ())
    rows = bench_gpu(tmp_path / "gpu.json", TINY, FakeCard(), clock=lambda: 0.0)["rows"]
    assert rows[0] == {"name": "broken", "error": "RuntimeError: out of something", "seconds_in_all": 0.0}
    assert rows[1]["correct"] and line(rows[0]) == "broken: not measured, RuntimeError: out of something"


def test_no_row_begins_after_eight_minutes(tmp_path, monkeypatch):
    times = iter([0.0, 1.0, 2.0, 481.0, 482.0, 483.0, 484.0])
    monkeypatch.setattr(command, "LAYER_ROWS", (bench.one_nope_layer, bench.chunks))
    rows = bench_gpu(tmp_path / "gpu.json", TINY, FakeCard(), clock=lambda: next(times))["rows"]
    assert rows[0]["correct"] and rows[1]["skipped"] == "480 s were over" and len(rows) == 2


def test_a_kill_between_two_rows_keeps_the_first(tmp_path, monkeypatch):
    def killed(card, sizes, rate):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "LAYER_ROWS", (bench.one_nope_layer, killed))
    with pytest.raises(KeyboardInterrupt):
        bench_gpu(tmp_path / "gpu.json", TINY, FakeCard(), clock=lambda: 0.0)
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == 1


def test_a_write_that_is_cut_short_leaves_the_file_whole(tmp_path, monkeypatch):
    report = Report(tmp_path / "gpu.json", {"device": "a fake"})
    report.add({"name": "first", "correct": True})
    monkeypatch.setattr(command.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        report.add({"name": "second", "correct": True})
    assert [r["name"] for r in json.loads((tmp_path / "gpu.json").read_text())["rows"]] == ["first"]


def test_a_wrong_answer_is_no_point(tmp_path):
    report = Report(None, {})
    report.add({"name": "wrong", "correct": False, "point": {"name": "p"}})
    assert report.data["points"] == [] and "point" not in report.data["rows"][0]


@pytest.mark.parametrize("error, correct", [(0.02, True), (0.03, False), (float("nan"), False), (-0.03, False)])
def test_correct_means_that_every_check_is_within_its_bound(error, correct):
    assert row("a", "ms", [1.0], 2, 1, {"e": error}, {"e": 0.02})["correct"] is correct


@pytest.mark.parametrize(
    "accepted, goal, value, reached",
    [
        (250, 330, 331, "goal"), (250, 330, 250, "accepted"), (250, 330, 249, "missed"),
        (14, 11.1, 11, "goal"), (14, 11.1, 14, "accepted"), (14, 11.1, 14.1, "missed"), (80, 80, 80, "goal"),
    ],
)  # fmt: skip
def test_more_is_better_unless_the_goal_is_below(accepted, goal, value, reached):
    assert row("a", "?", [value - 5, value, value + 9], accepted, goal, {}, {})["reached"] == reached


def test_both_sides_take_turns():
    order = []
    mine, theirs = taking_turns(FakeCard(), 3, lambda: order.append("a"), lambda: order.append("b"))
    assert "".join(order) == "ab" + "ababab" and median(mine) == pytest.approx(3e-3)
    assert theirs == pytest.approx([2e-3, 4e-3, 6e-3])


def test_a_point_is_counted_work_of_one_token():
    bound = decode_bound("scout", "int4", 1024, batch=4)
    p = point("decode", 100.0, bound)
    assert p["bytes"] == bound.bytes / 4 and p["flops"] == bound.flops / 4


def test_attention_in_pieces_is_attention():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 16, generator=draw).double() for n, h in ((1, 6), (70_000, 2), (70_000, 2)))
    k, v = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
    weights = (torch.einsum("hd,khd->hk", q[0], k) / 4).softmax(-1)
    torch.testing.assert_close(in_float64(q[0], k[:, ::3], v[:, ::3]), torch.einsum("hk,khd->hd", weights, v))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a CUDA device")
def test_without_cuda_there_is_one_clear_line(capsys):
    assert main(["bench", "gpu", "--out", "nowhere.json"]) == 2
    assert capsys.readouterr().err == (
        f"minillama4: bench gpu needs a CUDA device, and torch {torch.__version__} sees none\n"
    )
    assert main(["bench", "gpu", "--quick"]) == 2
    assert "--rounds and --quick are for cpu and long" in capsys.readouterr().err


def test_logits_that_are_wrong_are_seen():
    """One expert's scales off by a tenth."""
    model = bench.random_int4(TINY.config, torch.device("cpu"))
    good = bench.logits(FakeCard(), TINY, {}, model)

    def forward(*arguments, real=model.layers[3].self_attn.o_proj.forward):
        return 1.1 * real(*arguments)

    model.layers[3].self_attn.o_proj.forward = forward
    bad = bench.logits(FakeCard(), replace(TINY, sequences=12), {}, model)
    assert good["correct"] and not bad["correct"]
