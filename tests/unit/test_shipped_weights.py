"""The shipped weights do what their card says, and nothing they depend on has moved under them."""

import json

import pytest
import torch

from minillama4 import load_checkpoint, load_tokenizer, scenes
from minillama4.checkpoint import WEIGHTS
from minillama4.documents import Writer
from minillama4.evaluate import (
    accuracy,
    answers_right,
    chance,
    expert_load,
    held_out_questions,
    load_entropy,
    mixed_batches,
    nope_layers_off,
    question_batches,
    random_experts,
)  # fmt: skip
from minillama4.train_command import GOALS, card_text, frozen


@pytest.fixture(scope="module", params=["mini-scout", "mini-maverick"])
def preset(request):
    return request.param


@pytest.fixture(scope="module")
def model(preset):
    return load_checkpoint(preset)


@pytest.fixture(scope="module")
def writer(preset, model):
    return Writer(model.config, load_tokenizer(preset))


@pytest.fixture(scope="module")
def card(preset):
    return json.loads((WEIGHTS / preset / "card.json").read_text())


@pytest.fixture(scope="module")
def items():
    return held_out_questions(per_cell=12, seed=5)  # 192 questions that no card was scored on


def share(model, writer, items, **options):
    right = answers_right(model, writer, items, **options)
    return sum(right) / len(right)


@pytest.mark.parametrize("what,value,least", GOALS, ids=[goal[0] for goal in GOALS])
def test_the_card_reaches_its_goal(preset, card, what, value, least):
    reached = value(card) >= least
    if (preset, what) == ("mini-maverick", "lost with random experts"):
        assert not reached and "| NO |" in card_text(card)  # a goal for mini-scout; lesson 04 says that it is missed
    else:
        assert reached, f"{what}: {value(card):.3f}, wanted {least}"


def test_scenes_tokenizer_glossary_and_config_are_those_of_the_card(preset, card):
    assert frozen(preset, WEIGHTS / preset) == card["frozen"]


def test_training_took_at_most_90_minutes_and_the_file_at_most_10_megabytes(preset, card):
    assert card["minutes"] <= 90
    assert (WEIGHTS / preset / "model.safetensors").stat().st_size <= 10e6
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*.safetensors")) <= 25e6, "all weights together"


def test_the_card_tells_what_its_data_say(preset, card):
    assert (WEIGHTS / preset / "card.md").read_text() == card_text(card)


def test_fresh_held_out_questions_are_answered_as_the_card_says(model, writer, card, items):
    measured = share(model, writer, items)
    assert measured == pytest.approx(
        card["full"]["mean"], abs=0.1
    )  # 192 questions: three standard errors are about 7 points


def test_the_answers_come_from_the_picture(model, writer, items):
    """With another question's picture, no better than a guesser who knows the answers' habits."""
    blind = accuracy(items, answers_right(model, writer, items, blind=True), "kind")
    guess = chance(items, samples=2000)
    assert all(blind[kind] <= guess[kind] + 0.17 for kind in blind), (
        blind,
        guess,
    )  # 48 questions a kind: 2.3 standard errors


def test_nope_layers_carry_the_picture_and_routing_matters_to_mini_scout(preset, model, writer, items):
    items = items[::2]
    full = share(model, writer, items)
    with nope_layers_off(model):
        assert share(model, writer, items) < full - 0.2
    with random_experts(model):
        lost = full - share(model, writer, items)
    assert lost > 0.2 if preset == "mini-scout" else lost < 0.05
    assert share(model, writer, items) == full  # both undo themselves


def test_no_expert_is_dead(model, writer, items):
    for layer, shares in expert_load(model, question_batches(writer, items[::4])).items():
        assert load_entropy(shares) >= 0.8, layer
    for layer, shares in expert_load(model, mixed_batches(writer, each=3, seed=1)).items():
        assert min(shares) > 0.01, layer


def test_the_score_is_what_greedy_generation_gives(preset, model, writer, items):
    """`answers_right` checks all tokens in one pass; generating the text must agree with it."""
    from minillama4 import ask

    sample = items[::16]
    right = answers_right(model, writer, sample)
    texts = [ask(scenes.render(i.picture), i.question.text, model=preset) == i.question.answer for i in sample]
    assert texts == right


def test_mini_weights_are_stored_as_bf16_and_load_as_fp32(preset, model):
    from safetensors import safe_open

    with safe_open(WEIGHTS / preset / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
