"""Decoding and prefill of the CUDA path against the model itself, token by token: with plain functions on any machine,
with the kernels on a GPU or in Triton's interpreter.

The tiny models have rotary and NoPE layers, dense and MoE ones, with and without QK norm, three queries to a key; a
prompt of 40 and 30 tokens more cross six borders of a chunk and seven steps of the temperature.
"""

from dataclasses import replace

import pytest
import torch
from tiny_models import CONFIGS, SCOUT_LIKE, build, relative_error, text_only, with_text, words
from triton_interpreter import DEVICE, kernels_run  # noqa: F401, and before the kernels

from minillama4 import generate
from minillama4.cuda import plain
from minillama4.cuda.decode import FAST, PLAIN, Decoder
from minillama4.cuda.int4 import Int4Matrix, to_int4
from minillama4.cuda.prefill import expanded, prefill

PROMPT, NEW = 40, 30


def int4_model(config=SCOUT_LIKE):
    return to_int4(build(text_only(config)), torch.float32).to(DEVICE)


def prompt(tokens=PROMPT, seed=0):
    return words(tokens, seed=seed).to(DEVICE)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return int4_model(CONFIGS[request.param])


# ----------------------------------------------------------------------------------------------------------------------
# Prefill


@pytest.mark.parametrize("piece", [64, 11, 7])
def test_prefill_gives_the_logits_and_the_cache_of_the_model(model, piece):
    """Whole, in pieces that end where a chunk ends, and in pieces that do not."""
    mine, its = model.new_cache(1, PROMPT), model.new_cache(1, PROMPT)
    with torch.no_grad():
        wanted = model(prompt(), cache=its, logits="last")[:, -1]
    assert relative_error(prefill(model, prompt(), mine, piece), wanted) < 1e-5
    assert mine.length == its.length == PROMPT
    for layer, (a, b) in enumerate(zip(mine.layers, its.layers, strict=True)):
        kept = slice(0, (PROMPT - 1) % a.chunk_size + 1 if a.chunk_size else PROMPT)
        assert relative_error(a.k[:, kept], b.k[:, kept]) < 1e-5, f"keys of layer {layer}"
        assert relative_error(a.v[:, kept], b.v[:, kept]) < 1e-5, f"values of layer {layer}"


def test_experts_that_no_token_chose_stay_packed(monkeypatch):
    model, seen = int4_model().cpu(), []
    moe, expand = model.layers[1].feed_forward, plain.expand
    with torch.no_grad():
        moe.router.weight[1:] = 0  # so expert 0 or, of equal ones, the first other one
    monkeypatch.setattr(plain, "expand", lambda *each: (seen.append(each[0].data_ptr()), expand(*each)))
    prefill(model, prompt().cpu(), model.new_cache(1, PROMPT))
    assert [int(packed.data_ptr() in seen) for packed in moe.experts.down_proj.packed] == [1, 1, 0, 0, 0]


def test_matrices_of_all_sizes_come_expanded_and_in_order():
    matrices = []
    for outputs, inputs in ((5, 200), (37, 130), (64, 64), (3, 300)):
        matrix = Int4Matrix((outputs, inputs), torch.float32)
        matrix.fill(
            torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs)), torch.device(DEVICE)
        )
        matrices.append(matrix)
    got = [m.clone() for m in expanded(((m.packed, m.scale, m.shape[-1]) for m in matrices), torch.float32)]
    for mine, matrix in zip(got, matrices, strict=True):
        assert torch.equal(mine, matrix.dequantise())


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.ones(2, 3, dtype=torch.int64), r"^input_ids is \[2, 3\]; it must be \[1, 1 or more tokens\]$"),
        (torch.ones(1, 0, dtype=torch.int64), r"^input_ids is \[1, 0\]; it must be \[1, 1 or more tokens\]$"),
        (torch.tensor([[5, 131]]), "^input_ids holds 5 to 131; ids run from 0 to 130$"),
        (torch.ones(1, 9, dtype=torch.int64), "^the cache holds 0 of max_tokens=8 tokens; 9 more do not fit$"),
    ],
)
def test_bad_prompts(model, ids, message):
    with pytest.raises(ValueError, match=message):
        prefill(model, ids.to(DEVICE), model.new_cache(1, 8))


# ----------------------------------------------------------------------------------------------------------------------
# Decode


def test_plain_steps_give_the_tokens_of_generate(model):
    wanted = generate(model, prompt(), max_new_tokens=NEW)
    assert len(wanted.unique()) > 5  # not a loop
    got = Decoder(model, PROMPT + NEW, PLAIN).generate(prompt(), NEW)
    assert torch.equal(got, wanted)


def test_logits_of_each_step_are_those_of_the_model(model):
    """Tokens are forced, so that a difference cannot hide behind an equal choice."""
    ids = prompt(PROMPT + NEW)
    with torch.no_grad():
        wanted = model(ids)[0]
    decoder = Decoder(model, PROMPT + NEW, PLAIN)
    for position in range(PROMPT + NEW):  # from the first token on, without any prefill
        decoder.start(ids[:, position], position)
        decoder.advance()
        assert relative_error(decoder.logits, wanted[position]) < 1e-5, f"position {position}"


@pytest.mark.parametrize("room", [PROMPT + NEW, 9])
def test_a_cache_shorter_than_a_chunk_and_one_that_is_just_long_enough(room):
    model, ids = int4_model(), prompt(room - 3)
    assert torch.equal(Decoder(model, room, PLAIN).generate(ids, 3), generate(model, ids, max_new_tokens=3))


def test_a_model_without_chunks():
    model = int4_model(with_text(SCOUT_LIKE, chunk_size=None))
    assert torch.equal(Decoder(model, 60, PLAIN).generate(prompt(), 20), generate(model, prompt(), max_new_tokens=20))


def test_a_second_prompt_is_not_disturbed_by_the_first(model):
    decoder = Decoder(model, PROMPT + NEW)
    decoder.generate(prompt(), 20)
    assert torch.equal(decoder.generate(prompt(seed=1), 9), generate(model, prompt(seed=1), max_new_tokens=9))


def test_fused_matrices_take_no_memory_of_their_own_and_leave_the_model_as_it_was(model):
    before = generate(model, prompt(), max_new_tokens=3)
    layer, block = Decoder(model, 8).layers[0], model.layers[0].self_attn
    k = block.k_proj.weight.packed
    start = len(block.q_proj.weight.packed)
    assert layer.qkv[0][start].data_ptr() == k.data_ptr() and torch.equal(layer.qkv[0][start : start + len(k)], k)
    assert torch.equal(generate(model, prompt(), max_new_tokens=3), before)
    assert set(model.state_dict()) == set(int4_model(replace(model.config, patch_token=1)).state_dict())


def test_what_a_decoder_cannot_do(model):
    with pytest.raises(ValueError, match="^the model is not int4; load it with quantize='int4'$"):
        Decoder(build(text_only(SCOUT_LIKE)), 8)
    with pytest.raises(ValueError, match="^8 tokens and 3 new ones; there must be at least 1 new one, and 10 in all$"):
        Decoder(model, 10).generate(prompt(8), 3)
    with pytest.raises(ValueError, match="^head_dim is 12; a kernel needs a power of 2$"):
        Decoder(int4_model(with_text(SCOUT_LIKE, head_dim=12)), 8)


# ----------------------------------------------------------------------------------------------------------------------
# With kernels


@pytest.mark.usefixtures("kernels_run")
def test_a_step_with_kernels_gives_the_logits_of_the_model(model):
    """One step in the fourth chunk, since the interpreter is slow."""
    ids = prompt(PROMPT)
    with torch.no_grad():
        wanted = model(ids)[0]
    decoder = Decoder(model, PROMPT, FAST)
    prefill(model, ids[:, :-1], decoder.cache)
    decoder.start(ids[:, -1], PROMPT - 1)
    decoder.step()
    assert relative_error(decoder.logits, wanted[-1]) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_graph_gives_the_tokens_of_generate(model):
    decoder = Decoder(model, PROMPT + NEW)
    assert decoder.ops is FAST
    for seed in (0, 1):  # the second prompt replays the graph of the first
        got = decoder.generate(prompt(seed=seed), NEW)
        assert torch.equal(got, generate(model, prompt(seed=seed), max_new_tokens=NEW))
    assert decoder.graph is not None
