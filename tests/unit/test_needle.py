"""`minillama4 needle` finds what it says it finds, by the mechanism it says; its weights are those of the card."""

import json
import re
import time

import pytest
import torch

from minillama4 import load_checkpoint
from minillama4.bench_long import forget_peak, resident_bytes
from minillama4.checkpoint import WEIGHTS
from minillama4.cli import main
from minillama4.course import needle as module
from minillama4.course.evidence import recall
from minillama4.course.evidence.recall_weights import card_text, make, sha256
from minillama4.course.needle import BESIDE, INSIDE, Needles, Question, needle, report

FOLDER = WEIGHTS / "recall"


@pytest.fixture(scope="module")
def seen():
    return needle(16_384, questions=40)


@pytest.fixture(scope="module")
def card():
    return json.loads((FOLDER / "card.json").read_text())


# ----------------------------------------------------------------------------------------------------------------------
# Finding


def test_it_finds_pairs_anywhere_in_256_times_the_context_of_training(seen):
    assert seen.tokens == 16_384 and seen.pairs == 4095 and len(seen.questions) == 40
    assert seen.rate >= 0.9
    assert seen.cache_bytes >= 2 * 4 * 48 * (seen.tokens - 4)


def test_half_of_the_needles_lie_beside_a_border_and_all_depths_occur(seen):
    for question in seen.questions:
        slot = question.token % 16 // 4
        assert question.token % 4 == 0 and question.token + 4 < seen.tokens
        assert question.place == (BESIDE if slot in (0, 3) else INSIDE)
    assert [question.place for question in seen.questions].count(BESIDE) == 20
    assert {question.token % 16 // 4 for question in seen.questions} == {0, 1, 2, 3}
    depths = [question.token / seen.tokens for question in seen.questions]
    assert min(depths) < 0.2 and max(depths) > 0.8


def test_the_same_seed_asks_the_same_and_another_asks_other_pairs(seen):
    again = needle(16_384, questions=40)
    assert again.questions == seen.questions
    assert [q.token for q in needle(16_384, 40, seed=1).questions] != [q.token for q in seen.questions]


@pytest.mark.parametrize("broken", ["NoPE layer turned into a local one", "value of the wrong pair"])
def test_without_the_mechanism_nothing_is_found(monkeypatch, broken):
    if broken == "value of the wrong pair":  # the questions are not answered by chance
        honest = recall.haystack

        def mixed_up(*args):
            hay = honest(*args)
            hay.values = hay.values.roll(1, 1)
            return hay

        cache_of = module.prefill
        monkeypatch.setattr(module, "prefill", lambda model, hay, bar: cache_of(model, honest(1, 4096, draw()), bar))
        monkeypatch.setattr(module, "haystack", mixed_up)
    else:
        local = recall.changed(load_checkpoint("recall"), nope_layers=())
        monkeypatch.setattr(module, "load_checkpoint", lambda name: local)
    assert needle(4096, questions=40).rate < 0.2  # one value in 32 is right by chance


def draw():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "arguments,says",
    [
        ((63,), "tokens is 63; it must be 64 to 16,777,216"),
        ((16_777_217,), "tokens is 16,777,217; it must be 64 to 16,777,216"),
        ((4096, 0), "questions is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        needle(*arguments)


def test_the_shortest_context_works():
    assert len(needle(64, questions=3).questions) == 3


def test_what_it_says_before_it_takes_its_memory():
    lines = []
    seen = needle(4096, 2, said=lines.append)
    assert lines == ["1,023 pairs, no key twice; their keys and values will take 0.00 GiB"]
    assert abs(module.kv_bytes(load_checkpoint("recall"), 4096) - seen.cache_bytes) < 48 * 8 * (3 * 16 + 1)
    assert module.kv_bytes(load_checkpoint("recall"), 10_485_760) < 7 * 2**30


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_the_report_counts_by_place_and_gives_the_interval():
    questions = [Question(0, INSIDE, True, False), Question(8, BESIDE, True, True), Question(4, INSIDE, False, False)]
    lines = report(Needles(6400, 1599, 1, 2.0, 3.0, questions)).splitlines()
    assert lines[0] == "6,400 tokens (100 times those of training) read in 2.0 s, 3 questions asked twice in 3.0 s"
    assert lines[2].split() == [*INSIDE.split(), *"1 of 2".split(), *"0 of 2".split()]
    assert lines[3].split() == [*BESIDE.split(), *"1 of 1".split(), *"1 of 1".split()]
    assert lines[4] == "found 2 of 3: 67% (95 % interval 21% to 94%)"


def test_the_command_prints_the_rate(capsys):
    assert main(["needle", "--tokens", "4K", "--questions", "4"]) == 0
    out = capsys.readouterr().out
    assert "1,023 pairs" in out and re.search(r"^4,096 tokens \(64 times", out, re.M)
    assert re.search(r"^found \d of 4: \d+%", out, re.M)


def test_bad_tokens_are_one_line_and_exit_code_2(capsys):
    assert main(["needle", "--tokens", "ten"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--tokens is 'ten'" in error


@pytest.mark.slow
def test_a_million_tokens_in_a_minute():
    started = time.perf_counter()
    seen = needle(1 << 20)
    assert time.perf_counter() - started < 60 and seen.rate >= 0.7


@pytest.mark.slow
def test_memory_is_the_cache_and_little_more():
    needle(4096, 1)
    forget_peak()
    before = resident_bytes("VmRSS")
    seen = needle(1 << 20, 1)
    assert resident_bytes("VmHWM") - before < 1.3 * seen.cache_bytes


# ----------------------------------------------------------------------------------------------------------------------
# The weights


def test_the_weights_are_small_and_those_of_the_card(card):
    assert sha256(FOLDER / "model.safetensors") == card["sha256"]
    assert (FOLDER / "model.safetensors").stat().st_size < 300_000
    assert (FOLDER / "card.md").read_text() == card_text(card)


def test_the_card_s_scores_are_those_of_the_stored_weights(card):
    model = load_checkpoint("recall")
    assert model.config == recall.recall_config()
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]
    assert recall.exam(model)["accuracy"] == pytest.approx(card["exam"], abs=0.002)
    assert card["exam"] >= 0.99
    rates = {row["tokens"]: row["right"] / row["asked"] for row in card["lengths"]}
    assert rates[64] >= 0.95 and rates[1_048_576] >= 0.8


def test_the_command_that_makes_them_writes_weights_that_load_and_their_card(tmp_path):
    card = make(tmp_path, most=2, finish=1, lengths=(64,))
    assert card["sha256"] == sha256(tmp_path / "model.safetensors") and card["steps"] == 2
    assert load_checkpoint(tmp_path).lm_head.weight.shape == (288, 64)
    assert "| 64 |" in (tmp_path / "card.md").read_text()
