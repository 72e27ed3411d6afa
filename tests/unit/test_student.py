"""mini-maverick's training: what a student takes over from its teacher and learns from it, and what its card says."""

import csv
import json
from dataclasses import replace
from random import Random

import pytest
import torch
from test_train import TINY

from minillama4 import load_checkpoint, load_tokenizer
from minillama4.checkpoint import WEIGHTS
from minillama4.config import Llama4Config
from minillama4.distill import inherit
from minillama4.documents import Writer
from minillama4.model import Llama4
from minillama4.train import batch_at, loss_of, train
from minillama4.train_command import RECIPES, card_text


def model(seed: int, **text) -> Llama4:
    made = Llama4(replace(TINY, text=replace(TINY.text, **text)))
    made.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for block in made.layers:  # as after training, when a norm's weights are no longer ones
            block.input_layernorm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(seed))
    return made


def test_a_student_inherits_what_has_the_same_name_and_shape_and_nothing_else():
    teacher, student = model(0, num_experts=5), model(1)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    copied = inherit(student, teacher)
    given, now = dict(teacher.named_parameters()), dict(student.named_parameters())
    other = {name for name in now if "experts." in name or name.endswith("router.weight")}  # 5 experts there, 3 here
    assert set(copied) == set(now) - other and other
    assert all(torch.equal(now[name], given[name]) for name in copied)
    assert all(torch.equal(now[name], before[name]) for name in other)


def test_without_qk_norm_inherited_queries_and_keys_keep_the_size_that_it_gave_them():
    teacher, student = model(0), model(1, qk_norm=False)
    inherit(student, teacher)
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(2))
    for layer, block in enumerate(student.layers):
        attention = block.self_attn
        if not attention.rotary:  # a NoPE layer never had the norm
            assert torch.equal(attention.q_proj.weight, teacher.layers[layer].self_attn.q_proj.weight)
            continue
        for projection in (attention.q_proj, attention.k_proj):
            with torch.no_grad():
                heads = projection(block.input_layernorm(x)).unflatten(-1, (-1, 8))  # [4000, heads, dim]
            rms = heads.double().square().mean((0, 2)).sqrt()
            assert torch.allclose(rms, torch.ones_like(rms), atol=0.05), "RMS 1 for each head, as after QK norm"
    assert torch.equal(student.layers[0].self_attn.v_proj.weight, teacher.layers[0].self_attn.v_proj.weight)


def test_a_teacher_without_qk_norm_hands_its_queries_over_as_they_are():
    teacher, student = model(0, qk_norm=False), model(1, qk_norm=False)
    inherit(student, teacher)
    assert torch.equal(student.layers[0].self_attn.q_proj.weight, teacher.layers[0].self_attn.q_proj.weight)


def test_a_projection_that_was_not_copied_is_left_alone():
    teacher, student = model(0), model(1, qk_norm=False, num_heads=4)
    own = student.layers[0].self_attn.q_proj.weight.detach().clone()
    inherit(student, teacher)
    assert torch.equal(student.layers[0].self_attn.q_proj.weight, own)


def test_what_was_a_nope_layer_of_the_teacher_had_no_norm_either():
    teacher, student = model(0, nope_layers=(0,)), model(1, qk_norm=False)
    inherit(student, teacher)
    assert torch.equal(student.layers[0].self_attn.k_proj.weight, teacher.layers[0].self_attn.k_proj.weight)


@pytest.mark.parametrize("soft", [0.0, 0.3, 1.0])
def test_the_words_loss_is_hard_and_soft_targets_mixed_by_weight(soft):
    writer = Writer(TINY, load_tokenizer("mini-scout"))
    rng = Random(5)
    batch = writer.batch([writer.training_document(rng, "questions", 2) for _ in range(2)])
    student, teacher = model(0), model(1)
    losses = loss_of(student, batch, teacher=teacher, soft=soft)
    with torch.no_grad():
        log_q, log_p = (m(batch.ids, batch.pixels).double().log_softmax(-1) for m in (student, teacher))
    total = 0.0
    for i, t in batch.weights.nonzero().tolist():
        hard = -log_q[i, t, batch.targets[i, t]]
        kl = sum(log_p[i, t, v].exp() * (log_p[i, t, v] - log_q[i, t, v]) for v in range(1024))
        total += batch.weights[i, t] * ((1 - soft) * hard + soft * kl)
    assert losses.words.item() == pytest.approx(float(total / batch.weights.sum()), rel=1e-5)
    losses.words.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_a_run_with_a_teacher_starts_from_it(tmp_path):
    """Learning rates of 0, so that the weights after a step are those before it."""
    recipe = replace(
        RECIPES["mini-maverick"], steps=1, horizon=2, finish=1, warmup=1, batch_size=2, workers=1, adam_rate=0.0,
        muon_rate=0.0,
    )  # fmt: skip
    trained = train(Llama4Config.preset("mini-maverick"), WEIGHTS / "mini-scout", recipe, tmp_path)
    teacher = load_checkpoint("mini-scout")
    row = next(csv.DictReader((tmp_path / "loss.csv").open()))
    writer = Writer(trained.config, load_tokenizer("mini-scout"))
    wanted = loss_of(trained, batch_at(0, 0, recipe, writer), True, teacher, recipe.soft).words
    assert float(row["words"]) == pytest.approx(wanted.item(), abs=2e-4), "the loop asks the teacher"
    for name in (
        "embed_tokens.weight",
        "vision_model.patch_embedding.linear.weight",
        "layers.3.self_attn.q_proj.weight",
    ):
        assert torch.equal(trained.get_parameter(name), teacher.get_parameter(name)), name


def test_the_card_says_where_the_weights_come_from():
    card = json.loads((WEIGHTS / "mini-scout" / "card.json").read_text())
    assert "trained from nothing" in card_text(card)
    card["recipe"] |= {"teacher": "mini-scout", "soft": 0.25}
    text = card_text(card)
    assert "trained from mini-scout" in text and "25% of the loss of a word" in text


def test_a_run_that_goes_on_does_not_inherit_again(tmp_path):
    recipe = replace(RECIPES["mini-maverick"], steps=1, horizon=2, finish=1, warmup=1, batch_size=2, workers=1)
    job = (Llama4Config.preset("mini-maverick"), WEIGHTS / "mini-scout", recipe, tmp_path)
    first, again = train(*job), train(*job)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(again.embed_tokens.weight, load_checkpoint("mini-scout").embed_tokens.weight)
