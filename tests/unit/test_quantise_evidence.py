"""The study of fewer bits: rounding against loops in float64 and `cuda.int4`, the exam by hand, what the rows say."""

import copy
import json
import math

import pytest
import torch

from minillama4 import load_checkpoint, load_tokenizer
from minillama4.course import quantise_figures as figures
from minillama4.course.evidence import quantise, study
from minillama4.course.evidence.quantise import INT4, PARTS, job, plan, rounded
from minillama4.course.widgets.frame import png
from minillama4.cuda import int4
from minillama4.documents import Writer
from minillama4.evaluate import answers_right, held_out_questions


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def shipped():
    return load_checkpoint("mini-scout")


@pytest.fixture
def model(shipped):
    return copy.deepcopy(shipped)


# ----------------------------------------------------------------------------------------------------------------------
# Rounding


def by_loop(weights: list[float], bits: int, scale: str) -> list[float]:
    """One group, in Python's float64."""
    largest = max(weights, key=abs)
    step = -largest / 2 ** (bits - 1) if scale == "signed" else abs(largest) / (2 ** (bits - 1) - 1)
    codes = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    return [step * min(codes, key=lambda code: abs(code * step - weight)) for weight in weights]


@pytest.mark.parametrize("scale", ["signed", "textbook"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("group", [4, 5, "row", "matrix"])
def test_each_weight_is_the_nearest_of_its_group_s_levels(bits, group, scale):
    weight = random(2, 3, 11, seed=bits)
    back, scales = rounded(weight, bits, group, scale)
    count = 0
    for matrix, got in zip(weight.double(), back, strict=True):
        lines = [matrix.flatten()] if group == "matrix" else list(matrix)
        size = group if isinstance(group, int) else len(lines[0])
        groups = [piece.tolist() for line in lines for piece in line.split(size)]
        want = [weight for each in groups for weight in by_loop(each, bits, scale)]
        assert torch.allclose(got.flatten().double(), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-7)
        count += len(groups)
    assert scales == count


def test_a_group_by_hand():
    """3 bits: the largest is 4, so a step is -1 and the codes -4 to 3 stand for 4 to -3; -3.9 is cut."""
    weight = torch.tensor([[4.0, -3.9, 0.6, -1.4, 0.4, 0.0]])
    assert rounded(weight, 3, 6)[0].tolist() == [[4.0, -3.0, 1.0, -1.0, 0.0, 0.0]]
    back = rounded(weight, 3, 6, "textbook")[0]  # a step is 4 / 3
    assert torch.allclose(back, torch.tensor([[4.0, -4.0, 0.0, -4 / 3, 0.0, 0.0]]))
    assert rounded(torch.zeros(2, 6), 3, 4)[0].equal(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="bits is 1; it must be 2 to 8"):
        rounded(weight, 1, 6)


@pytest.mark.parametrize("inputs", [128, 384, 112, 300, 1])
def test_four_bits_in_groups_of_128_are_int4(inputs):
    weight = random(3, 7, inputs, seed=inputs)
    packed, scale = int4.quantise(weight)
    back, scales = rounded(weight, 4, 128)
    assert back.equal(int4.dequantise(packed, scale, inputs)) and scales == scale.numel()


def test_the_model_of_four_bits_is_the_one_that_to_int4_makes(model, shipped):
    packed = int4.to_int4(copy.deepcopy(shipped), torch.float32)
    row = quantise.quantise(model, 4, 128, "signed", INT4)
    rest = dict(packed.named_parameters())
    matrices = {name: module for name, module in packed.named_modules() if isinstance(module, int4.Int4Matrix)}
    scales = sum(matrix.scale.numel() for matrix in matrices.values())
    found = 0
    for name, parameter in model.named_parameters():
        if name in rest:
            assert parameter.equal(rest[name])
            continue
        matrix = matrices.pop(name)
        want = matrix.dequantise()
        assert parameter.equal(want.mT if ".experts." in name else want), name
        found += parameter.numel()
    assert not matrices and row["weights"] == found
    assert row["bits_a_weight"] == pytest.approx(4 + 32 * scales / found, abs=1e-3)


@torch.no_grad()
def test_parts_are_all_matrices_and_a_part_is_rounded_alone(shipped):
    counts = {}
    for part in PARTS:
        model = copy.deepcopy(shipped)
        row = quantise.quantise(model, 2, 128, "signed", (part,))
        pairs = zip(model.named_parameters(), shipped.parameters(), strict=True)
        changed = {name: (new - old).double() for (name, new), old in pairs if not new.equal(old)}
        old = {name: parameter.double() for name, parameter in shipped.named_parameters() if name in changed}
        counts[part] = sum(each.numel() for each in changed.values())
        assert row["weights"] == counts[part]
        error = sum(d.square().sum() for d in changed.values()) / sum(o.square().sum() for o in old.values())
        assert row["error"] == pytest.approx(math.sqrt(error), abs=1e-4)
        words = {"routed experts": ".experts.", "shared experts": ".shared_expert.", "attention": ".self_attn.",
                 "head": "lm_head", "vision": "", "embedding": "embed_tokens", "router": ".router."}  # fmt: skip
        assert all(words[part] in name for name in changed)
        assert all(name.startswith(("vision_model", "multi_modal")) == (part == "vision") for name in changed)
    tables = [p for name, p in shipped.named_parameters() if p.ndim == 1 or "positional" in name]
    assert sum(counts.values()) == sum(p.numel() for p in shipped.parameters()) - sum(p.numel() for p in tables)


# ----------------------------------------------------------------------------------------------------------------------
# Outliers


def test_planted_outliers_change_no_logit_and_stand_in_each_row(model, shipped):
    test = quantise.exam(1)
    quantise.plant(model, 16, seed=1)
    batch = test.batches[0]
    assert quantise.said(model, batch, batch.pixels).equal(test.logits[0])
    for name in ("self_attn.q_proj", "feed_forward.router", "feed_forward.shared_expert.up_proj"):
        new, old = (m.get_parameter(f"layers.3.{name}.weight") for m in (model, shipped))
        channel = ((new / old) > 2).any(0).nonzero()[:, 0]
        assert len(channel) == 1 and torch.equal(new[:, channel], 16 * old[:, channel])
    new, old = (m.layers[5].feed_forward.experts.gate_up_proj for m in (model, shipped))
    assert ((new / old) > 2).all((0, 2)).sum() == 1 and ((new / old) > 2).any((0, 2)).sum() == 1
    other = copy.deepcopy(shipped)
    quantise.plant(other, 16, seed=2)
    assert not other.lm_head.weight.equal(model.lm_head.weight)


# ----------------------------------------------------------------------------------------------------------------------
# The exam


@pytest.mark.parametrize("parts", [["attention", "head"], ["vision"]])
def test_a_row_is_what_the_rounded_model_answers(shipped, model, parts):
    row = quantise.run(job(2, parts=parts, per_cell=1))
    quantise.quantise(model, 2, 128, "signed", tuple(parts))
    writer = Writer(shipped.config, load_tokenizer("mini-scout"))
    items = held_out_questions(1)
    before, now = (answers_right(m, writer, items, batch_size=7) for m in (shipped, model))
    assert (row["right"], row["asked"]) == (sum(now), 16) and row["right"] < 16
    assert row["lost"] == sum(b and not n for b, n in zip(before, now, strict=True))
    assert row["won"] == sum(n and not b for b, n in zip(before, now, strict=True))
    distances = []
    with torch.no_grad():
        for item in items:
            document = writer.question(item.picture, item.question)
            ids, pixels = torch.tensor([document.ids]), writer.tiles(item.picture)
            old, new = (m(ids, pixels)[0].double().softmax(-1) for m in (shipped, model))
            for place in range(len(document.ids) - 1):
                if document.weight[place + 1] > 0:
                    distances.append(float((old[place] * (old[place] / new[place]).log()).sum()))
    assert row["kl"] == pytest.approx(sum(distances) / len(distances), rel=0.01)
    assert row["low"] < row["right"] / 16 < row["high"]


def test_right_means_every_token_of_an_answer():
    batch = quantise.exam(1).batches[0]
    logits = torch.nn.functional.one_hot(batch.targets[batch.weights > 0], 1024).float()
    assert quantise.right(batch, logits).all()
    logits[-1] = -logits[-1]  # the end of the last answer
    assert quantise.right(batch, logits).tolist() == [True] * (len(batch.ids) - 1) + [False]


def test_the_same_job_gives_the_same_row():
    each = job(3, 32, outlier=16, seed=2, per_cell=1)
    assert quantise.run(each) == quantise.run(each)


def test_a_killed_study_goes_on_where_it_was(tmp_path):
    out, jobs = tmp_path / "some.json", plan(per_cell=1)[:2]
    kept = jobs[0] | quantise.run(jobs[0]) | {"kl": 77.0}  # would be 0 if it were made again
    study.store(out, {"card": {"core_minutes": 0.0}, "rows": [kept]})
    report = study.study(jobs, quantise.run, {}, out, workers=1)
    assert [row["bits"] for row in report["rows"]] == [None, 8] and report["rows"][0]["kl"] == 77.0
    assert report["rows"][1] == jobs[1] | quantise.run(jobs[1])
    assert json.loads(out.read_text())["rows"] == report["rows"]


# ----------------------------------------------------------------------------------------------------------------------
# The picture and its table


def made_up():
    """A whole study whose numbers say which row they are of."""
    rows = []
    for each in plan():
        right = 1600 - 10 * (8 - (each["bits"] or 8)) - (80 + 8 * each["seed"]) * (each["outlier"] > 1)
        right -= 100 * list(PARTS).index(each["parts"][0]) * (len(each["parts"]) == 1 and each["bits"] == 2)
        row = {"right": right, "asked": 1600, "low": right / 1600 - 0.01, "high": right / 1600 + 0.01}
        if each["bits"] is not None:
            row |= {"weights": 8192, "bits_a_weight": each["bits"] + 0.25, "error": 0.5 ** each["bits"]}
        rows.append(each | row | {"lost": 1600 - right, "won": 3, "kl": 1 / right})
    return {"card": {"guess": 0.2631}, "rows": rows[::-1]}


def test_a_row_is_found_by_all_its_settings():
    report = made_up()
    for each in plan():
        found = figures.row_of(
            report, each["bits"], each["group"], **{k: each[k] for k in ("scale", "parts", "outlier", "seed")}
        )
        assert {name: found[name] for name in each} == each
    with pytest.raises(ValueError, match="no row has bits 7, group 128"):
        figures.row_of(report, 7)


def test_the_table_has_a_line_a_setting_and_says_what_the_rows_say():
    lines = figures.table(made_up()).splitlines()
    assert len(lines) == 1 + len(plan()) - 6 and len(set(lines)) == len(lines)  # three draws of channels share a line
    line = next(line for line in lines if line.startswith("3 bits, one scale a matrix"))
    assert line.split()[-7:] == ["3.25", "96.9%", "(95.9%-97.9%)", "50", "3", "0.00065", "12.5%"]
    drawn = next(line for line in lines if line.startswith("  4 bits, groups of 32, mean"))
    assert drawn.split()[-6:-2] == ["92.0%", "(90.5%-93.5%)", "128", "3"]  # 1480, 1472 and 1464 of 1600
    assert [line.split(", ")[1].split(" only")[0] for line in lines if " only" in line][::3] == list(PARTS)[::-1]


def test_the_picture_says_in_words_what_it_shows():
    shown = figures.fewer_bits(made_up())
    assert "groups of 128: 100.0% at 8.25, 98.8% at 6.25" in shown.alt and "only router: 97.5% with 4 bits" in shown.alt
    assert "best guess without the picture: 26%" in shown.alt and shown.text == figures.table(made_up())
    left, beside = shown.picture.axes
    assert len(left.lines) == 4 + 6 + 3 * 4 + 1 and len(beside.lines) == 2 * 3 * (1 + len(PARTS))
    assert png(shown.picture)[1] == 1000


# ----------------------------------------------------------------------------------------------------------------------
# What the lesson may say


@pytest.fixture(scope="module")
def stored():
    return study.load("quantise")


def row(stored, *settings, **changes):
    return figures.row_of(stored, *settings, **changes)


def test_the_stored_rows_are_the_plan_s_and_are_not_made_again(stored, tmp_path):
    def refuse(job):
        raise AssertionError("it is run again")

    out, card = tmp_path / "copy.json", stored["card"]
    study.store(out, stored)
    recipe = quantise.recipe() | {"command": "python -m minillama4.course.evidence.quantise"}
    assert study.study(plan(), refuse, recipe, out)["rows"] == stored["rows"] and len(stored["rows"]) == len(plan())
    assert card["core_minutes"] < 20 and card["date"] and card["versions"]["torch"] and card["machine"]
    for each in stored["rows"]:
        assert each["asked"] == 1600 and each["low"] <= each["right"] / 1600 <= each["high"]
        assert each["high"] - each["low"] < 0.05


def test_four_bits_cost_one_answer_of_1600_three_a_percent_and_two_a_third(stored):
    right, lost, kl = ([row(stored, bits)[name] for bits in (8, 6, 5, 4, 3, 2)] for name in ("right", "lost", "kl"))
    assert row(stored, None)["right"] >= 0.99 * 1600 and row(stored, None)["kl"] == 0
    assert max(lost[:2]) == 0 and max(lost[:4]) <= 2
    assert 8 <= lost[4] <= 24 and row(stored, 3)["high"] < row(stored, None)["low"]  # about 1 %, and not by chance
    assert right[5] < 0.7 * 1600 and row(stored, 2)["low"] > 2 * stored["card"]["guess"]
    assert kl == sorted(kl) and kl[4] > 5 * kl[3] and kl[5] > 30 * kl[4]


def test_each_bit_less_doubles_the_error_of_the_weights(stored):
    errors = {bits: row(stored, bits)["error"] for bits in (8, 6, 5, 4, 3, 2)}
    for bits in (5, 4, 3, 2):
        assert errors[bits] / errors[bits + 1] == pytest.approx(2, abs=0.05)
    assert errors[4] == pytest.approx(0.103, abs=0.002)  # what int4.py says of normal weights


def test_small_groups_help_three_bits_and_another_bit_helps_more(stored):
    small, usual, matrix = (row(stored, 3, group) for group in (32, 128, "matrix"))
    assert small["kl"] < 0.6 * usual["kl"] and small["lost"] < usual["lost"] < matrix["lost"] / 5
    four = row(stored, 4)
    assert four["bits_a_weight"] - small["bits_a_weight"] == pytest.approx(0.22, abs=0.02)
    assert four["kl"] < small["kl"] / 4 and four["lost"] < small["lost"]
    assert all(row(stored, 4, group)["lost"] <= 2 for group in (32, 64, 128, "row"))  # four bits do not care
    assert row(stored, 4, "matrix")["kl"] > 4 * four["kl"]
    assert usual["bits_a_weight"] - row(stored, 3, "row")["bits_a_weight"] < 0.02  # a group of 128 is a row here


def test_the_sign_of_the_scale_halves_the_divergence_of_four_bits_and_saves_two(stored):
    signed, textbook = ([row(stored, bits, scale=scale) for bits in (4, 3, 2)] for scale in ("signed", "textbook"))
    assert textbook[0]["kl"] > 2 * signed[0]["kl"] and textbook[0]["lost"] == signed[0]["lost"]
    assert textbook[1]["kl"] > 2 * signed[1]["kl"] and textbook[1]["high"] < signed[1]["right"] / 1600
    assert textbook[2]["right"] == 0 and signed[2]["right"] > 1000


def test_vision_and_attention_suffer_and_experts_hardly_do(stored):
    found = figures.by_part(stored)
    assert list(found)[:3] == ["vision", "attention", "embedding"]
    assert all(rows[4]["lost"] <= 1 for rows in found.values())
    vision, attention, experts = (found[part][2] for part in ("vision", "attention", "routed experts"))
    assert vision["high"] < attention["low"] and attention["high"] < found["embedding"][2]["low"]
    assert experts["weights"] > 3 * attention["weights"] and experts["lost"] < attention["lost"] / 20
    assert all(found[part][2]["lost"] <= 8 for part in ("routed experts", "shared experts", "router", "head"))
    packed = [found[part][4]["weights"] for part in INT4]
    assert sum(packed) == row(stored, 4)["weights"] and experts["weights"] > 0.65 * sum(packed)


def test_an_outlier_spoils_its_group_so_small_groups_save_the_rest(stored):
    assert row(stored, None, outlier=16)["kl"] == 0 and row(stored, 8, outlier=16)["lost"] <= 2
    small, middle, usual = (figures.with_outliers(stored, group) for group in (32, 64, 128))
    for few, more, all_ in zip(small, middle, usual, strict=True):  # in each draw of channels
        assert few["low"] > more["high"] and more["low"] > all_["high"]
        assert few["right"] > 0.97 * 1600 and all_["right"] < 0.5 * 1600 and few["lost"] > 20
    assert figures.with_outliers(stored, "matrix")[0]["right"] == 0


def test_the_picture_of_the_stored_rows(stored):
    shown = figures.fewer_bits(stored)
    assert "99.8% at 4.26, 98.9% at 3.26, 64.9% at 2.26 bits" in shown.alt and len(shown.text.splitlines()) == 48
