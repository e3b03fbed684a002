"""Serializes traffic that was accepted as the new drift baseline.

The result contains features and hashes, but no text.
"""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitoring.drift.detector import Baseline
from svc.drift_reference.sample import Sample

Array = NDArray[Any]


def baseline_bytes(baseline: Baseline) -> bytes:
    """Return the baseline serialized as a NumPy archive without pickled objects."""
    arrays = {
        **_arrays("prompts", baseline.prompts),
        **_arrays("answers", baseline.answers),
        "words": np.concatenate([np.zeros(0, np.int32), *baseline.words]),
        "word_counts": np.array([len(words) for words in baseline.words], dtype=np.int64),
    }
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return file.getvalue()


def read_baseline(data: bytes) -> Baseline:
    """Deserialize a baseline from bytes written by `baseline_bytes`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    words = np.split(arrays["words"], np.cumsum(arrays["word_counts"]))[:-1]  # the last part is empty
    return Baseline(_sample("prompts", arrays), words, _sample("answers", arrays))


def _arrays(side: str, sample: Sample) -> dict[str, Array]:
    return {
        f"{side}/size": np.array(sample.size),
        **{f"{side}/number/{name}": values for name, values in sample.numbers.items()},
        **{f"{side}/category/{name}": values for name, values in sample.categories.items()},
        **{f"{side}/view/{place}": view for place, view in enumerate(sample.views)},
    }


def _sample(side: str, arrays: dict[str, Array]) -> Sample:
    numbers, categories, views = (_columns(f"{side}/{kind}/", arrays) for kind in ("number", "category", "view"))
    return Sample(int(arrays[f"{side}/size"]), numbers, categories, tuple(views.values()))


def _columns(prefix: str, arrays: dict[str, Array]) -> dict[str, Array]:
    return {key.removeprefix(prefix): values for key, values in arrays.items() if key.startswith(prefix)}
