"""Finds near duplicates in large sets of texts, using 128 bytes per text and without comparing all pairs.

MinHash (Broder 1997) over runs of three words estimates the Jaccard similarity of two texts. Two texts
are compared only if they share at least one of 16 bands of 4 values (locality-sensitive hashing, Indyk
and Motwani 1998), which misses 2 in 10,000 of the pairs with similarity 0.8. The standard error of an
estimate is 0.06. datasketch, which the tests use for comparison, takes ten times as long and 3 kB per
text (6,000 questions of 60 words: 1.7 s instead of 0.15 s).

Runs that occur in more than 5% of the first 2,000 texts, and in more than 4 different texts, are
treated as part of the task's instructions and ignored. Otherwise, two short questions after the same long instruction
would look like copies. If fewer than 24 runs remain, texts count as near duplicates only if all their
runs are the same, because in a short text a single different word makes a different question.
"""

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from svc.dataset.checks.row_file import RowFile
from svc.dataset.text.plain_text import unified

SIMILAR = 0.7
"""Minimum Jaccard similarity for two texts to count as near duplicates."""
_VALUES = 64
_BAND = 4
_MIN_RUNS = 24
_SAMPLE = 2_000
_COMMON_SHARE = 0.05
_COMMON_TEXTS = 4
"""Number of distinct texts that may share a run of words before the run counts as common. Even a small file may contain
this many modified copies of one text."""
_BATCH = 256
_MAX_WORDS = 4_096
_MAX_CHARS = 60_000
_PAIR_BATCH = 2**16
_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W\u3040-\u30ff\u3400-\u9fff]+")
"""Matches a word or, in Chinese and Japanese, a single character."""
_ASCII_WORDS = bytes(code if _WORD.fullmatch(chr(code)) else 0x20 for code in range(128)) + bytes(128)
_EDGE = [0x51ED270B, 0xB5026F5B]

Numbers = NDArray[np.uint32]
_random = np.random.Generator(np.random.PCG64(20240607))
_FACTORS = _random.integers(1, 2**31, _VALUES, dtype=np.uint32) * 2 + 1
_OFFSETS = _random.integers(0, 2**32, _VALUES, dtype=np.uint32)
_SKETCH = np.dtype([("values", np.uint16, _VALUES), ("runs", np.uint16)])
Sketches = NDArray[np.void]
"""MinHash sketches, one row per text.

`values`: the low 16 bits of the smallest hash under each of 64 hash functions. `runs`: number of distinct three-word
runs in the text, excluding common runs; 0 if the text cannot be compared."""


class Sketcher:
    """Builds sketches of texts that are added one at a time, using 130 bytes per text."""

    def __init__(self) -> None:
        self._rows = RowFile(_SKETCH)
        self._waiting: list[Numbers] = []
        self._common: Numbers | None = None

    def add(self, text: str) -> None:
        """Add the next text. Spacing, case and punctuation are ignored."""
        hashes = list(map(zlib.crc32, _words(unified(text[:_MAX_CHARS]))[:_MAX_WORDS]))
        self._waiting.append(np.array([*_EDGE, *hashes, *_EDGE] if hashes else [], dtype=np.uint32))
        if len(self._waiting) >= (_SAMPLE if self._common is None else _BATCH):
            self._flush()

    def finish(self) -> Sketches:
        """Return the sketches of all added texts, in order."""
        self._flush()
        return self._rows.finish()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if self._common is None and waiting:
            self._common = _common_runs(waiting)
        for start in range(0, len(waiting), _BATCH):
            self._rows.add(_sketch(waiting[start : start + _BATCH], self._common).tobytes())


def clusters(sketches: Sketches) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group texts that are near duplicates, either directly or through a chain of other texts.

    Returns:
        Two arrays with one value per text: the index of the first text in the same group, and the index of the first
        earlier text that is a near duplicate, or -1 if there is none.
    """
    count = len(sketches)
    group, earlier = np.arange(count), np.full(count, count)
    usable = np.flatnonzero(sketches["runs"])
    for band in range(_VALUES // _BAND):
        keys = _band(sketches, band)[usable]
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        follows = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        for before in (follows - 1, np.searchsorted(ordered, ordered[follows])):  # the previous one, and the first
            one, other = usable[order[before]], usable[order[follows]]
            near = _near(sketches, one, sketches, other)
            one, other = one[near], other[near]
            np.minimum.at(earlier, other, one)
            unite(group, one, other)
    earlier[earlier == count] = -1
    return group, earlier


def nearest(sketches: Sketches, others: Sketches) -> NDArray[np.int64]:
    """Return, for each text, the index of a near duplicate in `others`, or -1 if there is none."""
    matches = np.full(len(sketches), -1)
    usable, theirs = np.flatnonzero(sketches["runs"]), np.flatnonzero(others["runs"])
    for band in range(_VALUES // _BAND):
        place = places_in(_band(sketches, band)[usable], _band(others, band)[theirs])
        match = np.flatnonzero(place >= 0)
        one, other = usable[match], theirs[place[match]]
        near = _near(sketches, one, others, other)
        matches[one[near]] = other[near]
    return matches


def places_in(keys: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the index of each key's first occurrence in `others`, or -1 for keys that do not occur in `others`."""
    if not len(others):
        return np.full(len(keys), -1)
    order = np.argsort(others, kind="stable")
    place = np.minimum(np.searchsorted(others[order], keys), len(others) - 1)
    return np.where(others[order[place]] == keys, order[place], -1)


def _words(text: str) -> list[bytes]:
    """Return a text's words in lower case.

    ASCII text, the most common case, has its own code path, which takes a fifth of the time.
    """
    if text.isascii():
        return text.encode("ascii").translate(_ASCII_WORDS).split()
    return [word.encode("utf-8", "surrogatepass") for word in _WORD.findall(text)]


def _runs_of_three(texts: Sequence[Numbers]) -> tuple[Numbers, NDArray[np.int64]]:
    """Return the hashes of each text's three-word runs, sorted and without repeats, and the index of each
    run's text.
    """
    words = np.concatenate(texts)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    if len(words) < 3:
        return np.zeros(0, np.uint32), np.zeros(0, np.int64)
    runs = words[:-2] * np.uint32(0x9E3779B1) + words[1:-1] * np.uint32(0x85EBCA77) + words[2:] * np.uint32(0xC2B2AE3D)
    runs = _mixed(runs)
    inside = owner[:-2] == owner[2:]
    keyed = np.unique(owner[:-2][inside].astype(np.uint64) << np.uint64(32) | runs[inside])
    return keyed.astype(np.uint32), (keyed >> np.uint64(32)).astype(np.int64)


def _mixed(numbers: Numbers) -> Numbers:
    """Apply MurmurHash3's finalizer, which makes every bit depend on every other bit."""
    numbers = (numbers ^ numbers >> np.uint32(16)) * np.uint32(0x85EBCA6B)
    numbers = (numbers ^ numbers >> np.uint32(13)) * np.uint32(0xC2B2AE35)
    return numbers ^ numbers >> np.uint32(16)


def _common_runs(texts: Sequence[Numbers]) -> Numbers:
    runs, _ = _runs_of_three(list({text.tobytes(): text for text in texts}.values()))  # exact copies do not count
    different, texts_with = np.unique(runs, return_counts=True)
    return different[texts_with > max(_COMMON_TEXTS, _COMMON_SHARE * len(texts))]


def _sketch(texts: Sequence[Numbers], common: Numbers | None) -> Sketches:
    sketches = np.zeros(len(texts), _SKETCH)
    runs, owner = _runs_of_three(texts)
    if common is not None and len(common):
        own = ~np.isin(runs, common)
        runs, owner = runs[own], owner[own]
    counts = np.bincount(owner, minlength=len(texts))
    filled = np.flatnonzero(counts)
    if len(filled):
        starts = np.searchsorted(owner, filled)
        for place, (factor, offset) in enumerate(zip(_FACTORS, _OFFSETS, strict=True)):
            sketches["values"][filled, place] = np.minimum.reduceat(runs * factor + offset, starts).astype(np.uint16)
    sketches["runs"] = np.minimum(counts, 2**16 - 1)
    return sketches


def _band(sketches: Sketches, band: int) -> NDArray[np.uint64]:
    """Return, for each sketch, the four consecutive 16-bit values that form the given band, as one 64-bit value."""
    part = np.ascontiguousarray(sketches["values"][:, band * _BAND : (band + 1) * _BAND])
    return part.view(np.uint64).ravel()


def _near(
    sketches: Sketches, ones: NDArray[np.int64], others: Sketches, theirs: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return, for each pair, whether the two texts are similar enough to be near duplicates."""
    near = np.zeros(len(ones), np.bool_)
    for start in range(0, len(ones), _PAIR_BATCH):
        part = slice(start, start + _PAIR_BATCH)
        one, other = sketches[ones[part]], others[theirs[part]]
        equal = np.count_nonzero(one["values"] == other["values"], axis=1)
        few, many = np.minimum(one["runs"], other["runs"]), np.maximum(one["runs"], other["runs"])
        short = (few < _MIN_RUNS) & ((equal < _VALUES) | (few < many))
        near[part] = (equal >= SIMILAR * _VALUES) & ~short & (few >= 0.6 * many)
    return near


def unite(group: NDArray[np.int64], ones: NDArray[np.int64], others: NDArray[np.int64]) -> None:
    """Merge the groups of the two texts in each pair, updating `group` in place. The smaller group index is kept.

    Args:
        group: for each text, the index of the first text in its group.
        ones, others: the first and the second text of each pair.
    """
    while len(ones):
        one, other = group[ones], group[others]
        apart = one != other
        ones, others, one, other = ones[apart], others[apart], one[apart], other[apart]
        np.minimum.at(group, np.maximum(one, other), np.minimum(one, other))
        while not np.array_equal(jumped := group[group], group):
            group[:] = jumped
