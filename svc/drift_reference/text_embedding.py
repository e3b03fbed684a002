"""A map from prompts to vectors, made from a version's examples: what tells one topic from another.

Two views of a prompt: where it lies among those prompts (latent semantic analysis of character n-grams,
Deerwester et al. 1990), and which answer it asks for (a ridge regression from there to their answers). With the
second, a change of topics that matters to the task is seen in about two thirds of the prompts; Lipton et al. 2018 and
Rabanser et al. 2019 found such a gain with a classifier's outputs.

It is made from other examples than those that live prompts are compared with (drift_sample.py), so that neither of the
two is nearer to it than the other: that is what a permutation test between them needs. Texts cannot be read back from
it: n-grams and words are kept as hashes. Knows nothing of tests, windows or the served model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from svc.errors import IntegrityError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Floats = NDArray[np.float64]

TEXT_SPACE_FILE = "text_space.npz"
_UNSPACED = (
    "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46"  # Thai
    "\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6\u0edc-\u0edf"  # Lao
    "\u1000-\u102a\u103f\u1050-\u1055\u105a-\u105d\u1061\u1065\u1066\u106e-\u1070\u1075-\u1081\u108e"  # Burmese
    "\u1780-\u17b3\u17d7\u17dc"  # Khmer
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese
)
_MARKS = (
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece"
    "\u102b-\u103e\u1056-\u1059\u105e-\u1060\u1062-\u1064\u1067-\u106d\u1071-\u1074\u1082-\u108d\u108f\u109a-\u109d"
    "\u17b4-\u17d3\u17dd\u3099\u309a"
)
"""Vowels and tones that are written on the letter before them."""
WORD = rf"[{_UNSPACED}][{_MARKS}]*|[^\W\d_{_UNSPACED}]+"
"""A run of letters; of a script that is written without spaces, a single letter with its marks."""
_BUCKETS = 2**14
_WORD_BUCKETS = 2**20
_AXES = 256
_TOPIC_AXES = 64
"""Of the axes, those that are compared as they are; the answer is predicted from all of them."""
_ANSWER_AXES = 32
_RIDGE = 0.3
_MAX_EXAMPLES = 5_000
"""More examples make no better axes, and cost memory."""
_END_CHARS = 1_000
"""Characters of a long text that are read at its beginning and at its end; n-grams of all of it cost 30 ms."""
_TOGETHER = 100
"""Texts whose n-grams are in memory at once, before they are added up."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """Prompts as vectors.

    Attributes:
        topic: prompts by axes; where they lie among those that the map was made from.
        answer: prompts by axes; the answer that they ask for. No axes where all answers were the same.
    """

    topic: Floats
    answer: Floats


@dataclass(frozen=True, slots=True)
class TextSpace:
    """The map. All arrays are what `save_text_space` keeps.

    Attributes:
        idf: weight of each n-gram bucket.
        axes: axes by buckets, the strongest first.
        answers: axes of the prompt by axes of the answer.
        words: sorted hashes of the words of the prompts.
    """

    idf: NDArray[np.float32]
    axes: NDArray[np.float32]
    answers: NDArray[np.float32]
    words: NDArray[np.int32]

    def embed(self, prompts: Sequence[str]) -> Embedding:
        """Prompts as vectors."""
        if not prompts:
            return Embedding(np.zeros((0, min(_TOPIC_AXES, len(self.axes)))), np.zeros((0, self.answers.shape[1])))
        placed = np.asarray(_weighted(_ngrams(prompts), self.idf) @ self.axes.T, dtype=np.float64)
        return Embedding(placed[:, :_TOPIC_AXES], placed @ self.answers)

    def unknown_words(self, prompts: Sequence[str]) -> Floats:
        """Share of the distinct words of each prompt that no prompt of the map has; 0 for one without words."""
        if not prompts:
            return np.zeros(0)
        found = _words(prompts)
        shares = np.zeros(found.shape[0])
        for row in range(found.shape[0]):
            words = found.indices[found.indptr[row] : found.indptr[row + 1]]
            if len(words):
                places = np.minimum(np.searchsorted(self.words, words), len(self.words) - 1)
                shares[row] = (self.words[places] != words).mean() if len(self.words) else 1.0
        return shares


def head_and_tail(text: str) -> str:
    """Return the part of a text that is read: all of it, or the beginning and the end of a long one."""
    return text if len(text) <= 2 * _END_CHARS else f"{text[:_END_CHARS]}\n{text[-_END_CHARS:]}"


def fit_text_space(prompts: Sequence[str], answers: Sequence[str]) -> TextSpace:
    """Makes the map.

    Args:
        prompts: at least one; beyond 5,000, evenly picked.
        answers: one for each prompt.
    """
    from sklearn.feature_extraction.text import TfidfTransformer

    if len(prompts) > _MAX_EXAMPLES:
        places = np.linspace(0, len(prompts) - 1, _MAX_EXAMPLES).round().astype(int)
        prompts, answers = [prompts[place] for place in places], [answers[place] for place in places]
    counts = _ngrams(prompts)
    idf = TfidfTransformer().fit(counts).idf_.astype(np.float32)
    weighted = _weighted(counts, idf)
    axes = _main_axes(weighted, _AXES)
    placed = weighted @ axes.T
    wanted = _ngrams(answers)
    weighted_answers = _weighted(wanted, TfidfTransformer().fit(wanted).idf_.astype(np.float32))
    differing = np.unique(answers).size > 1
    targets = weighted_answers @ _main_axes(weighted_answers, _ANSWER_AXES if differing else 0).T
    return TextSpace(
        idf=idf,
        axes=axes.astype(np.float32),
        answers=_answer_map(placed, targets).astype(np.float32),
        words=np.unique(_words(prompts).indices).astype(np.int32),
    )


def save_text_space(path: Path, space: TextSpace) -> None:
    """Writes it as a NumPy archive without pickled objects; the axes in half precision, which no comparison sees."""
    arrays = {field.name: getattr(space, field.name) for field in fields(space)}
    np.savez_compressed(path, allow_pickle=False, **{**arrays, "axes": space.axes.astype(np.float16)})


def load_text_space(path: Path) -> TextSpace:
    """Reads it.

    Raises:
        IntegrityError: it is missing or is no such archive.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {field.name: archive[field.name] for field in fields(TextSpace)}
    except Exception as error:  # NumPy and zipfile have ten kinds for a damaged file
        raise IntegrityError(f"cannot read {path}: {error}", todo="restore it from a backup, or train again") from error
    return TextSpace(**{**arrays, "axes": arrays["axes"].astype(np.float32)})


def _answer_map(placed: Floats, targets: Floats) -> Floats:
    """Prompt axes by answer axes. The intercept is left out: it moves all prompts alike, which no comparison sees."""
    from sklearn.linear_model import Ridge

    if not targets.shape[1]:
        return np.zeros((placed.shape[1], 0))
    found = Ridge(_RIDGE).fit(placed, targets).coef_
    return np.asarray(found, dtype=np.float64).reshape(targets.shape[1], -1).T  # of one target it has one dimension


def _main_axes(matrix: "csr_matrix", count: int) -> Floats:
    """The strongest axes of a matrix of weights; no more than it can have."""
    from sklearn.decomposition import TruncatedSVD

    count = min(count, min(matrix.shape) - 1)
    if count < 1:
        return np.zeros((0, matrix.shape[1]))
    # Of texts that are all alike it divides by their spread, for a figure that is not used.
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(TruncatedSVD(count, random_state=0).fit(matrix).components_, dtype=np.float64)


def _ngrams(texts: Sequence[str]) -> "csr_matrix":
    return _hashed(texts, n_features=_BUCKETS, analyzer="char_wb", ngram_range=(2, 5))


def _words(texts: Sequence[str]) -> "csr_matrix":
    return _hashed(texts, n_features=_WORD_BUCKETS, token_pattern=WORD)


def _hashed(texts: Sequence[str], **options: object) -> "csr_matrix":
    """Counts of hashed parts, texts by buckets."""
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import HashingVectorizer

    hasher = HashingVectorizer(alternate_sign=False, norm=None, **options)
    cut = [head_and_tail(text) for text in texts]
    return vstack([hasher.transform(cut[at : at + _TOGETHER]) for at in range(0, len(cut), _TOGETHER)]).tocsr()


def _weighted(counts: "csr_matrix", idf: NDArray[np.float32]) -> "csr_matrix":
    """Sublinear TF-IDF with rows of length 1."""
    from sklearn.preprocessing import normalize

    weighted = counts.astype(np.float64, copy=True)
    np.log(weighted.data, out=weighted.data)
    weighted.data += 1
    weighted.data *= idf[weighted.indices]
    return normalize(weighted, copy=False)
