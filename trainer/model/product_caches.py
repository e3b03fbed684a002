"""Limits how many compiled matrix-product kernels a process keeps in memory. Imports torch."""

import os
from functools import cache

import torch

_LIMITS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""Environment variables that limit oneDNN's cache of compiled kernels and PyTorch's own cache in front of it. One
step uses about 40 kernels, each of them in every layer."""


@cache
def bound_product_caches() -> None:
    """Limit oneDNN and PyTorch to 64 cached matrix-product kernels each, instead of 1,024. Must be called before the
    first matrix product.

    Each batch length needs its own kernels, which take about 0.6 MB each with AMX. In 80 steps of
    four examples each, the caches grew to 0.8 GB without the limits, and the steps were no faster than with
    them. Environment variables that are already set are kept. Child processes, such as engines, do not
    inherit the limits.
    """
    given = {name: os.environ.get(name) for name in _LIMITS}
    os.environ.update({name: limit for name, limit in _LIMITS.items() if given[name] is None})
    square = torch.zeros(64, 64, dtype=torch.bfloat16)
    torch.mm(square, square)  # both libraries read their limit at their first product
    for name, value in given.items():
        if value is None:
            del os.environ[name]
