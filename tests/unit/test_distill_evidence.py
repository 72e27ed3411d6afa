"""The study of lesson 04: its documents are what they say, its arms differ in one thing, its scores are right."""

import json
import math

import pytest
import torch

from minillama4 import distill as losses
from minillama4 import scenes
from minillama4.course import distill_figures as figures
from minillama4.course.evidence import distill, distill_tokens, study, told
from minillama4.course.widgets.frame import png
from minillama4.tokenizer import load_tokenizer
from minillama4.train_cost import training_cost

STORED = study.load("distill")
TOKENIZER = load_tokenizer("mini-scout")
TINY = distill.QUICK | {
    "pool": 60,
    "train_steps": 4,
    "teacher_steps": 2,
    "held_out": 20,
    "batch": 4,
    "teacher_batch": 4,
}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(distill, "QUICK", TINY)
    monkeypatch.setattr(distill, "RUNS", tmp_path)
    return TINY


@pytest.fixture(scope="module")
def read():
    return told.documents("test", "train", 60)


# ----------------------------------------------------------------------------------------------------------------------
# What is read


def lines(read, row):
    """[(words, size, digit, part of each token)] of one document."""
    found = []
    for first in range(0, told.TOKENS, told.LINE):
        ids, part = (x[row, first : first + told.LINE].tolist() for x in (read.ids, read.part))
        text = TOKENIZER.decode(ids)
        assert text.startswith(" ") and text.endswith("\n")
        *name, size, digit = text.split()
        found.append((" ".join(name), size, digit, part))
    return found


def test_a_line_is_a_caption_the_first_time_and_then_asks_for_what_it_said(read):
    names = {
        language: {scenes.phrase(language, "bare", c, s): (c, s) for c in scenes.COLOURS for s in scenes.SHAPES}
        for language in told.LANGUAGES
    }
    captions = answers = 0
    for row in range(len(read)):
        known = {}
        language = next(name for name in told.LANGUAGES if lines(read, row)[0][0] in names[name])
        for name, size, digit, part in lines(read, row):
            assert name in names[language] and size in {scenes.size_word(language, s) for s in scenes.SIZES}
            assert not scenes.is_held_out(*names[language][name], int(digit))
            if name in known:  # only the two words that answer count: " large", and "6" of " 6"
                assert known[name] == (size, digit)
                assert part == [told.READ, told.READ, told.ANSWER, told.READ, told.ANSWER + 1, told.READ]
                answers += 2
            else:
                assert part == [told.CAPTION] * told.LINE
                captions += 1
            known[name] = (size, digit)
        assert 1 <= len(known) <= 6
    assert captions > 4 * 60 and answers > 8 * 2 * 60


def test_a_document_has_a_seed_of_its_own_and_held_out_is_what_was_never_told():
    whole, rest = told.documents("a", "train", 8), told.documents("a", "train", 3, first=5)
    assert torch.equal(whole.ids[5:], rest.ids) and len(whole.ids.unique(dim=0)) == 8
    assert not torch.equal(whole.ids, told.documents("b", "train", 8).ids)
    held = told.documents("a", "held-out", 30)
    names = {
        scenes.phrase(language, "bare", c, s): (c, s)
        for language in told.LANGUAGES
        for c in scenes.COLOURS
        for s in scenes.SHAPES
    }
    for row in range(30):
        assert all(scenes.is_held_out(*names[name], int(digit)) for name, _, digit, _ in lines(held, row))


def test_kept_documents_are_the_documents(tmp_path):
    once, again = (told.kept_documents(tmp_path, "test", "train", 5) for _ in range(2))
    fresh = told.documents("test", "train", 5)
    assert all(
        torch.equal(vars(once)[k], vars(fresh)[k]) and torch.equal(vars(again)[k], v) for k, v in vars(once).items()
    )
    assert len(list(tmp_path.iterdir())) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def test_scores_by_hand(read):
    model = distill.build("mini-maverick", 0).eval()
    some = read[:9]
    got = told.scores(model, some)
    with torch.no_grad():
        chances = model(some.inputs).double().log_softmax(-1)
    told_losses, said_losses, answers = [], [], {0: [], 1: []}
    for row in range(9):
        for place in range(told.TOKENS - 1):
            part, target = int(some.part[row, place + 1]), int(some.ids[row, place + 1])
            loss = -float(chances[row, place, target])
            if part == told.CAPTION:
                told_losses.append(loss)
            elif part >= told.ANSWER:
                said_losses.append(loss)
                answers[part - told.ANSWER].append(int(chances[row, place].argmax()) == target)
    both = answers[0] + answers[1]
    assert got["captions"]["loss"][0] == pytest.approx(sum(told_losses) / len(told_losses), abs=1e-3)
    assert got["answers"]["loss"][0] == pytest.approx(sum(said_losses) / len(said_losses), abs=1e-3)
    assert got["answers"]["asked"] == len(both)
    assert got["answers"]["right"][0] == pytest.approx(sum(both) / len(both), abs=1e-4)
    for kind, name in enumerate(told.KINDS):
        share = sum(answers[kind]) / len(answers[kind])
        assert got["answers"]["right_by_kind"][name] == pytest.approx(share, abs=1e-4)


def test_the_interval_is_that_of_drawing_documents_again():
    draw = torch.Generator().manual_seed(0)
    document = torch.randint(40, (400,), generator=draw)
    values = torch.randn(40, generator=draw)[document] + 0.3 * torch.randn(400, generator=draw)
    mean, low, high = told.clustered(values, document)
    again = []
    for _ in range(2000):
        picked = torch.randint(40, (40,), generator=draw)
        rows = torch.cat([(document == d).nonzero()[:, 0] for d in picked])
        again.append(float(values[rows].mean()))
    spread = float(torch.tensor(again).std())
    assert mean == pytest.approx(float(values.mean()), abs=1e-4)
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.12)
    assert (high - low) / 2 > 2 * 1.96 * float(values.std()) / 400**0.5  # as if tokens were independent


# ----------------------------------------------------------------------------------------------------------------------
# Arms


def test_students_read_the_same_batches_and_each_document_once_an_epoch():
    one, two, other = (torch.cat(list(distill.batches(10, 4, 15, seed))) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
    for epoch in one.view(6, 10):
        assert epoch.sort().values.tolist() == list(range(10))
    assert not torch.equal(one[:10], one[10:20])


def test_the_weights_of_the_arms():
    sure = torch.tensor([0.2, 0.9])
    at = {arm: distill.soft_weight(arm, 25, 100, distill.RECIPE, sure) for arm in distill.ARMS[1:]}
    assert (at["soft"], at["fixed"], at["ramp"]) == (1.0, 0.5, 0.75) and at["confidence"].equal(sure)


def test_what_is_kept_says_how_sure_the_teacher_is():
    teacher = 3 * torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    target = torch.randint(30, (50,), generator=torch.Generator().manual_seed(1))
    whole, kept = losses.confidence(teacher, target), losses.top_k(teacher, 5)
    among = (kept.index_TK == target[:, None]).any(1)
    assert 5 < int(among.sum()) < 45
    assert torch.allclose(distill.sure(kept, target), whole * among, atol=1e-6)


@pytest.fixture
def lessons(tiny):
    def make(**changes):
        job = distill.student_job("soft", 1.0, 0, tiny, **changes)
        return distill.Lessons(job, distill.pool_of(1.0, tiny)), job

    return make


def test_the_tenth_is_a_tenth_of_the_pool(tiny):
    whole, tenth = distill.pool_of(1.0, tiny), distill.pool_of(distill.TENTH, tiny)
    assert len(whole) == 60 and torch.equal(tenth.ids, whole.ids[:6])


def test_targets_are_those_of_the_documents_asked_for(lessons, tiny):
    lessons()  # targets at another temperature lie in the same folder
    taught, job = lessons(temperature=2.0)
    rows = torch.tensor([7, 0, 59, 7])
    read = taught.pool[rows]
    with torch.no_grad():
        teacher_TV = distill.load_teacher("mini-behemoth", tiny)(read.inputs)[read.learn]
    want, got = losses.top_k(teacher_TV, job["top_k"], 2.0), taught.targets(rows)
    assert got.temperature == 2.0 and len(got.index_TK) == int(read.learn.sum()) == len(read.targets)
    assert torch.allclose(got.log_prob_TK, want.log_prob_TK, atol=4e-3)
    assert torch.allclose(got.log_tail_T, want.log_tail_T, atol=4e-3)


@pytest.mark.parametrize("arm", distill.ARMS[1:])
def test_the_loss_of_each_arm(lessons, tiny, arm):
    taught, job = lessons()
    taught.job = job | {"arm": arm}
    model, rows = distill.build("mini-maverick", 1), torch.tensor([3, 11])
    loss, weight = taught.loss(model, rows, 1, 4)
    read = taught.pool[rows]
    with torch.no_grad():
        student, teacher = (
            m(read.inputs)[read.learn].double() for m in (model, distill.load_teacher("mini-behemoth", tiny))
        )
    hard, soft = losses.hard_loss(student, read.targets), losses.soft_loss(student, teacher)
    w = {"soft": 1.0, "fixed": 0.5, "ramp": 0.75, "confidence": losses.confidence(teacher, read.targets)}[arm]
    # An untrained teacher is nearly uniform, so what 64 tokens leave out counts.
    kept = losses.top_k_loss(student, losses.top_k(teacher, 64))
    assert float(loss.detach()) == pytest.approx(float(losses.mix(hard, kept, w)), rel=2e-3)
    assert weight == pytest.approx(float(torch.as_tensor(w).mean()), abs=2e-3)
    everything, _ = lessons(top_k="all")
    everything.job["arm"] = arm
    if arm != "confidence":
        whole, _ = everything.loss(model, rows, 1, 4)
        assert float(whole.detach()) == pytest.approx(float(losses.mix(hard, soft, w)), rel=1e-4)


def test_the_targets_that_ship_are_those_of_the_tenth_and_need_no_teacher(tiny, monkeypatch):
    monkeypatch.setattr(distill, "load_teacher", lambda *_: pytest.fail("a teacher was asked for"))
    pool = told.documents("pool", "train", 400)
    taught = distill.Lessons(distill.student_job("soft", distill.TENTH, 0, distill.RECIPE, top_k=8), pool)
    index_TK, log_prob_TK, log_tail_T, _ = taught.kept
    assert len(index_TK) == int(pool.learn.sum()) and index_TK.shape[1] == 8
    assert torch.allclose(log_prob_TK.exp().sum(1) + log_tail_T.exp(), torch.ones(len(index_TK)), atol=1e-5)
    right, shifted = (
        float(distill.sure(taught.kept, target).mean()) for target in (pool.targets, pool.targets.roll(1))
    )
    assert right > 0.7 and shifted < 0.2, "the chance of the word that came; of another text's words it would be low"
    distill.teacher_file("mini-behemoth", distill.RECIPE).touch()  # a teacher trained here is asked, not the file
    with pytest.raises(pytest.fail.Exception, match="a teacher was asked for"):
        distill.Lessons(taught.job, pool)
    for change in ({"top_k": 1}, {"temperature": 2.0}, {"data": 1.0}, {"teacher": "under-trained"}, {"quick": True}):
        assert not distill.is_shipped(taught.job | change)


def test_costs_by_hand(lessons, tiny):
    taught, _ = lessons()
    one = training_cost(distill.build("mini-behemoth", 0).config, told.TOKENS - 1, head_tokens=told.TOKENS // 2)
    training = one.total * tiny["teacher_batch"] * tiny["teacher_steps"]
    assert taught.cost(500) == {"teacher_passes": one.forward * 60, "teacher_training": training}
    online, _ = lessons(top_k="all")
    assert online.cost(500)["teacher_passes"] == one.forward * 500
    online.job = online.job | {"teacher": "untrained"}
    assert online.cost(500)["teacher_training"] == 0


def test_every_teacher_is_what_its_name_says(tiny):
    jobs = {name: distill.teacher_job(name, distill.RECIPE) for name in distill.TEACHERS}
    full = distill.RECIPE["teacher_steps"]
    assert jobs["mini-behemoth"]["train_steps"] == full and jobs["untrained"]["train_steps"] == 0
    assert jobs["under-trained"]["train_steps"] == full // 10 and jobs["of the student's size"]["train_steps"] == full
    student, behemoth = (distill.build(size, 0) for size in ("mini-maverick", "mini-behemoth"))
    assert {type(b.feed_forward).__name__ for b in behemoth.layers} == {"MoE"}
    assert [type(b.feed_forward).__name__ for b in student.layers] == ["FeedForward", "MoE"] * 2
    assert behemoth.config.text.num_experts == student.config.text.num_experts == 16
    assert distill.sizes(behemoth)["active"] > 1.5 * distill.sizes(student)["active"]
    distill.run(distill.teacher_job("untrained", tiny))
    fresh = distill.build("mini-behemoth", 100)
    assert torch.equal(distill.load_teacher("untrained", tiny).lm_head.weight, fresh.lm_head.weight)
    assert not torch.equal(distill.load_teacher("mini-behemoth", tiny).lm_head.weight, fresh.lm_head.weight)


def test_a_teacher_that_reads_no_more_reads_the_tenth_only(tiny, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("it reads fresh documents")

    monkeypatch.setattr(distill, "documents", refuse)
    distill.run(distill.teacher_job("read no more than the student", tiny | {}) | {"quick": True})
    with pytest.raises(AssertionError, match="fresh"):
        distill.run(distill.teacher_job("mini-behemoth", tiny) | {"quick": True})


def test_the_plan():
    jobs = distill.plan(distill.RECIPE)
    assert len({json.dumps(job, sort_keys=True) for job in jobs}) == len(jobs)
    main = [job for job in jobs if job["arm"] != "teacher" and job["control"] is None]
    assert sorted((j["arm"], j["data"], j["seed"]) for j in main) == sorted(
        (arm, data, seed) for arm in distill.ARMS for data in (0.1, 1.0) for seed in range(3)
    )
    usual = {"temperature": 1.0, "top_k": 64, "teacher": "mini-behemoth"}
    assert all(job.items() >= usual.items() for job in main if job["arm"] != "hard")
    controls = [job for job in jobs if job.get("control")]
    for job in controls:  # each differs from the soft run on the tenth in what it is called
        changed = {name for name in usual if job[name] != usual[name]}
        assert job["arm"] == "soft" and job["data"] == 0.1 and job["seed"] == 0
        assert (
            changed
            == {"top-k": {"top_k"}, "temperature": {"temperature", "top_k"}, "teacher": {"teacher"}}[job["control"]]
        )
    trained = []
    for job in jobs:  # a teacher comes before its pupils
        if job["arm"] == "teacher":
            trained.append(job["teacher"])
        assert job["teacher"] is None or job["teacher"] in trained


@pytest.mark.parametrize("arm,top_k", [("hard", None), ("ramp", 64), ("soft", "all")])
def test_a_short_run_gives_a_whole_row(tiny, arm, top_k):
    changes = {} if arm == "hard" else {"top_k": top_k}
    row = distill.run(distill.student_job(arm, 1.0, 0, tiny, **changes) | {"quick": True})
    assert row["curve"]["steps"] == [0, 2, 4] and len(row["curve"]["answer_loss"]) == 3
    assert (
        row["curve"]["soft_weight"] == {"hard": [None, 0, 0], "ramp": [None, 0.875, 0.375], "soft": [None, 1, 1]}[arm]
    )
    low, high = row["captions"]["loss"][1:]
    assert low < row["captions"]["loss"][0] < high < 7.5 and row["total"] > row["active"] > 1e5
    assert (row["flops"]["teacher_passes"] > 0) == (arm != "hard") and row["flops"]["own"] > 0
    json.dumps(row)


def test_the_same_job_gives_the_same_row(tiny):
    job = distill.student_job("fixed", 0.1, 1, tiny) | {"quick": True}
    assert distill.run(job) == distill.run(job)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens for the lab


def test_hundredths_give_back_the_chances():
    logits = 5 * torch.randn(300, generator=torch.Generator().manual_seed(0))
    back = (-torch.tensor(distill_tokens.hundredths(logits)) / 100).softmax(-1)
    assert torch.allclose(back, logits.softmax(-1), atol=2e-3)
    assert max(distill_tokens.hundredths(torch.tensor([0.0, -1e4]))) == 9999


def test_sorts_of_tokens():
    """Five tokens: the teacher is sure and right, sure and wrong, unsure, right alone, unsure with the student."""
    sure, other, flat = torch.tensor([9.0, 0, 0, 0]), torch.tensor([0, 9.0, 0, 0]), torch.zeros(4)
    teacher, student = torch.stack([sure, sure, flat, sure, flat]), torch.stack([flat, other, flat, other, flat])
    target = torch.tensor([0, 1, 2, 0, 3])
    part = torch.tensor([told.CAPTION, told.ANSWER, told.CAPTION, told.ANSWER, told.ANSWER])
    merit = distill_tokens.sorts(teacher, student, target, part)
    assert (merit["sure and right"] > 0).tolist() == [True, False, False, True, False]
    assert int(merit["thought impossible"].argmax()) == 1 and merit["thought impossible"][[0, 3]].tolist() == [0, 0]
    assert int(merit["open"].argmax()) == 2 and float(merit["open"][2]) == pytest.approx(math.log(4), abs=1e-5)
    assert (merit["the student errs"] > 0).tolist() == [False, False, False, True, False]
    assert int(merit["both are unsure"].argmax()) == 4 and float(merit["both are unsure"][4]) == 1.0


def test_chosen_tokens_are_of_both_languages_and_of_documents_of_their_own(read):
    teacher, student = (distill.build(size, 0).eval() for size in ("mini-behemoth", "mini-maverick"))
    read = read[:9]  # so few that the best tokens of two sorts lie in one document
    found = distill_tokens.chosen(teacher, student, read, TOKENIZER)
    assert {token["language"] for token in found} == {"en", "fr"} and len({t["before"] for t in found}) == len(found)
    texts = [TOKENIZER.decode(ids) for ids in read.ids]
    sources = [next(i for i, text in enumerate(texts) if token["before"] in text) for token in found]
    assert len(set(sources)) == len(found) > 3
    for token in found:
        french = any(word in token["before"] for word in ("petite", "grande"))
        assert french == (token["language"] == "fr") or len(token["before"].split()) < 3
        assert any((token["before"] + TOKENIZER.decode([token["true"]]))[-40:] in text for text in texts)
        assert len(token["teacher"]) == len(token["student"]) == 1024 and min(token["teacher"]) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and tables


def made_up():
    """A whole study whose numbers say which row they are of."""
    rows = []
    for job in distill.plan(distill.RECIPE):
        seed, tenth = job.get("seed", 0), job.get("data") == distill.TENTH
        right = (
            0.9 - 0.3 * tenth + 0.02 * distill.ARMS.index(job["arm"]) * (seed + 1) if job["arm"] in distill.ARMS else 1
        )
        loss = 1.0 + 0.2 * tenth + 0.01 * seed
        curve = {"steps": [0, 10, 20], "answer_right": [0, 0.2, right], "caption_loss": [7, 1.5, loss]}
        curve |= {"answer_loss": [7, 2, 1], "soft_weight": [None, 0, 0]}
        scores = {"loss": [0.5, 0.4, 0.6], "right": [right, right - 0.01, right + 0.01]}
        cost = {"own": 2e12, "teacher_passes": 3e12, "teacher_training": 40e12}
        captions = {"loss": [loss, loss - 0.01, loss + 0.01]}
        rows.append(job | {"answers": scores, "captions": captions, "curve": curve, "flops": cost})
    return {"card": {}, "rows": rows[::-1]}


def test_intervals_over_seeds_are_student_s():
    """Three values 1, 2, 3: mean 2, standard deviation 1, and t = 4.303 with two degrees of freedom."""
    assert figures.interval([3.0, 1.0, 2.0]) == pytest.approx((2.0, 4.303 / 3**0.5))
    with pytest.raises(ValueError, match="1 values were given"):
        figures.interval([1.0])


def test_what_an_arm_has_over_hard_is_taken_seed_by_seed():
    """Fixed is 0.04 (seed + 1) above hard: 0.04, 0.08, 0.12."""
    mean, half = figures.gained(made_up(), "fixed", 0.1, "answer_right")
    assert (mean, half) == pytest.approx((0.08, 4.303 * 0.04 / 3**0.5))
    assert figures.gained(made_up(), "fixed", 1.0, "caption_loss") == pytest.approx((0.0, 0.0), abs=1e-12)


def test_main_rows_are_those_that_no_control_has_changed():
    report = made_up()
    for arm in distill.ARMS:
        for data in (1.0, 0.1):
            rows = figures.main_rows(report, arm, data)
            assert [row["seed"] for row in rows] == [0, 1, 2] and {row["control"] for row in rows} == {None}
    assert [len(figures.control_rows(report, kind)) for kind in ("top-k", "temperature", "teacher")] == [3, 2, 4]


def test_the_table_says_what_the_rows_say():
    lines = figures.table(made_up()).splitlines()
    assert len(lines) == 1 + 2 * (1 + len(distill.ARMS))
    soft = next(line for line in lines[7:] if "soft only" in line)
    assert "64.0% ± 5.0%" in soft and "+4.0% ± 5.0%" in soft and "1.210 ± 0.025" in soft  # 0.62, 0.64, 0.66
    assert "over hard" in lines[0] and lines[7].startswith("400 documents")


def test_costs_are_shared_by_a_teacher_s_pupils():
    line = figures.costs(made_up()).splitlines()[1]
    assert line.split()[-6:] == ["2.0", "3.0", "40.0", "45.0", "2.4", "2.0"]  # 2 + 43, 2 + 0.43, 2


@pytest.mark.parametrize("draw", [figures.curves, figures.controls])
def test_pictures_draw_and_are_told_in_words(draw):
    shown = draw(made_up())
    assert len(shown.alt) > 200 and "hard targets only" in shown.alt
    data, width, height = png(shown.picture)
    assert len(data) > 10_000 and 850 <= width <= 950 and height > 500


def test_one_hump_covers_both_by_forward_kl_and_takes_one_by_reverse():
    """By hand: a hump that matches mean and spread of the whole, or the higher hump alone (spread 1 / sqrt 2)."""
    shown = figures.two_humps()
    right = 1 / (1 + math.exp(-0.4))  # share of the right hump
    mean = 2.5 * (2 * right - 1)
    spread = (0.5 + 2.5**2 - mean**2) ** 0.5
    assert shown.text.splitlines()[1] == f"reverse KL: centre 2.5, standard deviation {0.5**0.5:.1f}"
    centre, width = (float(word.strip(",")) for word in shown.text.splitlines()[0].split()[3::3])
    assert abs(centre - mean) < 0.2 and abs(width - spread) < 0.2


# ----------------------------------------------------------------------------------------------------------------------
# What is stored


def test_every_run_of_the_plan_is_stored_once():
    jobs, rows = distill.plan(distill.RECIPE), STORED["rows"]
    assert len(rows) == len(jobs) == 44
    for job in jobs:
        assert sum(row.items() >= job.items() for row in rows) == 1, job
    assert all(STORED["card"][name] == value for name, value in distill.RECIPE.items())
    assert STORED["card"]["core_minutes"] < 100


def test_what_the_study_found():
    """Each claim from the rows alone; an interval that holds 0 claims nothing."""

    def gained(arm, data, measure):
        mean, half = figures.gained(STORED, arm, data, measure)
        return round(mean, 3), round(half, 3)

    def control(kind, name, value):
        return next(row for row in figures.control_rows(STORED, kind) if row[name] == value)

    def scores(row):
        return row["answers"]["right"][0], row["captions"]["loss"][0]

    # On a tenth, soft targets give what ten times the text gives; every arm with hard ones overfits captions.
    right, loss = ({a: figures.interval([figures.value(r, m) for r in figures.main_rows(STORED, a, 0.1)])[0]
                    for a in distill.ARMS} for m in ("answer_right", "caption_loss"))  # fmt: skip
    assert gained("soft", 0.1, "answer_right") == (0.335, 0.143) and gained("soft", 0.1, "caption_loss") == (
        -1.51,
        0.015,
    )
    assert [round(right[arm], 2) for arm in distill.ARMS] == [0.65, 0.98, 0.91, 0.90, 0.73]
    assert [round(loss[arm], 2) for arm in distill.ARMS] == [2.52, 1.01, 1.17, 1.56, 1.55]
    # On all data answers gain nothing that three seeds can show; captions gain a little.
    for arm in distill.ARMS[1:]:
        mean, half = gained(arm, 1.0, "answer_right")
        assert abs(mean) < half
    assert gained("soft", 1.0, "caption_loss") == (-0.068, 0.013)
    # Confidence claims nothing on the tenth's answers either.
    mean, half = gained("confidence", 0.1, "answer_right")
    assert 0 < mean < half
    # The teacher: what it has read decides, not its size; a pupil of soft targets alone gets what its teacher has.
    hard = scores(figures.main_rows(STORED, "hard", 0.1)[0])
    confined, small, weak, none = (
        scores(control("teacher", "teacher", name))
        for name in ("read no more than the student", "of the student's size", "under-trained", "untrained")
    )
    assert abs(confined[0] - hard[0]) < 0.03 and abs(confined[1] - hard[1]) < 0.03
    assert small[0] > 0.98 and small[1] < 1.02
    assert weak[0] < hard[0] - 0.1 and abs(weak[0] - 0.548) < 0.01 and none[0] == 0
    # k = 1 is best where one token is right, and loses where many may come; k = 8 has all.
    one, eight = (scores(control("top-k", "top_k", k)) for k in (1, 8))
    assert one[0] > eight[0] and one[1] > eight[1] + 0.08 and eight[1] < 1.01
    # The curve: hard targets' loss on captions is best early, before answers are found.
    for row in figures.main_rows(STORED, "hard", 0.1):
        best = min(range(1, 9), key=row["curve"]["caption_loss"].__getitem__)
        assert row["curve"]["caption_loss"][best] < 1.12 and row["curve"]["answer_right"][best] < 0.55
