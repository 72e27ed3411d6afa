"""Faults to plant in the decoder: a mechanism switched off, or a bug that a public Llama 4 once had.

A fault takes a copy of a model, spoils it or patches the code, and returns what is to be run. `TEXT_FAULTS` has them
all, with the models on which each is one. Sources: vLLM, torchtitan, llama.cpp, transformers, Meta, as they once were.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tiny_models import CONFIGS, randomise, rebuilt, with_text

from minillama4 import Llama4, RopeScaling, attention, model
from minillama4.moe import MoE

SCOUT, MAVERICK = BOTH = tuple(CONFIGS)


def config_fault(**changes):
    return lambda llama, patch: rebuilt(llama, **changes)


def code_fault(module, name, wrong):
    def spoil(llama, patch):
        patch.setattr(module, name, wrong)
        return llama

    return spoil


def on_queries_and_keys(layers, change, names=("q_proj", "k_proj")):
    """`change` ([batch, tokens, heads, dim] -> the same) is applied to what these projections give."""

    def spoil(llama, patch):
        dim = llama.config.text.head_dim
        for layer, block in enumerate(llama.layers):
            if layers(llama.config.text, layer):
                for name in names:
                    getattr(block.self_attn, name).register_forward_hook(
                        lambda module, inputs, out: change(out.unflatten(-1, (-1, dim)), llama.config.text).flatten(-2)
                    )
        return llama

    return spoil


def nope(text, layer):
    return text.is_nope(layer)


def rotary(text, layer):
    return not text.is_nope(layer)


def unit_rms(x, text):
    return F.rms_norm(x, x.shape[-1:], eps=text.norm_eps)


def turned(x, text):
    return attention.rotate(x, attention.rotation(torch.arange(x.shape[1]), attention.inverse_frequencies(text)))


def heated(x, text):
    return x * attention.temperature(torch.arange(x.shape[1]), text)[:, None, None]


def temperature_one_position_late(llama, patch):
    """floor(p / floor_scale) instead of floor((p + 1) / floor_scale)."""
    right = attention.temperature
    patch.setattr(attention, "temperature", lambda positions, text: right(positions - 1, text))
    return llama


def half_split_rotation(x, turn):
    """Llama 1-3 on the Hub: channel i with i + dim / 2."""
    a, b = x.chunk(2, dim=-1)
    y = torch.complex(a, b) * turn
    return torch.cat([y.real, y.imag], dim=-1)


def wrong_qk_norm(norm):
    """Another `rms_norm` for q and k alone: [batch, tokens, heads, dim]."""
    functions = SimpleNamespace(
        rms_norm=lambda x, shape, eps: norm(x, eps), scaled_dot_product_attention=F.scaled_dot_product_attention
    )
    return code_fault(attention, "F", functions)


def sliding_window(llama, patch):
    """Each local query sees the last `chunk_size` keys, which is not what is left of its chunk."""

    def window(q, k, v, chunk_size):
        i = torch.arange(q.shape[1])
        sees = (i[:, None] >= i) & (i[:, None] - i < chunk_size)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=True).transpose(1, 2)

    right = attention.rotation
    patch.setattr(attention, "rotation", lambda positions, f: right(torch.arange(len(positions)), f))  # not mod chunk
    patch.setattr(attention, "chunked_attention", window)
    return llama


def keys_dealt_out_in_turn(llama, patch):
    """Query head h reads key head h % kv_heads, not h // group."""
    right = attention.causal_attention

    def dealt(q, k, v):
        group = q.shape[2] // k.shape[2]
        return right(q, k.repeat(1, 1, group, 1), v.repeat(1, 1, group, 1))

    patch.setattr(attention, "causal_attention", dealt)
    return llama


def wrong_moe(score, scale_output=False):
    """`MoE.forward` with `score` ([T, E] router logits -> [T]) on the expert's input, or on its output."""

    def forward(self, x):
        x_TD = x.flatten(0, -2)
        logits_TE = self.router(x_TD)
        score_T1, expert_T = score(logits_TE)[:, None], logits_TE.argmax(-1)
        if scale_output:
            routed_TD = self.experts(x_TD, expert_T) * score_T1
        else:
            routed_TD = self.experts(x_TD * score_T1, expert_T)
        return (routed_TD + self.shared_expert(x_TD)).view_as(x)

    return code_fault(MoE, "forward", forward)


def sigmoid_of_winner(logits_TE):
    return logits_TE.max(-1).values.sigmoid()


def moe_without_transpose(self, x):
    """transformers 4.55: rows of expert 0, then 1, ... meet scores of token 0, then 1, ..."""
    x_TD = x.flatten(0, -2)
    logits_TE = self.router(x_TD)
    tokens, experts = logits_TE.shape
    score_TE = torch.zeros_like(logits_TE).scatter(1, logits_TE.argmax(-1, True), sigmoid_of_winner(logits_TE)[:, None])
    rows = x_TD.repeat(experts, 1) * score_TE.reshape(-1, 1)
    routed = self.experts(rows, torch.arange(experts).repeat_interleave(tokens)).view(experts, tokens, -1).sum(0)
    return (routed + self.shared_expert(x_TD)).view_as(x)


def no_shared_expert(llama, patch):
    for layer in llama.config.text.moe_layers:
        llama.layers[layer].feed_forward.shared_expert.down_proj.weight.data.zero_()
    return llama


def swapped_schedule(llama, patch):
    """Dense layers where the experts belong and experts where the dense layers belong; other weights stay."""
    text = llama.config.text
    dense_layers = tuple(set(range(text.num_layers)) - set(text.moe_layers))
    other = randomise(Llama4(with_text(llama.config, moe_layers=dense_layers)))
    shapes = {name: parameter.shape for name, parameter in other.named_parameters()}
    kept = {name: tensor for name, tensor in llama.state_dict().items() if shapes.get(name) == tensor.shape}
    other.load_state_dict(kept, strict=False)
    return other


def experts_gate_and_up_swapped(llama, patch):
    for layer in llama.config.text.moe_layers:
        weight = llama.layers[layer].feed_forward.experts.gate_up_proj
        weight.data = weight.data.roll(weight.shape[-1] // 2, dims=-1)
    return llama


def dense_gate_and_up_swapped(llama, patch):
    for layer, block in enumerate(llama.layers):
        if not llama.config.text.is_moe(layer):
            ff = block.feed_forward
            ff.gate_proj, ff.up_proj = ff.up_proj, ff.gate_proj
    return llama


def norm_weights_ignored(llama, patch):
    for module in llama.modules():
        if isinstance(module, model.RMSNorm):
            module.weight.data.fill_(1)
    return llama


def inverted_rotary_flag(llama, patch):
    text = llama.config.text
    return rebuilt(llama, nope_layers=tuple(set(range(text.num_layers)) - set(text.nope_layers)))


TEXT_FAULTS = {
    # Positions and attention
    "QK norm off": ([SCOUT], config_fault(qk_norm=False)),
    "QK norm where there is none": ([MAVERICK], config_fault(qk_norm=True)),
    "QK norm on NoPE layers": (BOTH, on_queries_and_keys(nope, unit_rms)),
    "QK norm over all heads together": (
        [SCOUT],
        wrong_qk_norm(lambda x, eps: F.rms_norm(x.flatten(-2), [x[0, 0].numel()], eps=eps).view_as(x)),
    ),
    "QK norm to length 1 instead of RMS 1": ([SCOUT], wrong_qk_norm(lambda x, eps: F.normalize(x, dim=-1))),
    "half-split rotary pairs": (BOTH, code_fault(attention, "rotate", half_split_rotation)),
    "no rotary": (BOTH, code_fault(attention, "rotate", lambda x, turn: x)),
    "rotary on NoPE layers": (BOTH, on_queries_and_keys(nope, turned)),
    "RoPE scaling dropped": (BOTH, config_fault(rope_scaling=None)),
    "RoPE scaling of Scout's superseded launch config": (
        [SCOUT],
        config_fault(rope_scaling=RopeScaling(8, 1, 4, 32)),
    ),
    "chunk dropped": (BOTH, config_fault(chunk_size=None)),
    "chunk of another size": (BOTH, config_fault(chunk_size=12)),
    "sliding window instead of a chunk": (BOTH, sliding_window),
    "NoPE layers at i % n == 0": ([SCOUT], config_fault(nope_layers=(0, 3))),
    "rotary flag inverted": (BOTH, inverted_rotary_flag),
    "key heads dealt out in turn": (BOTH, keys_dealt_out_in_turn),
    "temperature off": (BOTH, config_fault(temperature_tuning=False)),
    "temperature on rotary layers": ([MAVERICK], on_queries_and_keys(rotary, heated, ["q_proj"])),
    "temperature one position late": (BOTH, temperature_one_position_late),
    # Feed-forward
    "score on the expert's output": (BOTH, wrong_moe(sigmoid_of_winner, scale_output=True)),
    "softmax instead of sigmoid": (BOTH, wrong_moe(lambda logits_TE: logits_TE.softmax(-1).max(-1).values)),
    "score normalised to 1": (BOTH, wrong_moe(lambda logits_TE: torch.ones(len(logits_TE)))),
    "score not transposed": (BOTH, code_fault(MoE, "forward", moe_without_transpose)),
    "no shared expert": (BOTH, no_shared_expert),
    "dense and MoE layers swapped": (BOTH, swapped_schedule),
    "gate and up swapped in the experts": (BOTH, experts_gate_and_up_swapped),
    "gate and up swapped in dense layers": (BOTH, dense_gate_and_up_swapped),
    "norm weights ignored": (BOTH, norm_weights_ignored),
}
