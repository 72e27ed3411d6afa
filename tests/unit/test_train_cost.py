"""The cost of a training step against the products that PyTorch really runs, forward and backward.

`FlopCounterMode` counts mm, addmm and bmm. On a CPU it does not see fused attention, so one count has the products with
weights alone; with attention taken apart (the "math" backend) it sees those products too, but of whole squares, masked
pairs included. So attention is compared by squares where nothing is masked, and by a list of pairs where it is.
"""

from dataclasses import replace

import pytest
import torch
from tiny_models import CONFIGS, SCOUT_LIKE, TOKENS_PER_TILE, picture_prompt, text_only
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minillama4 import Llama4, VisionConfig, moe
from minillama4.budget import count, shape
from minillama4.train_cost import PARTS, training_cost

LINEAR = replace(SCOUT_LIKE, vision=VisionConfig(tile_size=24, patch_size=8, encoder="linear"))
MODELS = CONFIGS | {"linear": LINEAR}
TOKENS, TILES = 67, 4  # of `picture_prompt`
SUBSETS = [tuple(part for i, part in enumerate(PARTS) if bits >> i & 1) for bits in range(1, 8)]
NAMES = {"encoder": "vision_model.", "projector": "multi_modal_projector."}


def plain_experts(x_TD, w_EDF, counts_E):
    """By autograd alone, so that a frozen expert's weights get no gradient."""
    rows = x_TD.split(counts_E)
    return torch.cat([x @ w for x, w in zip(rows, w_EDF, strict=True) if len(x)])


@pytest.fixture
def measured(monkeypatch):
    """(forward, backward) FLOPs of one step of a random model in which `trains(parameter name)` says what is trained.

    head: how many of each sequence's tokens reach the head.
    """
    monkeypatch.setattr(moe, "grouped_mm", plain_experts)

    def measure(config, trains, rows=1, head=TOKENS, fused=True):
        model, (ids, pixels) = Llama4(config), picture_prompt(rows)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains(name))
        backend = SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH
        with sdpa_kernel(backend), FlopCounterMode(display=False) as counter:
            loss = model.lm_head(model.hidden_states(ids, pixels)[:, TOKENS - head :]).square().mean()
            forward = counter.get_total_flops()
            loss.backward()
        return forward, counter.get_total_flops() - forward

    return measure


def part_of(name):
    return next((part for part, start in NAMES.items() if name.startswith(start)), "text")


def without_attention(config):
    """The same matrices with heads that compare no channels: what remains is what fused attention hides."""
    return replace(shape(config), score_width=0)


def pairs(config, tokens):
    """Query and key, listed, over all layers."""
    text = config.text
    return sum(
        not text.is_local(layer) or query // text.chunk_size == key // text.chunk_size
        for layer in range(text.num_layers)
        for query in range(tokens)
        for key in range(query + 1)
    )


def decoder_attention(config, tokens):
    return 4 * config.text.num_heads * config.text.head_dim * pairs(config, tokens)


def encoder_attention(config, tiles):
    """Scores, then sums of values: 2 FLOPs for each channel, over all pairs of 36 patches and a class token."""
    return tiles * 2 * (37 * 37 * 4 * 56) if config.vision.encoder == "vit" else 0


# ----------------------------------------------------------------------------------------------------------------------
# FLOPs


@pytest.mark.parametrize("name", ["scout-like", "linear"])
@pytest.mark.parametrize("trained", SUBSETS, ids="+".join)
def test_every_product_with_weights_that_pytorch_runs(measured, name, trained):
    """Exactly equal, whatever is trained: nothing is rounded, and both count the same products."""
    config = MODELS[name]
    cost = training_cost(config, TOKENS, TILES, trained)
    if name == "linear" and trained == ("encoder",):  # it has no parameters, so PyTorch refuses to go backward
        assert cost.backward == cost.trained_parameters == 0
        return
    forward, backward = measured(config, lambda parameter: part_of(parameter) in trained)
    inside, tiles = decoder_attention(config, TOKENS), encoder_attention(config, TILES)
    assert cost.forward == forward + inside + tiles
    encoder = "encoder" in trained and name != "linear"
    assert cost.backward == backward + 2 * inside + (2 * tiles if encoder else 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_inputs_apart_from_those_of_weights(measured, name):
    """With only an embedding trained there is no gradient of a matrix, but one of everything after that embedding."""
    config = CONFIGS[name]
    cost = training_cost(config, TOKENS, TILES)
    _, through_text = measured(config, lambda parameter: parameter == "embed_tokens.weight")
    _, through_all = measured(config, lambda parameter: parameter == "vision_model.positional_embedding_vlm")
    text = cost.text.backward_inputs - 2 * decoder_attention(config, TOKENS)
    assert text == through_text
    encoder = cost.encoder.backward_inputs - 2 * encoder_attention(config, TILES)
    assert text + cost.projector.backward_inputs + encoder == through_all
    assert cost.projector.backward_inputs == cost.projector.backward_weights == cost.projector.forward
    assert cost.projector.forward == 2 * TILES * TOKENS_PER_TILE * 36 * 40


@pytest.mark.parametrize("head", [1, 20, 0])
def test_a_head_over_fewer_tokens_and_a_batch(measured, head):
    cost = training_cost(SCOUT_LIKE, TOKENS, TILES, ("text",), batch=3, head_tokens=head)
    forward, backward = measured(SCOUT_LIKE, lambda name: part_of(name) == "text", rows=3, head=head)
    inside, tiles = 3 * decoder_attention(SCOUT_LIKE, TOKENS), 3 * encoder_attention(SCOUT_LIKE, TILES)
    assert (cost.forward, cost.backward) == (forward + inside + tiles, backward + 2 * inside)


def test_attention_with_nothing_masked_and_with_squares_of_masked_pairs(measured):
    """Taken apart, attention's products are counted forward (2) and backward (4)."""
    fused, apart = (measured(SCOUT_LIKE, lambda name: True, fused=fused) for fused in (True, False))
    chunk = SCOUT_LIKE.text.chunk_size
    squares = 4 * (6 * chunk**2 + (TOKENS - 6 * chunk) ** 2) + 2 * TOKENS**2  # four local layers, two global
    whole = 4 * 6 * 16 * squares + encoder_attention(SCOUT_LIKE, TILES)
    assert apart[0] - fused[0] == whole and apart[1] - fused[1] == 2 * whole
    # Our count has the triangles of those squares, and all of the encoder's.
    bare = training_cost(without_attention(SCOUT_LIKE), TOKENS)
    ours = training_cost(text_only(SCOUT_LIKE), TOKENS)
    assert ours.forward - bare.forward == decoder_attention(SCOUT_LIKE, TOKENS) < whole
    assert ours.backward - bare.backward == 2 * decoder_attention(SCOUT_LIKE, TOKENS)


@pytest.mark.parametrize("tokens", [10, 11, 12, 33, 40])
def test_local_layers_compare_inside_chunks(tokens):
    ours, bare = (training_cost(model, tokens) for model in (text_only(SCOUT_LIKE), without_attention(SCOUT_LIKE)))
    assert ours.forward - bare.forward == decoder_attention(SCOUT_LIKE, tokens)


def test_scout_by_hand():
    """One picture of 5 tiles (727 tokens) and 1,000 of text; numbers of the fact sheet."""
    cost = training_cost("scout", 1727, 5)
    patches, width = 577, 1408
    encoder = 576 * 588 * width + patches * 34 * (4 * width**2 + 2 * width * 5632) + 144 * (5632 + 4096) * 4096
    assert cost.encoder.forward == 5 * (2 * encoder + 34 * 4 * width * patches**2)
    assert cost.projector.forward == 2 * 5 * 144 * 20_971_520
    triangle = 1727 * 1728 // 2
    assert cost.text.forward == 2 * 1727 * (16_138_408_960 - 496_640) + 48 * 4 * 5120 * triangle
    assert 5.0e12 < cost.encoder.forward < 5.1e12 and 5.5e13 < cost.text.forward < 5.8e13


def test_what_is_frozen_and_what_that_saves():
    joint, projector, text, frozen = (
        training_cost("scout", 1727, 5, trained) for trained in (PARTS, ("projector",), ("projector", "text"), ())
    )
    assert joint.forward == projector.forward == text.forward == frozen.total
    assert projector.encoder.backward == text.encoder.backward == 0
    assert projector.text.backward_weights == 0 < projector.text.backward_inputs == joint.text.backward_inputs
    assert projector.projector.backward_inputs == 0 < projector.projector.backward_weights
    assert 1.85 < projector.total / frozen.total < 2 and 2.8 < joint.total / frozen.total < 3


def test_text_alone_gives_a_vision_part_nothing_to_learn():
    cost = training_cost("scout", 100, 0, ("encoder", "projector"))
    assert cost.forward == cost.text.forward > 0 == cost.backward
    assert cost.encoder.forward == cost.projector.forward == 0
    assert training_cost("scout", 100).text.backward_weights > 0


# ----------------------------------------------------------------------------------------------------------------------
# Parameters and memory


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("trained", SUBSETS, ids="+".join)
def test_trained_parameters_are_those_of_the_model(name, trained):
    model = Llama4(MODELS[name])
    cost = training_cost(MODELS[name], TOKENS, TILES, trained)
    sizes = {part: 0 for part in PARTS}
    for parameter, value in model.named_parameters():
        sizes[part_of(parameter)] += value.numel()
    assert {part: each.parameters for part, each in cost.parts().items()} == sizes
    assert cost.trained_parameters == sum(sizes[part] for part in trained)
    memory = cost.memory(weights=2, gradients=3, states=8)
    total = sum(sizes.values())
    assert memory == {
        "weights": 2 * total, "gradients": 3 * cost.trained_parameters, "states": 8 * cost.trained_parameters
    }  # fmt: skip


def test_scout_takes_sixteen_bytes_a_trained_parameter():
    assert sum(training_cost("scout", 1).memory().values()) == 16 * 108_641_793_536
    frozen = training_cost("scout", 1, trained=("projector",))
    assert sum(frozen.memory().values()) == 2 * 108_641_793_536 + 14 * 20_971_520


# ----------------------------------------------------------------------------------------------------------------------
# Whatever `shape` takes, and bad input


@pytest.mark.parametrize("model", ["scout", "mini-scout", "llama-3.1-8b", "deepseek-v3", shape("mixtral-8x7b")])
def test_a_decoder_alone_costs_three_forward_passes(model):
    cost, c = training_cost(model, 512), count(model)
    assert cost.backward == 2 * cost.forward and cost.text.parameters == c.text_total
    assert 1 < cost.forward / (2 * 512 * c.active_read) < 1.2


@pytest.mark.parametrize(
    "model, arguments, said",
    [
        ("scuot", dict(tokens=1), "unknown model 'scuot'; did you mean scout"),
        ("scout", dict(tokens=0), "tokens is 0; it must be at least 1"),
        ("scout", dict(tokens=1000, tiles=-1), "tiles is -1; it must be at least 0"),
        ("scout", dict(tokens=1, batch=0), "batch is 0; it must be at least 1"),
        ("scout", dict(tokens=719, tiles=5), "tokens is 719; 5 tiles alone are 720 image tokens"),
        ("scout", dict(tokens=5, head_tokens=6), "head_tokens is 6; of 5 tokens it must be 0 to 5"),
        (
            "scout",
            dict(tokens=5, trained=("vision",)),
            "trained is .'vision',.; it must be a tuple of any of 'encoder'",
        ),
        ("scout", dict(tokens=5, trained="text"), "trained is 'text'; it must be a tuple"),
        ("llama-3.1-8b", dict(tokens=999, tiles=1), "tiles is 1, but Llama 3.1 8B holds no vision layers"),
        (shape("scout"), dict(tokens=999, tiles=1), "give a config with vision"),
        (text_only(SCOUT_LIKE), dict(tokens=999, tiles=1), "give a config with vision"),
    ],
)
def test_what_makes_no_sense_is_refused(model, arguments, said):
    with pytest.raises(ValueError, match=said) as caught:
        training_cost(model, **arguments)
    assert "\n" not in str(caught.value)


def test_bytes_below_nothing_are_refused():
    with pytest.raises(ValueError, match="states is -1; it must be at least 0"):
        training_cost("scout", 1).memory(states=-1)
