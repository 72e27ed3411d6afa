"""Distillation, against float64 loops by hand, finite differences, and the wrong ways that are often seen."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from minillama4 import Llama4, Llama4Config
from minillama4 import distill as d

T, V = 5, 11


def draw(seed, *shape, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def student():
    return draw(0, T, V)


@pytest.fixture
def teacher():
    return draw(1, T, V)


def chances(row, temperature=1.0):
    """softmax of one row of logits, by its definition."""
    powers = [math.exp(x / temperature) for x in row.tolist()]
    return [power / sum(powers) for power in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def gradient(loss, logits):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(logits).sum(), logits)[0]


def differences(loss, logits, step=1e-5):
    """d loss.sum() / d logits by central differences."""
    found = torch.zeros_like(logits)
    for place in range(logits.numel()):
        push = torch.zeros_like(logits).view(-1)
        push[place] = step
        push = push.view_as(logits)
        found.view(-1)[place] = (loss(logits + push).sum() - loss(logits - push).sum()) / (2 * step)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Hard and soft


def test_hard_loss_is_minus_log_of_the_chance_of_the_token(student):
    target = torch.tensor([0, 10, 3, 3, 7])
    want = [-math.log(chances(row)[t]) for row, t in zip(student, target.tolist(), strict=True)]
    assert d.hard_loss(student, target).tolist() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_soft_loss_is_the_divergence_by_its_definition(student, teacher, temperature, reverse):
    want = []
    for s, t in zip(student, teacher, strict=True):
        p, q = chances(t, temperature), chances(s, temperature)
        want.append(temperature**2 * (kl(q, p) if reverse else kl(p, q)))
    got = d.soft_loss(student, teacher, temperature, reverse)
    assert got.tolist() == pytest.approx(want, rel=1e-10) and min(want) > 0.1


@pytest.mark.parametrize("temperature", [0.7, 4.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_by_finite_differences(student, teacher, temperature, reverse):
    def loss(logits):
        return d.soft_loss(logits, teacher, temperature, reverse)

    assert torch.allclose(gradient(loss, student), differences(loss, student), atol=1e-8)


def test_the_gradient_is_temperature_times_the_gap_of_the_chances(student, teacher):
    for temperature in (0.5, 1.0, 4.0):
        want = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
        got = gradient(lambda s, t=temperature: d.soft_loss(s, teacher, t), student)
        assert torch.allclose(got, want, atol=1e-12)


def test_temperature_squared_keeps_the_size_of_the_gradient(student, teacher):
    """With the factor, it tends to that of half the squared gap of the centred logits, / V; without, to nothing."""
    sizes = {t: float(gradient(lambda s, t=t: d.soft_loss(s, teacher, t), student).norm()) for t in (8.0, 64.0, 512.0)}
    assert sizes[64.0] == pytest.approx(sizes[512.0], rel=0.05)
    assert sizes[64.0] / 64**2 < sizes[8.0] / 8**2 / 40  # what it would be without

    def centred(logits):
        return logits - logits.mean(-1, keepdim=True)

    matching = gradient(lambda s: (centred(s) - centred(teacher)).square().sum(-1) / (2 * V), student)
    hot = gradient(lambda s: d.soft_loss(s, teacher, 1e6), student)
    assert torch.allclose(hot, matching, atol=1e-4) and float(matching.abs().max()) > 0.1


def test_forward_covers_both_modes_and_reverse_seeks_one():
    """One Gaussian bump on a line of tokens, fitted by search to two, at 10 and 30, the second twice as heavy."""
    x = torch.arange(-40, 80, dtype=torch.float64)
    two = torch.log(torch.exp(-((x - 10) ** 2) / 8) + 2 * torch.exp(-((x - 30) ** 2) / 8))[None]
    bumps = {(m, w): (-((x - m) ** 2) / (2 * w**2))[None] for m in range(41) for w in (2, 4, 6, 8, 9, 10, 12)}
    best = {
        reverse: min(bumps, key=lambda bump, r=reverse: float(d.soft_loss(bumps[bump], two, reverse=r)))
        for reverse in (False, True)
    }
    mean = (10 + 2 * 30) / 3  # forward KL fits the mean and the spread: sqrt(4 + 2/9 * 20**2) = 9.6
    assert abs(best[False][0] - mean) <= 0.5 and best[False][1] in (9, 10)
    assert best[True] == (30, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
def test_equal_logits_cost_exactly_nothing(dtype, reverse):
    logits = (1e4 * torch.randn(3, 7)).to(dtype)
    assert d.soft_loss(logits, logits.clone(), 1.7, reverse).tolist() == [0.0] * 3


@pytest.mark.parametrize("reverse", [False, True])
def test_extreme_logits_give_finite_losses_and_gradients(reverse):
    wide = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 5.0]])
    other = torch.tensor([[-1e4, 1e4, 3.0], [-1e4, 1e4, -1e4]]).requires_grad_()
    loss = d.soft_loss(other, wide, 1.0, reverse)
    loss.sum().backward()
    assert (
        bool(loss.isfinite().all())
        and bool(other.grad.isfinite().all())
        and float(loss[0].detach()) == pytest.approx(2e4)
    )


def test_a_token_that_the_teacher_excludes_counts_as_chance_0(student, teacher):
    teacher = teacher.clone()
    teacher[:, 4:] = -torch.inf
    want = [kl(chances(t[:4]), chances(s)[:4]) for s, t in zip(student, teacher, strict=True)]
    assert d.soft_loss(student, teacher).tolist() == pytest.approx(want, rel=1e-10)
    got = gradient(lambda s: d.soft_loss(s, teacher), student)
    assert torch.allclose(got, student.softmax(-1) - teacher.softmax(-1), atol=1e-12)
    assert bool(d.soft_loss(student, teacher, reverse=True).isinf().all())


def test_half_precision_is_computed_in_float32(student, teacher):
    half = d.soft_loss(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32
    assert half.tolist() == d.soft_loss(student.bfloat16().float(), teacher.bfloat16().float()).tolist()


def test_no_gradient_reaches_the_teacher(student, teacher):
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    for reverse in (False, True):
        d.soft_loss(student, teacher, 2.0, reverse).sum().backward()
    d.top_k_loss(student, d.top_k(teacher, 3)).sum().backward()
    assert teacher.grad is None and student.grad is not None
    assert not d.confidence(teacher, torch.zeros(T, dtype=torch.int64)).requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# Weights


def test_mix_is_the_mean_of_the_weighted_sum():
    hard, soft = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 0.0, 8.0])
    assert float(d.mix(hard, soft, 0.25)) == pytest.approx((0.75 * 7 + 0.25 * 11) / 3)
    each = torch.tensor([0.0, 1.0, 0.5])
    assert float(d.mix(hard, soft, each)) == pytest.approx((1 + 0 + 6) / 3)
    assert float(d.mix(hard, soft, 0)) == pytest.approx(7 / 3) and float(d.mix(hard, soft, 1)) == pytest.approx(11 / 3)


def test_ramp_is_a_line_between_its_ends():
    assert [d.ramp(step, 4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [d.ramp(step, 2, 0.2, 0.6) for step in range(3)] == pytest.approx([0.2, 0.4, 0.6])


def test_confidence_is_the_teacher_s_chance_of_the_true_token(teacher):
    target = torch.tensor([0, 10, 3, 3, 7])
    want = [chances(row)[t] for row, t in zip(teacher, target.tolist(), strict=True)]
    assert d.confidence(teacher, target).tolist() == pytest.approx(want, rel=1e-12)
    student = draw(2, T, V).requires_grad_()
    d.mix(d.hard_loss(student, target), d.soft_loss(student, teacher), d.confidence(teacher, target)).backward()
    by_hand = (torch.tensor(want)[:, None] * teacher.softmax(-1)) - student.softmax(-1)
    by_hand += (1 - torch.tensor(want)[:, None]) * torch.nn.functional.one_hot(target, V)
    assert torch.allclose(student.grad, -by_hand / T, atol=1e-7)  # q - (w p + (1 - w) one-hot): a mix of two targets


# ----------------------------------------------------------------------------------------------------------------------
# A teacher in a file


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_by_hand(student, teacher, temperature):
    cached = d.top_k(teacher, 3, temperature)
    loss = d.top_k_loss(student, cached)
    for row in range(T):
        p, q = chances(teacher[row], temperature), chances(student[row], temperature)
        kept = sorted(range(V), key=lambda token: -p[token])[:3]
        assert cached.index_TK[row].tolist() == kept
        assert cached.log_prob_TK[row].tolist() == pytest.approx([math.log(p[token]) for token in kept])
        rest = [token for token in range(V) if token not in kept]
        p_tail, q_tail = (sum(x[token] for token in rest) for x in (p, q))
        assert float(cached.log_tail_T[row]) == pytest.approx(math.log(p_tail))
        want = kl([p[token] for token in kept] + [p_tail], [q[token] for token in kept] + [q_tail])
        assert float(loss[row]) == pytest.approx(temperature**2 * want, rel=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_fewer_kept_tokens_bound_the_soft_loss_from_below(student, teacher, temperature):
    whole, losses = d.soft_loss(student, teacher, temperature), []
    for k in range(1, V + 1):
        losses.append(d.top_k_loss(student, d.top_k(teacher, k, temperature)))
    losses = torch.stack(losses)  # [V, T]
    assert bool((losses[1:] - losses[:-1] > -1e-12).all())  # each token more tells more
    assert bool((losses[-2] <= whole + 1e-12).all()) and float((whole - losses[0]).min()) > 0.01
    assert torch.allclose(losses[-1], whole, atol=1e-12)
    everything = gradient(lambda s: d.top_k_loss(s, d.top_k(teacher, V, temperature)), student)
    assert torch.allclose(everything, gradient(lambda s: d.soft_loss(s, teacher, temperature), student), atol=1e-12)


@pytest.mark.parametrize("k", [1, 4, V - 1, V])
def test_gradients_of_top_k_by_finite_differences(student, teacher, k):
    def loss(logits):
        return d.top_k_loss(logits, d.top_k(teacher, k, 1.5))

    found = gradient(loss, student)
    assert torch.allclose(found, differences(loss, student), atol=1e-8)
    assert torch.allclose(found.sum(-1), torch.zeros(T, dtype=torch.float64), atol=1e-12)
    if k < V:  # the others are pushed, each by its share: q_j (q_tail - p_tail) / q_tail
        cached, q = d.top_k(teacher, k, 1.5), (student / 1.5).softmax(-1)
        rest = torch.ones_like(q).scatter(1, cached.index_TK, 0.0)
        q_tail = (q * rest).sum(-1, keepdim=True)
        push = 1.5 * q * (q_tail - cached.log_tail_T.exp()[:, None]) / q_tail
        assert torch.allclose(found * rest, push * rest, atol=1e-12)


def test_the_wrong_ways_to_keep_k_tokens_are_told_apart(student, teacher):
    """A student that agrees with the teacher on all K + 1 outcomes has no loss; without the tail, it has."""
    cached = d.top_k(teacher, 3)
    agrees = teacher.clone()
    rest = torch.ones_like(agrees).scatter(1, cached.index_TK, 0.0).bool()
    agrees[rest] = agrees[rest].view(T, -1).flip(-1).flatten()  # the others share their mass out differently
    assert d.top_k_loss(agrees, cached).abs().max() < 1e-12 and d.soft_loss(agrees, teacher).min() > 0.01

    log_q = student.log_softmax(-1).gather(1, cached.index_TK)
    renormalised = (cached.log_prob_TK.softmax(-1) * (cached.log_prob_TK.log_softmax(-1) - log_q)).sum(-1)
    dropped = (cached.log_prob_TK.exp() * (cached.log_prob_TK - log_q)).sum(-1)
    right = d.top_k_loss(student, cached)
    assert float((renormalised - right).abs().min()) > 0.01 and float((dropped - right).abs().min()) > 0.01
    assert bool((renormalised > d.soft_loss(student, teacher)).any())  # no bound any more
    own = cached.log_prob_TK.softmax(-1) * (cached.log_prob_TK.log_softmax(-1) - cached.log_prob_TK)
    assert float(own.sum(-1).min()) > 0.01  # and it would drive a perfect student on to be too sure


def test_a_tail_too_small_for_one_minus_the_sum():
    """In float32, 1 - sum says 0 or noise of 1e-7, where the tail is e^-39."""
    logits = torch.tensor([[30.0, 29.0, -10.0, -11.0, -12.0]])
    cached = d.top_k(logits, 2)
    p = chances(logits[0].double())
    assert float(cached.log_tail_T) == pytest.approx(math.log(sum(p[2:])), rel=1e-6) and cached.log_tail_T < -39
    naive = torch.log(1 - cached.log_prob_TK.exp().sum(-1))
    assert not abs(float(naive) - float(cached.log_tail_T)) < 1
    assert d.top_k(logits, 5).log_tail_T.tolist() == [-math.inf]
    excluded = logits.clone()
    excluded[:, 2:] = -torch.inf
    student = torch.randn(1, 5, requires_grad=True)
    loss = d.top_k_loss(student, d.top_k(excluded, 3))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx(d.soft_loss(student, excluded).tolist(), rel=1e-5)
    assert bool(student.grad.isfinite().all())


def test_a_file_gives_back_what_was_put_in(tmp_path, student, teacher):
    file, cached = tmp_path / "targets.safetensors", d.top_k(3 * teacher.float(), 4, 2.0)
    d.save_targets(file, cached)
    back = d.load_targets(file)
    assert [x.name for x in tmp_path.iterdir()] == [file.name]
    assert torch.equal(back.index_TK, cached.index_TK) and back.index_TK.dtype == torch.int64 and back.temperature == 2
    assert torch.allclose(back.log_prob_TK, cached.log_prob_TK, rtol=2e-3, atol=2e-3)
    assert torch.allclose(back.log_tail_T, cached.log_tail_T, rtol=2e-3, atol=2e-3)
    total = back.log_prob_TK.exp().sum(-1) + back.log_tail_T.exp()
    assert torch.allclose(total, torch.ones(T), atol=1e-6) and back.log_tail_T.dtype == torch.float32
    assert torch.allclose(d.top_k_loss(student, back), d.top_k_loss(student, cached), rtol=1e-2)
    assert float(d.top_k_loss(3 * teacher.float(), back).min()) > -1e-6


def test_a_save_that_is_killed_leaves_the_old_file(tmp_path, teacher, monkeypatch):
    file, cached = tmp_path / "targets", d.top_k(teacher.float(), 4)
    d.save_targets(file, cached)
    before = file.read_bytes()

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(d, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        d.save_targets(file, d.top_k(teacher.float(), 3))
    assert file.read_bytes() == before


def test_what_a_file_weighs_and_what_it_can_hold(tmp_path):
    logits = torch.randn(1000, 600)
    d.save_targets(tmp_path / "small", d.top_k(logits, 8))
    assert 0 <= (tmp_path / "small").stat().st_size - 1000 * (8 * (2 + 2) + 2) < 512
    for last in (32_767, 32_768, 39_999):  # on both sides of what 16 bits hold
        wide = d.top_k(torch.zeros(1, 40_000).index_fill(1, torch.tensor([last]), 9.0), 2)
        d.save_targets(tmp_path / "wide", wide)
        assert (
            torch.equal(d.load_targets(tmp_path / "wide").index_TK, wide.index_TK) and int(wide.index_TK[0, 0]) == last
        )
    d.save_targets(tmp_path / "none", d.top_k(logits[:0], 8))
    assert d.load_targets(tmp_path / "none").index_TK.shape == (0, 8)
    everything = d.top_k(logits[:3], 600)
    d.save_targets(tmp_path / "all", everything)
    assert d.load_targets(tmp_path / "all").log_tail_T.tolist() == [-math.inf] * 3


def test_a_file_that_is_no_cache_is_refused(tmp_path):
    save_file({"other": torch.zeros(1)}, tmp_path / "other")
    (tmp_path / "text").write_text("hello")
    parts = {"index": torch.zeros(3, 2), "log_prob": torch.zeros(3, 2), "log_tail": torch.zeros(4)}
    save_file(parts, tmp_path / "uneven", metadata={"temperature": "1.0"})
    save_file(parts | {"log_tail": torch.zeros(3)}, tmp_path / "warm", metadata={"temperature": "warm"})
    for name in ("missing", "text", "other", "uneven", "warm"):
        with pytest.raises(ValueError, match="holds no teacher's targets"):
            d.load_targets(tmp_path / name)


# ----------------------------------------------------------------------------------------------------------------------
# Codistillation


def tiny(seed, hidden=32):
    config = Llama4Config.preset("mini-maverick")
    text = replace(
        config.text, vocab_size=40, hidden_size=hidden, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=16,
        num_experts=4, expert_width=24, dense_width=48, moe_layers=(1, 3), nope_layers=(3,), chunk_size=4,
    )  # fmt: skip
    model = Llama4(replace(config, text=text, vision=None))
    model.reset_parameters(torch.Generator().manual_seed(seed))
    return model


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(40, (3, 9), generator=generator)
    learn = torch.rand(3, 9, generator=generator) < 0.4
    learn[:, -1] = False
    return ids, ids.roll(-1, 1)[learn], learn


def test_codistil_is_the_mix_of_both_losses_for_each_student(batch):
    ids, target, learn = batch
    teacher, students = tiny(0, 48), [tiny(1), tiny(2, 64)]
    with torch.no_grad():
        for model in (teacher, *students):
            model.lm_head.weight.mul_(30)  # as trained: with logits near 0, every temperature and direction looks alike
    losses = d.codistill(teacher, students, ids, target, learn, 0.3, 2.0)
    for student, loss in zip(students, losses, strict=True):
        with torch.no_grad():
            s, t = student(ids).double(), teacher(ids).double()
        each = []
        for row, column in learn.nonzero().tolist():
            hard = -math.log(chances(s[row, column])[int(ids[row, column + 1])])
            each.append(0.7 * hard + 0.3 * 4 * kl(chances(t[row, column], 2.0), chances(s[row, column], 2.0)))
        assert loss.requires_grad and float(loss.detach()) == pytest.approx(sum(each) / len(each), rel=1e-4)
    weights = torch.linspace(0, 1, len(target))
    by_token = d.codistill(teacher, students[:1], ids, target, learn, weights)[0]
    logits = students[0](ids)[learn]
    want = d.mix(d.hard_loss(logits, target), d.soft_loss(logits, teacher(ids)[learn]), weights)
    assert torch.allclose(by_token, want, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_runs_once_and_is_left_as_it_was(batch, training):
    teacher, students, calls = tiny(0).train(training), [tiny(1), tiny(2), tiny(3)], []
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    for block in (teacher.layers[0], teacher.lm_head):
        block.register_forward_hook(lambda module, x, y: calls.append((module.training, y.requires_grad, y.shape)))
    losses = d.codistill(teacher, students, *batch)
    assert len(losses) == 3 and len(calls) == 2
    assert [call[:2] for call in calls] == [(False, False)] * 2
    assert calls[1][2] == (int(batch[2].sum()), 40)  # the head runs only where there is something to learn
    sum(losses).backward()
    assert teacher.training is training and all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters())
    assert all(
        float(s.lm_head.weight.grad.norm()) > 0 and float(s.embed_tokens.weight.grad.norm()) > 0 for s in students
    )


def test_the_teacher_s_mode_is_restored_when_a_batch_is_refused(batch):
    ids, target, learn = batch
    teacher = tiny(0).train()
    teacher.layers[0].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        d.codistill(teacher, [tiny(1)], ids, target, learn)
    assert teacher.training


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def other_words():
    model = tiny(1)
    model.config = replace(model.config, text=replace(model.config.text, vocab_size=41))
    return model


REFUSED = {
    "other shapes": (lambda s, t: d.soft_loss(s, t[:, :-1]), "same wanted"),
    "one row": (lambda s, t: d.soft_loss(s[0], t[0]), r"must be logits \[T, V\]"),
    "temperature 0": (lambda s, t: d.soft_loss(s, t, 0.0), "temperature is 0.0; it must be above 0"),
    "temperature below 0": (lambda s, t: d.top_k(t, 2, -1.0), "temperature is -1.0; it must be above 0"),
    "k 0": (lambda s, t: d.top_k(t, 0), "k is 0; of 11 tokens it must be 1 to 11"),
    "k above V": (lambda s, t: d.top_k(t, 12), "k is 12; of 11 tokens it must be 1 to 11"),
    "fewer tokens": (lambda s, t: d.top_k_loss(s[1:], d.top_k(t, 2)), r"both must be \[4, K\]"),
    "tail of another shape": (
        lambda s, t: d.top_k_loss(s, d.top_k(t, 2)._replace(log_tail_T=torch.zeros(4))),
        r"log_tail_T is \[4\]; it must be \[5\]",
    ),
    "a kept token below 0": (
        lambda s, t: d.top_k_loss(s, d.top_k(t, 2)._replace(index_TK=torch.tensor([[-1, 3]] * T))),
        "keeps tokens -1 to 3; .* 0 to",
    ),
    "a smaller student": (lambda s, t: d.top_k_loss(s[:, :2], d.top_k(t, 11)), "keeps tokens 0 to 10; .* 0 to 1"),
    "target of another shape": (lambda s, t: d.hard_loss(s, torch.zeros(4, dtype=torch.int64)), r"it must be \[5\]"),
    "target out of range": (lambda s, t: d.hard_loss(s, torch.full((5,), 11)), "holds 11 to 11; ids run from 0 to 10"),
    "target below 0": (lambda s, t: d.confidence(t, torch.full((5,), -1)), "holds -1 to -1"),
    "weight above 1": (lambda s, t: d.mix(s[:, 0], t[:, 0], 1.5), "soft_weight is 1.5; it must be 0"),
    "weight not a number": (lambda s, t: d.mix(s[:, 0], t[:, 0], math.nan), "soft_weight is nan"),
    "weights below 0": (lambda s, t: d.mix(s[:, 0], t[:, 0], torch.full((5,), -0.5)), "soft_weight is -0.5 to -0.5"),
    "weights of another shape": (lambda s, t: d.mix(s[:, 0], t[:, 0], torch.ones(4)), r"must be a number or \[5\]"),
    "losses of another shape": (lambda s, t: d.mix(s[:, 0], t[1:, 0], 0.5), "both must be"),
    "no losses": (lambda s, t: d.mix(s[:0, 0], t[:0, 0], 0.5), "at least one token"),
    "step after the end": (lambda s, t: d.ramp(5, 4), "step is 5 of 4"),
    "no steps": (lambda s, t: d.ramp(0, 0), "steps must be at least 1"),
    "ramp above 1": (lambda s, t: d.ramp(1, 4, first=2.0), "first is 2.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_one_line(name, student, teacher):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        call(student, teacher)
    assert "\n" not in str(error.value)


def test_a_bad_batch_is_refused(batch):
    ids, target, learn = batch
    teacher = tiny(0)
    for change, message in (
        ({"students": []}, "students is empty"),
        ({"students": [teacher]}, "the teacher itself"),
        ({"students": [other_words()]}, r"vocabularies of \[40, 41\]"),
        ({"learn": learn[:, 1:]}, r"must be \[batch, tokens\]"),
        ({"learn": learn.long()}, "learn as bool"),
        ({"target_T": target[1:]}, "learn marks"),
        ({"learn": torch.zeros_like(learn), "target_T": target[:0]}, "learn marks 0 tokens"),
        ({"target_T": torch.full_like(target, 40)}, "holds 40 to 40"),
        ({"soft_weight": 1.01}, "soft_weight is 1.01"),
        ({"temperature": 0}, "temperature is 0"),
    ):
        call = {"students": [tiny(1)], "input_ids": ids, "target_T": target, "learn": learn}
        with pytest.raises(ValueError, match=message):
            d.codistill(teacher, **(call | change))
