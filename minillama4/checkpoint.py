"""Hugging Face folders in and out: config.json, and the weights in one or many safetensors files.

Loading streams: the model is built without memory, the files' headers are compared with it, then each tensor is read,
converted and put in place, so the peak is the model plus one tensor. Nothing is ever unpickled. Names differ from the
Hub's by prefixes only, and no weight is permuted: Llama 4 keeps Meta's adjacent rotary pairs on the Hub too.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .config import Llama4Config
from .cuda.int4 import int4_names, to_int4
from .cuda.load import does_not_fit, free_bytes, model_bytes, place
from .hub import INT4, from_hub, stored_as, to_hub
from .model import Llama4
from .tokenizer import Tokenizer

WEIGHTS = Path(__file__).parent / "weights"  # the shipped mini models, one folder each
SHARD_BYTES = 5 * 2**30
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def shipped() -> list[str]:
    """Presets whose weights come with the package."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/config.json"))


def find_folder(folder: str | Path) -> Path:
    """The checkpoint folder that `folder` names: a path, or a preset that ships weights."""
    path = Path(folder)
    if not path.is_dir() and (WEIGHTS / str(folder) / "config.json").is_file():
        path = WEIGHTS / str(folder)
    if not path.is_dir():
        near = get_close_matches(str(folder), shipped(), cutoff=0.4)
        raise ValueError(
            f"no folder {str(folder)!r}; give a folder with config.json, or a preset that ships weights: "
            + ", ".join(near or shipped())
        )
    return path


def load_config(folder: str | Path) -> Llama4Config:
    """The config of a checkpoint folder, or of a preset that ships weights."""
    path = find_folder(folder)
    config = _read_json(path / "config.json")
    return from_hub(
        config,
        *(_read_json(path / name, optional=True) for name in ("generation_config.json", "preprocessor_config.json")),
    )


def load_checkpoint(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
) -> Llama4:
    """A model from a Hugging Face folder (`Llama4ForConditionalGeneration` or `Llama4ForCausalLM`) or a shipped preset.

    dtype: what the weights become, whatever they are stored in; None is float32, and for an int4 model on a GPU bf16.
    quantize: "int4" packs attention, experts, feed-forward networks and head on `device`, tensor by tensor; the host
        never holds more than one tensor, the device never more than 2 GB beside the final model. A folder that was
        saved from such a model loads as int4 in any case. The model is in eval mode.
    ValueError: a missing or truncated file, a missing, unknown or wrongly shaped tensor, an unsupported config, or
        weights that do not fit on the device.
    """
    path, device = find_folder(folder), torch.device(device)
    config = load_config(path)
    stored = stored_as(_read_json(path / "config.json"))
    if quantize not in (None, "int4"):
        raise ValueError(f"quantize is {quantize!r}; it must be 'int4' or None")
    if dtype is None:
        dtype = torch.bfloat16 if device.type != "cpu" and (quantize or stored) else torch.float32
    with torch.device("meta"):
        model = Llama4(config)
    if stored:
        to_int4(model, dtype)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    files = _weight_files(path, stored or "model")
    _compare(files, shapes, path, config.vision is not None)  # before hours of reading, not after
    if quantize and not stored:
        to_int4(model, dtype)

    needed, free = model_bytes(model, dtype), free_bytes(device)
    full = free is not None and needed > free
    if not full:
        try:
            _fill(model, files, device, dtype, path.name)
        except torch.OutOfMemoryError:
            full = True
    if full:  # outside of `except`, whose traceback would keep the half-filled model alive
        del model
        raise ValueError(f"{path}: {does_not_fit(config, needed, free, device)}")
    return model.eval()


def save_checkpoint(
    model: Llama4, folder: str | Path, tokenizer: Tokenizer | None = None, dtype=None, shard_bytes: int = SHARD_BYTES
):
    """Write a folder that `load_checkpoint` and transformers read: config.json, safetensors, and the tokenizer's files.

    An int4 model becomes a folder that only `load_checkpoint` reads, without quantising anew: `name.packed` and
    `name.scale` (see `cuda.int4`) in files called int4*.safetensors, so that transformers finds no weights, instead of
    making up those that it misses.

    dtype: of the stored weights and in the config; None keeps the model's. shard_bytes: a larger model becomes several
    files with an index. Each file appears whole or not at all; config.json comes last, so a folder that was cut short
    is never taken for a checkpoint.
    ValueError: a model that Hugging Face has no class for (encoder-free vision), a dtype that cannot be named, or a
        folder that holds weights of the other kind, which would no longer load.
    """
    dtype = dtype or model.lm_head.weight.dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be one of {', '.join(map(str, _DTYPES))}")
    config = to_hub(model.config, _DTYPES[dtype])  # refuses before anything is written
    folder, int4 = Path(folder), int4_names(model)
    kind, other = ("int4", "model") if int4 else ("model", "int4")
    if int4:
        config["quantization_config"] = INT4
    if any(folder.glob(f"{other}*.safetensors")):
        raise ValueError(f"{folder} holds {other}*.safetensors; save {kind} weights in a folder of their own")
    folder.mkdir(parents=True, exist_ok=True)

    shards: list[dict[str, tuple[Tensor, torch.dtype]]] = [{}]
    size = total = 0
    for name, tensor in model.state_dict().items():
        kept = tensor.dtype if name in int4 else dtype
        nbytes = tensor.numel() * kept.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][_hub_name(name, model.config.vision is not None)] = tensor, kept
        size, total = size + nbytes, total + nbytes
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"{kind}.safetensors" if len(shards) == 1 else f"{kind}-{number:05}-of-{len(shards):05}.safetensors"
        index |= dict.fromkeys(shard, file)
        tensors = {key: tensor.to("cpu", kept).contiguous() for key, (tensor, kept) in shard.items()}
        with _new_file(folder / file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        _write_json(folder / f"{kind}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    if tokenizer is not None:
        tokenizer.save(folder)
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": model.config.bos_token,
            "eos_token_id": list(model.config.stop_tokens),
            "pad_token_id": model.config.pad_token,
            "do_sample": False,  # greedy, as `generate` is; transformers' text pipeline would sample unless told so
        },
    )
    if model.config.vision is not None:
        vision = model.config.vision
        _write_json(
            folder / "preprocessor_config.json",
            {
                "image_processor_type": "Llama4ImageProcessorFast",
                "processor_class": "Llama4Processor",
                "size": {"height": vision.tile_size, "width": vision.tile_size},
                "max_patches": vision.max_tiles,
                "resize_to_max_canvas": False,
                "do_rescale": True,
                "do_normalize": True,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
                "resample": 2,
            },
        )
        _write_json(
            folder / "processor_config.json",
            {
                "processor_class": "Llama4Processor",
                "patch_size": vision.patch_size,
                "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
            },
        )
    _write_json(folder / "config.json", config)


# ---------------------------------------------------------------------------------------------------------------------


def _our_name(key: str) -> str:
    """A key of either Hugging Face class, as this package names it."""
    key = key.removeprefix("language_model.")
    return key.removeprefix("model.")


def _hub_name(name: str, multimodal: bool) -> str:
    if name.startswith(("vision_model.", "multi_modal_projector.")):
        return name
    name = name if name.startswith("lm_head.") else "model." + name
    return "language_model." + name if multimodal else name


def _weight_files(path: Path, kind: str) -> list[Path]:
    """The safetensors files of a folder, from its index if it has one. kind: how their names begin."""
    index = path / f"{kind}.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{index}: a shard lies outside the folder")
        files = [path / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{path}: {len(missing)} of {len(files)} shards are missing, first {missing[0]}")
        return files
    if (path / f"{kind}.safetensors").is_file():
        return [path / f"{kind}.safetensors"]
    other = [file.name for pattern in ("*.bin", "*.pth", "*.pt") for file in path.glob(pattern)]
    raise ValueError(
        f"{path} has no {kind}.safetensors and no {kind}.safetensors.index.json"
        + (f"; {other[0]} is a pickle, which may run any code and is never loaded" if other else "")
    )


def _compare(files: list[Path], shapes: dict[str, torch.Size], path: Path, multimodal: bool):
    """All that can be wrong with names, shapes and files, found from the files' headers alone."""
    waiting = dict(shapes)
    for file in files:
        with _opened(file) as shard:
            found = {key: torch.Size(shard.get_slice(key).get_shape()) for key in shard.keys()}
        for key, shape in found.items():
            name = _our_name(key)
            if name not in waiting:
                reason = "comes twice" if name in shapes else "has no place in this model"
                raise ValueError(f"{file}: tensor {key!r} {reason}")
            if shape != waiting.pop(name):
                raise ValueError(f"{file}: tensor {key!r} is {list(shape)}; the config wants {list(shapes[name])}")
    if waiting:
        names = [_hub_name(name, multimodal) for name in waiting]
        raise ValueError(
            f"{path}: {len(names)} tensors are missing from its safetensors files, among them {', '.join(names[:3])}"
        )


def _fill(model: Llama4, files: list[Path], device: torch.device, dtype: torch.dtype, name: str):
    """Read every tensor and put it in place. The bar shows bytes and the time left, if there are several files."""
    total = sum(file.stat().st_size for file in files)
    quiet = None if len(files) > 1 else True
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"loading {name}", disable=quiet) as bar:
        for file in files:
            with _opened(file) as shard:
                keys = list(shard.keys())
            for key in keys:
                with _opened(file) as shard:  # anew: what was read of a mapped file stays in memory until it is closed
                    tensor = shard.get_tensor(key)
                    place(model, _our_name(key), tensor, device, dtype)
                    bar.update(tensor.nbytes)
                    del tensor


@contextmanager
def _opened(file: Path) -> Iterator:
    """A safetensors file, its tensors mapped and not yet read. ValueError: what it holds is not what it says."""
    try:
        with safe_open(file, "pt") as shard:
            yield shard
    except SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or no safetensors file ({file.stat().st_size:,} bytes{_promised(file)}; {error})"
        ) from None


def _promised(file: Path) -> str:
    """How long the file would be by its own header, if that much of it can be read."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(min(length, 10**8)))
            last = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, AttributeError, KeyError):
            return ""
    return f" of {8 + length + last:,}"


def _read_json(path: Path, optional: bool = False) -> dict | None:
    if not path.is_file():
        if optional:
            return None
        raise ValueError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a JSON object is wanted")
    return content


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` if all goes well, and vanishes if not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield temporary
        temporary.chmod(0o644)  # safetensors makes its files private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, content: dict):
    with _new_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
