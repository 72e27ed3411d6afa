"""Lesson 01's study: its questions, its count of FLOPs, what each arm trains, its plan; and what it stored."""

import json
from dataclasses import replace
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

from minillama4 import Llama4, generate, scenes
from minillama4.config import Llama4Config, TextConfig, VisionConfig
from minillama4.course import fusion_figures
from minillama4.course.evidence import fusion, fusion_cost, fusion_task, study
from minillama4.course.evidence.fusion import ALONE, ARMS, BATCH, EYE, FLOPS, LATE, RATES, SWEEP
from minillama4.course.evidence.fusion_cost import step_flops, trained_names
from minillama4.course.evidence.fusion_task import KINDS, LANGUAGES, MOST, TILES, Exams, config, held_out
from minillama4.train_cost import PARTS

STORED = study.load("fusion")


@pytest.fixture(scope="module")
def exams():
    return {eye: Exams(eye) for eye in ("linear", "vit")}


def fresh(eye, seed=0):
    return fusion._fresh(eye, seed)


# ----------------------------------------------------------------------------------------------------------------------
# The task


def test_questions_are_about_held_out_scenes_and_never_about_digits():
    items = held_out(30, "end")
    cells = {(item.question.kind, item.question.language) for item in items}
    assert cells == {(kind, language) for kind in KINDS for language in LANGUAGES} and len(items) == 180
    for item in items:
        assert 1 <= len(item.picture.items) <= MOST
        assert all(scenes.is_held_out(i.colour, i.shape, i.digit) for i in item.picture.items)
        assert item.question.form in ("colour_of", "shape_of", "size_of", "where") or item.question.kind == "count"
        assert not any(character.isdigit() for character in item.question.text)
    assert items == held_out(30, "end") and items != held_out(30, "sweep")


def test_a_test_asks_one_question_and_a_told_scene_is_the_scene_of_the_picture(exams):
    items, tokenizer = held_out(4, "end"), exams["vit"].writer.tokenizer
    shown, told = (exams["vit"].test_batch(items, as_text) for as_text in (False, True))
    for batch in (shown, told):
        assert int(((batch.weights[:, 1:] > 0) & (batch.weights[:, :-1] == 0)).sum()) == len(
            items
        )  # one run of targets
        for row, item in enumerate(items):
            answer = batch.targets[row][batch.weights[row] > 0]
            assert tokenizer.decode(answer.tolist()) == item.question.answer
    assert shown.pixels.shape == (TILES * len(items), 3, 48, 48) and told.pixels is None
    for row, item in enumerate(items):
        text = tokenizer.decode(told.ids[row].tolist())
        assert scenes.caption(item.picture, item.question.language) in text and item.question.text in text
        assert item.question.text in tokenizer.decode(shown.ids[row].tolist())


def written(exams, sort, monkeypatch):
    """The documents of a batch."""
    documents = []
    with monkeypatch.context() as patch:
        patch.setattr(exams.writer, "batch", documents.extend)
        exams.batch(Random(3), 12, sort)
    return documents


def test_training_documents_know_no_held_out_scene_and_labels_no_digit(exams, monkeypatch):
    digits = {exams["vit"].writer.tokenizer.encode(str(digit))[0] for digit in range(10)}
    for sort, objects in (("pictures", {1, 2}), ("labels", {6})):
        documents = written(exams["vit"], sort, monkeypatch)
        pictures = [picture for document in documents for picture in document.pictures]
        assert {len(picture.items) for picture in pictures} == objects
        assert not any(scenes.is_held_out(i.colour, i.shape, i.digit) for p in pictures for i in p.items)
        words = {word for document in documents for _, word in document.labels}
        assert words and not words & digits
        assert any(sum(document.weight) for document in documents) == (sort == "pictures")
    told = written(exams["vit"], "text", monkeypatch)
    assert not any(document.pictures or document.labels for document in told) and all(sum(d.weight) for d in told)


class Oracle:
    """Says what comes next, but for the rows that it does not know."""

    def __init__(self, wrong_rows):
        self.wrong_rows, self.lm_head = wrong_rows, torch.nn.Identity()

    def hidden_states(self, ids, pixels):
        following = F.pad(ids[:, 1:], (0, 1), value=0).clone()
        for row in self.wrong_rows:
            following[row] = 7
        return 30.0 * F.one_hot(following, 1024)


def test_an_answer_counts_if_all_its_tokens_are_right(exams):
    items = held_out(2, "end")  # 12 questions: one batch, in order
    found = fusion_task.examine(Oracle([0, 1, 4]), exams["vit"], items, as_text=True)
    assert found["all"] == 0.75 and found["loss"] > 1
    cells = [f"{kind}, {language}" for kind in KINDS for language in LANGUAGES]
    assert [found[cell] for cell in cells] == [0.0, 1.0, 0.5, 1.0, 1.0, 1.0]
    perfect = fusion_task.examine(Oracle([]), exams["vit"], items, as_text=True)
    assert perfect["all"] == 1.0 and perfect["loss"] < 1e-4

    class Half(Oracle):  # the first token of each answer right, the others wrong
        def hidden_states(self, ids, pixels):
            learn = exams["vit"].test_batch(items, True).weights > 0
            later = learn & F.pad(learn[:, :-1], (1, 0))
            return super().hidden_states(ids, pixels).masked_fill(later[..., None], 0.0)

    lengths = [len(exams["vit"].writer.tokenizer.encode(item.question.answer)) for item in items]
    assert fusion_task.examine(Half([]), exams["vit"], items, as_text=True)["all"] == lengths.count(1) / 12 < 1


def test_right_is_what_greedy_generation_says(exams):
    """A model that has learned 6 documents by heart, asked about them and about others."""
    model, writer, items = fresh("vit"), exams["vit"].writer, held_out(2, "end")
    batch, optimizer = exams["vit"].test_batch(items[::2], False), torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        fusion_task.losses(model, batch)[0].backward()
        optimizer.step()
    rights = []
    for item in items:
        found = fusion_task.examine(model, exams["vit"], [item], as_text=False)
        document = exams["vit"].document(item.picture, item.question.language, [item.question], as_text=False)
        first = next(i for i, weight in enumerate(document.weight) if weight)
        length = sum(weight > 0 for weight in document.weight)
        with torch.no_grad():
            said = generate(model, torch.tensor([document.ids[:first]]), writer.tiles(item.picture), length)
        assert found["all"] == (said[0].tolist() == document.ids[first : first + length])
        rights.append(found["all"])
    assert 3 < sum(rights) < 12


def test_who_only_reads_the_question_is_right_as_often_as_stated():
    """Counts: one object or two, equally often, so "1" and "2" for all objects. Colours: near one in six."""
    items = held_out(100, "end")
    said = fusion_task.guessed(items)
    assert 0.25 < said["all"] < 0.4 and 0.08 < said["place, en"] < 0.25 and 0.35 < said["count, en"] < 0.6
    assert said["all"] == pytest.approx(sum(said[name] for name in said if name != "all") / 6, abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# FLOPs


@pytest.fixture
def attention_flops(monkeypatch):
    """FLOPs of fused attention, which PyTorch's counter does not see on a CPU: by a list of the pairs that are seen."""
    spent, real = [], F.scaled_dot_product_attention

    def counted(q, k, v, is_causal=False, **others):
        pairs = sum(j <= i or not is_causal for i in range(q.shape[-2]) for j in range(k.shape[-2]))
        forward = 2 * q.shape[0] * q.shape[1] * pairs * (q.shape[-1] + v.shape[-1])  # batch, heads
        spent.append(forward * (3 if q.requires_grad or k.requires_grad or v.requires_grad else 1))
        return real(q, k, v, is_causal=is_causal, **others)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return spent


STEPS = [(eye, parts, sort) for eye, first, then, every in ARMS.values() for parts, sort in
         [(first, "labels"), (then, "pictures")] + ([(then, "text")] if every else [])]  # fmt: skip
STEPS += [("vit", ("text",), "text"), ("vit", PARTS, "labels")]  # the parts alone


@pytest.mark.parametrize("eye,parts,sort", sorted(set(STEPS)))
def test_flops_of_a_step_are_the_products_that_are_run(exams, attention_flops, eye, parts, sort):
    model, batch = fresh(eye), exams[eye].batch(Random(5), 3, sort)
    names = trained_names(model, parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    with FlopCounterMode(display=False) as counter:
        words = fusion_task.losses(model, batch) if sort != "labels" else [fusion_task.labels_only(model, batch)]
        sum(words).backward()
    ran = counter.get_total_flops() + sum(attention_flops)
    assert step_flops(model.config, batch, parts, sort != "labels") == ran


def test_parts_hold_all_parameters_once():
    model = fresh("vit")
    names = [name for part in PARTS for name in trained_names(model, (part,))]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert trained_names(model, ("projector",)) == ["multi_modal_projector.linear_1.weight"]
    assert all("vision_model" in name for name in trained_names(model, ("encoder",)))


def test_cross_attention_has_the_parameters_and_products_of_transformers_layers():
    text = TextConfig(
        vocab_size=96, hidden_size=48, num_layers=8, num_heads=6, num_kv_heads=2, head_dim=8, num_experts=0,
        expert_width=0, dense_width=80, moe_layers=(), nope_layers=(), chunk_size=None, max_positions=99,
    )  # fmt: skip
    vision = VisionConfig(tile_size=24, patch_size=4, hidden_size=32, num_layers=1, num_heads=2, mlp_width=40,
                          adapter_width=36)  # fmt: skip
    tiny = Llama4Config(text, vision, bos_token=0, stop_tokens=(), pad_token=0, patch_token=1)
    theirs = MllamaTextConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, intermediate_size=80,
                              num_hidden_layers=8, cross_attention_layers=[3], attn_implementation="eager")  # fmt: skip
    layer = MllamaCrossAttentionDecoderLayer(theirs, 3)
    tokens, tiles, image = 40, 2, 2 * vision.tokens_per_tile
    words, pictures = torch.randn(1, tokens - image, 48), torch.randn(1, image, 48)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(words, pictures, None, None, None, None)
    paper = fusion_cost.cross_attention(tiny, tokens, tiles)
    assert paper["layers"] == 2 and paper["parameters"] == 2 * sum(p.numel() for p in layer.parameters())

    deep = replace(tiny, text=replace(text, num_layers=32))  # as 3.2 11B: 8 beside 32
    assert fusion_cost.cross_attention(deep, tokens, tiles)["layers"] == 8
    model, ids = Llama4(tiny), torch.full((1, tokens - image), 5)  # the rest: our decoder without image tokens
    with FlopCounterMode(display=False) as ours, torch.no_grad():
        model.encode_images(torch.randn(tiles, 3, 24, 24))
        model.hidden_states(ids)
    n = tokens - image
    fused = 8 * 6 * 2 * (8 + 8) * n * (n + 1) // 2 + 1 * tiles * 2 * (32 + 32) * 37**2  # attention of text and of tiles
    assert paper["forward_flops"] == ours.get_total_flops() + fused + 2 * counter.get_total_flops()


# ----------------------------------------------------------------------------------------------------------------------
# What each arm trains


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Runs of a few steps, and few questions."""
    monkeypatch.setattr(fusion, "CACHE", tmp_path)
    monkeypatch.setattr(fusion, "held_out", lambda per_cell, name: held_out(1, name))
    monkeypatch.setattr(fusion, "BATCH", 2)
    return tmp_path


def arm_job(arm, flops=6e9, seed=0, **others):
    job = {"arm": arm, "seed": seed, "rate": 2, "flops": flops, "sweep": False} | others
    return job | ({"parts": {name: 1 for name in ALONE}, "parts_share": 1e-3} if arm in LATE else {})


@pytest.mark.parametrize("arm", ARMS)
def test_frozen_parts_do_not_move_by_a_bit_and_trained_ones_do(arm, small, exams):
    eye, first, then, every = ARMS[arm]
    model, seen = fresh(eye), []
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    live = []

    def at_point(flops):  # averaged weights are in the model
        seen.append({name for name, p in model.named_parameters() if not torch.equal(p, start[name])})
        live.append(flops)

    sorts = ["pictures", "text"] if every else ["pictures"]
    phases = [(0.5, first, ["labels"]), (1, then, sorts)]
    row = fusion.train(arm_job(arm, 8e9), model, exams[eye], phases, at_point)
    assert seen[-1] == set(trained_names(model, then)), "averaged weights at the end"
    early = set(trained_names(model, first)) - {n for n in start if n.startswith(("layers", "norm", "lm_head"))}
    assert seen[0] == early  # labels do not reach the decoder's layers
    assert {n for n, p in model.named_parameters() if not torch.equal(p, start[n])} == seen[-1]
    assert live[-1] >= 8e9 > live[-2] and len(live) <= 8 and (row["texts"] > 0) == bool(every)
    assert row["pictures"] + row["texts"] == 2 * row["steps"]


def test_a_late_arm_starts_from_both_parts_and_text_is_examined_on_the_same_questions(small):
    row = fusion.run(arm_job("frozen"))
    parts = {name: fusion.part(fusion.alone(name, 0, 1, 1e-3)) for name in ALONE}
    assert row["text_before"] == parts["text alone"][0]["text"] == row["text_after"]
    assert row["parts_flops"] == sum(part["curve"]["flops"][-1] for part, _ in parts.values())
    assert 1e-3 * sum(ALONE.values()) <= row["parts_flops"] < 1.5e-3 * sum(ALONE.values())
    names = {name for _, weights in parts.values() for name in weights}
    assert names == set(trained_names(fresh("vit"), ("text", "encoder")))
    changed = fusion.run(arm_job("unfrozen"))
    assert changed["text_before"] == row["text_before"] != changed["text_after"]
    assert row["trained_parameters"] == 128 * 64 < changed["trained_parameters"] < changed["parameters"]
    assert row["tokens_per_picture"] == 16 and row["curve"]["flops"][-1] >= 6e9


def test_the_model_of_an_arm_has_the_parts_weights(small, monkeypatch):
    kept = {}

    def look(job, model, *others):
        if job["arm"] == "frozen":
            kept.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return real(job, model, *others)

    real = fusion.train
    monkeypatch.setattr(fusion, "train", look)
    fusion.run(arm_job("frozen"))
    for name in ALONE:
        _, weights = fusion.part(fusion.alone(name, 0, 1, 1e-3))
        assert weights and all(torch.equal(kept[key], value) for key, value in weights.items())


def test_a_part_is_made_once_for_all_that_decides_it(small, monkeypatch):
    made, real = [], fusion._make_part
    monkeypatch.setattr(fusion, "_make_part", lambda job: made.append(job) or real(job))
    job = fusion.alone("encoder alone", 0, 1, 1e-3)
    first, again = fusion.part(job), fusion.part(dict(job))
    assert len(made) == 1 and first[0] == again[0] and len(list(small.iterdir())) == 1
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    for change in ({"seed": 1}, {"rate": 2}, {"flops": 2e8}):
        fusion.part(job | change)
    assert len(made) == 4 and len(list(small.glob("*.safetensors"))) == 4 == len(list(small.iterdir()))


def test_averaged_weights_are_the_mean_that_forgets_and_live_ones_come_back():
    model = torch.nn.Linear(1, 1, bias=False)
    average, wanted = fusion.Averaged(model), float(model.weight.detach())
    for step in range(1, 1200):
        model.weight.data.fill_(step)
        average.update()
        kept = min(0.99, step / (step + 9))
        wanted = kept * wanted + (1 - kept) * step
    with average:
        assert float(model.weight.detach()) == pytest.approx(wanted, rel=1e-4)
    assert float(model.weight.detach()) == 1199


def test_bytes_of_a_step(exams, monkeypatch):
    batch = exams["vit"].batch(Random(0), 4, "pictures")
    bytes_of = {arm: fusion_cost.memory(fresh("vit"), batch, ARMS[arm][2]) for arm in ("joint", "unfrozen", "frozen")}
    model = fresh("vit")
    size = {part: sum(model.get_parameter(name).numel() for name in trained_names(model, (part,))) for part in PARTS}
    for arm, found in bytes_of.items():
        trained = sum(size[part] for part in ARMS[arm][2])
        assert found["weights"] == 4 * sum(size.values()) and found["gradients"] == 4 * trained
        assert 4 * trained <= found["states"] <= 8.1 * trained  # Muon keeps one number a weight, AdamW two
    assert bytes_of["frozen"]["states"] == 4 * 128 * 64
    kept = [bytes_of[arm]["activations"] for arm in ("joint", "unfrozen", "frozen")]
    assert kept[0] > kept[1] > kept[2] > 0
    documents, batch_of = written(exams["vit"], "pictures", monkeypatch), exams["vit"].writer.batch
    once, twice = (
        fusion_cost.memory(model, batch_of(many), PARTS)["activations"] for many in (documents, 2 * documents)
    )
    assert abs(2 * once - twice) < 0.1 * 4 * sum(size.values())  # nothing as large as the weights is kept but once
    # A lower bound by hand: what gate and up give, and their product, of 4 layers; the input of every norm.
    tokens = batch.ids.numel()
    assert kept[0] > 4 * tokens * 4 * (3 * 192 + 2 * 64)


# ----------------------------------------------------------------------------------------------------------------------
# The plan


def answered(jobs, losses):
    """Rows of jobs as if they had run: loss by (arm, rate)."""
    names = {"text alone": "text_loss", "encoder alone": "label_loss"}
    rows = []
    for job in jobs:
        loss = losses.get((job["arm"], job["rate"]), 1.0)
        rows.append(job | {"curve": {"flops": [0.0, job["flops"]], names.get(job["arm"], "loss"): [9.0, loss]}})
    return json.loads(json.dumps(rows))


def test_the_plan_takes_the_rates_that_its_sweeps_found():
    losses = {("text alone", 4): 0.5, ("encoder alone", 2): 0.5, ("joint", 1): 0.5, ("frozen", 4): 0.5,
              ("encoder-free", 2): 0.5, ("unfrozen", 2): 0.5}  # fmt: skip
    first = fusion.plan([])
    assert {job["arm"] for job in first} == set(ALONE) and len(first) == 2 * len(RATES)
    second = fusion.plan(answered(first, losses))
    swept = second[len(first) :]
    assert second[: len(first)] == first and all(job["seed"] == 9 and job["flops"] == SWEEP for job in swept)
    assert {(job["arm"], job["rate"]) for job in swept} == {(a, r) for a in list(ARMS)[:4] for r in RATES}
    for job in swept:
        assert job.get("parts") == ({"text alone": 4, "encoder alone": 2} if job["arm"] in LATE else None)
    assert fusion.plan(answered(second[:-1], losses)) == second  # one is missing: no main run yet
    third = fusion.plan(answered(second, losses))
    assert third[: len(second)] == second
    main = [job for job in third[len(second) :] if job["arm"] in ARMS]
    rates = {"joint": 1, "frozen": 4, "encoder-free": 2, "unfrozen": 2, "unfrozen, with text": 2}
    assert all(job["flops"] == FLOPS and job["rate"] == rates[job["arm"]] and not job["sweep"] for job in main)
    seeds = {arm: sorted(job["seed"] for job in main if job["arm"] == arm) for arm in ARMS}
    assert seeds == {arm: [0, 1, 2] if arm in ("joint", "frozen") else [0] for arm in ARMS}
    parts = [job for job in third[len(second) :] if job["arm"] in ALONE]
    assert {(job["arm"], job["seed"], job["rate"], job["flops"]) for job in parts} == {
        (name, seed, {"text alone": 4, "encoder alone": 2}[name], ALONE[name]) for name in ALONE for seed in range(3)
    }
    assert fusion.plan(answered(third, losses)) == third


def test_the_best_rate_is_the_one_with_the_lowest_loss_at_the_end_on_seed_nine():
    def row(rate, seed, *losses):
        return {"arm": "joint", "seed": seed, "rate": rate, "curve": {"loss": list(losses)}}

    rows = [row(1, 9, 0.1, 0.7), row(2, 9, 0.9, 0.6), row(4, 9, 0.5, 0.8), row(4, 0, 0.1, 0.1)]
    assert fusion.best_rate(rows, "joint") == 2


def test_every_arm_reads_another_batch_each_step_but_the_same_for_equal_seeds(exams):
    def ids(seed, step):
        return exams["vit"].batch(Random(f"{seed}/{step}"), BATCH, "pictures").ids

    assert torch.equal(ids(0, 1), ids(0, 1)) and ids(0, 1).tolist() != ids(0, 2).tolist() != ids(1, 2).tolist()
    assert config("vit").text == config("linear").text and 0 < EYE < 0.5


# ----------------------------------------------------------------------------------------------------------------------
# What is stored, and how it is drawn


def main_rows(arm):
    return [row for row in STORED["rows"] if row["arm"] == arm and row["seed"] != 9]


def test_every_job_is_stored_once_and_nothing_else():
    rows = STORED["rows"]
    jobs = [json.loads(json.dumps(job)) for job in fusion.plan(rows)]
    assert len(jobs) == len(rows) == 8 + 16 + 6 + 9
    assert all(sum(row.items() >= job.items() for row in rows) == 1 for job in jobs)


def test_arms_have_equal_flops_and_late_ones_say_what_their_parts_cost():
    for row in STORED["rows"]:
        assert row["flops"] <= row["curve"]["flops"][-1] < 1.01 * row["flops"] or row["seed"] == 9
        if row["arm"] in LATE and row["seed"] != 9:
            parts = [p["curve"]["flops"][-1] for name in ALONE for p in main_rows(name) if p["seed"] == row["seed"]]
            assert len(parts) == 2 and row["parts_flops"] == sum(parts)
            text = next(p for p in main_rows("text alone") if p["seed"] == row["seed"])
            assert row["text_before"] == text["text"]
        elif row["arm"] in ARMS and row["arm"] not in LATE:
            assert row["parts_flops"] == 0
    for row in main_rows("frozen"):
        assert row["text_after"] == row["text_before"]


def test_a_run_at_a_budget_is_read_between_its_points():
    row = {"parts_flops": 1e12, "curve": {"flops": [1e12, 2e12, 4e12], "all": [0.2, 0.6, 0.8]}}
    assert [fusion_figures.reached(row, x, False) for x in (1, 1.5, 3, 9)] == pytest.approx([0.2, 0.4, 0.7, 0.8])
    assert fusion_figures.reached(row, 0.5, False) is None, "nothing was measured before the first point"
    assert fusion_figures.reached(row, 1.5, True) is None
    assert [fusion_figures.reached(row, x, True) for x in (2.5, 5)] == pytest.approx([0.4, 0.8])


def test_the_charged_table_takes_the_parts_off_the_budget():
    table = fusion_figures.equal_flops_table(STORED).splitlines()
    frozen = {line[:50].strip(): line[50:].split() for line in table[1:]}
    whole = STORED["card"]["flops"]
    assert table[0].split()[-4:] == [f"{whole * share / 1e12:.2f}" for share in (0.25, 0.5, 0.75, 1)]
    for arm in LATE:
        ends = [row["curve"]["all"][-1] for row in main_rows(arm)]
        assert frozen[f"{arm}, frozen parts free"][3] == f"{sum(ends) / len(ends):.0%}"
        assert len(frozen[f"{arm}, frozen parts charged in full"]) == 2  # up to a half of it, they are hardly made
    late = []
    for row in main_rows("frozen"):  # by hand: between which points is the whole budget, less the parts?
        left, curve = whole - row["parts_flops"], row["curve"]
        after = next(i for i, flops in enumerate(curve["flops"]) if flops >= left)
        (x1, x2), (y1, y2) = curve["flops"][after - 1 : after + 1], curve["all"][after - 1 : after + 1]
        late.append(y1 + (y2 - y1) * (left - x1) / (x2 - x1))
    assert frozen["frozen, frozen parts charged in full"][1] == f"{sum(late) / 3:.0%}"


def test_the_pictures_say_what_the_rows_say():
    shown = fusion_figures.accuracy_by_flops(STORED)
    joint = main_rows("joint")
    end = sum(row["curve"]["all"][-1] for row in joint) / 3
    assert "frozen parts free, joint: " in shown.alt and f"to {end:.0%} at 4.5" in shown.alt
    left, right = shown.picture.axes
    for axes, shift in ((left, 0), (right, 1)):
        line = next(line for line in axes.lines if line.get_label() == "frozen")
        rows = main_rows("frozen")
        wanted = [sum(row["curve"]["flops"][-1] + shift * row["parts_flops"] for row in rows) / 3e12]
        assert line.get_xdata()[-1] == pytest.approx(wanted[0])
    forgot = fusion_figures.forgetting_of_text(STORED)
    row = main_rows("unfrozen")[0]
    line = next(line for line in forgot.text.splitlines() if line.startswith("unfrozen   "))
    assert line.split()[1:] == [f"{row['text_before']['loss']:.3f}", f"{row['text_after']['loss']:.3f}",
                                f"{row['text_before']['all']:.0%}", f"{row['text_after']['all']:.0%}"]  # fmt: skip
    drawn = next(line for line in forgot.picture.axes[0].lines if line.get_label() == "unfrozen")
    assert drawn.get_ydata()[0] == row["text_before"]["loss"] and len(drawn.get_xdata()) == 9
    kinds = fusion_figures.by_kind_and_language(STORED)
    shares = sorted({f"{row['pictures_right']['place, hi']:.0%}" for row in joint}, key=lambda s: int(s[:-1]))
    assert f"{shares[0]}-{shares[-1]}" in next(line for line in kinds.splitlines() if line.startswith("joint"))


def test_what_the_study_found():
    """Each finding, from the rows alone."""

    def ends(arm, value="all", of="pictures_right"):
        return [row[of][value] for row in main_rows(arm)]

    def mean_at(arm, flops):  # between points, of runs that are charged nothing
        return sum(fusion_figures.reached(row, flops, False) for row in main_rows(arm)) / len(main_rows(arm))

    # Joint training beats a projector between frozen parts, in every seed, and by far.
    assert min(ends("joint")) > max(ends("frozen")) + 0.2 and max(ends("frozen")) < 0.5
    assert min(ends("frozen")) > STORED["card"]["guessed"]["all"] + 0.1
    # Early on it is the other way round if the parts are free: in every seed, at an eighth of the budget.
    early = {arm: [row["curve"]["all"][0] for row in main_rows(arm)] for arm in ("joint", "frozen")}
    assert min(early["frozen"]) > max(early["joint"]) + 0.1
    # An unfrozen language model on free parts ends above all seeds of joint, and on charged parts in their midst.
    joint = [row["curve"]["all"][-1] for row in main_rows("joint")]
    for arm in LATE[1:]:
        assert ends(arm)[0] > max(ends("joint"))
        row = main_rows(arm)[0]
        charged = fusion_figures.reached(row, STORED["card"]["flops"] / 1e12, True)
        assert min(joint) < charged < max(joint)
    # The encoder-free form is behind a ViT at all points past the first, with four times the tokens.
    assert all(mean_at("encoder-free", flops) < mean_at("joint", flops) - 0.1 for flops in (1.125, 2.25, 3.375, 4.5))
    # Text: forgotten without text, kept and improved with a quarter of it; joint training did not lose it either.
    forgot, kept = main_rows("unfrozen")[0], main_rows("unfrozen, with text")[0]
    assert forgot["text_after"]["loss"] > 4 * forgot["text_before"]["loss"]
    assert kept["text_after"]["loss"] < 0.7 * kept["text_before"]["loss"]
    alone = [row["text"]["loss"] for row in main_rows("text alone")]
    assert max(ends("joint", "loss", "text_after")) < min(alone)
    assert sum(row["texts"] for row in main_rows("joint")) < 0.7 * sum(row["texts"] for row in main_rows("text alone"))
