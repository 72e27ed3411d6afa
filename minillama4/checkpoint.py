"""Hugging Face folders in and out: config.json, and the weights in one or many safetensors files.

Loading streams: the model is built without memory, then each tensor is read, converted and put in place, so the peak
is the model plus one tensor. Nothing is ever unpickled. Names differ from the Hub's by prefixes only, and no weight is
permuted: Llama 4 keeps Meta's adjacent rotary pairs on the Hub too.
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
from torch import Tensor, nn
from tqdm import tqdm

from .config import Llama4Config
from .hub import from_hub, to_hub
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


def load_checkpoint(folder: str | Path, device: str | torch.device = "cpu", dtype=torch.float32) -> Llama4:
    """A model from a Hugging Face folder (`Llama4ForConditionalGeneration` or `Llama4ForCausalLM`) or a shipped preset.

    dtype: what the weights become, whatever they are stored in. The model is in eval mode.
    ValueError: a missing or truncated file, a missing, unknown or wrongly shaped tensor, an unsupported config.
    """
    path = find_folder(folder)
    config = load_config(path)
    with torch.device("meta"):
        model = Llama4(config)
    waiting = dict(model.named_parameters())
    files = _weight_files(path)
    with tqdm(
        total=sum(f.stat().st_size for f in files),
        unit="B",
        unit_scale=True,
        desc=f"loading {path.name}",
        disable=None if len(files) > 1 else True,
    ) as bar:
        for file in files:
            for key, tensor in _tensors(file):
                name = _our_name(key)
                if name not in waiting:
                    known = name in dict(model.named_parameters())
                    raise ValueError(
                        f"{file}: tensor {key!r} " + ("comes twice" if known else "has no place in this model")
                    )
                if tensor.shape != waiting[name].shape:
                    raise ValueError(
                        f"{file}: tensor {key!r} is {list(tensor.shape)}; the config wants {list(waiting[name].shape)}"
                    )
                _put(model, name, tensor.to(device=device, dtype=dtype, copy=True))
                del waiting[name]
                bar.update(tensor.nbytes)
    if waiting:
        names = [_hub_name(name, config.vision is not None) for name in waiting]
        raise ValueError(
            f"{path}: {len(names)} tensors are missing from its safetensors files, among them {', '.join(names[:3])}"
        )
    return model.eval()


def save_checkpoint(
    model: Llama4, folder: str | Path, tokenizer: Tokenizer | None = None, dtype=None, shard_bytes: int = SHARD_BYTES
):
    """Write a folder that `load_checkpoint` and transformers read: config.json, safetensors, and the tokenizer's files.

    dtype: of the stored weights and in the config; None keeps the model's. shard_bytes: a larger model becomes several
    files with an index. Each file appears whole or not at all; config.json comes last, so a folder that was cut short
    is never taken for a checkpoint.
    ValueError: a model that Hugging Face has no class for (encoder-free vision), or a dtype that cannot be named.
    """
    dtype = dtype or model.lm_head.weight.dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be one of {', '.join(map(str, _DTYPES))}")
    config = to_hub(model.config, _DTYPES[dtype])  # refuses before anything is written
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    shards: list[dict[str, nn.Parameter]] = [{}]
    size = 0
    for name, parameter in model.named_parameters():
        nbytes = parameter.numel() * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][_hub_name(name, model.config.vision is not None)] = parameter
        size += nbytes
    index = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        index |= dict.fromkeys(shard, file)
        tensors = {key: parameter.detach().to("cpu", dtype).contiguous() for key, parameter in shard.items()}
        with _new_file(folder / file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
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


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, from its index if it has one."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise ValueError(f"{index}: a shard lies outside the folder")
        files = [path / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{path}: {len(missing)} of {len(files)} shards are missing, first {missing[0]}")
        return files
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    other = [file.name for pattern in ("*.bin", "*.pth", "*.pt") for file in path.glob(pattern)]
    raise ValueError(
        f"{path} has no model.safetensors and no model.safetensors.index.json"
        + (f"; {other[0]} is a pickle, which may run any code and is never loaded" if other else "")
    )


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) one after another; the tensors lie in the mapped file until they are copied."""
    try:
        with safe_open(file, "pt") as shard:
            keys = list(shard.keys())
        for key in keys:
            with safe_open(
                file, "pt"
            ) as shard:  # anew: what was read of a mapped file stays in memory until it is closed
                yield key, shard.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or no safetensors file ({file.stat().st_size:,} bytes; {error})"
        ) from None


def _put(model: Llama4, name: str, tensor: Tensor):
    module_name, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module_name), leaf, nn.Parameter(tensor))


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
