"""Every test runs offline, with the same generated examples each time, on two CPU threads (or OMP_NUM_THREADS).

With `-n 2` each of two processes has one thread, and so has what it starts.
"""

import os

import torch
import triton_interpreter  # noqa: F401 - first: what imports Triton first decides how its kernels run
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")
