"""The study of lesson 03: its data are what it says, its arms differ in one thing, and it goes on after a kill."""

import json

import pytest
import torch

from minillama4.course.evidence import moe, study
from minillama4.moe import MoE

STORED = study.load("moe")


def rows(arm: str) -> list[dict]:
    return [row for row in STORED["rows"] if row["arm"] == arm]


def job(**settings) -> dict:
    return {"seed": 0, "rate": 0.008, "train_steps": 2} | settings


# ----------------------------------------------------------------------------------------------------------------------
# What is read


def number(ids: torch.Tensor) -> int:
    return int("".join(str(int(id) - moe.DIGIT) for id in ids.flip(0)))  # lowest digit first


@pytest.mark.parametrize("held_out", [False, True])
def test_sums_are_right_and_what_is_said_are_their_digits(held_out):
    ids, say = moe.sum_rows(3, torch.Generator().manual_seed(0), held_out)
    for sum_, said in zip(ids[:, :60].reshape(-1, 12), say[:, :60].reshape(-1, 12), strict=True):
        assert number(sum_[:3]) + number(sum_[3:6]) == number(sum_[7:11])
        assert said.tolist() == [False] * 7 + [True] * 4 + [False]


def test_a_held_out_pair_is_never_read():
    draw = torch.Generator().manual_seed(0)

    def pairs(held_out):
        ids, _ = moe.sum_rows(2000, draw, held_out)
        return {(number(s[:3]), number(s[3:6])) for s in ids[:, :60].reshape(-1, 12)}

    read, kept = pairs(False), pairs(True)
    assert not read & kept
    last_digits = {(a % 10, b % 10) for a, b in read}
    assert (
        last_digits == {(a % 10, b % 10) for a, b in kept} and len(last_digits) == 100
    )  # no digit is new, the pair is


def test_each_fact_has_one_object_and_frequent_facts_are_read_more():
    world = moe.World.draw(0)
    ids, say = world.fact_rows(torch.arange(moe.FACTS).view(-1, 16))
    facts = ids.view(-1, 4)
    assert len({(int(a), int(b)) for a, b in facts[:, :2]}) == moe.FACTS
    assert facts[:, 3].equal(world.objects + 2 * moe.NAMES) and say.sum() == moe.FACTS
    chance = world.chance.sort(descending=True).values
    assert chance[0] / chance[99] == pytest.approx(100, rel=1e-4) and world.chance.sum() == pytest.approx(1)


# ----------------------------------------------------------------------------------------------------------------------
# What is compared


def test_the_studied_layer_is_the_package_s_layer():
    studied, own = moe.StudiedMoE(8, 32), MoE(moe.HIDDEN, 8, 32)
    draw = torch.Generator().manual_seed(0)
    for parameter in studied.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    own.load_state_dict(studied.state_dict())
    x = torch.randn(2, 9, moe.HIDDEN, generator=draw)
    assert torch.allclose(studied(x), own(x), atol=1e-5)


@pytest.mark.parametrize("change", [{"output_softmax": True}, {"shared": False}])
def test_a_variant_is_another_function(change):
    plain, other = moe.StudiedMoE(8, 32), moe.StudiedMoE(8, 32, **change)
    draw = torch.Generator().manual_seed(0)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    other.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 9, moe.HIDDEN, generator=draw)
    assert (plain(x) - other(x)).norm() > 0.1 * plain(x).norm()


def test_softmax_on_the_output_by_a_loop():
    layer = moe.StudiedMoE(4, 16, output_softmax=True, shared=False)
    draw = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    x = torch.randn(1, 5, moe.HIDDEN, generator=draw)
    for token, out in zip(x[0], layer(x)[0], strict=True):
        chance = torch.softmax(layer.router.weight @ token, 0)
        e = int(chance.argmax())
        gate, up = (token @ layer.experts.gate_up_proj[e]).chunk(2)
        by_hand = chance[e] * ((torch.nn.functional.silu(gate) * up) @ layer.experts.down_proj[e])
        assert torch.allclose(out, by_hand, atol=1e-4)


def test_the_bias_chooses_and_never_scores():
    layer = moe.StudiedMoE(4, 16)
    draw = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    x = torch.randn(1, 50, moe.HIDDEN, generator=draw)
    plain = layer(x)
    chosen = layer.expert_T
    layer.bias_E += 0.5  # all alike: the same choice, so nothing may change
    assert torch.equal(layer(x), plain)
    layer.bias_E[2] = 1e6
    out = layer(x)
    assert layer.load().tolist() == [0, 0, 1, 0]
    assert torch.allclose(out[0, chosen == 2], plain[0, chosen == 2], atol=1e-5) and (chosen == 2).any()


def test_the_bias_goes_up_for_who_has_too_little(monkeypatch):
    """One step of training, from a bias of zero: each expert's bias is a step towards the even share."""
    kept = []
    monkeypatch.setattr(moe, "tests", lambda model, world: {})
    monkeypatch.setattr(moe, "test_loads", lambda model, world, layers: kept.extend(layers) or [])
    moe.train(job(experts=8, cure="bias", strength=0.25, train_steps=1))
    for layer in kept:
        counts = torch.bincount(layer.expert_T, minlength=8)
        few, many = counts < len(layer.expert_T) / 8, counts > len(layer.expert_T) / 8
        assert few.any() and (layer.bias_E[few] == 0.25).all() and (layer.bias_E[many] == -0.25).all()


def test_active_size_is_equal_and_total_is_as_said():
    size = {row["experts"]: row for row in rows("experts")}
    router = moe.LAYERS * moe.HIDDEN  # weights an expert adds to the routers, which every token uses
    assert all(size[e]["active"] - size[1]["active"] == (e - 1) * router for e in size)
    for dense, experts in zip(rows("dense"), (4, 16), strict=True):
        assert dense["total"] == dense["active"] == size[experts]["total"] - experts * router
    assert rows("no shared expert")[0]["active"] == pytest.approx(size[16]["active"], rel=0.01)
    assert rows("no shared expert")[0]["total"] == pytest.approx(size[16]["total"], rel=0.06)


def test_all_arms_read_the_same_batches(monkeypatch):
    seen = []
    batch = moe.World.batch
    monkeypatch.setattr(moe.World, "batch", lambda self, draw: seen.append(batch(self, draw)) or seen[-1])
    monkeypatch.setattr(moe, "tests", lambda model, world: {"fact_loss": 0.0, "sum_loss": 0.0})
    monkeypatch.setattr(moe, "test_loads", lambda *_: [])
    moe.train(job(experts=1))
    moe.train(job(dense=64))
    for first, second in zip(seen[:2], seen[2:], strict=True):
        assert all(a.equal(b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# What is stored


def test_every_arm_is_stored_once_and_nothing_else():
    wanted = json.loads(json.dumps(moe.arms(moe.RECIPE["train_steps"])))
    assert len(STORED["rows"]) == len(wanted)
    assert all(row.items() >= job.items() for row, job in zip(STORED["rows"], wanted, strict=True))


def test_each_size_was_trained_at_the_rate_that_was_best_in_its_sweep():
    for key, rates in (("experts", moe.EXPERT_RATES), ("dense", moe.DENSE_RATES)):
        for size, rate in rates.items():
            tried = [row for row in rows("sweep") if row.get(key) == size]
            assert len(tried) == len(moe.SWEEP)
            assert min(tried, key=lambda row: row["fact_loss"])["rate"] == rate
            assert rate not in (moe.SWEEP[0], moe.SWEEP[-1]), "the best may lie outside what was tried"


def test_a_run_gives_its_stored_row_again():
    """Up to the second entry of its history, 50 steps in: batches, model, optimiser and rate are what they were."""
    stored = rows("experts")[0]
    short = {name: stored[name] for name in ("experts", "seed", "rate", "train_steps")}

    class Enough(Exception):
        pass

    losses, answers = [], moe.answers

    def counted(model, ids, say):
        loss, right = answers(model, ids, say)
        losses.append(loss.detach())
        if len(losses) == moe.LOGGED + 1:
            raise Enough
        return loss, right

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Enough):
        patch.setattr(moe, "answers", counted)
        moe.train(short)
    facts = moe.RECIPE["batch"]["facts"] * 16
    for entry, step in ((0, 0), (1, moe.LOGGED)):
        assert float(losses[step][:facts].mean()) == pytest.approx(stored["fact_losses"][entry], abs=0.02)
        assert float(losses[step][facts:].mean()) == pytest.approx(stored["sum_losses"][entry], abs=0.02)
    assert stored["fact_losses"][1] < stored["fact_losses"][0] - 1  # so a model that does not learn would be seen


def test_the_stored_bench_beats_no_bound():
    bench = study.load("bench_cpu")
    sizes = [(row["experts"], row["tokens"]) for row in bench["moe_layer"]]
    assert sizes == [(experts, tokens) for experts in (16, 128) for tokens in (1, 8, 64, 512, 2048)]
    for row in bench["moe_layer"]:
        assert row["ours_ms"] > 0.95 * max(row["flop_bound_ms"], row["byte_bound_ms"])


# ----------------------------------------------------------------------------------------------------------------------
# The harness


def double(job: dict) -> dict:
    return {"doubled": 2 * job["x"]}


def fails_at_three(job: dict) -> dict:
    if job["x"] == 3:
        raise RuntimeError("stopped")
    return double(job)


def test_a_study_that_was_stopped_goes_on_and_keeps_what_it_had(tmp_path):
    out, jobs = tmp_path / "s.json", [{"x": x} for x in (1, 3, 2)]
    with pytest.raises(RuntimeError, match="stopped"):
        study.study(jobs, fails_at_three, {"seed": 1}, out, workers=1)
    half = json.loads(out.read_text())["rows"]
    assert half == [{"x": 1, "doubled": 2}]
    report = study.study(jobs, double, {"seed": 1}, out, workers=1)
    assert [row["doubled"] for row in report["rows"]] == [2, 6, 4]  # in the order of the jobs
    assert json.loads(out.read_text()) == report


def test_a_job_is_not_taken_for_one_that_says_one_thing_more(tmp_path):
    out, more, less = tmp_path / "s.json", {"x": 1, "start": "warm"}, {"x": 1}
    study.study([more], double, {"seed": 1}, out, workers=1)
    report = study.study([less, more], double, {"seed": 1}, out, workers=1)
    assert report["rows"] == [less | {"doubled": 2}, more | {"doubled": 2}]


def test_results_of_another_recipe_are_not_mixed_in(tmp_path):
    out = tmp_path / "s.json"
    study.study([{"x": 1}], double, {"steps": 5}, out, workers=1)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="another recipe"):
        study.study([{"x": 2}], double, {"steps": 6}, out, workers=1)
    assert out.read_bytes() == before
