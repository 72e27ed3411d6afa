"""Information is compared with its definition and with cases known by thought; controls, with what they must keep."""

import json
import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

from minillama4 import load_checkpoint, load_tokenizer, scenes
from minillama4.course.evidence import specialise
from minillama4.course.evidence.specialise import (
    DIGIT,
    FRAME,
    INSIDE,
    PATCH,
    PUNCTUATION,
    SORTS,
    START,
    entropy,
    information,
    kinds_of,
    measured,
    measures,
)  # fmt: skip
from minillama4.documents import Writer


@pytest.fixture(scope="module")
def model():
    return load_checkpoint("mini-scout")


@pytest.fixture(scope="module")
def writer(model):
    return Writer(model.config, load_tokenizer("mini-scout"))


@pytest.fixture(scope="module")
def tokens(model, writer):
    return specialise.collect(model, writer, num_scenes=4, seed=5)


def rng(seed=0):
    return np.random.default_rng(seed)


# ----------------------------------------------------------------------------------------------------------------------
# Information


def by_definition(a, b):
    """H(a) + H(b) - H(a, b), from counters: nothing in common with the code."""

    def bits(values):
        return -sum(n / len(a) * math.log2(n / len(a)) for n in Counter(values).values())

    return bits(a.tolist()) + bits(b.tolist()) - bits(list(zip(a.tolist(), b.tolist(), strict=True)))


@pytest.mark.parametrize("seed", range(5))
def test_information_is_what_the_entropies_say(seed):
    a = rng(seed).integers(0, 5, 200)
    b = np.where(rng(seed + 9).random(200) < 0.5, a, rng(seed + 5).integers(0, 7, 200))
    assert information(a, b) == pytest.approx(by_definition(a, b))
    assert entropy(a) == pytest.approx(by_definition(a, a))
    g = rng(seed + 20).integers(0, 3, 200)
    parts = [(g == k).mean() * by_definition(a[g == k], b[g == k]) for k in range(3)]
    assert information(a, b, g) == pytest.approx(sum(parts))


def test_information_of_known_cases():
    four = np.arange(400) % 4
    assert information(four, four) == pytest.approx(2) == entropy(four)
    assert information(four, np.arange(400) // 100) == pytest.approx(0)
    assert information(four, four // 2) == pytest.approx(1)  # one of two bits
    assert information(four % 2, four // 2 ^ four % 2) == pytest.approx(0)  # xor: nothing alone ...
    assert information(four % 2, four // 2 ^ four % 2, four // 2) == pytest.approx(1)  # ... and all, given the other
    assert information(four, four // 2, four // 2) == pytest.approx(0)  # what is given tells no more


# ----------------------------------------------------------------------------------------------------------------------
# Controls


def test_rotated_labels_stay_in_their_document_and_in_their_order():
    document, label = np.repeat([0, 1, 2], [30, 1, 50]), rng().integers(0, 4, 81)
    seen = set()
    for seed in range(20):
        turned = specialise.rotated(rng(seed), label, document)
        for k in range(3):
            here, there = label[document == k].tolist(), turned[document == k].tolist()
            assert any(there == here[shift:] + here[:shift] for shift in range(len(here)))
        seen.add(tuple(turned))
    assert len(seen) > 15


def test_languages_are_dealt_among_the_versions_of_one_document(tokens):
    everything = np.arange(len(tokens.token))
    dealt = [specialise.dealt(rng(seed), tokens, everything) for seed in range(12)]
    for labels in dealt:
        per_document = [set(labels[tokens.document == d].tolist()) for d in range(len(tokens.language))]
        assert all(len(languages) == 1 for languages in per_document)
        for group in set(tokens.group.tolist()):
            mine = (tokens.group == group).nonzero()[0]
            assert sorted(min(per_document[d]) for d in mine) == [0, 1, 2, 3]
    assert len({tuple(labels) for labels in dealt}) == 12


def test_within_shuffles_only_among_equals():
    given, label = rng().integers(0, 5, 300), rng(1).integers(0, 4, 300)
    shuffled = specialise.within(rng(2), label, given)
    assert not np.array_equal(shuffled, label)
    for k in range(5):
        assert sorted(shuffled[given == k]) == sorted(label[given == k])


def test_swapped_rows_keep_each_row_whole():
    label = np.arange(24) // 4  # six documents of four positions
    swapped = specialise.swapped_rows(rng(), label, 6).reshape(6, 4)
    assert (swapped == swapped[:, :1]).all() and sorted(swapped[:, 0]) == list(range(6))


# ----------------------------------------------------------------------------------------------------------------------
# Documents


def test_the_four_versions_of_a_document_show_the_same_scenes_and_ask_the_same(writer):
    for scene, sort in product(range(3), SORTS):
        versions = [specialise.write(writer, scene, sort, language, seed=1) for language in scenes.LANGUAGES]
        assert all(d.pictures == versions[0].pictures for d in versions)
        assert all(
            scenes.is_held_out(item.colour, item.shape, item.digit)
            for picture in versions[0].pictures for item in picture.items
        )  # fmt: skip
        assert len({tuple(d.ids) for d in versions}) == 4
        frames = [[t for t in d.ids if t in writer.tokenizer.special_names] for d in versions]
        assert all(frame == frames[0] for frame in frames)  # as many turns, as many pictures


def test_kinds_of_tokens(writer):
    tokenizer = writer.tokenizer
    ids = [
        writer.config.bos_token, *tokenizer.encode_header("user"), tokenizer.token_id("<|image_start|>"),
        tokenizer.token_id("<|patch|>"), *tokenizer.encode("zebra 3?"), tokenizer.token_id("<|eot|>"),
    ]  # fmt: skip
    text = [tokenizer.decode([i]) for i in ids[7:-1]]
    assert text[-3:] == [" ", "3", "?"] and "".join(text) == "zebra 3?"
    pieces = len(text) - 3  # of a word that the tokenizer does not know
    assert pieces > 1
    wanted = [FRAME] * 6 + [PATCH, START, *[INSIDE] * (pieces - 1), PUNCTUATION, DIGIT, PUNCTUATION, FRAME]
    assert kinds_of(ids, tokenizer) == wanted


def test_experts_are_those_of_each_document_alone(model, writer, tokens):
    """Not mixed up by the batches, which put documents of one length together."""
    for number in (0, 5, 17):
        group, language = divmod(number, 4)
        scene, sort = divmod(group, len(SORTS))
        document = specialise.write(writer, scene, SORTS[sort], scenes.LANGUAGES[language], seed=5)
        here = tokens.document == number
        assert tokens.token[here].tolist() == document.ids
        assert tokens.position[here].tolist() == list(range(len(document.ids)))
        seen = []
        hook = model.layers[3].feed_forward.router.register_forward_hook(lambda m, i, out, s=seen: s.append(out))
        with torch.no_grad():
            model(torch.tensor([document.ids]), torch.cat([writer.tiles(p) for p in document.pictures]))
        hook.remove()
        assert (seen[0].argmax(-1).numpy() == tokens.expert[3][here]).mean() > 0.99  # but for ties


# ----------------------------------------------------------------------------------------------------------------------
# Measures


def rows_of(tokens, expert, shuffles=60):
    """The measures of tokens whose expert was decided here."""
    told = specialise.Tokens(**(vars(tokens) | {"expert": {0: expert}}))
    return {row["measure"]: row for row in measured(told, shuffles, seed=0)}


def told(row):
    return row["bits"] > row["control_95"] and row["share_of_label"] > 0.02


@pytest.fixture(scope="module")
def many(model, writer):
    return specialise.collect(model, writer, num_scenes=8, seed=6)


def test_experts_drawn_by_lot_know_nothing(many):
    rows = rows_of(many, rng().integers(0, 8, len(many.token)))
    assert all(abs(row["share_of_label"]) < 0.05 for row in rows.values())
    assert max(row["bits"] for row in rows.values()) > 0.02  # which the correction has to take off


def test_an_expert_for_each_language_is_found_in_every_way_that_language_is_asked(many):
    language = many.language[many.document]
    rows = rows_of(many, language)
    for name in rows:
        if name.startswith("language"):
            assert rows[name]["bits"] == pytest.approx(rows[name]["label_bits"]), name
            assert rows[name]["share_of_label"] > 0.7, name
    assert not told(rows["modality"])


def test_a_table_from_token_to_expert_seems_to_know_languages_but_not_given_the_token(many):
    """The confound that the conditional measure is there for."""
    table = rng().integers(0, 8, many.token.max() + 1)
    rows = rows_of(many, table[many.token])
    assert rows["language, on words"]["bits"] > rows["language, on words"]["control_95"]
    assert rows["language | token"]["bits"] == 0
    assert rows["token"]["bits"] == pytest.approx(rows["token"]["expert_bits"])


def test_an_expert_of_positions_seems_to_know_modality_but_not_at_equal_positions(many):
    rows = rows_of(many, many.position // 12 % 8)
    assert rows["modality"]["bits"] > rows["modality"]["control_95"]
    assert rows["modality | position"]["bits"] == pytest.approx(0)


def test_an_expert_for_patches_is_found_at_equal_positions_too(many):
    rows = rows_of(many, (many.kind == PATCH).astype(int))
    for name in ("modality", "modality | position"):
        assert rows[name]["bits"] == pytest.approx(rows[name]["label_bits"]) and told(rows[name])
    assert rows["kind of text token"]["bits"] == 0  # patches are not among them


def test_an_expert_for_each_kind_is_found(many):
    rows = rows_of(many, many.kind)
    assert rows["kind of text token"]["share_of_label"] > 0.9
    assert rows["language | kind of text token"]["bits"] == pytest.approx(0)


def test_documents_and_not_tokens_are_what_is_shuffled(many):
    """An expert for each document tells its language by being one of few: nothing that the control does not tell."""
    rows = rows_of(many, many.document)
    row = rows["language, on words"]
    assert row["bits"] == pytest.approx(row["label_bits"]) and row["share_of_label"] < 0.02


def test_patches_before_any_word_go_to_the_same_expert_in_every_language(tokens):
    """Causal: a picture that comes first cannot know the language of what follows."""
    rows = {row["measure"]: row for row in measured(tokens, 5, seed=0) if row["layer"] == 7}
    assert rows["language | place, first patches"]["bits"] < 1e-3
    first = measures(tokens, rng())["language | place, first patches"]
    assert len(first.keep) == len(tokens.language) * 64 and set(first.given.tolist()) == set(range(64))


def test_of_a_shared_token_each_document_gives_one_sample(many):
    measure = measures(many, rng())["language | token"]
    pairs = Counter(zip(many.document[measure.keep].tolist(), measure.given.tolist(), strict=True))
    assert max(pairs.values()) == 1
    assert (many.token[measure.keep] == measure.given).all() and (many.words[measure.keep] > 0).all()
    for token in set(measure.given.tolist()):
        here = Counter(measure.label[measure.given == token].tolist())
        assert len(here) == 4 and min(here.values()) >= specialise.LEAST


def test_too_few_scenes_are_refused(model, writer):
    few = specialise.collect(model, writer, num_scenes=1, seed=0)
    with pytest.raises(ValueError, match="no tokens to measure 'language | token' on; num_scenes is too small"):
        measured(few, 2, seed=0)


# ----------------------------------------------------------------------------------------------------------------------
# Results


@pytest.fixture(scope="module")
def stored():
    return json.loads(specialise.RESULTS.read_text())


def test_the_stored_result_has_a_card_and_all_rows(stored):
    card = stored["card"]
    for name in (
        "command",
        "seeds",
        "shuffles",
        "documents",
        "samples",
        "model_sha256",
        "cpu",
        "cores",
        "torch",
        "date",
    ):
        assert card[name]
    assert len(card["seeds"]) >= 3 and card["seconds"] < 120
    keys = [(r["weights"], r["seed"], r["measure"], r["layer"]) for r in stored["rows"]]
    names = dict.fromkeys(r["measure"] for r in stored["rows"])
    assert sorted(keys) == sorted(product(("trained", "untrained"), card["seeds"], names, range(8)))
    for row in stored["rows"]:
        assert row["corrected_bits"] == pytest.approx(row["bits"] - row["control_mean"], abs=3e-5)
        assert row["share_of_label"] == pytest.approx(row["corrected_bits"] / row["label_bits"], abs=3e-5)
        assert -1e-6 <= row["bits"] <= min(row["label_bits"], row["expert_bits"]) + 1e-4


def test_measured_again_in_small_modality_leads_and_language_follows():
    small = specialise.run(num_scenes=3, seeds=(7,), shuffles=10)
    for weights in ("trained", "untrained"):
        modality, language = (
            specialise.by_layer(small, weights, name, "share_of_label").mean()
            for name in ("modality", "language, on words")
        )
        assert modality > 3 * language


def test_the_table_and_the_verdicts_read_the_rows(stored):
    lines = specialise.table(stored).splitlines()
    assert len(lines) == 2 + len({row["measure"] for row in stored["rows"]}) and max(map(len, lines)) < 110
    modality = [r["share_of_label"] for r in stored["rows"] if (r["weights"], r["measure"]) == ("trained", "modality")]
    by_layer = np.array(modality).reshape(len(stored["card"]["seeds"]), 8).mean(0)
    assert f"{by_layer.min():.3f}" in lines[2] and f"{by_layer.max():.3f}" in lines[2]
    verdicts = specialise.verdicts(stored)
    assert all(type(holds) is bool for holds in verdicts.values())
    assert verdicts["every layer tells patches from text"] and verdicts["patches before any word tell no language"]
    flat = json.loads(json.dumps(stored))
    for row in flat["rows"]:
        if row["measure"].startswith("modality") and row["layer"] == 3:
            row["bits"] = row["control_95"]
    assert not specialise.verdicts(flat)["every layer tells patches from text"]
    assert not specialise.verdicts(flat)["also at equal positions"]


def test_rows_that_are_not_there_are_refused(stored):
    with pytest.raises(ValueError, match="no row has weights 'trained' and measure 'colour'"):
        specialise.by_layer(stored, "trained", "colour", "bits")
