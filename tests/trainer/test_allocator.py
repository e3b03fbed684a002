"""What a step frees the next one gets without the kernel, and other programs get it after training."""

import ctypes
import platform
import resource
from pathlib import Path

import pytest

from trainer.allocator import freed_memory_kept

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="knows glibc alone")
SIZE = 2**28
PAGES = SIZE // resource.getpagesize()


def page_faults() -> int:
    """Those of writing to a block of memory that is freed again."""
    glibc = ctypes.CDLL(None)
    glibc.malloc.restype, glibc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    glibc.free.argtypes = [ctypes.c_void_p]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = glibc.malloc(SIZE)
    ctypes.memset(block, 1, SIZE)
    glibc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize()


def test_inside_a_freed_block_is_there_for_the_next() -> None:
    with freed_memory_kept():
        page_faults()
        assert page_faults() < PAGES / 100


def test_outside_each_block_comes_from_the_kernel() -> None:
    with freed_memory_kept():
        page_faults()
    assert page_faults() > PAGES / 600  # of 2 MiB, where the kernel makes its pages large
    assert page_faults() > PAGES / 600


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux")
def test_at_the_end_the_memory_is_given_back() -> None:
    with freed_memory_kept():
        page_faults()
        inside = resident()
    assert resident() < inside - SIZE / 2


def test_it_is_given_back_also_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), freed_memory_kept():
        1 / (page_faults() * 0)
    assert page_faults() > PAGES / 600
