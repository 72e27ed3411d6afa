"""The Hugging Face spelling of a config: `config.json` -> `Llama4Config`, and back.

Three traps on the way. `intermediate_size` is the width of an EXPERT and `intermediate_size_mlp` that of a dense layer.
`no_rope_layers` holds 1 where a layer HAS rotary embeddings. RoPE settings are `rope_theta` + `rope_scaling` in
transformers 4 and `rope_parameters` in 5; both are read, and both are written.
"""

from .config import Llama4Config, RopeScaling, TextConfig, VisionConfig, every

MODEL_TYPES = ("llama4", "llama4_text")
INT4 = {"quant_method": "minillama4-int4", "bits": 4, "group_size": 128, "scale_dtype": "float32"}  # see cuda/int4.py
_MISSING = object()


def from_hub(config: dict, generation: dict | None = None, preprocessor: dict | None = None) -> Llama4Config:
    """`Llama4Config` of a parsed config.json (and generation_config.json, preprocessor_config.json if there).

    ValueError: a field that is missing, or whose value this package does not implement; it names the field.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"config.json: model_type is {kind!r}; only {' and '.join(MODEL_TYPES)} can be loaded")
    stored_as(config)
    text = config.get("text_config", config) if kind == "llama4" else config
    _require(text, "text_config", num_experts_per_tok=1, attention_bias=False, hidden_act="silu")
    _require(config, "config.json", tie_word_embeddings=False)
    _require(text, "text_config", tie_word_embeddings=False)
    theta, scaling = _rope(text, "text_config", default_theta=500_000.0)
    layers = _get(text, "num_hidden_layers")
    moe_layers = text.get("moe_layers")
    rotary = text.get("no_rope_layers") or []  # empty means "from the interval"
    nope_step = text.get("no_rope_layer_interval", 4)
    nope_layers = tuple(i for i in range(layers) if not rotary[i]) if rotary else every(nope_step, layers)
    kinds = ["full_attention" if i in nope_layers else "chunked_attention" for i in range(layers)]
    if text.get("layer_types") not in (None, kinds):
        raise ValueError(
            f"text_config: layer_types is {text['layer_types']}; only full_attention on layers without "
            "rotary embeddings and chunked_attention on the others is supported"
        )
    stops = (generation or {}).get("eos_token_id", text.get("eos_token_id"))
    return Llama4Config(
        text=TextConfig(
            vocab_size=_get(text, "vocab_size"),
            hidden_size=_get(text, "hidden_size"),
            num_layers=layers,
            num_heads=_get(text, "num_attention_heads"),
            num_kv_heads=_get(text, "num_key_value_heads"),
            head_dim=text.get("head_dim") or _get(text, "hidden_size") // _get(text, "num_attention_heads"),
            num_experts=_get(text, "num_local_experts"),
            expert_width=_get(text, "intermediate_size"),
            dense_width=_get(text, "intermediate_size_mlp"),
            moe_layers=every(text.get("interleave_moe_layer_step", 1), layers)
            if moe_layers is None
            else tuple(moe_layers),
            nope_layers=nope_layers,
            chunk_size=text.get("attention_chunk_size", 8192),
            max_positions=_get(text, "max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            qk_norm=text.get("use_qk_norm", True),
            temperature_tuning=bool(text.get("attn_temperature_tuning", True)),  # 4, meaning true, in the first release
            temperature_scale=text.get("attn_scale", 0.1),
            floor_scale=text.get("floor_scale", 8192),
            norm_eps=text.get("rms_norm_eps", 1e-5),
        ),
        vision=_vision(config["vision_config"], preprocessor or {}) if config.get("vision_config") else None,
        bos_token=text.get("bos_token_id", 1),
        stop_tokens=tuple(stops) if isinstance(stops, (list, tuple)) else (stops,) if stops is not None else (),
        pad_token=text.get("pad_token_id") or 0,
        patch_token=config.get("image_token_index", config.get("image_token_id", 200092)),
    )


def stored_as(config: dict) -> str | None:
    """How the weights beside a parsed config.json are quantised: "int4" as `save_checkpoint` writes it, or None.

    ValueError: quantised by somebody else, or by another version of the format.
    """
    if "quantization_config" not in config:
        return None
    if config["quantization_config"] != INT4:
        raise ValueError(
            "config.json: quantization_config is set, and not the one that `save_checkpoint` writes; load the "
            "unquantised checkpoint"
        )
    return "int4"


def _vision(vision: dict, preprocessor: dict) -> VisionConfig:
    _require(vision, "vision_config", num_channels=3, multi_modal_projector_bias=False, hidden_act="gelu")
    _require(vision, "vision_config", norm_eps=1e-5)  # what Hugging Face's encoder uses, whatever the field says
    theta, scaling = _rope(vision, "vision_config", default_theta=10_000.0)
    if scaling is not None:
        raise ValueError("vision_config: RoPE scaling is set; the vision encoder has none")
    ratio, width = vision.get("pixel_shuffle_ratio", 0.5), _get(vision, "hidden_size")
    if _get(vision, "intermediate_size") != round(width / ratio**2):
        raise ValueError(
            f"vision_config: intermediate_size is {vision['intermediate_size']}; it is also the adapter's "
            f"input, so it must be hidden_size / pixel_shuffle_ratio^2 = {round(width / ratio**2)}"
        )
    outputs = {
        name: _get(vision, name) for name in ("projector_input_dim", "projector_output_dim", "vision_output_dim")
    }
    if len(set(outputs.values())) > 1:
        raise ValueError(f"vision_config: {outputs} must be equal")
    return VisionConfig(
        tile_size=_get(vision, "image_size"),
        patch_size=_get(vision, "patch_size"),
        max_tiles=preprocessor.get("max_patches", 16),
        hidden_size=width,
        num_layers=_get(vision, "num_hidden_layers"),
        num_heads=_get(vision, "num_attention_heads"),
        mlp_width=vision["intermediate_size"],
        adapter_width=outputs["projector_output_dim"],
        pixel_shuffle_ratio=ratio,
        rope_theta=theta,
    )


def _rope(config: dict, where: str, default_theta: float) -> tuple[float, RopeScaling | None]:
    """(theta, scaling or None), in either spelling."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = settings.get("rope_theta", config.get("rope_theta", default_theta))
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{where}: rope_type is {kind!r}; it must be 'default' or 'llama3'")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if name not in settings]
    if missing:
        raise ValueError(f"{where}: the llama3 RoPE settings lack {', '.join(missing)}")
    return theta, RopeScaling(*(settings[name] for name in names))


def to_hub(config: Llama4Config, dtype: str) -> dict:
    """config.json as a dict: `Llama4ForConditionalGeneration` with vision, `Llama4ForCausalLM` without.

    ValueError: a vision part that the Hugging Face model has no place for.
    """
    text = config.text
    moe_step = text.moe_layers[0] + 1 if text.moe_layers else text.num_layers + 1
    settings = {"rope_type": "default"}
    if text.rope_scaling is not None:
        settings = {
            "rope_type": "llama3",
            "factor": float(text.rope_scaling.factor),
            "low_freq_factor": float(text.rope_scaling.low_frequency_factor),
            "high_freq_factor": float(text.rope_scaling.high_frequency_factor),
            "original_max_position_embeddings": text.rope_scaling.original_positions,
        }
    hub_text = {
        "model_type": "llama4_text",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "num_local_experts": text.num_experts,
        "num_experts_per_tok": 1,
        "intermediate_size": text.expert_width,
        "intermediate_size_mlp": text.dense_width,
        "moe_layers": list(text.moe_layers),
        "interleave_moe_layer_step": moe_step,
        "no_rope_layers": [int(not text.is_nope(layer)) for layer in range(text.num_layers)],
        "attention_chunk_size": text.chunk_size,
        "max_position_embeddings": text.max_positions,
        "rope_theta": text.rope_theta,
        "rope_scaling": None if text.rope_scaling is None else settings,
        "rope_parameters": {"rope_theta": text.rope_theta, **settings},
        "use_qk_norm": text.qk_norm,
        "attn_temperature_tuning": text.temperature_tuning,
        "attn_scale": text.temperature_scale,
        "floor_scale": text.floor_scale,
        "rms_norm_eps": text.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_token,
        "eos_token_id": list(config.stop_tokens),
        "pad_token_id": config.pad_token,
        "dtype": dtype,
    }
    if config.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **hub_text, "torch_dtype": dtype}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "image_token_index": config.patch_token,
        "tie_word_embeddings": False,
        "dtype": dtype,
        "torch_dtype": dtype,
        "text_config": hub_text,
        "vision_config": _vision_to_hub(config.vision),
    }


def _vision_to_hub(vision: VisionConfig) -> dict:
    if vision.encoder != "vit":
        raise ValueError(
            "this model is encoder-free (VisionConfig.encoder='linear'), for which Hugging Face has no model; "
            "keep its `state_dict()` with safetensors instead"
        )
    if vision.mlp_width != vision.hidden_size * vision.shuffle**2:
        raise ValueError(
            f"mlp_width is {vision.mlp_width}; Hugging Face uses one field for it and the adapter's input, so "
            f"only hidden_size x {vision.shuffle}^2 = {vision.hidden_size * vision.shuffle**2} can be saved"
        )
    if vision.norm_eps != 1e-5:
        raise ValueError(f"norm_eps is {vision.norm_eps}; the vision encoder of Hugging Face always uses 1e-05")
    return {
        "model_type": "llama4_vision_model",
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": vision.mlp_width,
        "image_size": vision.tile_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        "projector_input_dim": vision.adapter_width,
        "projector_output_dim": vision.adapter_width,
        "vision_output_dim": vision.adapter_width,
        "multi_modal_projector_bias": False,
        "hidden_act": "gelu",
        "norm_eps": vision.norm_eps,
        "rope_theta": vision.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": vision.rope_theta},
    }


def _get(config: dict, name: str):
    if config.get(name) is None:
        raise ValueError(f"config.json: {name} is missing")
    return config[name]


def _require(config: dict, where: str, **wanted):
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise ValueError(f"{where}: {name} is {config[name]!r}; only {value!r} is supported")
