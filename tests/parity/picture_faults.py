"""Faults to plant on the way from pixels to embeddings; `PICTURE_FAULTS` has them all (see `faults`)."""

import torch
import torch.nn.functional as F
from faults import BOTH, code_fault

from minillama4 import model, vision

right_patches, right_gelu = vision.patchify, F.gelu


def vectors_reordered(order):
    """`order` permutes the picture vectors [vectors, hidden] before they are written among the words."""

    def spoil(llama, patch):
        right = model.merge_image_embeddings
        patch.setattr(model, "merge_image_embeddings", lambda x, ids, vectors, id: right(x, ids, order(vectors), id))
        return llama

    return spoil


def shuffled_column_first(x, block):
    tiles, patches, channels = x.shape
    cells = round(patches**0.5) // block
    x = x.view(tiles, cells, block, cells, block, channels).permute(0, 1, 3, 4, 2, 5)  # (2i, 2j), (2i+1, 2j), ...
    return x.reshape(tiles, cells * cells, block * block * channels)


def shuffled_by_runs(x, block):
    """Four patches that follow each other, instead of a square of four."""
    return x.reshape(len(x), -1, block * block * x.shape[-1])


def channels_last_in_a_patch(pixels, patch_size):
    return right_patches(pixels, patch_size).unflatten(-1, (3, -1)).transpose(-1, -2).flatten(-2)


def tanh_gelu(x):
    return right_gelu(x, approximate="tanh")


def class_token_first(self, pixels):
    x = self.patch_embedding["linear"](vision.patchify(pixels, self.config.patch_size))
    x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
    x = self.layernorm_pre(x + self.positional_embedding_vlm)
    for block in self.model["layers"]:
        x = block(x, vision.patch_rotation(self.config))
    x = self.layernorm_post(x)[:, 1:]
    return self.vision_adapter["mlp"](vision.pixel_shuffle(x, self.config.shuffle))


def x_and_y_swapped(llama, patch):
    right = vision.patch_rotation
    patch.setattr(vision, "patch_rotation", lambda *args: torch.cat(right(*args).chunk(2, dim=-1)[::-1], dim=-1))
    return llama


def tiles_see_each_other(llama, patch):
    right = vision.VisionAttention.forward

    def joined(self, x, turn):
        return right(self, x.flatten(0, 1)[None], turn.repeat(len(x), 1, 1)).view_as(x)

    patch.setattr(vision.VisionAttention, "forward", joined)
    return llama


def no_last_gelu(llama, patch):
    llama.vision_model.vision_adapter["mlp"].last_activation = False
    return llama


def vision_logits_unscaled(llama, patch):
    for block in llama.vision_model.model["layers"]:
        q_proj = block.self_attn.q_proj
        scale = (q_proj.out_features // block.self_attn.num_heads) ** 0.5
        q_proj.weight.data *= scale
        q_proj.bias.data *= scale
    return llama


PICTURE_FAULTS = {
    "tiles in reverse order": (BOTH, vectors_reordered(lambda x: x.flatten(0, -2).unflatten(0, (4, -1)).flip(0))),
    "tokens of a tile in column order": (
        BOTH,
        vectors_reordered(lambda x: x.flatten(0, -2).unflatten(0, (4, 3, 3)).transpose(1, 2).flatten(0, 2)),
    ),
    "pixel shuffle column first": (BOTH, code_fault(vision, "pixel_shuffle", shuffled_column_first)),
    "pixel shuffle of runs instead of squares": (BOTH, code_fault(vision, "pixel_shuffle", shuffled_by_runs)),
    "channels last in a patch": (BOTH, code_fault(vision, "patchify", channels_last_in_a_patch)),
    "class token first": (BOTH, code_fault(vision.VisionEncoder, "forward", class_token_first)),
    "vision rotary x and y swapped": (BOTH, x_and_y_swapped),
    "no vision rotary": (BOTH, code_fault(vision, "rotate", lambda x, turn: x)),
    "tiles see each other in the encoder": (BOTH, tiles_see_each_other),
    "no GELU after the second adapter layer": (BOTH, no_last_gelu),
    "vision attention without 1 / sqrt(dim)": (BOTH, vision_logits_unscaled),
}
