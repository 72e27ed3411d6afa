"""What one step reads, for a check: every tensor of a `Decoder` as it lies in memory, but for its values."""

from collections.abc import Iterator

import torch


def read(model, formats: dict, context: int, size: int) -> dict[str, int]:
    """Name -> bytes that are read. Scales end in ".scale", and the cache of a layer in ".keys" and ".values"."""
    found = {"embedding": bf16(model.vocab_size, model.hidden_size)[0].nbytes}
    for name, part, rows, columns in matrices(model):
        packed, scales = stored(rows, columns, formats[part])
        found[name] = packed.nbytes
        if scales is not None:
            found[f"{name}.scale"] = scales.nbytes
    for layer in range(model.num_layers):
        if layer in model.moe_layers:
            found[f"{layer}.router"] = bf16(model.num_experts, model.hidden_size).nbytes
        for norm in ("attention_norm", "feed_forward_norm"):
            found[f"{layer}.{norm}"] = bf16(model.hidden_size).nbytes
        cache = torch.empty(context, model.num_kv_heads, model.head_dim, size, dtype=torch.uint8, device="meta")
        seen = cache if layer in model.nope_layers else cache[: model.chunk_size]
        found |= {f"{layer}.keys": seen.nbytes, f"{layer}.values": seen.nbytes}
    return found | {"last_norm": bf16(model.hidden_size).nbytes}


def matrices(model) -> Iterator[tuple[str, str, int, int]]:
    """(name, part, rows, columns) of what is multiplied, and may be quantised."""
    hidden = model.hidden_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    moe, dense = {"routed": model.expert_width, "shared": model.expert_width}, {"dense": model.dense_width}
    for layer in range(model.num_layers):
        for name, rows, columns in (
            ("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden), ("o", hidden, queries),
        ):  # fmt: skip
            yield f"{layer}.attention.{name}", "attention", rows, columns
        for part, width in (moe if layer in model.moe_layers else dense).items():
            for name, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
                yield f"{layer}.{part}.{name}", part, rows, columns
    yield "head", "head", model.vocab_size, hidden


def stored(rows: int, columns: int, format) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(codes, scales) of a matrix."""
    packed = torch.empty(rows, columns * format.bits // 8, dtype=torch.uint8, device="meta")
    if format.group is None:
        return packed, None
    dtype = {2: torch.float16, 4: torch.float32}[format.scale_bytes]
    return packed, torch.empty(rows, columns // format.group, dtype=dtype, device="meta")


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")
