"""Release of memory between two models, and before another process, the engine, starts."""

import gc
import sys


def release_memory() -> None:
    """Release unused memory.

    Trainers and models form reference cycles, which only the garbage collector frees. PyTorch caches the GPU's memory,
    so an engine would find the device full.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
