"""Table columns (in CSV and Parquet files) that are used by at least one format of chat examples or preferences."""

from collections import Counter
from collections.abc import Sequence

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.chat_formats import KEYS, OPTIONAL_KEYS, quoted
from svc.dataset.readers.preference_formats import LABEL_KEYS, PAIR_KEYS, PROMPT_KEYS

FORMAT_KEYS: tuple[tuple[str, ...], ...] = (*KEYS.values(), *PAIR_KEYS.values())
"""Required keys of each format."""
READ_KEYS = {*OPTIONAL_KEYS, *PROMPT_KEYS, *LABEL_KEYS}.union(*FORMAT_KEYS)
"""All keys that at least one format reads. Other keys of a row are ignored."""


def header_fault(names: Sequence[str]) -> RowError | None:
    """Return an error if two columns of a table have the same key, because only one of them could be read."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name in READ_KEYS]
    if not twice:
        return None
    return RowError(Code.WRONG_FORMAT, f"the header contains {quoted(twice)} twice", expected="one column per key")
