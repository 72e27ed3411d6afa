"""Llama 4: the table of contents. Pixels and words become one sequence; iRoPE and experts turn it into logits.

    embed -> [ x + attention(norm(x)) -> x + feed_forward(norm(x)) ] x layers -> norm -> lm_head

Shapes: x [batch, tokens, hidden]. Parameter names are those of the Hugging Face checkpoint without its prefixes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention import Attention, angles
from .cache import KVCache, LayerCache
from .config import Llama4Config, TextConfig
from .fusion import merge_image_embeddings
from .moe import FeedForward, MoE
from .vision import build_vision


class RMSNorm(nn.Module):
    """x / rms(x) in float32, back to x's dtype, then times the weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


class Block(nn.Module):
    """One layer: attention, then a dense or a mixture-of-experts feed-forward, each behind a norm and a residual."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        if config.is_moe(layer):
            self.feed_forward = MoE(config.hidden_size, config.num_experts, config.expert_width)
        else:
            self.feed_forward = FeedForward(config.hidden_size, config.dense_width)

    def forward(
        self, x: Tensor, turn: Tensor, scale: Tensor | None, cache: LayerCache | None, start: int, queries: int
    ) -> Tensor:
        """[batch, tokens, hidden] -> [batch, queries, hidden]: the last tokens (arguments as in `Attention`)."""
        attended = self.self_attn(self.input_layernorm(x), turn, scale, cache, start, queries)
        if queries == 0:
            return attended
        x = x[:, x.shape[1] - queries :] + attended
        return x + self.feed_forward(self.post_attention_layernorm(x))


class Llama4(nn.Module):
    """The whole model. Its weights are random until `load_checkpoint` or training sets them."""

    def __init__(self, config: Llama4Config):
        super().__init__()
        self.config = config
        with NothingDrawnOnMeta():
            self._build(config.text)
            self.reset_parameters()

    def _build(self, text: TextConfig):
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(Block(text, layer) for layer in range(text.num_layers))
        self.norm = RMSNorm(text.hidden_size, text.norm_eps)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if self.config.vision is not None:
            self.vision_model, self.multi_modal_projector = build_vision(self.config.vision, text.hidden_size)

    def reset_parameters(self, generator: torch.Generator | None = None):
        """Fresh random weights: matrices N(0, 1 / inputs), less where a residual branch ends and in the head."""
        depth = {"layers": self.config.text.num_layers, "vision_model": getattr(self.config.vision, "num_layers", 1)}
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                nn.init.ones_(parameter)  # norms
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
                continue
            if name == "embed_tokens.weight":
                std = 0.5  # about the size at which pictures arrive among the words
            elif name.startswith("vision_model.") and "_embedding" in name and "patch" not in name:
                std = 0.1  # positions and the class token: well below the patches themselves
            else:
                inputs = parameter.shape[-2 if "experts." in name else -1]  # experts are used as x @ W
                std = inputs**-0.5
            if (
                name.endswith(("o_proj.weight", "down_proj.weight", "down_proj", "mlp.fc2.weight"))
                and "adapter" not in name
            ):
                std /= (2 * depth[name.split(".")[0]]) ** 0.5  # so that the sum over all branches stays near 1
            if name == "lm_head.weight":
                std /= 10  # start from nearly equal chances
            nn.init.normal_(parameter, std=std, generator=generator)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Tiles [tiles, 3, side, side] -> vectors among the words [tiles, tokens_per_tile, hidden]."""
        vision = self.config.vision
        if vision is None:
            raise ValueError("pixel_values were given, but this config has no vision")
        wanted = (3, vision.tile_size, vision.tile_size)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != wanted:
            raise ValueError(
                f"pixel_values is {list(pixel_values.shape)}; it must be [tiles, {', '.join(map(str, wanted))}]"
            )
        return self.multi_modal_projector["linear_1"](self.vision_model(pixel_values.to(self.lm_head.weight.dtype)))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None, cache: KVCache | None) -> Tensor:
        """One sequence of embeddings [batch, tokens, hidden]: words, with pictures where `<|patch|>` tokens stand.

        With a cache, the tokens of a picture may come in pieces: give `pixel_values` with the first piece.
        """
        x = self.embed_tokens(input_ids)
        vectors = self.encode_images(pixel_values).flatten(0, 1) if pixel_values is not None else None
        if cache is not None and len(input_ids) == 1:
            if cache.pending_images is not None:
                pending = cache.pending_images
                vectors = pending if vectors is None else torch.cat([pending, vectors])
            if vectors is not None:
                here = int((input_ids == self.config.patch_token).sum())
                cache.pending_images = vectors[here:].detach() if len(vectors) > here else None
                vectors = vectors[:here]
        if self.config.vision is None:
            return x
        return merge_image_embeddings(x, input_ids, vectors, self.config.patch_token)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        cache: KVCache | None = None,
        logits: str = "all",
    ) -> Tensor | None:
        """Next-token logits: [batch, tokens] int64 -> [batch, tokens, vocab] ("all"), [batch, 1, vocab] ("last").

        "none" only fills the cache and returns None. The last layer computes queries, experts and head only where
        logits are wanted, so a long prompt costs its last layer nothing but keys and values.

        pixel_values: [tiles, 3, side, side], the tiles of all pictures in the order of their `<|patch|>` tokens.
        cache: from `new_cache`; any number of tokens may be added per call.
        ValueError: a token id out of range, tiles that do not match the patch tokens, a full cache.
        """
        if logits not in ("all", "last", "none"):
            raise ValueError(f"logits is {logits!r}; it must be 'all', 'last' or 'none'")
        if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids is {list(input_ids.shape)} {input_ids.dtype}; it must be [batch, 1 or more tokens] int64"
            )
        text = self.config.text
        if not input_ids.is_meta:
            lowest, highest = (int(id) for id in input_ids.aminmax())
            if lowest < 0 or highest >= text.vocab_size:
                raise ValueError(f"input_ids holds {lowest} to {highest}; ids run from 0 to {text.vocab_size - 1}")
        wanted = {"all": input_ids.shape[1], "last": 1, "none": 0}[logits]
        x = self.hidden_states(input_ids, pixel_values, cache, wanted)
        return self.lm_head(x) if wanted else None

    def hidden_states(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, cache: KVCache | None = None, queries: int = -1
    ) -> Tensor:
        """What the head reads: [batch, queries, hidden] after the last norm, for the last `queries` tokens (-1: all).

        A training loop that learns from few of its tokens takes these and runs the head on those tokens only.
        """
        text, (batch, tokens) = self.config.text, input_ids.shape
        if cache is not None:
            cache.check_room(batch, tokens)
        start = cache.length if cache is not None else 0
        x = self.embed(input_ids, pixel_values, cache)

        turn, scale = angles(torch.arange(start, start + tokens, device=x.device), text)
        for layer, block in enumerate(self.layers):
            wanted = queries if layer == text.num_layers - 1 and queries >= 0 else tokens
            x = block(x, turn, scale, cache.layers[layer] if cache is not None else None, start, wanted)
        if cache is not None:
            cache.length += tokens
        return self.norm(x)

    def new_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        """An empty cache for `batch_size` rows of up to `max_tokens` tokens, on the model's device and in its dtype."""
        weight = self.lm_head.weight
        return KVCache(self.config.text, batch_size, max_tokens, weight.device, weight.dtype)


class NothingDrawnOnMeta(TorchFunctionMode):
    """Skips `nn.init` for meta tensors, which have no values; drawing them, torch would import its compiler: 2 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return function(*args, **kwargs)
