"""Training-cost calculator against sums by hand, and its activations against what a real model's layers are given."""

import re
from html.parser import HTMLParser

import pytest
import torch
from tiny_models import SCOUT_LIKE, TOKENS_PER_TILE, picture_prompt

from minillama4 import Llama4
from minillama4.course.widgets.frame import png
from minillama4.course.widgets.training_cost import (
    BYTES,
    FLOPS,
    JOINT,
    OPTIMIZERS,
    PRESETS,
    WAYS,
    Load,
    TrainingCost,
    activations,
    flops,
    shown,
    size,
    step,
    table,
    table_tag,
)
from minillama4.model import Block
from minillama4.train_cost import training_cost
from minillama4.vision import VisionBlock

KNOWN = {"everything, jointly": ("100%", 22), "encoder frozen": ("95%", 21), "text frozen": ("70%", 3),
         "projector only": ("65%", 3)}  # fmt: skip
FREE = 81_559 * 2**20 - 3e9  # bytes that an H100 has left
TOTAL, ENCODER, PROJECTOR = 108_641_793_536, 850_960_896, 20_971_520  # of Scout (fact sheet, section 4)
TRAINED = {
    "everything, jointly": TOTAL,
    "encoder frozen": TOTAL - ENCODER,
    "text frozen": ENCODER + PROJECTOR,
    "projector only": PROJECTOR,
}


# ----------------------------------------------------------------------------------------------------------------------
# Costs


@pytest.mark.parametrize("way", WAYS)
def test_a_thousand_tokens_and_a_picture(way):
    share, h100s = KNOWN[way]
    now, joint = step(way=way), step()
    assert Load().tokens == 1727 and Load().tiles == 5
    assert f"{now.cost.total / joint.cost.total:.0%}" == share and now.h100s == h100s
    assert now.cost.trained_parameters == TRAINED[way]
    said = shown(way=way).text
    assert f"{share} of training jointly" in said and f"which {h100s} H100s can hold" in said
    assert f"{TRAINED[way]:,} of {TOTAL:,} parameters train" in said


@pytest.mark.parametrize("states", [12, 6, 0])
@pytest.mark.parametrize("way", WAYS)
def test_bytes_by_hand(way, states):
    load = Load(text=500, pictures=2, grid=1, batch=3)  # 794 tokens, 2 tiles
    text = 794 * (2 * 48 * 5120 + 4 * 202_048)
    tower = 2 * 2 * 577 * 34 * 1408 if way in ("everything, jointly", "text frozen") else 0
    wanted = {
        "weights": 2 * TOTAL,
        "gradients": 2 * TRAINED[way],
        "states": states * TRAINED[way],
        "activations": 3 * (text + tower + 2 * 2 * 144 * 4096),
    }
    now = step("scout", way, load, states)
    assert now.memory == wanted and now.bytes == sum(wanted.values())
    assert (now.h100s - 1) * FREE < now.bytes <= now.h100s * FREE


@pytest.mark.parametrize("way", WAYS)
def test_kept_is_what_the_layers_of_a_model_are_given_and_a_gradient_needs(way):
    """Of a small model: each layer's input that has a gradient, what a trained projector reads, and the logits."""
    ids, pixels = picture_prompt(2)
    model, kept = Llama4(SCOUT_LIKE), []
    parts = {"vision_model": "encoder", "multi_modal_projector": "projector"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts.get(name.partition(".")[0], "text") in WAYS[way])

    def keep(module, inputs):
        kept.append(2 * inputs[0].numel() if inputs[0].requires_grad or module is projector else 0)

    projector = model.multi_modal_projector["linear_1"]
    for module in model.modules():
        if isinstance(module, (Block, VisionBlock)) or module is projector:
            module.register_forward_pre_hook(keep)
    logits = model(ids, pixels)
    tiles = len(pixels) // 2
    cost = training_cost(SCOUT_LIKE, ids.shape[1], tiles, WAYS[way], batch=2)

    class Fed(Load):
        tokens, tiles = ids.shape[1], len(pixels) // 2

    assert TOKENS_PER_TILE == SCOUT_LIKE.vision.tokens_per_tile and logits.dtype == torch.float32
    assert activations(SCOUT_LIKE, Fed(batch=2), cost) == sum(kept) + logits.nbytes


def test_tokens_of_pictures():
    """147 for one tile, else 145 a tile of the grid and 147 for the global one (fact sheet, section 2.2)."""
    for grid, tokens, tiles in ((1, 147, 1), (2, 437, 3), (4, 727, 5), (12, 1887, 13), (16, 2467, 17)):
        load = Load(text=10, pictures=3, grid=grid)
        assert (load.picture_tokens, load.tokens, load.tiles) == (tokens, 10 + 3 * tokens, 3 * tiles)
    assert (Load(pictures=0).tokens, Load(pictures=0).tiles) == (1000, 0)


@pytest.mark.parametrize("preset", PRESETS.values())
def test_a_frozen_text_is_passed_and_not_learnt(preset):
    for way in ("text frozen", "projector only"):
        text, joint = step(preset, way).cost.text, step(preset).cost.text
        assert text.backward_weights == 0 and text.backward == joint.backward_inputs > 0.9 * text.forward
        assert f"{flops(text.backward)} backward, all for its inputs" in shown(preset, way).text
    assert step(preset, "encoder frozen").cost.encoder.backward == 0


def test_without_pictures_a_projector_learns_nothing():
    load = Load(pictures=0)
    for way in ("text frozen", "projector only"):
        now = step("scout", way, load)
        assert now.cost.backward == now.memory["activations"] == 0
        assert "nothing here to learn from" in shown("scout", way, load).text
    assert "1,000 of text and no picture" in shown(load=load).text
    assert step("scout", JOINT, load).cost.total == step("scout", "encoder frozen", load).cost.total


def test_maverick_reads_no_more_experts_but_stores_them():
    scout, maverick = step(), step("maverick")
    assert maverick.cost.forward == pytest.approx(scout.cost.forward, rel=0.01)
    assert maverick.memory["weights"] == 2 * 401_583_781_376
    assert maverick.h100s == -(-(16 * 401_583_781_376 + maverick.memory["activations"]) // FREE)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(preset="llama-3.1-8b"), "unknown model 'llama-3.1-8b'"),
        (dict(way="nothing"), "unknown way of training 'nothing'; .*encoder frozen"),
        (dict(load=Load(grid=17)), "grid is 17; it must be at least 1 and at most 16"),
        (dict(load=Load(text=0)), "text is 0; it must be at least 1"),
        (dict(load=Load(pictures=-1)), "pictures is -1; it must be at least 0"),
        (dict(load=Load(batch=0)), "batch is 0; it must be at least 1"),
        (dict(states=-1), "states is -1; it must be at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        shown(**arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Words, table, picture


@pytest.mark.parametrize(
    "number, said",
    [(62.3e12, "62.3 T"), (0, "0"), (30.2e9, "30.2 G"), (4.941e18, "4.94 E"), (999.9e12, "1 P"), (12e6, "12 M")],
)
def test_flops_in_three_digits(number, said):
    assert flops(number) == said


@pytest.mark.parametrize(
    "number, said",
    [(1303.7e9, "1,303.7 GB"), (2.53e9, "2.5 GB"), (41.9e6, "41.9 MB"), (0, "0"), (148.3e12, "148.3 TB")],
)
def test_bytes_in_gigabytes_where_that_can_be(number, said):
    assert size(number) == said


def read(tag: str) -> list[list[str]]:
    """The cells of an HTML table, as a browser reads it."""
    rows, parser = [], HTMLParser()
    parser.handle_starttag = lambda name, _: rows.append([]) if name == "tr" else None
    parser.handle_data = lambda words: rows[-1].append(words)
    parser.feed(tag)
    return rows


def test_the_table_has_a_line_for_each_way_and_marks_the_chosen_one():
    lines = table()
    tag = table_tag(lines, "text frozen")
    assert read(tag) == lines and [line[0] for line in lines[1:]] == list(WAYS)
    assert {line[0]: (line[4], int(line[-1])) for line in lines[1:]} == KNOWN
    assert lines[1][1:4] == ["62.3 T", "64.1 T", "60.5 T"] and lines[1][5:8] == ["217.3 GB", "217.3 GB", "1,303.7 GB"]
    assert re.findall(r'<tr style="font-weight: bold"><th[^>]*>([^<]*)', tag) == ["text frozen"]
    assert tag.count('scope="col"') == len(lines[0]) and tag.count('scope="row"') == 4


def test_the_bars_are_the_parts_end_to_end():
    left, right = shown().picture.axes
    check_bars(left, [[getattr(step(way=way).cost, key) / 1e12 for way in WAYS] for key, _ in FLOPS.values()])
    check_bars(right, [[step(way=way).memory[key] / 1e9 for way in WAYS] for key, _ in BYTES.values()])


def check_bars(axes, parts: list[list[float]]):
    """parts: of each part, its width in every row."""
    wanted = [(sum(each[row] for each in parts[:i]), parts[i][row]) for i in range(len(parts)) for row in range(4)]
    assert [bar.get_x() for bar in axes.patches] == pytest.approx([start for start, _ in wanted])
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([width for _, width in wanted])


LOADS = [Load(), Load(1, 0, 1, 1), Load(1, 48, 16, 1), Load(1_000_000, 48, 16, 10_000), Load(8000, 8, 16, 64)]


@pytest.mark.parametrize("load", LOADS, ids=str)
@pytest.mark.parametrize("preset", PRESETS.values())
def test_nothing_is_cut_and_the_picture_is_described(preset, load):
    seen = shown(preset, "projector only", load)
    figure = seen.picture
    assert png(figure)[1] <= 900 and "Bars" in seen.alt and "\n" not in seen.alt
    assert all(f"{way} " in seen.alt for way in WAYS)
    figure.draw_without_rendering()
    for axes in figure.axes:
        box, legend = axes.get_tightbbox(), axes.get_legend().get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert axes.bbox.x0 <= legend.x0 and legend.x1 <= axes.bbox.x1
        *labels, title = (text.get_window_extent() for text in axes.texts)
        assert all(label.x1 <= axes.bbox.x1 and label.y1 <= legend.y0 for label in labels)
        assert title.y0 >= axes.bbox.y1
        assert sum(text.get_text().startswith("▸ projector only: ") for text in axes.texts) == 1


# ----------------------------------------------------------------------------------------------------------------------
# The widget


def test_every_control_changes_what_it_says_draws_and_lists():
    calculator = TrainingCost()
    assert calculator.says().startswith("Llama 4 Scout, everything, jointly: ")
    said, drawn, listed = {calculator.says()}, {calculator.picture.value}, {calculator.table.value}
    moves = dict(way="projector only", text=5000, pictures=3, grid=9, batch=7, states=8, preset="maverick")
    for number, (name, value) in enumerate(moves.items(), start=2):
        said.add(calculator.drive(**{name: value}))
        drawn.add(calculator.picture.value)
        listed.add(calculator.table.value)
        assert len(said) == len(drawn) == len(listed) == number, name
    assert set(moves) == set(calculator.controls)
    assert calculator.table in calculator.box.children and read(calculator.table.value)[4][0] == "projector only"


def test_numbers_are_clamped_and_every_option_is_shown():
    calculator = TrainingCost()
    calculator.drive(text=-5, pictures=99, batch=0)
    assert [calculator.controls[name].value for name in ("text", "pictures", "batch")] == [1, 48, 1]
    for states in OPTIMIZERS.values():
        optimizer = states * TOTAL
        assert f"optimizer {size(optimizer)}, " in calculator.drive(states=states)
