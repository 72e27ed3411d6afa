"""Folders travel both ways between this package and Hugging Face, and give the same logits on both sides."""

import json

import pytest
import torch
import transformers
from partner import make_pair
from safetensors import safe_open
from tiny_models import (
    CONFIGS,
    MAVERICK_LIKE,
    SCOUT_LIKE,
    assert_same,
    in_pieces,
    picture_prompt,
    text_only,
    with_text,
    words,
)

from minillama4 import load_checkpoint, load_config, save_checkpoint

ONE_FILE, MANY_SHARDS = 2**40, 60_000  # bytes
files = pytest.mark.parametrize("shard_bytes", [ONE_FILE, MANY_SHARDS], ids=["one file", "many shards"])


@pytest.fixture(scope="session", params=["scout-like", "maverick-like", "scout-like, text only"])
def any_pair(request):
    """Both architectures: `Llama4ForConditionalGeneration`, and `Llama4ForCausalLM` without vision."""
    name, _, without_vision = request.param.partition(", ")
    return make_pair(text_only(CONFIGS[name]) if without_vision else CONFIGS[name])


def prompt_for(config):
    return picture_prompt() if config.vision else (words(67), None)


@torch.no_grad()
def hub_logits(folder, ids, pixels, dtype=torch.float32):
    """Logits of what `transformers` makes of a folder; nothing in it may be missing, left over or of another shape."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, architecture).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    pictures = {} if pixels is None else {"pixel_values": pixels}
    return model(input_ids=ids, **pictures, use_cache=False).logits


# ----------------------------------------------------------------------------------------------------------------------
# Ours -> theirs


@files
def test_a_saved_folder_gives_the_same_logits_in_hugging_face(any_pair, tmp_path, shard_bytes):
    save_checkpoint(any_pair.ours, tmp_path, shard_bytes=shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard_bytes == MANY_SHARDS)
    ids, pixels = prompt_for(any_pair.config)
    assert_same(any_pair.ours(ids, pixels), hub_logits(tmp_path, ids, pixels))


@pytest.mark.parametrize(
    "changes",
    [
        dict(rope_scaling=None, rope_theta=300.0),
        dict(moe_layers=()),
        dict(moe_layers=(0, 1, 2, 3, 4, 5), nope_layers=(3,)),
        dict(nope_layers=()),
        dict(temperature_scale=0.7, floor_scale=4, norm_eps=0.2),
        dict(temperature_tuning=False),
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_every_field_of_the_config_reaches_hugging_face(tmp_path, changes):
    config = with_text(text_only(SCOUT_LIKE), **changes)
    ours = make_pair(config).ours
    save_checkpoint(ours, tmp_path)
    ids = words(67)
    assert_same(ours(ids), hub_logits(tmp_path, ids, None))


def test_auto_classes_of_hugging_face_recognise_a_saved_folder(pair, tmp_path):
    save_checkpoint(pair.ours, tmp_path)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(model) is transformers.Llama4ForConditionalGeneration
    assert model.generation_config.eos_token_id == list(pair.config.stop_tokens)
    assert model.config.image_token_id == pair.config.patch_token


@files
def test_our_own_round_trip_changes_no_bit_and_no_field(any_pair, tmp_path, shard_bytes):
    save_checkpoint(any_pair.ours, tmp_path, shard_bytes=shard_bytes)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == any_pair.config and not loaded.training
    wanted = any_pair.ours.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
    assert not list(tmp_path.glob(".*")), "temporary files are left"


# ----------------------------------------------------------------------------------------------------------------------
# Theirs -> ours


@files
def test_a_folder_of_hugging_face_gives_the_same_logits_here(any_pair, tmp_path, shard_bytes):
    any_pair.theirs.save_pretrained(tmp_path, max_shard_size=shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard_bytes == MANY_SHARDS)
    ours = load_checkpoint(tmp_path)
    assert ours.config == any_pair.config
    ids, pixels = prompt_for(any_pair.config)
    wanted = any_pair.wanted(ids, pixels)
    assert_same(ours(ids, pixels), wanted)
    assert_same(in_pieces(ours, ids, [3, 25, 1, 1, 30, 7], pixels), wanted)


def spelled_as_in_transformers_4(config: dict) -> dict:
    """`rope_theta` + `rope_scaling` instead of `rope_parameters`, `torch_dtype` instead of `dtype`, no layer types."""
    config = {**config, "torch_dtype": config["dtype"]}
    parts = [config]
    for name in ("text_config", "vision_config"):
        if name in config:
            config[name] = dict(config[name])
            parts.append(config[name])
    for part in parts:
        part.pop("dtype", None), part.pop("layer_types", None)
        rope = part.pop("rope_parameters", None)
        if rope is not None:
            part["rope_theta"] = rope.pop("rope_theta")
            part["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return config


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled RoPE", "plain RoPE"])
@pytest.mark.parametrize("config", [MAVERICK_LIKE, text_only(MAVERICK_LIKE)], ids=["with vision", "text only"])
@pytest.mark.parametrize("spelling", [4, 5], ids=["transformers 4", "transformers 5"])
def test_rope_settings_are_read_in_both_spellings(tmp_path, spelling, config, scaled):
    if not scaled:
        config = with_text(config, rope_scaling=None, rope_theta=700.0)
    pair = make_pair(config)
    pair.theirs.save_pretrained(tmp_path)
    if spelling == 4:
        saved = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(spelled_as_in_transformers_4(saved)))
        assert "rope_parameters" not in (tmp_path / "config.json").read_text()
    ids, pixels = prompt_for(config)
    assert load_config(tmp_path) == config
    assert_same(load_checkpoint(tmp_path)(ids, pixels), pair.wanted(ids, pixels))


def test_an_empty_list_of_rotary_layers_means_every_fourth_is_nope(tmp_path):
    """As in the configs of the first release, which also spelled "tune the temperature" as 4."""
    config = with_text(SCOUT_LIKE, nope_layers=(3,), moe_layers=(1, 3, 5))
    pair = make_pair(config)
    pair.theirs.save_pretrained(tmp_path)
    saved = spelled_as_in_transformers_4(json.loads((tmp_path / "config.json").read_text()))
    saved["text_config"] |= {"no_rope_layers": [], "attn_temperature_tuning": 4, "interleave_moe_layer_step": 2}
    del saved["text_config"]["moe_layers"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == config and loaded.config.text.temperature_tuning is True
    ids, pixels = picture_prompt()
    assert_same(loaded(ids, pixels), pair.wanted(ids, pixels))


def test_fields_that_a_folder_leaves_out_have_the_defaults_of_hugging_face(tmp_path):
    """What no config has to say: schedules, chunk, temperature, norm and RoPE."""
    sizes = dict(vocab_size=99, hidden_size=40, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2)
    sizes |= dict(intermediate_size=20, intermediate_size_mlp=52, num_local_experts=5, max_position_embeddings=500)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4_text", **sizes}))
    ours = load_config(tmp_path).text
    theirs = transformers.Llama4TextConfig.from_pretrained(tmp_path)
    assert [int(not ours.is_nope(layer)) for layer in range(8)] == theirs.no_rope_layers
    assert list(ours.moe_layers) == theirs.moe_layers
    assert ours.chunk_size == theirs.attention_chunk_size
    assert (ours.qk_norm, ours.norm_eps) == (theirs.use_qk_norm, theirs.rms_norm_eps)
    assert (ours.temperature_tuning, ours.temperature_scale) == (theirs.attn_temperature_tuning, theirs.attn_scale)
    assert ours.floor_scale == theirs.floor_scale
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": ours.rope_theta}
    assert ours.rope_scaling is None


# ----------------------------------------------------------------------------------------------------------------------
# bf16


def stored_dtypes(folder) -> set[str]:
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found |= {shard.get_slice(key).get_dtype() for key in shard.keys()}
    return found


@pytest.mark.parametrize(
    "dtype, name, stored", [(torch.bfloat16, "bfloat16", "BF16"), (torch.float32, "float32", "F32")]
)
def test_the_config_names_the_dtype_that_is_stored(pair, tmp_path, dtype, name, stored):
    save_checkpoint(pair.ours, tmp_path, dtype=dtype)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert stored_dtypes(tmp_path) == {stored}
    assert {saved["dtype"], saved["torch_dtype"], saved["text_config"]["dtype"]} == {name}
    model = transformers.Llama4ForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == dtype and model.language_model.lm_head.weight.dtype == dtype


def test_weights_stored_in_bf16_by_us_are_equal_on_both_sides(pair, tmp_path):
    save_checkpoint(pair.ours, tmp_path, dtype=torch.bfloat16)
    ids, pixels = picture_prompt()
    ours = load_checkpoint(tmp_path)
    assert ours.lm_head.weight.dtype == torch.float32
    assert_same(ours(ids, pixels), hub_logits(tmp_path, ids, pixels))
    half = load_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.lm_head.weight.float(), ours.lm_head.weight)


def test_weights_stored_in_bf16_by_hugging_face_are_equal_on_both_sides(tmp_path):
    pair = make_pair(SCOUT_LIKE)
    for parameter in pair.theirs.parameters():  # not `.to()`, which would round its rotary table as well
        parameter.data = parameter.data.bfloat16()
    pair.theirs.save_pretrained(tmp_path)
    assert stored_dtypes(tmp_path) == {"BF16"}
    ids, pixels = picture_prompt()
    assert_same(load_checkpoint(tmp_path)(ids, pixels), hub_logits(tmp_path, ids, pixels))


def test_bf16_logits_stay_near_those_of_fp32(pair, tmp_path):
    """A loose check that no step of the model needs fp32 to work at all (cached and in one pass)."""
    save_checkpoint(pair.ours, tmp_path, dtype=torch.bfloat16)
    ids = words(40)
    wanted = load_checkpoint(tmp_path)(ids)
    half = load_checkpoint(tmp_path, dtype=torch.bfloat16)
    for got in (half(ids), in_pieces(half, ids, [3, 25, 1, 1, 10])):
        assert got.dtype == torch.bfloat16
        agreement = (got.argmax(-1) == wanted.argmax(-1)).float().mean()
        assert agreement > 0.6, f"the same next token at {agreement:.0%} of the positions"
