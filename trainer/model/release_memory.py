"""Releases memory before another model is loaded or an engine process starts."""

import gc
import sys


def release_memory() -> None:
    """Release unused memory, including the GPU memory that PyTorch caches.

    Trainers and models form reference cycles, which only the garbage collector frees. PyTorch caches freed
    GPU memory, so an engine would otherwise find the device full.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
