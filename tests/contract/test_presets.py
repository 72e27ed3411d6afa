"""The full-size presets, on the meta device: parameters to the unit, schedules, tensors, tables, KV bytes.

Every number here is spelled out or computed by its own formula, from the shapes of the released checkpoints; none is
taken from the code under test.
"""

from dataclasses import replace

import pytest
import torch

from minillama4 import PRESETS, Llama4, Llama4Config
from minillama4.attention import inverse_frequencies, rotation, temperature
from minillama4.cache import KVCache, LayerCache
from minillama4.checkpoint import _hub_name, _our_name

GIB = 2**30
RELEASED = ("scout", "maverick")


def on_meta(config: Llama4Config) -> Llama4:
    with torch.device("meta"):
        return Llama4(config)


@pytest.fixture(scope="module", params=RELEASED)
def released(request) -> tuple[str, Llama4]:
    return request.param, on_meta(Llama4Config.preset(request.param))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Parameters

TOTAL = {"scout": 108_641_793_536, "maverick": 401_583_781_376}
TEXT = {"scout": 107_769_861_120, "maverick": 400_711_848_960}
ACTIVE = {"scout": 17_172_894_720, "maverick": 17_184_691_200}


def test_parameters_are_those_of_the_released_models_to_the_unit(released):
    name, model = released
    assert count(model) == TOTAL[name]
    vision = count(model.vision_model), count(model.multi_modal_projector)
    assert vision == (850_960_896, 20_971_520)
    assert count(model) - sum(vision) == TEXT[name]


def test_the_parts_of_the_vision_tower_have_their_released_sizes(released):
    vision = released[1].vision_model
    assert count(vision.patch_embedding) == 827_904
    assert vision.class_embedding.numel() == 1_408
    assert vision.positional_embedding_vlm.numel() == 812_416
    assert count(vision.layernorm_pre) == count(vision.layernorm_post) == 2_816
    assert [count(block) for block in vision.model["layers"]] == [23_807_872] * 34
    assert count(vision.vision_adapter) == 23_068_672 + 16_777_216


def active_parameters(config: Llama4Config) -> int:
    """What one text token multiplies with, embedding and head included, from the config alone."""
    text = config.text
    attention = 2 * text.hidden_size * text.head_dim * (text.num_heads + text.num_kv_heads)
    expert = 3 * text.hidden_size * text.expert_width
    moe = 2 * expert + text.num_experts * text.hidden_size  # one routed expert, the shared one, and the router
    dense = 3 * text.hidden_size * text.dense_width
    layers = text.num_layers * (attention + 2 * text.hidden_size)
    feed_forward = len(text.moe_layers) * moe + (text.num_layers - len(text.moe_layers)) * dense
    return layers + feed_forward + text.hidden_size + 2 * text.vocab_size * text.hidden_size


def test_active_parameters_are_17b(released):
    """From the config, and again from the model: all text parameters but the routed experts that a token leaves out."""
    name, model = released
    assert active_parameters(model.config) == ACTIVE[name]
    routed = sum(count(block.feed_forward.experts) for block in model.layers if hasattr(block.feed_forward, "experts"))
    text = model.config.text
    assert TEXT[name] - routed + routed // text.num_experts == ACTIVE[name]


def test_llama_guard_4_has_its_published_size_by_the_same_formulas():
    """Meta pruned it from Scout: only the shared experts remain, so layers are dense and 8192 wide; no chunk."""
    scout = Llama4Config.preset("scout")
    guard = replace(scout, text=replace(scout.text, moe_layers=(), dense_width=8192, chunk_size=None))
    assert count(on_meta(guard)) == 12_001_097_216


def test_behemoth_estimate_says_that_it_is_one():
    """288B active, nearly 2T in total and 16 experts are all that was published; the rest is solved from them."""
    if "behemoth-estimate" not in PRESETS:
        pytest.skip("there is no behemoth-estimate yet")
    config = Llama4Config.preset("behemoth-estimate")
    assert config.text.num_experts == 16
    assert abs(active_parameters(config) / 288e9 - 1) < 0.02
    model = on_meta(config)
    text = count(model) - (count(model.vision_model) + count(model.multi_modal_projector) if config.vision else 0)
    assert 1.85e12 < text < 2e12
    assert "estimate" in config.note.lower()


# ----------------------------------------------------------------------------------------------------------------------
# Schedules


def test_every_fourth_layer_is_nope_and_global_and_the_others_are_local(released):
    text = released[1].config.text
    assert [layer for layer in range(48) if text.is_nope(layer)] == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47]
    for layer, block in enumerate(released[1].layers):
        assert block.self_attn.rotary != text.is_nope(layer)
        assert block.self_attn.chunk_size == (None if text.is_nope(layer) else 8192)


def test_scout_has_experts_in_all_layers_and_maverick_in_the_odd_ones(released):
    name, model = released
    moe = [layer for layer, block in enumerate(model.layers) if hasattr(block.feed_forward, "experts")]
    assert moe == (list(range(48)) if name == "scout" else list(range(1, 48, 2)))
    assert {"scout": 16, "maverick": 128}[name] == model.config.text.num_experts


def test_scout_normalises_queries_and_keys_and_maverick_does_not():
    assert Llama4Config.preset("scout").text.qk_norm and not Llama4Config.preset("maverick").text.qk_norm


def test_the_mini_presets_keep_every_mechanism():
    """A question about one picture (two tiles of 16 tokens and the words) crosses two borders of a chunk."""
    for name in ("mini-scout", "mini-maverick"):
        text, vision = Llama4Config.preset(name).text, Llama4Config.preset(name).vision
        assert {text.is_nope(layer) for layer in range(text.num_layers)} == {True, False}
        assert text.moe_layers and text.temperature_tuning and text.num_heads > text.num_kv_heads
        assert text.chunk_size <= 32 and text.floor_scale <= 32 and vision.tokens_per_tile == 16
    assert len(Llama4Config.preset("mini-maverick").text.moe_layers) == 4, "dense layers too"


# ----------------------------------------------------------------------------------------------------------------------
# Tensors


def released_tensors(name: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the released checkpoints in Hugging Face's layout, written out."""
    experts, moe_layers = {"scout": (16, range(48)), "maverick": (128, range(1, 48, 2))}[name]
    tensors = {
        "language_model.model.embed_tokens.weight": (202048, 5120),
        "language_model.model.norm.weight": (5120,),
        "language_model.lm_head.weight": (202048, 5120),
        "multi_modal_projector.linear_1.weight": (5120, 4096),
        "vision_model.class_embedding": (1408,),
        "vision_model.positional_embedding_vlm": (577, 1408),
        "vision_model.patch_embedding.linear.weight": (1408, 588),
        "vision_model.vision_adapter.mlp.fc1.weight": (4096, 5632),
        "vision_model.vision_adapter.mlp.fc2.weight": (4096, 4096),
    }
    for norm in ("layernorm_pre", "layernorm_post"):
        tensors |= {f"vision_model.{norm}.weight": (1408,), f"vision_model.{norm}.bias": (1408,)}
    for layer in range(48):
        prefix = f"language_model.model.layers.{layer}."
        tensors |= {prefix + f"{norm}.weight": (5120,) for norm in ("input_layernorm", "post_attention_layernorm")}
        tensors |= {prefix + f"self_attn.{x}_proj.weight": (5120, 5120) for x in "qo"}
        tensors |= {prefix + f"self_attn.{x}_proj.weight": (1024, 5120) for x in "kv"}
        prefix += "feed_forward."
        if layer in moe_layers:
            tensors[prefix + "router.weight"] = (experts, 5120)
            tensors[prefix + "experts.gate_up_proj"] = (experts, 5120, 16384)
            tensors[prefix + "experts.down_proj"] = (experts, 8192, 5120)
        width = 8192 if layer in moe_layers else 16384
        prefix += "shared_expert." if layer in moe_layers else ""
        tensors |= {prefix + f"{x}_proj.weight": (width, 5120) for x in ("gate", "up")}
        tensors[prefix + "down_proj.weight"] = (5120, width)
    for layer in range(34):
        prefix = f"vision_model.model.layers.{layer}."
        for name, inputs, outputs in [(f"self_attn.{x}_proj", 1408, 1408) for x in "qkvo"] + [
            ("mlp.fc1", 1408, 5632),
            ("mlp.fc2", 5632, 1408),
        ]:
            tensors |= {prefix + f"{name}.weight": (outputs, inputs), prefix + f"{name}.bias": (outputs,)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors |= {prefix + f"{norm}.weight": (1408,), prefix + f"{norm}.bias": (1408,)}
    return tensors


def test_tensors_have_the_names_and_shapes_of_the_released_checkpoint(released):
    name, model = released
    wanted = released_tensors(name)
    assert len(wanted) == {"scout": 1133, "maverick": 1061}[name]
    assert {_hub_name(key, multimodal=True): tuple(p.shape) for key, p in model.named_parameters()} == wanted
    assert not dict(model.named_buffers()), "nothing else is stored"


def test_both_spellings_of_a_key_lead_to_the_same_parameter(released):
    """`Llama4ForConditionalGeneration` puts `language_model.` in front of what `Llama4ForCausalLM` calls it."""
    _, model = released
    for key, _ in model.named_parameters():
        assert _our_name(_hub_name(key, multimodal=True)) == key
        if not key.startswith(("vision_model", "multi_modal_projector")):
            assert _our_name(_hub_name(key, multimodal=False)) == key
            assert _hub_name(key, multimodal=True) == "language_model." + _hub_name(key, multimodal=False)


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def test_scout_slows_rotary_pairs_35_to_63_by_16_and_maverick_none():
    plain = 500_000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert torch.equal(inverse_frequencies(Llama4Config.preset("maverick").text), plain)
    ratio = plain / inverse_frequencies(Llama4Config.preset("scout").text)
    torch.testing.assert_close(ratio[:35], torch.ones(35).double(), rtol=1e-12, atol=0)
    torch.testing.assert_close(ratio[35:], torch.full((29,), 16).double(), rtol=1e-12, atol=0)


TEMPERATURES = {
    0: 1.0,
    8190: 1.0,
    8191: 1.069315,
    16383: 1.109861,
    32767: 1.160944,
    65535: 1.219722,
    131071: 1.283321,
    262143: 1.349651,
    1048575: 1.485981,
    10485759: 1.715540,
}


@pytest.mark.parametrize("position, factor", TEMPERATURES.items())
def test_temperature_at_published_positions_in_prefill_and_in_decode(position, factor):
    """Step by step up to 10M; p = 8190 is still 1. The same from a long call as from a call of one token."""
    text = Llama4Config.preset("scout").text
    one = temperature(torch.tensor([position]), text)
    assert float(one) == pytest.approx(factor, abs=1e-6)
    many = temperature(torch.arange(max(0, position - 100), position + 1), text)
    assert many[-1] == one[0]


def test_rotary_angles_stay_exact_at_10m_tokens():
    """A float32 product of position and frequency would be off by half a radian there."""
    positions = torch.tensor([10_485_759])
    frequencies = inverse_frequencies(Llama4Config.preset("maverick").text)
    exact = positions.double()[:, None, None] * frequencies
    error = (rotation(positions, frequencies) - torch.polar(torch.ones_like(exact), exact)).abs().max()
    assert error < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# Memory

KV_BYTES = {131_072: 7.125, 262_144: 13.125, 1_048_576: 49.125, 10_485_760: 481.125}  # GiB in bf16


@pytest.mark.parametrize("tokens, gib", KV_BYTES.items())
def test_kv_cache_bytes_of_full_contexts(tokens, gib):
    """12 global layers grow, 36 local ones stop at one chunk; full caches everywhere would be four times as much."""
    for name in RELEASED:
        text = Llama4Config.preset(name).text
        assert KVCache(text, 1, tokens, "meta", torch.bfloat16).nbytes == gib * GIB
        assert KVCache(text, 3, tokens, "meta", torch.float8_e4m3fn).nbytes == 3 * gib / 2 * GIB
        naive = KVCache(replace(text, chunk_size=None), 1, tokens, "meta", torch.bfloat16)
        assert naive.nbytes == tokens * 192 * 1024


def test_local_layers_cache_one_chunk_and_global_layers_everything():
    text = Llama4Config.preset("scout").text
    caches = [LayerCache(text, layer, 1, 10_485_760, "meta", torch.bfloat16) for layer in range(48)]
    assert [layer.k.shape[1] for layer in caches] == [8192, 8192, 8192, 10_485_760] * 12
    local = sum(layer.k.nbytes + layer.v.nbytes for layer in caches if layer.chunk_size)
    assert local == 1_207_959_552
    assert all(layer.k.shape == layer.v.shape == (1, layer.k.shape[1], 8, 128) for layer in caches)


# ----------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("wrong, near", [("scot", "scout"), ("mavrick", "maverick"), ("mini_scout", "mini-scout")])
def test_an_unknown_preset_is_refused_with_the_nearest_names(wrong, near):
    with pytest.raises(ValueError, match=f"unknown preset '{wrong}'; did you mean .*{near}") as error:
        Llama4Config.preset(wrong)
    assert "\n" not in str(error.value)


def test_a_preset_that_resembles_none_is_refused_with_all_names():
    with pytest.raises(ValueError) as error:
        Llama4Config.preset("gpt-99")
    assert all(name in str(error.value) for name in PRESETS)
