"""int4 against loops in float64, a group worked by hand, and the dense model that its weights stand for."""

from dataclasses import replace

import pytest
import torch
from tiny_models import CONFIGS, SCOUT_LIKE, assert_same, build, in_pieces, picture_prompt, relative_error, with_text

from minillama4 import Llama4, Llama4Config
from minillama4.budget import weight_bytes
from minillama4.cuda import int4
from minillama4.cuda.int4 import (
    GROUP,
    Int4Experts,
    Int4Linear,
    Int4Matrix,
    dequantise,
    int4_linear,
    int4_names,
    quantise,
    to_int4,
)
from minillama4.cuda.load import model_bytes


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_loops(packed, scale, inputs: int):
    """The weights [outputs, inputs] in float64, one at a time, as the format says."""
    weight = torch.zeros(len(packed), inputs, dtype=torch.float64)
    for row in range(len(packed)):
        for column in range(inputs):
            group, place = divmod(column, 128)
            byte = int(packed[row, 64 * group + place % 64])
            code = byte % 16 if place < 64 else byte // 16
            weight[row, column] = (code - 8) * float(scale[row, group])
    return weight


# ----------------------------------------------------------------------------------------------------------------------
# The format


def test_a_group_by_hand():
    """The largest weight is -4, so a step is 0.5 and +4 is cut to 7 steps; what is not named is 0, code 8."""
    weight = torch.zeros(1, 128)
    weight[0, [0, 1, 2, 64, 66, 127]] = torch.tensor([-4.0, 0.26, 3.5, 4.0, -0.24, -1.3])
    packed, scale = quantise(weight)
    assert scale.tolist() == [[0.5]] and packed.shape == (1, 64) and packed.dtype == torch.uint8
    codes = {0: 0 + 16 * 15, 1: 9 + 16 * 8, 2: 15 + 16 * 8, 63: 8 + 16 * 5}
    assert packed[0].tolist() == [codes.get(j, 8 + 16 * 8) for j in range(64)]
    wanted = torch.zeros(1, 128)
    wanted[0, [0, 1, 2, 64, 127]] = torch.tensor([-4.0, 0.5, 3.5, 3.5, -1.5])
    assert torch.equal(dequantise(packed, scale, 128), wanted)


def test_the_largest_weight_of_a_group_is_kept_whatever_its_sign():
    weight = random(40, 3 * 128)
    largest = weight.view(40, 3, 128).abs().argmax(-1, keepdim=True)
    packed, scale = quantise(weight)
    kept = dequantise(packed, scale, 384).view(40, 3, 128).gather(-1, largest)
    assert torch.allclose(kept, weight.view(40, 3, 128).gather(-1, largest), rtol=1e-6)
    assert (scale > 0).any() and (scale < 0).any()


@pytest.mark.parametrize("inputs", [128, 384, 112, 300, 1])
def test_what_comes_back_is_what_the_format_says_and_near_what_went_in(inputs):
    weight = random(7, inputs, seed=inputs)
    packed, scale = quantise(weight)
    groups = -(-inputs // 128)
    assert packed.shape == (7, 64 * groups) and scale.shape == (7, groups) and scale.dtype == torch.float32
    back = dequantise(packed, scale, inputs)
    assert torch.allclose(back.double(), by_loops(packed, scale, inputs), rtol=1e-6, atol=0)
    steps = weight / scale.repeat_interleave(128, dim=1)[:, :inputs]  # -8 is the group's largest weight
    error = (back / scale.repeat_interleave(128, dim=1)[:, :inputs] - steps).abs()
    assert (error <= torch.where(steps > 7.5, 1, 0.5) + 1e-5).all()


def test_the_error_on_normal_weights_is_what_the_page_says():
    """11.7 % with |largest| / 7, 10.6 % with |largest| / 8 and always the same sign."""
    weight = random(512, 1024)
    error = relative_error(dequantise(*quantise(weight), 1024), weight)
    assert 0.102 < error < 0.1045, error


def test_groups_lie_along_the_inputs():
    """One wild input channel must spoil its own group of 128 only."""
    weight = random(6, 512)
    calm = dequantise(*quantise(weight), 512)
    weight[:, 200] *= 1000
    wild = dequantise(*quantise(weight), 512)
    same = (wild == calm).all(0)
    assert same[:128].all() and same[256:].all() and not same[128:256].any()


def test_zeros_and_the_smallest_numbers_stay_finite():
    for value in (0.0, 1e-45, -1e-45, 1e-38):
        weight = torch.full((2, 130), value)
        packed, scale = quantise(weight)
        back = dequantise(packed, scale, 130)
        assert value or (packed == 0x88).all(), "0 is code 8 on every machine, not what 0 / 0 happens to become"
        assert back.isfinite().all() and (back - weight).abs().max() <= 1e-44


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_damaged_weights_are_refused(value):
    weight = random(3, 256)
    weight[1, 77] = value
    with pytest.raises(ValueError, match="infinities or NaN"):
        quantise(weight)


@pytest.mark.parametrize("weight", [torch.zeros(128), torch.zeros(2, 128, dtype=torch.int64)])
def test_only_matrices_of_floats_are_quantised(weight):
    with pytest.raises(ValueError, match="outputs, inputs"):
        quantise(weight)


def test_experts_are_quantised_as_so_many_matrices():
    weight = random(3, 5, 200)
    packed, scale = quantise(weight)
    for expert in range(3):
        alone = quantise(weight[expert])
        assert torch.equal(packed[expert], alone[0]) and torch.equal(scale[expert], alone[1])
    assert torch.equal(dequantise(packed, scale, 200)[2], dequantise(packed[2], scale[2], 200))


@pytest.mark.parametrize("lead", [(), (4,)], ids=["matrix", "experts"])
@pytest.mark.parametrize("piece", [1, 5 * 300, 2**26])
def test_pieces_change_nothing(monkeypatch, piece, lead):
    weight = random(*lead, 300, 9).mT  # as experts come: their inputs are not neighbours
    wanted = quantise(weight)
    whole = dequantise(*wanted, 300)
    sizes = []
    monkeypatch.setattr(int4, "PIECE", piece)
    monkeypatch.setattr(int4, "quantise", lambda weight: sizes.append(weight.numel()) or quantise(weight))
    matrix = Int4Matrix((*lead, 9, 300), torch.float32)
    matrix.fill(weight, torch.device("cpu"))
    assert max(sizes) <= (9 * 300 if lead else max(piece, 300)) and sum(sizes) == weight.numel()
    assert torch.equal(matrix.packed, wanted[0]) and torch.equal(matrix.scale, wanted[1])
    assert torch.equal(matrix.dequantise(), whole)


def test_bf16_weights_are_rounded_once():
    packed, scale = quantise(random(11, 256))
    wanted = by_loops(packed, scale, 256).float().bfloat16()
    assert torch.equal(dequantise(packed, scale, 256, torch.bfloat16), wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize("lead", [(5,), (2, 3), (1, 1)])
def test_the_product_is_that_of_the_weights_it_stands_for(lead):
    packed, scale = quantise(random(10, 200))
    x = random(*lead, 200, seed=1)
    assert_same(int4_linear(x, packed, scale), x.double() @ by_loops(packed, scale, 200).T, 1e-6)


def experts_by_hand(experts: Int4Experts, x, chosen):
    """[T, D] in float64, token by token."""
    rows = []
    for token, expert in zip(x.double(), chosen.tolist(), strict=True):
        gate_up, down = experts.gate_up_proj, experts.down_proj
        hidden = by_loops(gate_up.packed[expert], gate_up.scale[expert], x.shape[1]) @ token
        gate, up = hidden.chunk(2)
        rows.append(by_loops(down.packed[expert], down.scale[expert], len(gate)) @ (gate / (1 + (-gate).exp()) * up))
    return torch.stack(rows)


@pytest.fixture
def experts():
    experts = Int4Experts(5, 40, 12, torch.float32)
    experts.gate_up_proj.fill(random(5, 24, 40), torch.device("cpu"))
    experts.down_proj.fill(random(5, 40, 12, seed=1), torch.device("cpu"))
    return experts


@pytest.mark.parametrize("chosen", [[3], [0, 3, 3, 0, 4, 0, 3]], ids=["one token", "two experts without any"])
def test_each_token_goes_through_its_own_expert_and_the_others_stay_packed(experts, chosen, monkeypatch):
    chosen = torch.tensor(chosen)
    x = random(len(chosen), 40, seed=2)
    wanted = experts_by_hand(experts, x, chosen)
    for expert in {0, 1, 2, 3, 4} - set(chosen.tolist()):
        experts.gate_up_proj.scale[expert] = experts.down_proj.scale[expert] = float("nan")  # seen if it were used
    rows = []
    monkeypatch.setattr(int4, "int4_linear", lambda x, *matrix: rows.append(len(x)) or int4_linear(x, *matrix))
    assert_same(experts(x, chosen), wanted, 1e-6)
    assert sum(rows) == 2 * len(chosen), "a row was computed for an expert that it did not choose"


# ----------------------------------------------------------------------------------------------------------------------
# Models

LARGE = with_text(replace(SCOUT_LIKE, vision=None), hidden_size=128, num_heads=8, expert_width=256, dense_width=128)


def dense_again(model: Llama4) -> Llama4:
    """An ordinary model of the weights that the int4 one stands for."""
    dense, weights = Llama4(model.config), dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, Int4Matrix):
            del weights[f"{name}.packed"], weights[f"{name}.scale"]
            weight = module.dequantise()
            weights[name] = weight.mT if weight.ndim == 3 else weight
    dense.load_state_dict(weights)
    return dense.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_dequantised_weights(name):
    model = build(CONFIGS[name])
    ids, pixels = picture_prompt(rows=2)
    original = model(ids, pixels)
    wanted = dense_again(to_int4(model, torch.float32))(ids, pixels)
    assert_same(model(ids, pixels), wanted, 1e-5)
    one, two = ids[:1], pixels[: len(pixels) // 2]
    assert_same(in_pieces(model, one, [3, 25, 1, 1, 30, 7], two), wanted[:1], 1e-5)
    error = relative_error(wanted, original)
    print(f"int4 against the original weights: relative error {error:.2f}")
    assert 0.05 < error < 1  # weights of N(0, 0.3) are as far from a trained model as can be


def test_router_norms_embedding_and_vision_are_left_alone():
    model = to_int4(build(SCOUT_LIKE), torch.float32)
    kept = {name.removesuffix(".weight").split(".")[-1] for name, _ in model.named_parameters() if "vision" not in name}
    assert kept == {"embed_tokens", "router", "norm", "input_layernorm", "post_attention_layernorm", "linear_1"}
    dense = build(SCOUT_LIKE)
    assert all(torch.equal(p, dense.get_parameter(name)) for name, p in model.named_parameters())
    packed = {name.rsplit(".", 1)[0] for name in int4_names(model)}
    gone = {name for name, _ in dense.named_parameters()} - {name for name, _ in model.named_parameters()}
    assert packed == gone and "lm_head.weight" in packed and "layers.1.feed_forward.experts.down_proj" in packed


@pytest.mark.parametrize("config", ["scout", "maverick", LARGE], ids=["scout", "maverick", "small"])
def test_the_budget_counts_the_bytes_that_are_there(config):
    """All matrices have a multiple of 128 inputs; 16 bits for what stays, and 4.25 for the rest."""
    config = Llama4Config.preset(config) if isinstance(config, str) else config
    with torch.device("meta"):
        model = to_int4(Llama4(config), torch.bfloat16)
    assert model_bytes(model, torch.bfloat16) == weight_bytes(config, "int4")
    if config is LARGE:
        real = to_int4(build(config), torch.bfloat16).to(torch.bfloat16)
        assert sum(x.untyped_storage().nbytes() for x in real.state_dict().values()) == weight_bytes(config, "int4")


def test_a_group_that_is_not_full_costs_as_much_as_a_full_one():
    """mini-scout's experts have 112 inputs, so that the budget is a little below."""
    with torch.device("meta"):
        model = to_int4(Llama4(Llama4Config.preset("mini-scout")), torch.bfloat16)
    assert 1 < model_bytes(model, torch.bfloat16) / weight_bytes("mini-scout", "int4") < 1.03


def test_the_scales_stay_float32_in_any_model():
    model = to_int4(build(SCOUT_LIKE), torch.float32)
    before = {name: x.clone() for name, x in model.state_dict().items() if name in int4_names(model)}
    model.to(torch.bfloat16)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())
    assert model.lm_head.weight.dtype == model.embed_tokens.weight.dtype == torch.bfloat16
    ids, pixels = picture_prompt()
    logits = model(ids, pixels, model.new_cache(1, 80))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_layers_mirror_the_teaching_ones():
    model, dense = to_int4(build(SCOUT_LIKE), torch.float32), build(SCOUT_LIKE)
    for name, module in model.named_modules():
        if isinstance(module, (Int4Linear, Int4Experts)):
            assert type(module).__name__ == "Int4" + type(dense.get_submodule(name)).__name__
    assert GROUP == 128
