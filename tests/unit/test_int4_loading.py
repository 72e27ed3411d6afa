"""Folders become int4 models tensor by tensor, int4 models become folders, and what does not fit is said in one line.

A GPU is played by the CPU: how much of it is free, and that it runs full, is what the tests decide.
"""

import gc
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import SCOUT_LIKE, assert_same, build, picture_prompt, text_only, with_text

from minillama4 import Llama4, Llama4Config, generate, load_checkpoint, load_config, load_tokenizer, save_checkpoint
from minillama4 import checkpoint as checkpoint_module
from minillama4.budget import kv_bytes, weight_bytes
from minillama4.cuda import int4
from minillama4.cuda.int4 import GROUP, Int4Linear, int4_names, to_int4
from minillama4.cuda.load import RESERVE, does_not_fit, free_bytes, model_bytes
from minillama4.hub import INT4

ROOT = Path(__file__).resolve().parents[2]
MODEL = build(SCOUT_LIKE)


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(MODEL, tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def packed(tmp_path):
    """A folder of a quantised model, in several files."""
    save_checkpoint(to_int4(build(SCOUT_LIKE), torch.float32), tmp_path / "packed", shard_bytes=40_000)
    return tmp_path / "packed"


def equal(one: Llama4, other: Llama4) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def refused(folder, *words, **options):
    """Loading raises a one-line ValueError that holds all these words."""
    with pytest.raises(ValueError) as error:
        load_checkpoint(folder, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500, message
    for word in words:
        assert str(word) in message, f"{word!r} is not in {message!r}"


# ----------------------------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize("shard_bytes", [2**40, 60_000], ids=["one file", "many shards"])
@pytest.mark.parametrize("config", [SCOUT_LIKE, text_only(SCOUT_LIKE)], ids=["with vision", "text only"])
def test_streaming_gives_what_quantising_the_whole_model_gives(tmp_path, config, shard_bytes):
    save_checkpoint(build(config), tmp_path, shard_bytes=shard_bytes)
    model = load_checkpoint(tmp_path, quantize="int4")
    assert equal(model, to_int4(build(config), torch.float32)) and not model.training
    assert isinstance(model.lm_head, Int4Linear) and model.embed_tokens.weight.dtype == torch.float32


def test_weights_stored_in_bf16_are_quantised_as_stored(tmp_path):
    save_checkpoint(MODEL, tmp_path, dtype=torch.bfloat16)
    model = load_checkpoint(tmp_path, quantize="int4", dtype=torch.bfloat16)
    assert equal(model, to_int4(build(SCOUT_LIKE).to(torch.bfloat16), torch.bfloat16))
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_shipped_model_still_answers_in_int4():
    model, tokenizer = load_checkpoint("mini-scout", quantize="int4"), load_tokenizer("mini-scout")
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Explain MoE routing in two sentences."}])
    tokens = generate(model, [torch.tensor(prompt)], stop_tokens=model.config.stop_tokens)[0]
    assert tokenizer.decode(tokens).startswith("A router scores all experts for each token")


@pytest.mark.parametrize("quantize", ["int8", "INT4", True, ""])
def test_another_format_is_refused(folder, quantize):
    refused(folder, "quantize is", repr(quantize), "'int4' or None", quantize=quantize)


def test_a_damaged_weight_is_named(folder):
    key, file = "language_model.model.layers.3.self_attn.v_proj.weight", folder / "model.safetensors"
    tensors = load_file(file)
    tensors[key][3, 4] = float("nan")
    save_file(tensors, file)
    refused(folder, "layers.3.self_attn.v_proj.weight", "NaN", quantize="int4")


LOADER = """
import sys
from pathlib import Path
from minillama4 import load_checkpoint

def resident(field):  # of this process, in bytes; getrusage's maximum would start from the parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

load_checkpoint(sys.argv[1], quantize="int4")  # a small one: everything that is imported on the way is now there
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
model = load_checkpoint(sys.argv[2], quantize="int4")
sizes = [x.nbytes for x in model.state_dict().values()]
print(sum(sizes), resident("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_quantising_40_shards_takes_the_final_model_and_one_tensor(tmp_path, dtype):
    """Peak resident memory of a process of its own, pages of mapped files included."""
    config = with_text(
        replace(SCOUT_LIKE, vision=None),
        vocab_size=1000,
        hidden_size=512,
        num_layers=20,
        moe_layers=(1, 5, 9, 13, 17),
        nope_layers=(3,),
        num_experts=5,
        expert_width=256,
        dense_width=256,
    )
    small, big = tmp_path / "small", tmp_path / "big"
    save_checkpoint(build(SCOUT_LIKE), small)
    with torch.device("meta"):
        model = Llama4(config)
    largest = 5 * 512 * 512 * dtype.itemsize
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.1)
    save_checkpoint(model, big, dtype=dtype, shard_bytes=800_000)
    assert len(list(big.glob("*.safetensors"))) >= 40
    run = subprocess.run([sys.executable, "-c", LOADER, small, big], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    size, grown = map(int, run.stdout.split())
    stored = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    one_expert = 4 * 512 * 512 * 4  # in float32, in steps, and in codes
    allowed = largest + one_expert + 6e6
    print(f"{stored / 1e6:.0f} MB stored, {size / 1e6:.0f} MB packed, peak + {grown / 1e6:.0f} MB")
    assert size < grown < size + allowed < stored


# ----------------------------------------------------------------------------------------------------------------------
# A full device


def play_gpu(monkeypatch, free):
    monkeypatch.setattr(checkpoint_module, "free_bytes", lambda device: free)


def no_reading(*_):
    raise AssertionError("a tensor was read")


def test_what_cannot_fit_is_refused_before_anything_is_read(folder, monkeypatch):
    needed = model_bytes(MODEL, torch.float32)
    play_gpu(monkeypatch, needed - 1)
    monkeypatch.setattr(checkpoint_module, "place", no_reading)
    refused(folder, folder, f"need {needed / 1e6:,.2f} MB", f"cpu has {(needed - 1) / 1e6:,.2f} MB free")


def test_what_just_fits_is_loaded(folder, monkeypatch):
    play_gpu(monkeypatch, model_bytes(MODEL, torch.float32))
    assert equal(load_checkpoint(folder), MODEL)


def test_a_device_that_runs_full_on_the_way_is_reported_and_emptied(folder, monkeypatch):
    """As when another process takes the rest: the half-filled model must not stay, or nothing else could be tried."""
    play_gpu(monkeypatch, 10**9)
    place, seen = checkpoint_module.place, []

    def runs_full(model, *rest):
        seen.append(weakref.ref(model))
        if len(seen) == 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
        place(model, *rest)

    monkeypatch.setattr(checkpoint_module, "place", runs_full)
    with pytest.raises(ValueError) as error:
        load_checkpoint(folder, quantize="int4")
    assert "the weights need" in str(error.value) and "1.0 GB free" in str(error.value)
    assert error.value.__context__ is None
    gc.collect()
    assert seen[0]() is None


def card(gigabytes):
    return int(gigabytes * 1e9)


def test_scout_in_bf16_on_80_gb_is_sent_to_int4_with_the_context_that_is_left():
    config, cuda = Llama4Config.preset("scout"), torch.device("cuda", 0)
    message = does_not_fit(config, 2 * 108_641_793_536, card(80), cuda)
    assert message.startswith("the weights need 217.3 GB, and cuda:0 has 80.0 GB free; quantize='int4' would fit: ")
    assert "60.5 GB" in message
    tokens = int(message.split("and ")[-1].split(" tokens")[0].replace(",", ""))
    left = card(80) - weight_bytes(config, "int4") - RESERVE
    assert kv_bytes(config, tokens) <= left < kv_bytes(config, tokens + 1)
    assert 300_000 < tokens < 420_000


@pytest.mark.parametrize(
    "preset, needed, free, said",
    [
        ("scout", 4 * 108.6, 250, "dtype=torch.bfloat16 would fit: 217.3 GB"),
        ("scout", 4 * 108.6, 217.5, "quantize='int4' would fit: 60.5 GB"),  # bf16 would leave no room to work in
        ("maverick", 2 * 401.6, 80, "quantize='int4' needs a device with 219.2 GB, of which 3.0 GB"),
        ("scout", 60.52, 40, "the smallest format, needs a device with 63.5 GB"),
        ("scout", 2 * 108.6, None, "ran out of memory; quantize='int4' needs a device with 63.5 GB"),
    ],
)
def test_the_largest_format_that_fits_is_named(preset, needed, free, said):
    config, cuda = Llama4Config.preset(preset), torch.device("cuda")
    message = does_not_fit(config, card(needed), None if free is None else card(free), cuda)
    assert said in message and "\n" not in message


def test_nobody_asks_a_cpu_how_much_is_free():
    assert free_bytes(torch.device("cpu")) is None


# ----------------------------------------------------------------------------------------------------------------------
# Quantised folders


@pytest.mark.parametrize("shard_bytes", [2**40, 40_000], ids=["one file", "many shards"])
def test_a_quantised_model_comes_back_bit_by_bit_and_is_not_quantised_again(tmp_path, monkeypatch, shard_bytes):
    model = to_int4(build(SCOUT_LIKE), torch.float32)
    save_checkpoint(model, tmp_path, shard_bytes=shard_bytes)
    assert (len(list(tmp_path.glob("int4*.safetensors"))) > 3) == (shard_bytes < 2**40)
    monkeypatch.setattr(int4, "quantise", no_reading)
    for quantize in (None, "int4"):
        loaded = load_checkpoint(tmp_path, quantize=quantize)
        assert equal(loaded, model) and loaded.config == SCOUT_LIKE and not loaded.training
    ids, pixels = picture_prompt()
    assert_same(loaded(ids, pixels), model(ids, pixels), 1e-6)


def test_scales_stay_float32_where_the_rest_is_stored_in_bf16(tmp_path):
    model = to_int4(build(SCOUT_LIKE), torch.float32)
    save_checkpoint(model, tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "int4.safetensors")
    assert sum(x.nbytes for x in stored.values()) == model_bytes(model, torch.bfloat16)
    loaded = load_checkpoint(tmp_path)
    for name in int4_names(model):
        assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])
    assert torch.equal(loaded.embed_tokens.weight, model.embed_tokens.weight.bfloat16().float())


def test_the_format_on_disk_is_the_one_that_is_documented(packed):
    """Names of the Hub, with .packed and .scale behind."""
    config = json.loads((packed / "config.json").read_text())
    assert config["quantization_config"] == INT4 and INT4["group_size"] == GROUP
    index = json.loads((packed / "int4.safetensors.index.json").read_text())["weight_map"]
    layer = "language_model.model.layers.1."
    for key in ("self_attn.q_proj.weight", "feed_forward.experts.gate_up_proj"):
        assert f"{layer}{key}.packed" in index and f"{layer}{key}.scale" in index and layer + key not in index
    assert layer + "feed_forward.router.weight" in index and load_config(packed) == SCOUT_LIKE


@pytest.mark.parametrize("auto", ["Llama4ForConditionalGeneration", "AutoModelForCausalLM"])
def test_transformers_finds_no_weights_instead_of_making_them_up(packed, auto):
    with pytest.raises(OSError, match="model.safetensors"):
        getattr(transformers, auto).from_pretrained(packed)


def test_one_folder_holds_one_kind_of_weights(folder, packed):
    """Its config.json can speak of one kind only, so the other would be lost."""
    for target, model, there in (
        (folder, to_int4(build(SCOUT_LIKE), torch.float32), "model"),
        (packed, MODEL, "int4"),
    ):
        before = {path.name: path.read_bytes() for path in target.iterdir()}
        with pytest.raises(ValueError, match=rf"holds {there}\*\.safetensors; .* a folder of their own"):
            save_checkpoint(model, target)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def edit(folder, change):
    """Change the tensors of the file that holds the first q_proj."""
    file = next(f for f in sorted(folder.glob("int4-*")) if any("0.self_attn.q_proj" in key for key in load_file(f)))
    tensors = load_file(file)
    key = next(key for key in tensors if "0.self_attn.q_proj" in key and key.endswith(".scale"))
    change(tensors, key)
    save_file(tensors, file)
    return key


def test_a_quantised_folder_with_a_missing_tensor_is_refused(packed):
    key = edit(packed, lambda tensors, key: tensors.pop(key))
    refused(packed, "1 tensors are missing", key)


def test_a_quantised_folder_of_another_group_size_is_refused(packed):
    key = edit(packed, lambda tensors, key: tensors.update({key: tensors[key].repeat(1, 2)}))
    refused(packed, key, "the config wants [96, 1]")


def test_a_scale_of_another_type_is_refused(packed):
    edit(packed, lambda tensors, key: tensors.update({key: tensors[key].half()}))
    refused(packed, "q_proj.weight.scale is torch.float16", "torch.float32")


def test_a_format_of_somebody_else_is_refused(packed):
    file = packed / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["group_size"] = 64
    file.write_text(json.dumps(config))
    refused(packed, "quantization_config", "unquantised")


def test_the_last_shard_is_found_short_before_the_first_is_read(packed, monkeypatch):
    last = sorted(packed.glob("int4-*.safetensors"))[-1]
    size = last.stat().st_size
    os.truncate(last, size - 1000)
    monkeypatch.setattr(checkpoint_module, "place", no_reading)
    refused(packed, last.name, "truncated", f"{size - 1000:,} bytes of {size:,}")
