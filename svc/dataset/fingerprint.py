"""A name for the content of a data set: equal content, equal name, whatever the file is called."""

import hashlib
import json
from collections.abc import Iterable

from svc.dataset.schema.example import ChatExample


def fingerprint(examples: Iterable[ChatExample]) -> str:
    """SHA-256 over the examples in their order, as `sha256:<hex>`; spacing and key order of the file do not count."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example.as_dict(), ensure_ascii=False, sort_keys=True).encode("utf-8") + b"\n")
    return f"sha256:{digest.hexdigest()}"
