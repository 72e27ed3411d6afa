"""The budget against what is published, against models that `transformers` builds, and against counting by hand.

The tables are those of two studies of the released models; a number must agree with what the table prints, to half a
unit of its last digit and two parts in ten thousand (the studies leave the norms out of what a token reads).
"""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from minillama4 import PRESETS, Llama4, Llama4Config, VisionConfig
from minillama4.budget import (
    FORMATS,
    OTHERS,
    Shape,
    count,
    experts_touched,
    kv_bytes,
    longest_context,
    read_bytes,
    shape,
    weight_bytes,
)
from minillama4.cli import main
from minillama4.roofline import GPUS, budget, decode_bound, moe_layer_times, parse_tokens, prefill_bound

K, M, GiB = 2**10, 2**20, 2**30


def printed(value: float, text: str) -> bool:
    """Is `text` what a table prints for `value`?"""
    unit = 10.0 ** -len(text.partition(".")[2])
    return abs(value - float(text.replace(",", ""))) <= unit / 2 + 2e-4 * abs(value)


def row(values, text: str) -> bool:
    values, texts = list(values), text.replace("/", " ").split()
    assert len(values) == len(texts)
    assert all(map(printed, values, texts)), (values, texts)
    return True


# Parameters.

COMPONENTS = {  # Scout, Maverick
    "embedding": (1_034_485_760, 1_034_485_760),
    "head": (1_034_485_760, 1_034_485_760),
    "attention": (3_019_898_880, 3_019_898_880),
    "norms": (491_520 + 5_120, 491_520 + 5_120),
    "routed": (96_636_764_160, 386_547_056_640),
    "shared": (6_039_797_760, 3_019_898_880),
    "router": (3_932_160, 15_728_640),
    "dense": (0, 6_039_797_760),
    "text_total": (107_769_861_120, 400_711_848_960),
    "vision": (850_960_896, 850_960_896),
    "projector": (20_971_520, 20_971_520),
    "total": (108_641_793_536, 401_583_781_376),
    "active": (17_172_894_720, 17_184_691_200),
    "active_read": (16_138_408_960, 16_150_205_440),
}


@pytest.mark.parametrize("part", COMPONENTS)
def test_every_component_of_scout_and_maverick(part):
    assert tuple(getattr(count(name), part) for name in ("scout", "maverick")) == COMPONENTS[part]


def guard() -> Llama4Config:
    """Llama Guard 4: Scout with its shared experts only."""
    scout = PRESETS["scout"]
    return replace(scout, text=replace(scout.text, moe_layers=(), dense_width=8192))


def test_llama_guard_from_the_same_formulas():
    assert count(guard()).total == 12_001_097_216 and count(guard()).active == count(guard()).text_total


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_counts_what_the_model_has(name):
    with torch.device("meta"):
        model = Llama4(PRESETS[name])
    assert count(name).total == sum(p.numel() for p in model.parameters())
    assert count(PRESETS[name]) == count(shape(name)) == count(name)


@pytest.mark.parametrize("vision", [None, VisionConfig(tile_size=48, patch_size=6, encoder="linear")])
def test_a_model_without_a_vision_transformer(vision):
    config = replace(PRESETS["mini-maverick"], vision=vision)
    with torch.device("meta"):
        model = Llama4(config)
    assert count(config).total == sum(p.numel() for p in model.parameters())
    assert count(config).vision == 0 and bool(count(config).projector) == bool(vision)


def hub_config(name: str):
    """The released config of a model of another family, as a `transformers` config."""
    from transformers import DeepseekV3Config, LlamaConfig, MixtralConfig

    if name == "deepseek-v3":
        return DeepseekV3Config()  # the class defaults are the release
    if name == "mixtral-8x7b":
        return MixtralConfig()
    vocab, sizes = (
        (32_000 if name == "llama-2-7b" else 128_256),
        {
            "llama-2-7b": (4096, 32, 32, 32, 11_008),
            "llama-3.1-8b": (4096, 32, 32, 8, 14_336),
            "llama-3.1-70b": (8192, 80, 64, 8, 28_672),
            "llama-3.1-405b": (16_384, 126, 128, 8, 53_248),
        }[name],
    )
    hidden, layers, heads, kv_heads, width = sizes
    return LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=width, tie_word_embeddings=False,
    )  # fmt: skip


PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_419_200,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_count_what_transformers_builds(name):
    from transformers import AutoModelForCausalLM

    config = hub_config(name)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    total = sum(tensor.numel() for tensor in tensors.values())
    assert count(name).total == count(name).text_total == total == PUBLISHED[name]
    routed = sum(tensor.numel() for key, tensor in tensors.items() if ".experts." in key)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "n_routed_experts", None) or 1
    chosen = getattr(config, "num_experts_per_tok", 1)
    assert count(name).routed == routed
    assert count(name).active * experts == (total - routed) * experts + routed * chosen


def test_published_active_sizes():
    assert row((count(n).active / 1e9 for n in ("mixtral-8x7b", "scout", "maverick")), "12.9 17.2 17.2")
    assert count("mixtral-8x7b").active == 12_879_925_248
    assert printed(count("deepseek-v3").active_read / 1e9, "37")  # 37.6 with the embedding: "37B" is without


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(layers=0), "layers is 0"),
        (dict(dense_width=-1), "dense_width is -1"),
        (dict(moe_layers=5), "moe_layers is 5; there are 4 layers"),
        (dict(moe_layers=2, experts=4, per_token=5), "per_token is 5; with 4 experts it must be 1 to 4"),
        (dict(local_layers=2), "chunk is 0; 2 local layers need at least 1 token"),
    ],
)
def test_a_shape_that_contradicts_itself_is_refused(wrong, says):
    good = dict(name="x", layers=4, hidden=8, vocab=16, attention=1, norms=1, kv_values=1, score_width=1)
    with pytest.raises(ValueError, match=says):
        Shape(**(good | wrong))


# Experts touched.


@pytest.mark.parametrize("experts, per_token, tokens", [(4, 1, 3), (5, 2, 3), (3, 3, 1), (2, 1, 6)])
def test_experts_touched_is_the_mean_over_every_way_to_route(experts, per_token, tokens):
    choices = list(itertools.combinations(range(experts), per_token))
    ways = [len(set().union(*way)) for way in itertools.product(choices, repeat=tokens)]
    assert experts_touched(experts, tokens, per_token) == pytest.approx(sum(ways) / len(ways))


def test_experts_touched_as_printed():
    touched = (experts_touched(16, tokens) for tokens in (1, 2, 4, 8, 16, 32, 64, 256))
    assert row(touched, "1.00 1.94 3.64 6.45 10.30 13.97 15.74 16.00")
    assert experts_touched(16, 0) == 0
    for wrong in ((4, 1, 5), (0, 1, 1), (4, -1, 1)):
        with pytest.raises(ValueError):
            experts_touched(*wrong)


# Memory.


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_kv_cache_of_one_sequence(name):
    for context, gib in ((131_072, 7.125), (262_144, 13.125), (1_048_576, 49.125), (10_485_760, 481.125)):
        assert kv_bytes(name, context) == gib * GiB
        assert kv_bytes(name, context, dtype="fp8") == gib / 2 * GiB
        assert kv_bytes(name, context, batch=3) == 3 * gib * GiB
        naive = replace(shape(name), local_layers=0)
        assert kv_bytes(naive, context) == 192 * K * context
    assert kv_bytes(name, 100) == 100 * 192 * K  # below a chunk, local layers hold as much as global ones
    assert kv_bytes(name, 8193) - kv_bytes(name, 8192) == 48 * K  # past it, only 12 of 48 grow
    assert kv_bytes(name, 0) == 0


def test_weights_in_memory():
    assert row((weight_bytes(name) / 1e9 for name in ("scout", "maverick")), "217.28 803.17")
    text = {name: replace(shape("scout"), vision=0, projector=0) for name in FORMATS}
    for dtype, gb in {
        "bf16": "215.5", "fp8-mixed": "118.9", "int4-meta": "64.7", "int4-int8": "60.7", "int4-head16": "60.3",
        "int4": "58.8",
    }.items():  # fmt: skip
        assert printed(weight_bytes(text[dtype], dtype) / 1e9, gb), dtype


@pytest.mark.parametrize(
    "gpu, dtype, thousands",  # of tokens: bf16 KV, fp8 KV, bf16 KV with all layers at full length
    [
        ("h100", "int4-meta", (301, 626, 81)),
        ("h100", "int4-int8", (383, 791, 102)),
        ("h100", "int4-head16", (391, 806, 104)),
        ("h100", "int4", (422, 868, 112)),
        ("h200", "fp8-mixed", (526, 1076, 138)),
        ("h200", "int4-meta", (1628, 3280, 413)),
        ("h200", "int4-int8", (1710, 3445, 434)),
        ("h200", "int4", (1749, 3523, 443)),
    ],
)
def test_the_longest_context_that_fits(gpu, dtype, thousands):
    free = GPUS[gpu].memory - GPUS[gpu].reserve - weight_bytes("scout", dtype)
    naive = replace(shape("scout"), local_layers=0)
    got = [longest_context("scout", free), longest_context("scout", free, "fp8"), longest_context(naive, free)]
    # The table rounds the vision path up to 1.8 GB: 56 MB, or about 2,300 tokens of fp8 cache, that we have free.
    assert all(-0.5 <= tokens / 1000 - table < 3.5 for tokens, table in zip(got, thousands, strict=True)), got
    assert kv_bytes("scout", got[0]) <= free < kv_bytes("scout", got[0] + 1)


def test_sequences_of_a_batch_share_the_memory():
    free = GPUS["h200"].memory - 3e9 - weight_bytes("scout", "int4")
    longest = budget("scout", "int4", 8 * K, "h200", batch=5)["longest_context"]
    assert kv_bytes("scout", longest, batch=5) <= free < kv_bytes("scout", longest + 1, batch=5)


def test_a_context_shorter_than_a_chunk_or_none():
    per_token = 192 * K
    assert longest_context("scout", 5000 * per_token + 1) == 5000 and longest_context("scout", -1) == 0
    with pytest.raises(ValueError, match="local_layers is 48 of 48"):
        longest_context(replace(shape("scout"), local_layers=48), 1e12)


# Decoding.

CONTEXTS = (0, 8 * K, 128 * K, M, 10 * M)
DECODE = {  # dtype: GB a token; tokens/s on an H100 and an H200 with no context, 8K, 128K, 1M and 10M
    "scout": {
        "bf16": ("32.28", "103.8 98.9 83.9 39.4 6.1", "133.2 126.9 107.7 50.6 7.8"),
        "fp8-mixed": ("26.24", "127.7 120.3 98.9 42.4 6.2", "163.9 154.4 126.9 54.4 7.9"),
        "fp8": ("16.14", "207.5 188.7 140.8 48.6 6.3", "266.4 242.2 180.7 62.4 8.1"),
        "int4-meta": ("14.53", "230.5 207.5 151.0 49.8 6.3", "295.9 266.3 193.8 63.9 8.1"),
        "int4-int8": ("10.48", "319.7 277.1 184.8 53.0 6.4", "410.3 355.7 237.2 68.0 8.2"),
        "int4-head16": ("10.10", "331.7 286.1 188.7 53.3 6.4", "425.8 367.2 242.3 68.4 8.2"),
        "int4": ("8.58", "390.5 328.8 206.4 54.6 6.4", "501.2 422.0 265.0 70.1 8.2"),
    },
    "maverick": {
        "bf16": ("32.30", "103.7 98.8 83.9 39.4 6.1", "133.1 126.8 107.6 50.6 7.8"),
        "fp8-mixed": ("29.28", "114.4 108.4 90.7 40.8 6.1", "146.9 139.2 116.4 52.4 7.9"),
        "fp8": ("16.17", "207.2 188.5 140.7 48.6 6.3", "266.0 241.9 180.6 62.4 8.1"),
        "int4-int8": ("10.50", "319.0 276.5 184.5 53.0 6.4", "409.4 355.0 236.9 68.0 8.2"),
        "int4-head16": ("10.12", "331.0 285.5 188.5 53.3 6.4", "424.8 366.5 241.9 68.4 8.2"),
        "int4": ("8.60", "389.4 328.0 206.1 54.6 6.4", "499.8 421.0 264.6 70.1 8.2"),
    },
    "llama-2-7b": {
        "bf16": ("13.21", "253.5 191.3 40.9", "325.4 245.6 52.5"),
        "fp8": ("6.61", "507.0 307.3 44.5", "650.8 394.4 57.1"),
        "int4-head16": ("3.70", "904.8 418.9 46.3", "1161.4 537.7 59.4"),
        "int4": ("3.51", "954.4 429.2 46.4", "1225.1 550.9 59.5"),
    },
    "llama-3.1-8b": {
        "bf16": ("15.01", "223.2 208.3 104.1", "286.5 267.4 133.6"),
        "fp8": ("7.50", "446.4 390.5 135.7", "573.0 501.3 174.2"),
        "int4-head16": ("4.76", "704.0 574.4 152.7", "903.7 737.3 196.0"),
        "int4": ("3.99", "840.3 662.0 158.3", "1078.5 849.7 203.1"),
    },
}


@pytest.mark.parametrize("model, dtype", [(model, dtype) for model in DECODE for dtype in DECODE[model]])
def test_decoding_one_token(model, dtype):
    gb, h100, h200 = DECODE[model][dtype]
    assert printed(read_bytes(model, dtype) / 1e9, gb)
    for gpu, text in (("h100", h100), ("h200", h200)):
        bounds = [decode_bound(model, dtype, context, gpu=gpu) for context in CONTEXTS[: len(text.split())]]
        assert row((bound.tokens_per_second for bound in bounds), text)
        assert all(bound.bound_by == "memory" for bound in bounds)


def test_decoding_with_an_fp8_cache_and_with_every_expert():
    fp8 = (decode_bound("scout", "int4", c, gpu="h200", kv_dtype="fp8").tokens_per_second for c in CONTEXTS)
    assert row(fp8, "501.2 458.2 346.7 123.0 16.1")
    dense = [decode_bound(name, dense=True) for name in ("scout", "maverick")]
    assert row((bound.bytes / 1e9 for bound in dense), "213.47 799.35")
    speeds = [decode_bound("scout", gpu=gpu, dense=True).tokens_per_second for gpu in ("h100", "h200")]
    assert row(speeds, "15.7 20.1")


def test_meta_leaves_the_dense_layers_of_maverick_in_bf16():
    experts, rest = 24 * 2 * 125_829_120, 3_019_898_880 + 24 * 251_658_240 + 15_728_640 + 1_034_485_760 + 496_640
    assert read_bytes("maverick", "int4-meta") == pytest.approx(experts * 4.25 / 8 + rest * 2)


def test_a_batch_reads_more_experts_and_its_own_caches():
    rest = 3_019_898_880 + 6_039_797_760 + 3_932_160 + 1_034_485_760 + 496_640
    touched = 16 * (1 - (15 / 16) ** 8)
    bound = decode_bound("scout", context=1000, batch=8)
    assert bound.bytes == pytest.approx(2 * (rest + 48 * touched * 125_829_120) + 8 * 1000 * 192 * K)
    per_token = 2 * (16_138_408_960 - 496_640) + 48 * 1000 * 4 * 40 * 128  # norms are no product of matrices
    assert bound.flops == pytest.approx(8 * per_token)
    assert bound.tokens_per_second == pytest.approx(8 / (bound.bytes / 3.35e12))
    large = decode_bound("scout", batch=4096)
    assert large.bound_by == "compute" and large.tokens_per_second == pytest.approx(
        790e12 / (per_token - 48 * 20_480_000)
    )


# Prefill.

PREFILL = {  # context: GFLOP a token, tokens/s, seconds, how much more with every expert and masked local layers
    "scout": [
        (2 * K, "31.21", "25310", "0.08", "6.83"),
        (8 * K, "34.23", "23077", "0.35", "6.38"),
        (128 * K, "49.33", "16014", "8.19", "6.57"),
        (M, "162.08", "4874", "215.13", "6.87"),
        (10 * M, "1321.72", "598", "17543.30", "6.98"),
    ],
    "maverick": [
        (2 * K, "31.24", "25290", "0.08", "25.58"),
        (8 * K, "34.26", "23061", "0.36", "23.48"),
        (128 * K, "49.36", "16006", "8.19", "18.44"),
        (M, "162.10", "4874", "215.16", "10.48"),
        (10 * M, "1321.74", "598", "17543.61", "7.43"),
    ],
}


@pytest.mark.parametrize("model", PREFILL)
def test_prefill(model):
    for context, gflop, speed, seconds, ratio in PREFILL[model]:
        bound = prefill_bound(model, context=context, gpu="h200")
        dense = prefill_bound(model, context=context, gpu="h200", dense=True)
        assert row(
            (bound.flops / context / 1e9, bound.compute_seconds, dense.flops / bound.flops),
            f"{gflop} {seconds} {ratio}",
        )
        if (model, context) != ("maverick", 2 * K):  # 128 experts: reading them takes longer than 2,048 tokens compute
            assert printed(bound.tokens_per_second, speed) and bound.bound_by == "compute"


def test_a_short_prompt_waits_for_the_weights():
    assert prefill_bound("maverick", context=2 * K, gpu="h200").bound_by == "memory"
    one = prefill_bound("scout", context=1)
    assert one.bound_by == "memory" and one.bytes == pytest.approx(2 * 16_138_408_960 + 192 * K)


@pytest.mark.parametrize("context", [1, 3, 4, 5, 8, 11])
def test_prefill_counts_each_pair_that_attention_may_compare(context):
    toy = Shape("toy", 5, 8, 16, attention=0, norms=0, kv_values=1, score_width=7, local_layers=3, chunk=4)
    pairs = [(q, k) for q in range(context) for k in range(q + 1)]
    local = [(q, k) for q, k in pairs if q // 4 == k // 4]
    assert prefill_bound(toy, context=context).flops == 2 * 7 * (2 * len(pairs) + 3 * len(local))


# One MoE layer.

LAYER = [  # tokens, µs: chosen experts in bf16 and in int4, all experts, what those also move; the three ratios
    (1, "117.1", "31.1", "994.9", "0.7", "8.50 8.51 32.0"),
    (2, "171.9", "45.7", "994.9", "1.4", "5.79 5.79 21.8"),
    (4, "271.6", "72.2", "994.9", "2.9", "3.66 3.67 13.8"),
    (8, "436.3", "116.0", "994.9", "5.7", "2.28 2.29 8.6"),
    (16, "661.7", "175.9", "994.9", "11.5", "1.50 1.52 5.7"),
    (32, "876.7", "233.2", "994.9", "22.9", "1.13 1.16 4.4"),
    (64, "980.8", "261.2", "994.9", "45.8", "1.01 1.06 4.0"),
    (256, "998.6", "267.9", "1386.4", "183.4", "1.39 1.57 5.9"),
    (1024, "1009.6", "652.4", "5545.4", "733.5", "5.49 6.22 9.6"),
    (2048, "1304.8", "1304.8", "11090.8", "1467.0", "8.50 9.62 9.6"),
    (8192, "5219.2", "5219.2", "44363.2", "5868.1", "8.50 9.62 9.6"),
    (32768, "20876.8", "20876.8", "177452.8", "23472.5", "8.50 9.62 9.6"),
]


@pytest.mark.parametrize("tokens, sparse, int4, dense, elementwise, ratios", LAYER)
def test_one_moe_layer(tokens, sparse, int4, dense, elementwise, ratios):
    times, packed = moe_layer_times(tokens), moe_layer_times(tokens, dtype="int4")
    seconds = (times.sparse, packed.sparse, times.dense, times.dense_elementwise)
    assert row((s * 1e6 for s in seconds), f"{sparse} {int4} {dense} {elementwise}")
    everything = times.dense + times.dense_elementwise
    assert row((times.dense / times.sparse, everything / times.sparse, everything / packed.sparse), ratios)
    assert (times.sparse_memory > times.sparse_compute) == (tokens < 2048)


def test_a_layer_of_another_model_and_card():
    times, expert = moe_layer_times(1, "mixtral-8x7b", "h100"), 3 * 4096 * 14_336
    assert times.touched == pytest.approx(2)
    assert times.sparse_memory == pytest.approx((2 * expert * 2 + 6 * 4096 * 2) / 3.35e12)
    assert times.dense_compute == pytest.approx(2 * 8 * expert / 790e12)
    with pytest.raises(ValueError, match="Llama 3.1 8B; it has no layer with experts"):
        moe_layer_times(1, "llama-3.1-8b")


# The command.


def run(capsys, *arguments):
    code = main(["budget", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("model", [*PRESETS, *OTHERS])
def test_json_of_every_model(capsys, model):
    code, out, err = run(capsys, model, "--dtype", "int4", "--context", "1M", "--gpu", "h200", "--json")
    got = json.loads(out)
    assert code == 0 and err == "" and got == budget(model, "int4", M, "h200")
    assert got["weights_bytes"] == weight_bytes(model, "int4") and got["kv_bytes"] == kv_bytes(model, M)
    assert got["decode_tokens_per_second_bound"] > 0 < got["prefill_tokens_per_second_bound"]
    assert got["bound_by"] in ("memory", "compute")
    assert got["fits"] == (got["longest_context"] >= M)
    assert ("unpublished" in got["note"] or "published no shape" in got["note"]) == (model == "behemoth-estimate")


def test_scout_on_one_h100(capsys):
    def fits(*arguments):
        return json.loads(run(capsys, "scout", *arguments, "--json")[1])["fits"]

    assert fits("--dtype", "int4", "--context", "400K") and not fits("--dtype", "int4", "--context", "1M")
    assert fits("--dtype", "int4-meta", "--context", "290K") and not fits("--dtype", "int4-meta", "--context", "300K")
    assert fits("--dtype", "int4", "--context", "800K", "--kv-dtype", "fp8")
    assert fits("--dtype", "int4", "--context", "8K", "--batch", "8")
    assert not fits("--dtype", "int4", "--context", "8K", "--batch", "16")
    assert not fits() and not fits("--dtype", "fp8")


def test_the_table_reads_like_one(capsys):
    code, out, err = run(capsys, "scout", "--dtype", "int4", "--context", "1M", "--gpu", "h100")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0 and err == ""
    assert "108,641,793,536" in lines["model"] and "17,172,894,720" in lines["model"]
    assert lines["weights"].startswith("60.52 GB") and lines["KV"].startswith("cache  52.75 GB")
    assert lines["fits"].startswith("no; ") and "54.6 tokens/s, bound by memory" in lines["decode"]
    assert "4,874 tokens/s, bound by compute" in lines["prefill"]
    assert (
        "3.35 TB/s" in lines["assumed"] and "790 TFLOP/s" in lines["assumed"] and max(map(len, out.splitlines())) < 130
    )
    assert run(capsys, "behemoth-estimate")[1].splitlines()[-1] == f"note      {PRESETS['behemoth-estimate'].note}"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("scuot",), "did you mean scout"),
        (("scout", "--dtype", "int5"), "unknown dtype 'int5'; did you mean int4"),
        (("scout", "--gpu", "a100"), "unknown GPU 'a100'"),
        (("scout", "--context", "3X"), "context is '3X'; it must be a whole number above 0, such as 8192, 128K or 1M"),
        (("scout", "--context", "0"), "context is '0'"),
        (("scout", "--context", "-5"), "context is '-5'"),
        (("scout", "--batch", "0"), "batch is '0'"),
        (("scout", "--kv-dtype", "fp4"), "unknown KV dtype 'fp4'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, says):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith("minillama4: ") and says in err and len(err.splitlines()) == 1


def test_lengths_in_words():
    assert [parse_tokens(text) for text in ("8192", "8K", "128k", "1M", "10M")] == [8192, 8192, 131_072, M, 10_485_760]


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: decode_bound("scout", batch=0), "batch is 0"),
        (lambda: decode_bound("scout", context=-1), "context is -1"),
        (lambda: prefill_bound("scout", context=0), "context is 0"),
        (lambda: moe_layer_times(0), "tokens is 0"),
        (lambda: weight_bytes("scout", "fp16"), "unknown dtype 'fp16'"),
    ],
)
def test_numbers_out_of_range_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
