"""Fingerprint of a data set's content, independent of file names."""

import hashlib
import json
from collections.abc import Iterable

from svc.dataset.schema.example import ChatExample


def fingerprint(examples: Iterable[ChatExample]) -> str:
    """Return the SHA-256 of the examples in order as `sha256:<hex>`, ignoring the file's spacing and key order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example.as_dict(), ensure_ascii=False, sort_keys=True).encode("utf-8") + b"\n")
    return f"sha256:{digest.hexdigest()}"
