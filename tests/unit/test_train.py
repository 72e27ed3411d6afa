"""Training documents teach what they should, and a run that was killed goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from random import Random

import pytest
import torch
from safetensors import safe_open

from minillama4 import scenes
from minillama4 import train as train_module
from minillama4.config import Llama4Config, TextConfig, VisionConfig, every
from minillama4.documents import SORTS, Writer
from minillama4.evaluate import load_entropy
from minillama4.fusion import cut_tiles
from minillama4.model import Llama4
from minillama4.muon import Muon, orthogonal
from minillama4.tokenizer import load_tokenizer, train_tokenizer
from minillama4.trace import trace
from minillama4.train import LABEL_SCALE, Losses, Recipe, Team, balance_loss, batch_at, loss_of, train

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
RECIPE = Recipe(steps=6, horizon=7, finish=2, batch_size=2, warmup=2, eye=2, curriculum=2, workers=1)


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


@pytest.mark.parametrize("language", scenes.LANGUAGES)
def test_a_label_stands_on_a_picture_vector_that_shows_its_object(writer, language):
    """Paint the object over: of all tiles' cells, those with its labels must change."""
    rng = Random(11)
    for _ in range(10):
        scene = scenes.draw_scene(rng, "train", 1)
        document = writer.start()
        writer.user(document, "?", scenes.draw_scene(rng, "train"))  # labels count on from an earlier picture's vectors
        writer.user(document, "?", scene)
        writer.label(document, language)
        full, less = (cut_tiles(scenes.render(s), MINI.vision)[0] for s in (scene, replace(scene, items=())))
        cells = (full != less).any(1).unflatten(1, (4, 12)).unflatten(3, (4, 12)).any(4).any(2)  # [tiles, 4, 4]
        labelled = sorted({vector - cells.numel() for vector, _ in document.labels})
        assert len(labelled) == 2 and labelled[1] >= 48 > labelled[0] >= 0  # in its own tile, and in the global one
        assert all(cells.flatten()[i] for i in labelled)
        (item,) = scene.items
        first = [word for vector, word in document.labels if vector == document.labels[0][0]]
        told = writer.tokenizer.decode(first).split()
        name = scenes.phrase(language, "bare", item.colour, item.shape)
        assert told == f"{name} {scenes.size_word(language, item.size)}{item.digit}".split()


def test_a_word_points_at_the_patches_of_every_object_that_it_names(writer):
    red = scenes.Item("circle", "red", "large", "top left", 3, 0, 0)
    blue = scenes.Item("circle", "blue", "small", "bottom right", 4, 0, 0)
    document = writer.start()
    writer.user(document, "Where is the red circle?", scenes.Scene((red, blue), 240))
    writer.label(document, "en")
    batch = writer.batch([document])
    (red_word,), (circle_word,) = writer.tokenizer.encode(" red"), writer.tokenizer.encode(" circle")
    seen = {int(batch.ids[0, at]): row for (_, at), row in zip(batch.points.tolist(), batch.pointed, strict=True)}
    assert set(seen) == {red_word, circle_word}
    assert seen[red_word].sum() == 2 and seen[circle_word].sum() == 4  # a tile and the global one, for each object
    assert (batch.ids[0][seen[circle_word]] == MINI.patch_token).all() and seen[circle_word][seen[red_word]].all()


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


def test_the_losses_are_means_over_learned_tokens_labels_and_points_only(writer):
    model = Llama4(MINI)
    rng = Random(2)
    batch = writer.batch([writer.training_document(rng, "questions", 3) for _ in range(2)])
    losses = loss_of(model, batch, point=True)
    with torch.no_grad(), trace(model, attention=[3], router=True) as seen:
        surprise = -model(batch.ids, batch.pixels).double().log_softmax(-1)
        vectors = model.encode_images(batch.pixels).double().flatten(0, 1)
    told = [
        float(surprise[row, t, batch.targets[row, t]])
        for row in range(2)
        for t in range(batch.ids.shape[1])
        if batch.weights[row, t] > 0
    ]
    assert losses.words.item() == pytest.approx(sum(told) / len(told), rel=1e-5)
    shown, embeddings = [], model.embed_tokens.weight.detach().double()
    for vector, word in batch.labels.tolist():
        direction = vectors[vector] / vectors[vector].square().mean().sqrt()
        shown.append(-float((LABEL_SCALE * embeddings @ direction).log_softmax(0)[word]))
    assert losses.labels.item() == pytest.approx(sum(shown) / len(shown), rel=1e-4)
    paid = []
    for (row, at), patches in zip(batch.points.tolist(), batch.pointed, strict=True):
        for head in (0, 1):
            paid.append(-float(seen.attention[3][row, head, at][patches].sum().log()))
    assert losses.points.item() == pytest.approx(sum(paid) / len(paid), rel=1e-4)
    assert loss_of(model, batch).points == 0  # nothing points once the curriculum is over
    quiet = [-float(routes.score.log().mean()) for routes in seen.router.values()]
    assert losses.volume.item() == pytest.approx(sum(quiet) / len(quiet), rel=1e-5)


def test_the_parts_of_the_loss_are_weighted_as_the_tables_say(monkeypatch):
    monkeypatch.setattr(train_module, "ROUTING", ((0.0, 1.0, 0.0, 0.0), (0.6, 2.0, 10.0, 0.0)))
    recipe = Recipe(horizon=10, label=100, point=1000)
    losses = Losses(*torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))  # words, labels, balance, volume, points
    assert losses.weighted(recipe, 5).item() == pytest.approx(0.1 + 20 + 0.3 + 500)
    assert losses.weighted(recipe, 6).item() == pytest.approx(0.1 + 20 + 0.6 + 4 + 500)


def test_learning_rate_warms_up_stays_and_cools_down_to_zero():
    recipe = Recipe(steps=900, horizon=1000, warmup=100, cooldown=0.4, finish=100, eye=200, curriculum=300)
    assert recipe.rate(0) == pytest.approx(0.01) and recipe.rate(100) == recipe.rate(600) == 1
    assert recipe.rate(800) == pytest.approx(0.5) and recipe.rate(850) == pytest.approx(0.375 / 2)
    assert recipe.rate(899) < 0.005
    assert [recipe.most_objects(i) for i in (0, 200, 249, 250, 499, 999)] == [6, 1, 1, 2, 6, 6]


# ----------------------------------------------------------------------------------------------------------------------
# Muon


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 6, 9)])
def test_orthogonal_keeps_singular_vectors_and_brings_all_values_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).view(-1, *shape[-2:])
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    values = torch.diagonal(u.mT @ orthogonal(x) @ vh.mT, dim1=-2, dim2=-1)
    assert ((values > 0.6) & (values < 1.3)).all()
    aligned = u @ torch.diag_embed(values) @ vh
    assert torch.allclose(orthogonal(x), aligned, atol=1e-6)


def test_muon_on_matrices_is_torchs_and_a_stack_is_its_matrices_one_by_one():
    draw = torch.Generator().manual_seed(0)
    start, pushes = torch.randn(3, 8, 12, generator=draw), [torch.randn(3, 8, 12, generator=draw) for _ in range(4)]
    stack, singles = start.clone().requires_grad_(), [m.clone().requires_grad_() for m in start]
    ours = Muon([stack], lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(singles, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for push in pushes:
        stack.grad = push.clone()
        for single, grad in zip(singles, push, strict=True):
            single.grad = grad.clone()
        ours.step(), theirs.step()
    moved = (torch.stack([s.detach() for s in singles]) - start).norm()
    assert (stack.detach() - torch.stack([s.detach() for s in singles])).norm() < 0.05 * moved  # theirs is in bf16


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


def in_two_ranks(run) -> list:
    """run(team) in two threads, through the same shared memory that processes use."""
    buffer, barrier = torch.zeros(2, 20_000), threading.Barrier(2)
    results = [None, None]

    def work(rank):
        results[rank] = run(Team(rank, buffer, barrier))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    return results


def test_workers_share_the_mean_gradient():
    def run(team):
        model = Llama4(TINY)
        for name, parameter in model.named_parameters():
            if "vision" in name:  # the others have none yet
                parameter.grad = torch.full_like(parameter, 1.0 + 2 * team.rank)
        team.average_gradients(model)
        return [p.grad for name, p in model.named_parameters() if "vision" in name]

    assert all(torch.equal(g, torch.full_like(g, 2.0)) for grads in in_two_ranks(run) for g in grads)


def test_workers_that_share_the_orthogonalising_make_the_same_step_as_one_alone():
    draw = torch.Generator().manual_seed(0)
    shapes = [(5, 6, 9), (7, 4), (9, 6), (3, 6, 9)]
    start, pushes = ([torch.randn(shape, generator=draw) for shape in shapes] for _ in range(2))

    def run(team):
        parameters = [weight.clone().requires_grad_() for weight in start]
        optimizer = Muon(parameters, lr=0.1, weight_decay=0.1, team=team)
        for _ in range(2):
            for parameter, push in zip(parameters, pushes, strict=True):
                parameter.grad = push.clone()
            optimizer.step()
        return [p.detach() for p in parameters]

    alone = run(None)
    for together in in_two_ranks(run):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(alone, together, strict=True))
