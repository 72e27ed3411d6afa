"""Folders that cannot be right are refused in one line that names what is wrong; and nothing half-written is left."""

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SCOUT_LIKE, build, with_text

from minillama4 import checkpoint as checkpoint_module
from minillama4 import load_checkpoint, load_config, save_checkpoint

MODEL = build(SCOUT_LIKE)


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(MODEL, tmp_path)
    return tmp_path


@pytest.fixture
def shards(tmp_path):
    save_checkpoint(MODEL, tmp_path, shard_bytes=60_000)
    return tmp_path


def refused(folder, *words, load=load_checkpoint):
    """Loading raises a one-line ValueError that holds all these words."""
    with pytest.raises(ValueError) as error:
        load(folder)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500, message
    for word in words:
        assert str(word) in message, f"{word!r} is not in {message!r}"


def edit_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, part, **changes):
    """None removes a field."""
    config = json.loads((folder / "config.json").read_text())
    where = config[part] if part else config
    for name, value in changes.items():
        where[name] = value
        if value is None:
            del where[name]
    (folder / "config.json").write_text(json.dumps(config))


# ----------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("kept", [0.0, 1e-5, 0.01, 0.5, 0.999], ids=lambda share: f"{share:.3%}")
def test_a_truncated_file_is_refused(folder, kept):
    file = folder / "model.safetensors"
    os.truncate(file, int(file.stat().st_size * kept))
    refused(folder, file, "truncated")


def test_a_file_that_is_no_safetensors_file_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 100)
    refused(folder, "model.safetensors", "no safetensors file")


def test_a_missing_shard_is_refused_before_any_is_read(shards):
    lost = sorted(shards.glob("*.safetensors"))[2]
    lost.unlink()
    refused(shards, "1 of", "shards are missing", lost.name)


def test_a_truncated_shard_is_named(shards):
    short = sorted(shards.glob("*.safetensors"))[3]
    os.truncate(short, short.stat().st_size - 10)
    refused(shards, short.name, "truncated")


def test_an_index_that_leads_out_of_the_folder_is_refused(shards):
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../model.safetensors")
    index.write_text(json.dumps(content))
    refused(shards, "outside the folder")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_folder_of_pickles_is_refused_and_none_is_opened(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload()))
    refused(folder, name, "pickle", "never loaded")
    assert not (folder / "unpickled").exists()


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, folder, "no model.safetensors")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "no folder", "nowhere")


@pytest.mark.parametrize(
    "content, word", [("", "not JSON"), ('{"model_type": "llama4"', "not JSON"), ("[1, 2]", "JSON object")]
)
def test_a_broken_config_is_refused(folder, content, word):
    (folder / "config.json").write_text(content)
    refused(folder, "config.json", word)


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


# ----------------------------------------------------------------------------------------------------------------------
# Tensors


def test_a_missing_tensor_is_named(folder):
    key = "language_model.model.layers.3.self_attn.v_proj.weight"
    edit_weights(folder, lambda tensors: tensors.pop(key))
    refused(folder, "1 tensors are missing", key)


def test_a_tensor_that_the_model_has_no_place_for_is_named(folder):
    key = "language_model.model.layers.3.self_attn.q_norm.weight"
    edit_weights(folder, lambda tensors: tensors.update({key: torch.zeros(16)}))
    refused(folder, key, "has no place in this model")


def test_a_tensor_that_comes_twice_is_named(shards):
    files = sorted(shards.glob("*.safetensors"))
    key, tensor = next(iter(load_file(files[0]).items()))
    save_file(load_file(files[1]) | {key: tensor}, files[1])
    refused(shards, key, "comes twice")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    """Transposed, as a converter would leave it."""
    key = "language_model.model.layers.1.feed_forward.router.weight"
    edit_weights(folder, lambda tensors: tensors.update({key: tensors[key].T.contiguous()}))
    refused(folder, key, "[40, 5]", "[5, 40]")


def test_the_widths_of_expert_and_dense_layers_cannot_be_mixed_up(folder):
    """`intermediate_size` is the expert's on the Hub, the reverse of most models."""
    edit_config(folder, "text_config", intermediate_size=52, intermediate_size_mlp=20)
    refused(folder, "feed_forward", "the config wants")


def test_a_schedule_that_is_not_the_checkpoints_is_refused(folder):
    edit_config(folder, "text_config", moe_layers=[0, 2, 4])
    refused(folder, "feed_forward", "has no place")


# ----------------------------------------------------------------------------------------------------------------------
# Configs that this package does not implement


@pytest.mark.parametrize("kind", ["llama", "mllama", None])
def test_an_unknown_model_type_is_refused(folder, kind):
    edit_config(folder, "", model_type=kind)
    refused(folder, "model_type", repr(kind), "llama4")


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
UNSUPPORTED = [
    ("", dict(quantization_config={"bits": 4}), ["quantization_config"]),
    ("", dict(tie_word_embeddings=True), ["tie_word_embeddings is True"]),
    ("text_config", dict(num_experts_per_tok=2), ["num_experts_per_tok is 2", "only 1 is supported"]),
    ("text_config", dict(attention_bias=True), ["attention_bias is True"]),
    ("text_config", dict(hidden_act="gelu"), ["hidden_act is 'gelu'"]),
    ("text_config", dict(hidden_size=None), ["hidden_size is missing"]),
    ("text_config", dict(rope_parameters={"rope_type": "yarn", "factor": 4}), ["rope_type is 'yarn'"]),
    ("text_config", dict(rope_parameters=LLAMA3), ["lack low_freq_factor", "high_freq_factor", "original_max"]),
    ("text_config", dict(layer_types=["full_attention"] * 6), ["layer_types"]),
    ("text_config", dict(num_key_value_heads=4), ["num_heads is 6", "num_kv_heads (4)"]),
    ("text_config", dict(moe_layers=[1, 9]), ["moe_layers is [1, 9]", "from 0 to 5"]),
    ("vision_config", dict(hidden_act="quick_gelu"), ["vision_config", "hidden_act"]),
    ("vision_config", dict(multi_modal_projector_bias=True), ["multi_modal_projector_bias is True"]),
    ("vision_config", dict(intermediate_size=200), ["intermediate_size is 200", "224"]),
    ("vision_config", dict(vision_output_dim=99), ["vision_output_dim", "must be equal"]),
    ("vision_config", dict(num_channels=1), ["num_channels is 1"]),
    ("vision_config", dict(norm_eps=1e-6), ["norm_eps is 1e-06"]),
    ("vision_config", dict(image_size=25), ["tile_size is 25", "patch_size (4)"]),
]


@pytest.mark.parametrize("part, changes, words", UNSUPPORTED, ids=[f"{p} {next(iter(c))}" for p, c, _ in UNSUPPORTED])
def test_a_field_that_is_not_implemented_is_refused_by_name(folder, part, changes, words):
    edit_config(folder, part, **changes)
    refused(folder, *words, load=load_config)
    refused(folder, *words)


# ----------------------------------------------------------------------------------------------------------------------
# Saving


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "config, options, message",
    [
        (with_text(SCOUT_LIKE), dict(dtype=torch.float64), "dtype is torch.float64"),
        (replace(SCOUT_LIKE, vision=replace(SCOUT_LIKE.vision, mlp_width=200)), {}, "mlp_width is 200"),
        (replace(SCOUT_LIKE, vision=replace(SCOUT_LIKE.vision, norm_eps=1e-3)), {}, "norm_eps is 0.001"),
    ],
    ids=["dtype", "mlp_width", "norm_eps"],
)
def test_a_model_that_hugging_face_cannot_hold_is_refused_and_nothing_is_written(folder, config, options, message):
    before = snapshot(folder)
    refused(folder, message, load=lambda folder: save_checkpoint(build(config), folder, **options))
    assert snapshot(folder) == before
    refused(folder / "new", message, load=lambda folder: save_checkpoint(build(config), folder, **options))
    assert not (folder / "new").exists()


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_save_that_fails_leaves_no_half_file_and_no_checkpoint(tmp_path, monkeypatch, fails_at):
    """The disk is full in the middle of a file: what is there is whole, and is not taken for a checkpoint."""
    calls = []

    def full_disk(tensors, path, metadata):
        calls.append(path)
        if len(calls) == fails_at:
            path.write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint_module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(MODEL, tmp_path, shard_bytes=60_000)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == fails_at - 1 and all(name.endswith(".safetensors") for name in left)
    for name in left:
        load_file(tmp_path / name)
    refused(tmp_path, "no config.json")
