"""Hypothesis strategies for arbitrary user input."""

from typing import Any

from hypothesis import strategies as st

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


def mappings_of(keys: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for mappings that often contain the known keys, with any value, also one level deeper."""
    sections = sorted({key.partition(".")[0] for key in keys} | {key.rpartition(".")[2] for key in keys})
    names = st.sampled_from(sections) | st.text(max_size=8)
    return st.dictionaries(names, json_values | st.dictionaries(names, json_values, max_size=4), max_size=6)
