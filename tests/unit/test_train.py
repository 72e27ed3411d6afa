"""Training documents teach what they should, and a run that was killed goes on as if nothing had happened."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from random import Random

import pytest
import torch
from safetensors import safe_open

from minillama4 import scenes
from minillama4.config import Llama4Config, TextConfig, VisionConfig, every
from minillama4.documents import SORTS, Writer
from minillama4.evaluate import load_entropy
from minillama4.fusion import cut_tiles
from minillama4.model import Llama4
from minillama4.tokenizer import load_tokenizer, train_tokenizer
from minillama4.train import Recipe, average_gradients, balance_loss, batch_at, loss_of, train

MINI = Llama4Config.preset("mini-scout")
TINY = replace(
    MINI,
    text=TextConfig(
        vocab_size=1024, hidden_size=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=3,
        expert_width=8, dense_width=8, moe_layers=every(2, 4), nope_layers=every(4, 4), chunk_size=32,
        max_positions=1024, floor_scale=32,
    ),
    vision=VisionConfig(tile_size=48, patch_size=12, max_tiles=3, hidden_size=8, num_layers=1, num_heads=2,
                        mlp_width=32, adapter_width=8),
)  # fmt: skip
RECIPE = Recipe(steps=6, batch_size=2, warmup=2, workers=1)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(scenes.words(40)).save(folder)
    return folder


@pytest.fixture(scope="module")
def writer(tokens):
    return Writer(MINI, load_tokenizer(tokens))


def weights_of(folder):
    with safe_open(folder / "state.safetensors", "pt") as state:
        return {name: state.get_tensor(name) for name in state.keys()}


# ----------------------------------------------------------------------------------------------------------------------
# Documents


@pytest.mark.parametrize("sort", ["questions", "caption", "two pictures", "text"])
def test_only_the_assistants_words_and_labels_are_learned(writer, sort):
    document = writer.training_document(Random(5), sort, most_objects=6)
    tokenizer = writer.tokenizer
    speaker, in_header = None, False
    for i, token in enumerate(document.ids):
        if token == tokenizer.token_id("<|header_start|>"):
            speaker, in_header = tokenizer.decode([document.ids[i + 1]]), True
        learned = document.weight[i] > 0
        assert learned == (speaker == "assistant" and not in_header), (i, token)
        if in_header and tokenizer.decode([token]) == "\n\n":
            in_header = False
    assert sum(w > 0 for w in document.weight) >= 2


def test_a_table_teaches_its_values_only(writer):
    document = writer.start()
    writer.table(document, [("the red circle", ["top left", "small"]), ("circles", ["3"])])
    learned = [token for token, weight in zip(document.ids, document.weight, strict=True) if weight]
    assert writer.tokenizer.decode(learned) == "top leftsmall3"
    assert writer.tokenizer.decode(document.ids).endswith("\n\nthe red circle\ntop left\nsmall\ncircles\n3\n")
    assert len(document.ids) == len(document.weight)


def test_inventories_and_tallies_are_true():
    rng = Random(4)
    for _ in range(50):
        scene = scenes.draw_scene(rng)
        for name, (place, size, digit) in scenes.inventory(scene, rng, "en"):
            named = [
                i for i in scene.items if all(word in (i.colour, i.shape, "the", "object") for word in name.split())
            ]
            assert [(i.place, i.size, str(i.digit)) for i in named] == [(place, size, digit)], name
        counts = dict(scenes.tally(scene, rng, "en"))
        assert len(counts) == len(scenes.SHAPES) + len(scenes.COLOURS)
        assert counts["red objects"] == [str(sum(i.colour == "red" for i in scene.items))]
        assert counts["crosses"] == [str(sum(i.shape == "cross" for i in scene.items))]


@pytest.mark.parametrize("sort", SORTS)
def test_every_sort_of_document_is_padded_to_one_batch(writer, sort):
    batch = writer.batch([writer.training_document(Random(seed), sort, 6) for seed in range(3)])
    assert batch.ids.shape == batch.targets.shape == batch.weights.shape and (batch.weights.sum(1) > 0).all()


def test_a_batch_predicts_the_next_token_and_pads_without_weight(writer):
    documents = [writer.training_document(Random(seed), "text", 6) for seed in (1, 2, 3)]
    batch = writer.batch(documents)
    assert batch.pixels is None and not len(batch.labels)
    for row, document in enumerate(documents):
        n = len(document.ids)
        assert batch.ids[row, :n].tolist() == document.ids
        assert batch.targets[row, : n - 1].tolist() == document.ids[1:]
        assert not batch.weights[row, n - 1 :].any()


def test_a_label_stands_on_a_patch_that_shows_its_object(writer):
    """Paint over one object: of all tiles' cells, those with its labels must change."""
    rng = Random(11)
    for _ in range(40):
        scene = scenes.draw_scene(rng, "train", 3)
        document = writer.start()
        writer.user(document, "?", scene)
        writer.label(document, replace(scene, items=scene.items[:1]))  # label the first object only
        without = replace(scene, items=scene.items[1:])
        full, less = (cut_tiles(scenes.render(s), MINI.vision)[0] for s in (scene, without))
        cells = (full != less).any(1).unflatten(1, (4, 12)).unflatten(3, (4, 12)).any(4).any(2)  # [tiles, 4, 4]
        patches = [i for i, token in enumerate(document.ids) if token == MINI.patch_token]
        labelled = sorted({patches.index(position) for position, _ in document.labels})
        assert len(labelled) == 2 and labelled[1] >= 48 > labelled[0]  # one in its own tile, one in the global tile
        assert all(cells.flatten()[i] for i in labelled)
        item = scene.items[0]
        words = (item.colour, item.shape, item.size, *item.place.split(), str(item.digit))
        told = [writer.tokenizer.decode([word]).strip() for _, word in document.labels]
        assert sorted(told) == sorted(2 * words)


def test_the_batch_of_a_step_depends_on_seed_step_and_worker_alone(writer):
    first = batch_at(7, 0, RECIPE, writer)
    again = batch_at(7, 0, RECIPE, writer)
    assert torch.equal(first.ids, again.ids) and torch.equal(first.labels, again.labels)
    assert first.pixels is again.pixels is None or torch.equal(first.pixels, again.pixels)
    others = [
        batch_at(8, 0, RECIPE, writer),
        batch_at(7, 1, RECIPE, writer),
        batch_at(7, 0, replace(RECIPE, seed=1), writer),
    ]
    assert all(o.ids.shape != first.ids.shape or not torch.equal(o.ids, first.ids) for o in others)


def test_training_never_draws_a_held_out_object(writer):
    for step in range(0, 400, 40):
        rng = Random(step)
        for sort in ("questions", "caption", "two pictures"):
            for picture in writer.training_document(rng, sort, 6).pictures:
                assert not any(scenes.is_held_out(i.colour, i.shape, i.digit) for i in picture.items)


# ----------------------------------------------------------------------------------------------------------------------
# Balance


def test_balance_loss_is_one_when_even_and_the_number_of_experts_when_collapsed():
    even = torch.eye(4).mul(50).repeat(3, 1)[None]  # [1, 12 tokens, 4 experts]: each expert wins three times
    assert balance_loss(even).item() == pytest.approx(1.0)
    collapsed = torch.tensor([50.0, 0, 0, 0]).repeat(1, 12, 1)
    assert balance_loss(collapsed).item() == pytest.approx(4.0)


def test_balance_loss_pushes_down_the_expert_that_has_most_tokens():
    logits = torch.tensor([[[2.0, 0, 0], [2.0, 1, 0], [0, 1.0, 0]]], requires_grad=True)
    balance_loss(logits).backward()
    assert logits.grad[..., 0].sum() > 0 > logits.grad[..., 2].sum()


def test_load_entropy_of_hand_worked_loads():
    assert load_entropy([0.25] * 4) == pytest.approx(1)
    assert load_entropy([1, 0, 0, 0]) == 0
    assert load_entropy([0.5, 0.5, 0, 0]) == pytest.approx(0.5)


def test_the_losses_are_means_over_learned_tokens_and_labels_only(writer):
    model = Llama4(MINI)
    rng = Random(2)
    batch = writer.batch([writer.training_document(rng, "questions", 3) for _ in range(2)])
    words, labels, _ = loss_of(model, batch)
    with torch.no_grad():
        surprise = -model(batch.ids, batch.pixels).double().log_softmax(-1)
    told = [
        float(surprise[row, t, batch.targets[row, t]])
        for row in range(2)
        for t in range(batch.ids.shape[1])
        if batch.weights[row, t] > 0
    ]
    assert words.item() == pytest.approx(sum(told) / len(told), rel=1e-5)
    shown = [float(surprise[row, position, word]) for row, position, word in batch.labels.tolist()]
    assert labels.item() == pytest.approx(sum(shown) / len(shown), rel=1e-5)


def test_learning_rate_warms_up_follows_the_cosine_and_cools_down_to_zero():
    recipe = Recipe(steps=800, warmup=100, horizon=1100, cooldown=200)
    assert recipe.rate(0) == pytest.approx(0.01) and recipe.rate(100) == 1
    assert recipe.rate(600) == pytest.approx(0.05 + 0.95 / 2)  # half of the cosine, and the cool-down begins
    assert recipe.rate(700) == pytest.approx(0.5 * (0.05 + 0.95 * 0.5 * (1 + math.cos(0.6 * math.pi))))
    assert recipe.rate(799) < 0.005
    assert all(recipe.rate(i) >= recipe.rate(i + 1) for i in range(100, 799))
    assert [recipe.most_objects(i) for i in (0, 374, 375, 2249, 9999)] == [1, 1, 2, 6, 6]


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_run_stopped_in_the_middle_ends_with_the_same_weights(tokens, tmp_path, monkeypatch):
    train(TINY, tokens, RECIPE, tmp_path / "whole", save_every=3)

    class Killed(Exception):
        pass

    def dies_at_four(step, *args):
        if step == 4:
            raise Killed
        return batch_at(step, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("minillama4.train.batch_at", dies_at_four)
        train(TINY, tokens, RECIPE, tmp_path / "broken", save_every=3)
    train(TINY, tokens, RECIPE, tmp_path / "broken", save_every=3)
    whole, broken = weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert len((tmp_path / "broken" / "loss.csv").read_text().splitlines()) == 1 + RECIPE.steps


def test_kill_9_loses_nothing_that_was_saved_and_leaves_no_process(tokens, tmp_path):
    code = (
        "import sys; sys.path[:0] = sys.argv[4:];"
        "from pathlib import Path; from dataclasses import replace; import test_train as t;"
        "from minillama4.train import train;"
        "train(t.TINY, Path(sys.argv[1]), replace(t.RECIPE, workers=2, steps=int(sys.argv[3])), Path(sys.argv[2]), 1)"
    )
    script = tmp_path / "run.py"
    script.write_text("if __name__ == '__main__':\n    " + code)
    here = os.path.dirname(__file__)
    command = [sys.executable, str(script), str(tokens), str(tmp_path / "run"), "400", here]
    run = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": here}, start_new_session=True)
    state = tmp_path / "run" / "state.safetensors"
    deadline = time.time() + 180
    while not state.exists() and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    with safe_open(state, "pt") as file:  # whole, whatever moment it was
        step = int(file.metadata()["step"])
        assert 1 <= step < 400
    assert not [p for p in (tmp_path / "run").glob("*.new") if p.name != "state.safetensors.new"]
    deadline = time.time() + 90
    while time.time() < deadline and subprocess.run(["pgrep", "-g", str(run.pid)], capture_output=True).stdout:
        time.sleep(0.2)
    assert not subprocess.run(["pgrep", "-g", str(run.pid)], capture_output=True).stdout, "a worker outlived its parent"


def test_another_recipe_is_refused_and_nothing_is_overwritten(tokens, tmp_path):
    train(TINY, tokens, replace(RECIPE, steps=2), tmp_path, save_every=1)
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another recipe"):
        train(TINY, tokens, replace(RECIPE, steps=3), tmp_path, save_every=1)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_workers_share_the_mean_gradient():
    """Two ranks in two threads, through the same shared memory that processes use."""
    import threading

    models = [Llama4(TINY) for _ in range(2)]
    for rank, model in enumerate(models):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 + 2 * rank)
    size = sum(p.numel() for p in models[0].parameters())
    shared, barrier = torch.zeros(2, size), threading.Barrier(2)
    threads = [threading.Thread(target=average_gradients, args=(m, r, shared, barrier)) for r, m in enumerate(models)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(torch.equal(p.grad, torch.full_like(p, 2.0)) for m in models for p in m.parameters())
