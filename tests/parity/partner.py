"""The parity partner: a Hugging Face model of the same config and the same weights, written down independently."""

from dataclasses import dataclass

import torch
import transformers
from tiny_models import randomise
from torch import Tensor

from minillama4 import Llama4, Llama4Config

transformers.logging.set_verbosity_error()  # it warns of Scout's own RoPE settings, whose two factors are equal


def hub_config(config: Llama4Config) -> transformers.PreTrainedConfig:
    """What Hugging Face calls it; by hand, because `minillama4.hub` is among the things under test."""
    text, vision = config.text, config.vision
    rope = {"rope_type": "default", "rope_theta": text.rope_theta}
    if text.rope_scaling is not None:
        rope = {
            "rope_type": "llama3",
            "rope_theta": text.rope_theta,
            "factor": float(text.rope_scaling.factor),
            "low_freq_factor": float(text.rope_scaling.low_frequency_factor),
            "high_freq_factor": float(text.rope_scaling.high_frequency_factor),
            "original_max_position_embeddings": text.rope_scaling.original_positions,
        }
    hub_text = transformers.Llama4TextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.expert_width,
        intermediate_size_mlp=text.dense_width,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        max_position_embeddings=text.max_positions,
        rms_norm_eps=text.norm_eps,
        num_local_experts=text.num_experts,
        moe_layers=list(text.moe_layers),
        use_qk_norm=text.qk_norm,
        rope_parameters=rope,
        no_rope_layers=[0 if layer in text.nope_layers else 1 for layer in range(text.num_layers)],
        # Hugging Face has no "no chunk"; a chunk longer than any test is the same.
        attention_chunk_size=text.chunk_size or 10**6,
        attn_temperature_tuning=text.temperature_tuning,
        floor_scale=text.floor_scale,
        attn_scale=text.temperature_scale,
        bos_token_id=config.bos_token,
        eos_token_id=list(config.stop_tokens),
        pad_token_id=config.pad_token,
    )
    if vision is None:
        return hub_text
    hub_vision = transformers.Llama4VisionConfig(
        hidden_size=vision.hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        intermediate_size=vision.mlp_width,
        image_size=vision.tile_size,
        patch_size=vision.patch_size,
        pixel_shuffle_ratio=vision.pixel_shuffle_ratio,
        projector_input_dim=vision.adapter_width,
        projector_output_dim=vision.adapter_width,
        vision_output_dim=vision.adapter_width,
        rope_parameters={"rope_type": "default", "rope_theta": vision.rope_theta},
    )
    return transformers.Llama4Config(
        text_config=hub_text, vision_config=hub_vision, image_token_index=config.patch_token
    )


def our_name(key: str) -> str:
    return key.removeprefix("language_model.").removeprefix("model.")


@dataclass
class Pair:
    """One model twice."""

    config: Llama4Config
    ours: Llama4
    theirs: transformers.PreTrainedModel

    @torch.no_grad()
    def wanted(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Logits of one full pass of the partner."""
        pictures = {} if pixel_values is None else {"pixel_values": pixel_values}
        return self.theirs(input_ids=input_ids, **pictures, use_cache=False).logits


def make_pair(config: Llama4Config, seed: int = 0) -> Pair:
    partner = transformers.Llama4ForCausalLM if config.vision is None else transformers.Llama4ForConditionalGeneration
    theirs = randomise(partner(hub_config(config)), seed)
    ours = Llama4(config)
    ours.load_state_dict({our_name(key): tensor for key, tensor in theirs.state_dict().items()})
    return Pair(config, ours.eval(), theirs)
