"""Bounds the number of matrix shapes whose compiled products a process keeps. Imports torch."""

import os
from functools import cache

import torch

_LIMITS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""Number of products in oneDNN's cache and in PyTorch's own cache in front of it. One step uses about 40, each in every
layer."""


@cache
def bound_product_caches() -> None:
    """Let oneDNN and PyTorch keep 64 compiled products each instead of 1,024; call it before the first product.

    Each length of a batch has its own products, of about 0.6 MB each with AMX. In 80 steps of four examples each, their
    caches grew to 0.8 GB, and the steps were no faster than with these limits. Variables that are already set stay.
    Child processes, such as engines, do not inherit the limits.
    """
    given = {name: os.environ.get(name) for name in _LIMITS}
    os.environ.update({name: limit for name, limit in _LIMITS.items() if given[name] is None})
    square = torch.zeros(64, 64, dtype=torch.bfloat16)
    torch.mm(square, square)  # both libraries read their limit at their first product
    for name, value in given.items():
        if value is None:
            del os.environ[name]
