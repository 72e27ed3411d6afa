"""What one training step of a multimodal model costs: FLOPs forward and backward of each part, and memory of its state.

    pixels -> encoder -> projector -> text -> loss          the forward pass, always all of it
              encoder <- projector <- text <- loss          the backward pass, back to the first trained part

A matrix of N numbers costs 2 N FLOPs for each vector that passes it. Backward it costs 2 N for the gradient of its
weights, if it is trained, and 2 N for that of its inputs, if anything trained lies before it, towards the pixels. So a
frozen part is free backward only if all before it is frozen too: a frozen language model still carries the gradient to
a trained projector.

Counted: products of matrices, with the routed experts that a token takes, and attention's products of those pairs that
may see each other. Left out: norms, activation functions, softmax and the optimizer, which are little beside these;
what fused attention or activation checkpointing computes twice; communication; and, of memory, the activations, since
how many are kept is a free choice between none (all recomputed) and all.
"""

from collections.abc import Collection
from dataclasses import dataclass

from .budget import Model, count, shape
from .config import PRESETS, Llama4Config, VisionConfig
from .roofline import attention_pairs, matrix_flops

PARTS = ("encoder", "projector", "text")  # from the pixels to the loss; the adapter belongs to the encoder


class _Passes:
    """Sums over the passes of one step."""

    @property
    def backward(self) -> int:
        return self.backward_inputs + self.backward_weights

    @property
    def total(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True)
class Part(_Passes):
    """One part's parameters, and its FLOPs in one step."""

    parameters: int
    trained: bool
    forward: int
    backward_inputs: int  # gradients that flow on, towards the pixels; all of attention's own backward pass
    backward_weights: int  # gradients that stay, for the optimizer


@dataclass(frozen=True)
class Cost(_Passes):
    """One training step by part; FLOPs add up over the parts."""

    encoder: Part
    projector: Part
    text: Part

    def parts(self) -> dict[str, Part]:
        return dict(vars(self))

    @property
    def forward(self) -> int:
        return sum(part.forward for part in self.parts().values())

    @property
    def backward_inputs(self) -> int:
        return sum(part.backward_inputs for part in self.parts().values())

    @property
    def backward_weights(self) -> int:
        return sum(part.backward_weights for part in self.parts().values())

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts().values())

    @property
    def trained_parameters(self) -> int:
        return sum(part.parameters for part in self.parts().values() if part.trained)

    def memory(self, weights: float = 2, gradients: float = 2, states: float = 12) -> dict[str, float]:
        """Bytes of the weights of all parts, and of gradients and optimizer states of the trained ones.

        The arguments are bytes of one parameter: bf16 weights and gradients, and for Adam an fp32 copy of the weight
        with two fp32 moments. All experts count, not only the active ones. Activations are not in it.
        ValueError: less than 0 bytes.
        """
        per_parameter = {"weights": weights, "gradients": gradients, "states": states}
        for name, size in per_parameter.items():
            if size < 0:
                raise ValueError(f"{name} is {size}; it must be at least 0 bytes for a parameter")
        of = {"weights": self.parameters}
        return {name: size * of.get(name, self.trained_parameters) for name, size in per_parameter.items()}


def training_cost(
    model: Model,
    tokens: int,
    tiles: int = 0,
    trained: Collection[str] = PARTS,
    *,
    batch: int = 1,
    head_tokens: int | None = None,
) -> Cost:
    """One step over `batch` sequences of `tokens` tokens, each with `tiles` tiles among them.

    model: what `budget.shape` takes. tokens: all that the decoder sees, image tokens included. tiles: global tiles
    included. trained: which of `PARTS`; the embedding is part of the text. head_tokens: how many of a sequence's tokens
    reach the head, where the loss asks for fewer than all.
    ValueError: counts that make no sense, an unknown part, or a `Shape` with tiles (it does not hold the encoder's
    layers; its config does).
    """
    s, vision = shape(model), _vision(model)
    head_tokens = tokens if head_tokens is None else head_tokens
    if set(trained) - set(PARTS):
        raise ValueError(f"trained is {trained!r}; it must be a tuple of any of {', '.join(map(repr, PARTS))}")
    for name, value, least in (("tokens", tokens, 1), ("tiles", tiles, 0), ("batch", batch, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if not 0 <= head_tokens <= tokens:
        raise ValueError(f"head_tokens is {head_tokens}; of {tokens} tokens it must be 0 to {tokens}")
    if tiles and vision is None:
        raise ValueError(
            f"tiles is {tiles}, but {s.name} holds no vision layers; give a config with vision, or 0 tiles"
        )
    image_tokens = tiles * vision.tokens_per_tile if tiles else 0
    if image_tokens > tokens:
        raise ValueError(f"tokens is {tokens}; {tiles} tiles alone are {image_tokens} image tokens")

    c = count(s)
    attention = 2 * s.score_width * attention_pairs(s, tokens)
    text = tokens * matrix_flops(s) + 2 * head_tokens * c.head
    first, others, inside_tiles = _encoder_flops(vision) if tiles else (0, 0, 0)
    projector = 2 * image_tokens * s.projector
    sees_pixels = tiles and vision.encoder == "linear"
    # One sequence, forward: products with weights; of these the products with pixels, which are not learnt; attention.
    flops = {
        "encoder": (tiles * (first + others), tiles * first, tiles * inside_tiles),
        "projector": (projector, projector if sees_pixels else 0, 0),
        "text": (text, 0, attention),
    }
    parts, sizes = {}, {"encoder": s.vision, "projector": s.projector, "text": c.text_total}
    gradient_wanted = False  # is anything trained before this part, towards the pixels?
    for name, (products, on_pixels, scores) in flops.items():
        learns = name in trained and products > 0
        # A trained encoder or text begins with an embedding or a first matrix, so that all its other matrices have
        # something trained before them. A projector is one matrix.
        inputs = gradient_wanted or (learns and name != "projector")
        parts[name] = Part(
            sizes[name],
            name in trained,
            forward=batch * (products + scores),
            backward_inputs=batch * (products - on_pixels + 2 * scores) if inputs else 0,
            backward_weights=batch * products if learns else 0,
        )
        gradient_wanted |= learns
    return Cost(**parts)


def _vision(model: Model) -> VisionConfig | None:
    config = PRESETS.get(model) if isinstance(model, str) else model
    return config.vision if isinstance(config, Llama4Config) else None


def _encoder_flops(vision: VisionConfig) -> tuple[int, int, int]:
    """FLOPs of one tile forward: in the matrix that reads pixels, in all others, and in attention.

    The layers work on patches and a class token, the adapter on what pixel shuffle leaves: the tile's image tokens.
    """
    if vision.encoder == "linear":
        return 0, 0, 0
    patches, width, adapter = vision.patches_per_side**2, vision.hidden_size, vision.adapter_width
    layer = 4 * width**2 + 2 * width * vision.mlp_width
    layers = (patches + 1) * vision.num_layers * layer
    adapted = vision.tokens_per_tile * (vision.shuffle**2 * width + adapter) * adapter
    pairs = vision.num_layers * (patches + 1) ** 2  # no mask: every patch sees its whole tile
    return 2 * patches * 3 * vision.patch_size**2 * width, 2 * (layers + adapted), 4 * width * pairs
