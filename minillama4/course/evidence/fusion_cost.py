"""What a run of lesson 01's study costs: FLOPs of a step, bytes of a step, and cross-attention on paper."""

import torch

from ...budget import shape
from ...config import Llama4Config
from ...documents import Batch
from ...model import Llama4
from ...train import Recipe, make_optimizers
from ...train_cost import training_cost
from .fusion_task import losses


def trained_names(model: Llama4, parts: tuple[str, ...]) -> list[str]:
    """Names of the parameters that belong to the parts."""
    of = {"vision_model": "encoder", "multi_modal_projector": "projector"}
    return [name for name, _ in model.named_parameters() if of.get(name.split(".")[0], "text") in parts]


def step_flops(config: Llama4Config, batch: Batch, trained: tuple[str, ...], words: bool = True) -> int:
    """Of one step; padding counts. words: False if only labels are learned, so that nothing passes the decoder.

    The head runs for each token to learn and once for each label, which compares a vector with all embeddings.
    """
    documents, tokens = batch.ids.shape
    tiles = 0 if batch.pixels is None else len(batch.pixels) // documents
    tokens = tokens if words else tiles * config.vision.tokens_per_tile
    step = training_cost(config, tokens, tiles, trained, batch=documents, head_tokens=0)
    one = [training_cost(config, tokens, tiles, trained, head_tokens=n).total for n in (0, 1)]
    heads = len(batch.labels) + (int((batch.weights > 0).sum()) if words else 0)
    return (step.total if words else step.encoder.total + step.projector.total) + heads * (one[1] - one[0])


def memory(model: Llama4, batch: Batch, trained: tuple[str, ...]) -> dict[str, int]:
    """Bytes that a step on this batch needs, counted: a process's own peak would also hold what came before.

    "activations": all that is kept for the backward pass, each storage once, weights left out. "states": the
    optimizers' after a step.
    """
    names = set(trained_names(model, trained))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.grad = None
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too: no other may come to lie there
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sum(losses(model, batch))
    loss.backward()
    optimizers = make_optimizers(model, Recipe())
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
    states = [v.nbytes for o in optimizers for state in o.state.values() for v in state.values()]
    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": gradients,
        "states": sum(states),
        "activations": sum(size for size, _ in kept.values()),
    }


def cross_attention(config: Llama4Config, tokens: int, tiles: int) -> dict[str, int]:
    """Llama 3.2's way at this size, on paper, beside early fusion: parameters, and forward FLOPs of a document.

    Image tokens never enter the sequence. One layer more for each four (3.2 11B: 8 beside 32), gated, with its own
    feed-forward network: text tokens ask, image tokens answer. Norms of queries and keys, two norms, two gates.
    tokens: of the document with its image tokens; the head is left out on both sides.
    """
    s, text = shape(config), config.text
    image = tiles * config.vision.tokens_per_tile
    early = training_cost(config, tokens, tiles, head_tokens=0)
    apart = training_cost(config, tokens - image, head_tokens=0)
    layers = text.num_layers // 4
    asking = 2 * text.hidden_size * text.num_heads * text.head_dim  # q and o
    answering = 2 * text.hidden_size * text.num_kv_heads * text.head_dim  # k and v
    feed_forward = 3 * text.hidden_size * text.dense_width
    small = 2 * text.hidden_size + 2 * text.head_dim + 2
    cross = 2 * (tokens - image) * (asking + feed_forward) + 2 * image * answering
    cross += 2 * s.score_width * (tokens - image) * image
    eyes = early.encoder.forward + early.projector.forward
    return {
        "layers": layers,
        "parameters": layers * (asking + answering + feed_forward + small),
        "forward_flops": eyes + apart.text.forward + layers * cross,
        "early_fusion_forward_flops": early.forward,
    }
