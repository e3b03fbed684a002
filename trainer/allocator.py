"""The C library's allocator while training: memory that was freed is kept for the next layer and the next step.

By default glibc maps large blocks anew each time, and gives the top of its heap back to the kernel as often as it can.
The kernel then clears each page once more at its first touch, on one thread, while the others wait: with activations in
float32, of which a batch has many that are so large, a good part of a step.

Knows glibc alone; with another library, as musl, that of macOS, or jemalloc in its place, nothing changes.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Numbers of malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEEP_ALL = 2**31 - 1
_DEFAULT_MMAP_MAX = 65536
_GROWN_MMAP_THRESHOLD = 2**25


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, freed memory stays with the process; at the end the kernel gets it back."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    glibc = ctypes.CDLL(None)
    glibc.mallopt(_MMAP_MAX, 0)
    glibc.mallopt(_TRIM_THRESHOLD, _KEEP_ALL)
    try:
        yield
    finally:
        # After any call of mallopt glibc no longer adapts its thresholds: they are set to what they had grown to.
        glibc.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        glibc.mallopt(_MMAP_THRESHOLD, _GROWN_MMAP_THRESHOLD)
        glibc.mallopt(_TRIM_THRESHOLD, 2 * _GROWN_MMAP_THRESHOLD)
        glibc.malloc_trim(0)
