"""minillama4: a compact, correct Llama 4. Start with `model.py`; everything an engineer imports is listed here."""

from .ask import ask
from .checkpoint import load_checkpoint, load_config, save_checkpoint
from .config import PRESETS, Llama4Config, RopeScaling, TextConfig, VisionConfig
from .fusion import build_prompt, open_image
from .generate import generate, stream
from .model import Llama4
from .tokenizer import Tokenizer, load_tokenizer
from .trace import trace

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Llama4",
    "Llama4Config",
    "RopeScaling",
    "TextConfig",
    "Tokenizer",
    "VisionConfig",
    "ask",
    "build_prompt",
    "generate",
    "load_checkpoint",
    "load_config",
    "load_tokenizer",
    "open_image",
    "save_checkpoint",
    "stream",
    "trace",
]
