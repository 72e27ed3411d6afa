"""int4: 128 weights share one scale, and two of them a byte. That is 4 + 32 / 128 = 4.25 bits a weight.

    weight [..., outputs, inputs] --128 neighbours along the inputs are a group--> codes 0..15, scale [..., outputs, G]
    weight = (code - 8) * scale         byte j of a group (0 <= j < 64) = code[j] + 16 * code[j + 64]

So the low halves of a group's bytes are 64 neighbours and the high halves the next 64: whoever unpacks them multiplies
each with a contiguous piece of the input and never has to interleave.

Symmetric: no zero point, and code 8 is 0. The scale has the sign that gives the group's largest weight the code 0, the
only one with 8 steps to go; of what lies opposite, only the last sixteenth is cut off. Of 16 levels none is lost, and
weights drawn from a normal distribution come back with 10.3 % of error, where |largest| / 7 leaves 11.7 %.

Shapes: G = ceil(inputs / 128) groups, the last one filled up with zeros. T tokens, D hidden size, F expert width, E
experts. Source of group, float32 scales and division by 8: Meta's int4 quantiser; of the sign: llama.cpp's Q4_0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..moe import Experts

GROUP = 128
PIECE = 2**26  # weights that are quantised at a time, for which less than 1 GB is taken; a quarter when dequantising


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., outputs, inputs] -> packed [..., outputs, 64 G] uint8, and scale [..., outputs, G] float32.

    ValueError: not a matrix of floats, or infinities and NaN in it.
    """
    if weight.ndim < 2 or not weight.is_floating_point():
        raise ValueError(f"weight is {list(weight.shape)} {weight.dtype}; it must be [..., outputs, inputs] of floats")
    missing = -weight.shape[-1] % GROUP
    weight = F.pad(weight.float(), (0, missing)) if missing else weight.float()
    weight = weight.unflatten(-1, (-1, GROUP))  # [..., outputs, G, 128]
    lowest, highest = weight.aminmax(dim=-1, keepdim=True)
    scale = torch.where(highest > -lowest, highest, lowest) / -8  # [..., outputs, G, 1]
    if not scale.isfinite().all():
        raise ValueError("weight holds infinities or NaN, which int4 cannot; the checkpoint is damaged")
    code = (weight / torch.where(scale == 0, 1, scale)).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
    low, high = code.split(GROUP // 2, dim=-1)
    return (low | high << 4).flatten(-2), scale.squeeze(-1)


def dequantise(packed: Tensor, scale: Tensor, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """packed [..., outputs, 64 G] and scale [..., outputs, G] -> [..., outputs, inputs], rounded to `dtype` once.

    In pieces, since a float32 copy of a whole head (202,048 x 5,120) would take another 4 GB on its way to bf16.
    """
    weight = torch.empty(*packed.shape[:-1], inputs, dtype=dtype, device=packed.device)
    rows = max(1, PIECE // 4 // inputs)
    pieces = zip(*(x.flatten(0, -2).split(rows) for x in (packed, scale, weight)), strict=True)
    for packed_RB, scale_RG, weight_RI in pieces:  # R rows
        byte = packed_RB.unflatten(-1, (-1, GROUP // 2))  # [R, G, 64]
        code = torch.cat([byte & 15, byte >> 4], dim=-1)  # [R, G, 128]
        weight_RI.copy_(((code.float() - 8) * scale_RG[..., None]).flatten(1)[:, :inputs])
    return weight


def int4_linear(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """x [..., inputs] times one packed matrix -> [..., outputs]. The single door to faster backends."""
    return F.linear(x, dequantise(packed, scale, x.shape[-1], x.dtype))


class Int4Matrix(nn.Module):
    """What stands where a weight stood: `packed` and `scale`, of one matrix or of one for each expert.

    shape: [outputs, inputs], or [E, outputs, inputs] of experts, whose matrices lie the other way round on the Hub.
    dtype: what the weights stand for, and what the rest of the model computes in; the scales are float32 always.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        self.shape, self.dtype = torch.Size(shape), dtype
        groups = -(-shape[-1] // GROUP)
        self.register_buffer("packed", torch.empty(*shape[:-1], groups * GROUP // 2, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(*shape[:-1], groups, dtype=torch.float32))

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @torch.no_grad()
    def fill(self, weight: Tensor, device: torch.device):
        """Quantise `weight`, of this shape, on `device`, whatever memory it lies in.

        In pieces (one expert, or `PIECE` weights), so that beside the result there is only one of them on the device.
        """
        for name in ("packed", "scale"):
            setattr(self, name, torch.empty_like(getattr(self, name), device=device))
        whole = (weight, self.packed, self.scale)
        rows = max(1, PIECE // self.shape[-1])
        parts = zip(*whole, strict=True) if weight.ndim == 3 else zip(*(x.split(rows) for x in whole), strict=True)
        for piece, packed, scale in parts:
            for target, new in zip((packed, scale), quantise(piece.to(device)), strict=True):
                target.copy_(new)

    def dequantise(self) -> Tensor:
        """The weights [..., outputs, inputs], in `dtype`."""
        return dequantise(self.packed, self.scale, self.shape[-1], self.dtype)

    def _apply(self, fn, recurse=True):
        """`model.to(dtype)` changes what is computed in, and leaves the scales as the format has them."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.dtype = fn(scale.new_empty(0, dtype=self.dtype)).dtype
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self


class Int4Linear(nn.Module):
    """`nn.Linear` without bias on packed weights: [..., inputs] -> [..., outputs]."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype):
        super().__init__()
        self.weight = Int4Matrix((outputs, inputs), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return int4_linear(x, self.weight.packed, self.weight.scale)


class Int4Experts(nn.Module):
    """`Experts` on packed weights: [E, outputs, inputs] here, so that one product serves experts and all others."""

    def __init__(self, num_experts: int, hidden_size: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.gate_up_proj = Int4Matrix((num_experts, 2 * width, hidden_size), dtype)  # gate first, then up
        self.down_proj = Int4Matrix((num_experts, hidden_size, width), dtype)

    def forward(self, x_TD: Tensor, expert_T: Tensor) -> Tensor:
        """Send each token through its own expert; the others stay packed."""
        y_TD = torch.empty_like(x_TD)
        gate_up, down = self.gate_up_proj, self.down_proj
        for expert in expert_T.unique().tolist():
            mine_T = expert_T == expert
            gate, up = int4_linear(x_TD[mine_T], gate_up.packed[expert], gate_up.scale[expert]).chunk(2, dim=-1)
            y_TD[mine_T] = int4_linear(F.silu(gate) * up, down.packed[expert], down.scale[expert])
        return y_TD


def to_int4(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same model, changed in place: attention, feed-forward networks, experts and head become int4.

    Router, norms, embedding and vision stay what they are, as in `budget`'s "int4". dtype: see `Int4Matrix`. On the
    meta device there is nothing to quantise, and the new tensors are as empty as the old ones.
    """
    for name, module in list(model.named_modules()):
        in_words = name.partition(".")[0] in ("layers", "lm_head")
        if isinstance(module, nn.Linear) and in_words and not name.endswith(".router"):
            with torch.device("meta"):
                packed = Int4Linear(module.in_features, module.out_features, dtype)
            weights = [(packed.weight, module.weight)]
        elif isinstance(module, Experts):
            (experts, hidden, _), width = module.gate_up_proj.shape, module.down_proj.shape[1]
            with torch.device("meta"):
                packed = Int4Experts(experts, hidden, width, dtype)
            weights = [(packed.gate_up_proj, module.gate_up_proj.mT), (packed.down_proj, module.down_proj.mT)]
        else:
            continue
        for matrix, weight in weights:
            if not weight.is_meta:
                matrix.fill(weight, weight.device)
        model.set_submodule(name, packed)
    return model


def int4_names(model: nn.Module) -> set[str]:
    """The names of all packed tensors and scales in the model's `state_dict`; empty if nothing is quantised."""
    matrices = [name for name, module in model.named_modules() if isinstance(module, Int4Matrix)]
    return {f"{name}.{part}" for name in matrices for part in ("packed", "scale")}
