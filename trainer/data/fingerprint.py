"""Fingerprint of a data set's examples, independent of file names."""

import hashlib
import json
from collections.abc import Iterable

from svc.dataset.schema.example import ChatExample


def fingerprint(examples: Iterable[ChatExample]) -> str:
    """Return the SHA-256 hash of the examples, in order, as `sha256:<hex>`.

    Whitespace and key order in the file do not affect it.
    """
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example.as_dict(), ensure_ascii=False, sort_keys=True).encode("utf-8") + b"\n")
    return f"sha256:{digest.hexdigest()}"
