"""Weights onto a device: one tensor at a time, quantised on the way; and what to say where they do not fit.

A tensor lies in a mapped file until it is copied, so the host holds at most one of them; the device holds the final
model, and of an int4 one also the piece that is being quantised, which takes less than 1 GB (one expert of Scout).
"""

import torch
from torch import Tensor, nn

from ..budget import longest_context, shape, weight_bytes
from ..config import Llama4Config
from .int4 import Int4Matrix, int4_names

RESERVE = 3e9  # bytes for the CUDA context and activations, as in `roofline.Gpu`


def place(model: nn.Module, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype):
    """Put one tensor of a checkpoint where the model has it: a weight, a weight to quantise, or a part of an int4 one.

    name: as in the model's `state_dict`, or of an `Int4Matrix`, which then takes the weight as the Hub has it.
    ValueError: a weight that cannot be quantised, or a part of another type.
    """
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    target = getattr(module, leaf)
    if isinstance(target, nn.Parameter):
        setattr(module, leaf, nn.Parameter(tensor.to(device=device, dtype=dtype, copy=True)))
    elif isinstance(target, Int4Matrix):
        try:
            target.fill(tensor.mT if tensor.ndim == 3 else tensor, device)  # experts are [inputs, outputs] on the Hub
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    elif tensor.dtype != target.dtype:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {target.dtype}")
    else:
        setattr(module, leaf, tensor.to(device=device, copy=True))


def model_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of all weights once they are there, also of a model on the meta device. dtype: of what is not int4."""
    int4 = int4_names(model)
    return sum(x.nbytes if name in int4 else x.numel() * dtype.itemsize for name, x in model.state_dict().items())


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated there; None where nobody knows, as on a CPU, which swaps."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def does_not_fit(config: Llama4Config, needed: int, free: int | None, device: torch.device) -> str:
    """One line: how much was needed, how much there was, and what of this model would fit."""
    there = "ran out of memory" if free is None else f"has {_gb(free)} free"
    message = f"the weights need {_gb(needed)}, and {device} {there}; "
    sizes = {"dtype=torch.bfloat16": weight_bytes(config, "bf16"), "quantize='int4'": weight_bytes(config, "int4")}
    smaller = {how: size for how, size in sizes.items() if size < 0.99 * needed}
    for how, size in smaller.items():
        if free is not None and size + RESERVE <= free:
            return message + f"{how} would fit: {_gb(size)}, and {_context(config, free - size - RESERVE)}"
    how, size = min(smaller.items(), key=lambda pair: pair[1], default=("this, the smallest format,", needed))
    return message + f"{how} needs a device with {_gb(size + RESERVE)}, of which {_gb(RESERVE)} are to work in"


def _context(config: Llama4Config, free: float) -> str:
    sizes = shape(config)
    if sizes.local_layers == sizes.layers:
        return "any context"
    return f"{longest_context(config, free):,} tokens of context in bf16"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
