"""Where the kernels of `minillama4.cuda` are tested: on a GPU for real, elsewhere on a CPU in Triton's interpreter.

Import this before anything of `minillama4.cuda`: a kernel is made for one of the two when its file is imported.
"""

import os

import pytest
import torch
from packaging.version import Version

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def kernels_run(monkeypatch):
    """Skips without Triton. Until 3.7 its interpreter cannot count in loops with numpy 2.4 or later (issue 9171)."""
    triton = pytest.importorskip("triton")
    if DEVICE == "cpu" and Version(triton.__version__) < Version("3.7"):
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patched(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
