"""Release of memory between models, and between a stage and another process: the engine.

Knows nothing of the computation.
"""

import gc
import sys


def release_memory() -> None:
    """Release unused memory.

    Trainers and models refer to each other in circles, which only the collector frees; and of a GPU's memory PyTorch
    keeps what it once had, so that an engine would find the device full.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
