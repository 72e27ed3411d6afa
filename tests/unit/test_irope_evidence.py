"""Lesson 02's study: its data, its questions and its measures, each against another computation; and what it stored."""

import json
import math
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch

from minillama4.attention import full_attention
from minillama4.course.evidence import irope, recall, study
from minillama4.course.evidence.irope import ARMS, CHANGES, LENGTHS, RATES, RECIPE, build
from minillama4.course.evidence.recall import KEY, KEYS, PAIR, SYMBOLS, TRAINED, VALUES, Haystack, haystack
from minillama4.trace import trace

STORED = study.load("irope")
DECISIVE = ("iRoPE", "local only", "all RoPE", "all NoPE")


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def read_pairs(ids):
    """Token ids of one context -> [(key, value), ...], by plain Python."""
    ids = ids.tolist()
    return [(tuple(ids[i : i + KEY]), ids[i + KEY]) for i in range(0, len(ids), PAIR)]


# ----------------------------------------------------------------------------------------------------------------------
# Data


def test_what_a_training_row_asks_for_is_the_value_of_a_key_that_came_before():
    ids, say = recall.training_rows(64, draw())
    assert ids.shape == say.shape == (64, TRAINED)
    asked = 0
    for row, marks in zip(ids, say, strict=True):
        known = {}
        for slot, (key, value) in enumerate(read_pairs(row)):
            assert all(0 <= symbol < SYMBOLS for symbol in key) and SYMBOLS <= value < SYMBOLS + VALUES
            assert marks[slot * PAIR : slot * PAIR + KEY].sum() == 0
            assert bool(marks[slot * PAIR + KEY]) == (key in known)
            assert known.setdefault(key, value) == value
            asked += bool(marks[slot * PAIR + KEY])
    assert 0.4 < asked / (64 * 15) < 0.6


def test_half_of_the_training_rows_make_their_keys_of_three_symbols_a_place():
    ids, _ = recall.training_rows(32, draw(1))
    kinds = [[len({key[place] for key, _ in read_pairs(row)}) for place in range(KEY)] for row in ids]
    assert all(max(kind) > 3 for kind in kinds[:16]) and all(max(kind) <= 3 for kind in kinds[16:])


def test_no_key_comes_twice_in_a_haystack_and_any_piece_of_it_is_part_of_the_whole():
    hay = haystack(2, 4096, draw(2))
    whole = hay.ids(0, hay.tokens)
    assert whole.shape == (2, 4092)
    for row, keys, values in zip(whole, hay.keys, hay.values, strict=True):
        pairs = read_pairs(row)
        assert len({key for key, _ in pairs}) == len(pairs) == 1023
        assert [sum(s * SYMBOLS**i for i, s in enumerate(key)) for key, _ in pairs] == keys.tolist()
        assert [value - SYMBOLS for _, value in pairs] == values.tolist()
    assert not torch.equal(hay.keys[0].sort()[0], hay.keys[0])  # unsorted: depth says nothing about the key
    for start, end in ((0, 1), (3, 9), (8, 12), (1001, 4092)):
        assert torch.equal(hay.ids(start, end), whole[:, start:end])
    shifted = Haystack(hay.keys, hay.values, dropped=3)
    assert shifted.tokens == 4089 and torch.equal(shifted.ids(5, 50), whole[:, 8:53])


def test_too_many_keys_are_refused():
    with pytest.raises(ValueError, match=f"at most {KEYS // 4:,}"):
        recall.distinct_keys(KEYS // 4 + 1, draw())


# ----------------------------------------------------------------------------------------------------------------------
# Asking


@pytest.mark.parametrize("arm", DECISIVE)
def test_a_question_is_answered_as_in_one_pass_and_then_forgotten(arm):
    """The truth is one forward pass over haystack and question, without any cache."""
    model, hay = build(arm).eval(), haystack(3, 200, draw(3))
    cache = recall.prefill(model, hay)
    for pair in (7, 40, 7):
        said = recall.ask(model, cache, hay.keys[:, pair])
        whole = torch.cat([hay.ids(0, hay.tokens), recall.symbols(hay.keys[:, pair])], dim=1)
        with torch.no_grad():
            truth = model(whole)[:, -1, SYMBOLS:].argmax(-1)
        assert torch.equal(said, truth)
    assert cache.length == hay.tokens


def test_a_question_across_a_border_is_refused():
    model = build("iRoPE").eval()
    cache = recall.prefill(model, haystack(1, 64, draw(), dropped=1))  # 59 tokens: 11 in the last chunk
    recall.ask(model, cache, torch.tensor([5]))
    cache.length = 62
    with pytest.raises(ValueError, match="62 tokens; the question would cross the border of a chunk of 16"):
        recall.ask(model, cache, torch.tensor([5]))


def test_a_changed_model_has_the_same_weights_and_another_mechanism():
    model = build("iRoPE").eval()
    cold = recall.changed(model, temperature_tuning=False)
    assert cold.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    ids = haystack(1, 2048, draw(4)).ids(0, 2000)
    with torch.no_grad():
        one, other = model(ids), cold(ids)
    assert torch.equal(one[:, : TRAINED - 1], other[:, : TRAINED - 1])  # in training, temperature is 1
    assert (one[:, -1] - other[:, -1]).abs().max() > 1e-4 and model.config.text.temperature_tuning


@pytest.mark.parametrize("right,asked", [(0, 20), (8, 10), (128, 128), (371, 384)])
def test_the_interval_holds_the_rates_that_the_data_do_not_reject(right, asked):
    """Wilson's ends are where |rate - p| = 1.96 sqrt(p (1 - p) / n): found by bisection."""

    def end(inner, outer):
        for _ in range(60):
            middle = (inner + outer) / 2
            rejected = abs(right / asked - middle) > 1.96 * math.sqrt(middle * (1 - middle) / asked)
            inner, outer = (inner, middle) if rejected else (middle, outer)
        return inner

    low, high = recall.wilson(right, asked)
    assert low == pytest.approx(end(right / asked, 0.0), abs=1e-9)
    assert high == pytest.approx(end(right / asked, 1.0), abs=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Measures


def test_how_the_needle_stands_out_by_definition():
    logits, needle = 3 * torch.randn(2, 3, 50, generator=draw(5)), torch.tensor([[7], [49]])
    found = irope.standing_out(logits, needle)
    for row in range(2):
        for head in range(3):
            all_ = logits[row, head].double().tolist()
            own = all_.pop(int(needle[row]))
            margin = own - math.log(sum(map(math.exp, all_)) / 49)
            assert float(found["lead"][row, head]) == pytest.approx(own - sum(all_) / 49, abs=1e-4)
            assert float(found["margin"][row, head]) == pytest.approx(margin, abs=1e-4)
            assert float(found["nearest"][row, head]) == pytest.approx(own - max(all_), abs=1e-4)
            assert float(found["share"][row, head]) == pytest.approx(1 / (1 + 49 * math.exp(-margin)), abs=1e-5)


@pytest.mark.parametrize("arm", ["iRoPE", "all RoPE", "all NoPE"])
def test_logits_are_those_that_the_last_layer_compares(arm):
    model, hay = build(arm).eval(), haystack(2, 300, draw(6))
    cache = recall.prefill(model, hay)
    with irope.last_logits(model, on=True) as seen:
        recall.ask(model, cache, hay.keys[:, 3])
    whole = torch.cat([hay.ids(0, hay.tokens), recall.symbols(hay.keys[:, 3])], dim=1)
    with torch.no_grad(), trace(model, attention=[3]) as traced:
        model(whole)
    assert len(seen) == 1 and model.layers[3].self_attn.probe is None
    assert torch.allclose(seen[0].softmax(-1), traced.attention[3][:, :, -1], atol=1e-5)


def test_nothing_is_read_of_a_local_last_layer():
    found = irope.at_length(build("local only").eval(), 256, 8, seed=0)
    assert "margin" not in found and found["asked"] == 64


def test_the_exam_measures_binding_and_matching():
    model = build("iRoPE").eval()
    got = recall.exam(model, rows=64)
    ids, say = recall.training_rows(64, draw(7))
    with torch.no_grad(), trace(model, attention=range(4)) as seen:
        right = model(ids)[:, :-1].argmax(-1) == ids[:, 1:]
    assert got["accuracy"] == pytest.approx(float(right[say[:, 1:]].float().mean()))
    bind, match = torch.zeros(3, 2), torch.zeros(2)
    for row in range(64):
        pairs = read_pairs(ids[row])
        for slot, (key, _) in enumerate(pairs):
            for layer in range(3):
                bind[layer] += seen.attention[layer][row, :, slot * 4 + 3, slot * 4 : slot * 4 + 3].sum(-1)
            for earlier in range(slot):
                if pairs[earlier][0] == key:
                    match += seen.attention[3][row, :, slot * 4 + 2, earlier * 4 + 3]
    assert got["bind"] == pytest.approx(float(bind.max()) / (64 * 16), abs=1e-5)
    assert got["match"] == pytest.approx(float(match.max()) / int(say.sum()), abs=1e-5)


def test_training_ends_a_fixed_number_of_steps_after_the_exam_is_passed(monkeypatch):
    assert (recall.LOGGED, recall.ENOUGH) == (50, 0.99)
    monkeypatch.setattr(recall, "LOGGED", 2)
    monkeypatch.setattr(recall, "ROWS", 2)
    monkeypatch.setattr(recall, "exam", lambda model: {"accuracy": 0.0, "bind": 0.0, "match": 0.0})
    never = recall.learn(build("iRoPE"), 0.01, 0, 10, 3)
    assert (never["learned"], never["passed_at"], never["steps"]) == (False, None, 10)
    monkeypatch.setattr(recall, "exam", lambda model: {"accuracy": 1.0, "bind": 0.0, "match": 0.0})
    at_once = recall.learn(build("iRoPE"), 0.01, 0, 10, 3)
    assert (at_once["learned"], at_once["passed_at"], at_once["steps"]) == (True, 2, 5)
    assert at_once["history"]["steps"] == [2, 4, 5]


# ----------------------------------------------------------------------------------------------------------------------
# Where it breaks


@pytest.fixture
def asked(monkeypatch):
    """Every question as (haystack, row, number of the pair in it), in place of an answer."""
    questions, current = [], []
    monkeypatch.setattr(irope, "prefill", lambda model, hay: current.append(hay))

    def ask(model, cache, keys):
        for row, key in enumerate(keys):
            questions.append((current[-1], row, int((current[-1].keys[row] == key).nonzero())))
        return torch.zeros(len(keys), dtype=torch.int64)

    monkeypatch.setattr(irope, "ask", ask)
    monkeypatch.setattr(irope, "last_logits", lambda model, on: nullcontext([]))
    return questions


def test_split_pairs_lie_across_a_border_and_whole_ones_do_not(asked):
    found = irope.split_pairs(None, 4096, 16, seed=0)
    assert list(found) == ["after 1", "whole beside 1", "after 2", "whole beside 2", "after 3", "whole beside 3"]
    assert len(asked) == 6 * 16 == sum(each["asked"] for each in found.values())
    for index, (hay, row, pair) in enumerate(asked):
        cut, whole = index // 32 + 1, index // 16 % 2 == 1
        ids = hay.ids(0, hay.tokens)[row].tolist()
        key = recall.symbols(hay.keys[row, pair]).tolist()
        starts = [i for i in range(len(ids) - 3) if ids[i : i + 3] == key and ids[i + 3] >= SYMBOLS]
        assert len(starts) == 1
        chunks = [position // 16 for position in range(starts[0], starts[0] + 4)]
        assert chunks.count(chunks[0]) == (4 if whole else cut)


def test_depths_are_spread_over_the_whole_context(asked):
    irope.at_length(None, 1024, 640, seed=0)
    depths = sorted(pair / hay.keys.shape[1] for hay, _, pair in asked)
    assert len(depths) == 640 and depths[0] < 0.02 and depths[-1] > 0.98
    assert max(b - a for a, b in pairwise(depths)) < 0.05


@pytest.mark.parametrize("near", [0, 12, 765])
def test_a_crowd_shares_two_of_three_symbols_with_the_needle(near):
    hay = haystack(1, 4096, draw(8))
    before = hay.keys.clone()
    irope.crowd(hay, 0, 500, near, draw(9))
    needle = recall.symbols(hay.keys[0, 500])
    shared = (recall.symbols(hay.keys[0]) == needle).sum(-1)
    assert torch.equal(hay.keys[0, 500], before[0, 500]) and int((shared == KEY).sum()) == 1
    assert near <= int((shared == 2).sum()) <= near + 3  # a few may have been there
    assert int((hay.keys != before).sum()) == near
    changed = (hay.keys != before)[0].nonzero()[:, 0].float()
    assert near == 0 or changed.min() < 500 < changed.max()


# ----------------------------------------------------------------------------------------------------------------------
# Arms


def kinds(arm):
    text = build(arm).config.text
    names = {(False, True): "L", (False, False): "G", (True, False): "N"}  # local RoPE, global RoPE, NoPE
    return "".join(names[text.is_nope(layer), text.is_local(layer)] for layer in range(4))


def test_each_arm_is_what_its_name_says_and_all_have_the_same_size():
    assert {arm: kinds(arm) for arm in ARMS} == {
        "iRoPE": "LLLN", "local only": "LLLL", "all RoPE": "GGGG", "all NoPE": "NNNN", "NoPE every 2": "LNLN",
        "NoPE above one RoPE": "LNNN", "NoPE first": "NLLL", "chunk 8": "LLLN", "chunk 32": "LLLN",
        "chunk 64": "LLLN", "RoPE scaled": "LLLN",
    }  # fmt: skip
    assert [build(f"chunk {size}").config.text.chunk_size for size in (8, 32, 64)] == [8, 32, 64]
    assert len({sum(p.numel() for p in build(arm).parameters()) for arm in ARMS}) == 1
    states = [build(arm) for arm in ("iRoPE", "all NoPE")]
    for model in states:
        model.reset_parameters(draw(3))
    assert torch.equal(states[0].layers[3].self_attn.q_proj.weight, states[1].layers[3].self_attn.q_proj.weight)


def test_the_plan_has_three_seeds_of_what_decides_and_the_same_rates_for_each():
    jobs = irope.arms()
    for arm in DECISIVE:
        assert {job["seed"] for job in jobs if job["arm"] == arm and job["rate"] == RATES[arm]} == {0, 1, 2}
        assert {job["rate"] for job in jobs if job["arm"] == arm and job["seed"] == 0} == set(RECIPE["rates"])
    longest = {arm: max(job["longest"] for job in jobs if job["arm"] == arm) for arm in ARMS}
    assert (
        longest["iRoPE"] == longest["local only"] == 1_048_576 and longest["all RoPE"] == longest["all NoPE"] == 65_536
    )
    assert LENGTHS[0] == TRAINED and all(b == 4 * a for a, b in pairwise(LENGTHS))
    assert len({str(job) for job in jobs}) == len(jobs)
    assert all(change in CHANGES for job in jobs for change in job["changes"])


def test_a_short_run_gives_a_whole_row():
    job = irope.job("iRoPE", 0.01, 0, 256, ("as trained", "temperature off"), breaks=True)
    row = irope.run(job | {"train_steps": 2, "finish_steps": 1, "asked": 2})
    assert row["steps"] == 2 and not row["learned"]
    for name in job["changes"]:
        assert [entry["tokens"] for entry in row["lengths"][name]] == [64, 256]
        assert all(entry["low"] <= entry["right"] / entry["asked"] <= entry["high"] for entry in row["lengths"][name])
        assert set(row["crowd"][name]) == {"0", "12", "96", "765"} and len(row["split"][name]) == 6
    trained, cold = (row["lengths"][name] for name in job["changes"])
    assert trained[0]["margin"] == cold[0]["margin"] and trained[1]["margin"] != cold[1]["margin"]


def test_one_query_over_all_keys_is_what_the_last_layer_runs():
    """`full_attention`, with the logits of `last_logits`: the margin is about the numbers that are used."""
    q, k, v = (torch.randn(1, n, h, 48, generator=draw(i)) for i, (n, h) in enumerate([(1, 2), (90, 1), (90, 1)]))
    seen = (q[:, -1] * 48**-0.5) @ k[:, :, 0].mT
    assert torch.allclose(full_attention(q, k, v)[:, 0], seen.softmax(-1) @ v[:, :, 0], atol=1e-5)


def test_an_arm_may_start_from_the_weights_of_another(monkeypatch):
    """It learns first as the one and then as the other: the weights stay, the layers change."""
    calls = []

    def learn(model, rate, seed, most, finish, fresh=True):
        text = model.config.text
        calls.append((text.nope_layers, text.chunk_size, fresh, model.lm_head.weight.data_ptr()))
        return {}

    monkeypatch.setattr(irope, "learn", learn)
    irope.run(irope.job("all RoPE", 0.01, 0, 64, start="iRoPE", asked=1))
    assert [call[:3] for call in calls] == [((3,), 16, True), ((), None, False)]
    assert calls[0][3] == calls[1][3]


@pytest.mark.parametrize("fresh", [True, False])
def test_only_a_fresh_start_draws_new_weights(fresh):
    model = build("iRoPE")
    before = model.embed_tokens.weight.detach().clone()
    recall.learn(model, 1e-9, 5, 1, 1, fresh=fresh)
    assert torch.allclose(model.embed_tokens.weight, before, atol=1e-6) is not fresh


# ----------------------------------------------------------------------------------------------------------------------
# What is stored


def plain(job):
    return json.loads(json.dumps(job))


def test_every_arm_is_stored_once_and_nothing_else():
    jobs, rows = [plain(job) for job in irope.arms()], STORED["rows"]
    assert len(rows) == len(jobs) == 30
    for job in jobs:
        assert sum(row.items() >= job.items() and row.get("start") == job.get("start") for row in rows) == 1, job


def test_the_rate_of_each_arm_is_one_of_its_best():
    for arm, rate in RATES.items():
        tried = {
            row["rate"]: (row["learned"], row["history"]["accuracy"][-1])
            for row in STORED["rows"]
            if row["arm"] == arm and row["seed"] == 0 and row["train_steps"] == 1200 and "start" not in row
        }
        assert sorted(tried) == RECIPE["rates"]
        best = max(tried.values())
        assert tried[rate][0] == best[0] and tried[rate][1] >= best[1] - 0.02  # on 2,000 answers: one and a half points


def test_what_the_lesson_says_of_the_study():
    """Each claim of the lesson's seven, from the rows alone."""
    usual = [row for row in STORED["rows"] if row["train_steps"] == 1200 and row["rate"] == 0.01]
    arm = {name: [row for row in usual if row["arm"] == name and "start" not in row] for name in ARMS}
    begun = next(row for row in usual if "start" in row)

    def found(rows, change="as trained"):
        """tokens -> share of the pairs found."""
        points = [point for row in rows for point in row["lengths"][change]]
        return {
            n: sum(p["right"] for p in points if p["tokens"] == n) / sum(p["asked"] for p in points if p["tokens"] == n)
            for n in {point["tokens"] for point in points}
        }

    assert [row["learned"] for name in DECISIVE for row in arm[name]] == [True] * 3 + [False] * 9
    assert not any(row["learned"] for row in STORED["rows"] if row["arm"] in DECISIVE[1:] and "start" not in row)
    assert [arm[f"chunk {n}"][0]["learned"] for n in (8, 32, 64)] == [True, False, False]
    assert begun["learned"] and [round(found([begun])[n], 2) for n in (64, 256)] == [1.0, 0.28]
    assert found([begun])[1024] < 0.06
    hot, cold = found(arm["iRoPE"]), found(arm["iRoPE"], "temperature off")
    assert [round(hot[n], 2) for n in (65_536, 1_048_576)] == [0.92, 0.43] and round(cold[1_048_576], 2) == 0.28
    margins = [[p["margin"] for p in row["lengths"]["as trained"]] for row in arm["iRoPE"]]
    assert all(18 < row[0] < 20 and 11 < row[-1] < 13 for row in margins)
    for tokens, least, most in ((16_384, 1.5, 2.5), (1_048_576, 0.5, 1.0)):  # what temperature adds to the margin
        n = LENGTHS.index(tokens)
        added = [row["lengths"]["as trained"][n]["margin"] - row["lengths"]["temperature off"][n]["margin"]
                 for row in arm["iRoPE"]]  # fmt: skip
        assert least < sum(added) / len(added) < most
    cut = [sum(row["split"]["as trained"][f"after {n}"]["right"] for row in arm["iRoPE"]) / 384 for n in (1, 2, 3)]
    assert round(min(cut), 2) == 0.02 and round(max(cut), 2) == 0.14
    assert sum(row["crowd"]["as trained"]["765"]["right"] for row in arm["iRoPE"]) / 384 < hot[1_048_576]
    assert not arm["NoPE first"][0]["learned"] and found(arm["NoPE every 2"])[65_536] >= hot[65_536] - 0.01
    costs = [[p["prefill_us_per_token"] for p in rows[0]["lengths"]["as trained"]] for rows in arm.values()]
    assert 4 < costs[0][5] < 6 and 500 < costs[2][5] < 550
