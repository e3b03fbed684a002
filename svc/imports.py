"""Imports large libraries faster."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Turn Python's garbage collector off in a `with` block that only imports, and let it ignore what was imported.

    Importing creates a million objects and hardly any garbage. To search them again and again took 2.3 of the 9 seconds
    of processor time in which vLLM is imported. Each later full collection searched them too, for 0.7 s, and trainers
    collect often.

    Cycles of objects that exist now are never freed, so import before a model is loaded. If all modules have been
    imported before, nothing changes.
    """
    before = len(sys.modules)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        if len(sys.modules) > before:
            gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
