"""Records the prompts that a version was trained on, as eight-byte hashes instead of texts.

An example that one version was trained on is not held out for a later version of the same model. Prompts that differ
only in spacing and case share a hash. A hash does not reveal the text, but anyone who has a prompt can test whether its
hash is in the record. This module knows nothing about versions or near duplicates.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svc.dataset.schema.example import ChatExample, answered_prompts, normal_prompt
from svc.errors import IntegrityError

PromptHashes = NDArray[np.uint64]

TRAINED_PROMPTS_FILE = "trained_prompts.npy"
NO_PROMPTS: PromptHashes = np.zeros(0, np.uint64)


def hash_text(text: str) -> int:
    """Return the eight-byte BLAKE2b hash of a text as an integer."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def hash_prompts(examples: Iterable[ChatExample]) -> PromptHashes:
    """Return the hash of each example's prompt, in order."""
    return np.fromiter((hash_text(normal_prompt(example)) for example in examples), np.uint64)


def hash_answered_prompts(examples: Iterable[ChatExample]) -> PromptHashes:
    """Return the hash of every prompt with an answer, including the earlier prompts in conversations."""
    prompts = (prompt for example in examples for prompt in answered_prompts(example))
    return np.fromiter(map(hash_text, prompts), np.uint64)


def write_prompt_hashes(path: Path, hashes: PromptHashes) -> None:
    """Write the hashes as a NumPy array without pickled objects.

    Duplicates are removed, and the hashes are sorted so that the file does not reveal the order of the examples.
    """
    np.save(path, np.unique(hashes).astype("<u8"), allow_pickle=False)


def read_prompt_hashes(path: Path) -> PromptHashes:
    """Read prompt hashes from a file.

    Raises:
        IntegrityError: the file is missing or does not contain an array of hashes.
    """
    todo = "restore the file from a backup, or train again"
    try:
        with path.open("rb") as file:
            hashes = np.load(file, allow_pickle=False)
    except Exception as error:  # NumPy has several kinds for a damaged file
        raise IntegrityError(f"cannot read {path}: {error}", todo=todo) from error
    if not isinstance(hashes, np.ndarray) or hashes.dtype != np.uint64 or hashes.ndim != 1:
        raise IntegrityError(f"{path} contains no prompt hashes", expected="an array of 64-bit numbers", todo=todo)
    return np.asarray(hashes, dtype=np.uint64)
