"""A text embedding that maps prompts to vectors by topic, fitted on a version's examples.

A prompt has two views: its coordinates in a space fitted to the examples' prompts (latent semantic analysis of
character n-grams, Deerwester et al. 1990), and the predicted coordinates of its answer in a space fitted to the
examples' answers (a ridge regression on the prompt's coordinates).
With the second view, detecting a topic change that matters to the task takes only about two thirds as many prompts.
Lipton et al. 2018 and Rabanser et al. 2019 found a similar gain with a classifier's outputs.

The map is not fitted on the examples with which live prompts are compared (drift_sample.py). It therefore fits those
examples no better than it fits live prompts, as a permutation test requires. Texts cannot be recovered from the map,
because n-grams and words are stored as hashes. This module knows nothing about statistical tests, windows or the served
model.
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
"""Combining vowel signs and tone marks, which are treated as part of the preceding letter."""
WORD = rf"[{_UNSPACED}][{_MARKS}]*|[^\W\d_{_UNSPACED}]+"
"""Matches a run of letters or, in a script without spaces, a single letter with any combining marks that follow it."""
_BUCKETS = 2**14
_WORD_BUCKETS = 2**20
_AXES = 256
_TOPIC_AXES = 64
"""Number of axes of a prompt's topic vector. The vector of the prompt's answer is predicted from all `_AXES` axes."""
_ANSWER_AXES = 32
_RIDGE = 0.3
_MAX_EXAMPLES = 5_000
"""Maximum number of examples on which the text embedding is fitted. More would use memory without improving it."""
_END_CHARS = 1_000
"""Number of characters read at each end of a long text. Computing the n-grams of the whole text would take
30 ms."""
_BATCH = 100
"""Number of texts to process at a time, which limits the memory needed for n-grams."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """The vectors of a list of prompts.

    Attributes:
        topic: array of shape (prompts, axes), with each prompt's coordinates in the space fitted to the
            examples' prompts.
        answer: array of shape (prompts, axes), with the predicted coordinates of each prompt's answer in the
            space fitted to the examples' answers. The array has no axes if all those answers are the same.
    """

    topic: Floats
    answer: Floats


@dataclass(frozen=True, slots=True)
class TextSpace:
    """A fitted map from prompts to vectors. All of its arrays are stored by `save_text_space`.

    Attributes:
        idf: weight of each n-gram bucket.
        axes: array of shape (axes, buckets), strongest axis first.
        answers: regression coefficients, an array of shape (prompt axes, answer axes).
        words: sorted hashes of all words in the prompts used for fitting.
    """

    idf: NDArray[np.float32]
    axes: NDArray[np.float32]
    answers: NDArray[np.float32]
    words: NDArray[np.int32]

    def embed(self, prompts: Sequence[str]) -> Embedding:
        """Return the prompts as vectors."""
        if not prompts:
            return Embedding(np.zeros((0, min(_TOPIC_AXES, len(self.axes)))), np.zeros((0, self.answers.shape[1])))
        placed = np.asarray(_weighted(_ngrams(prompts), self.idf) @ self.axes.T, dtype=np.float64)
        return Embedding(placed[:, :_TOPIC_AXES], placed @ self.answers)

    def unknown_words(self, prompts: Sequence[str]) -> Floats:
        """Return, for each prompt, the fraction of its distinct words that never occur in the prompts used for fitting.

        The fraction is 0 for a prompt without words.
        """
        if not prompts:
            return np.zeros(0)
        counts = _words(prompts)
        shares = np.zeros(counts.shape[0])
        for row in range(counts.shape[0]):
            words = counts.indices[counts.indptr[row] : counts.indptr[row + 1]]
            if len(words):
                places = np.minimum(np.searchsorted(self.words, words), len(self.words) - 1)
                shares[row] = (self.words[places] != words).mean() if len(self.words) else 1.0
        return shares


def head_and_tail(text: str) -> str:
    """Return the part of a text that is analyzed: the beginning and the end of a long text, or all of a short one."""
    return text if len(text) <= 2 * _END_CHARS else f"{text[:_END_CHARS]}\n{text[-_END_CHARS:]}"


def fit_text_space(prompts: Sequence[str], answers: Sequence[str]) -> TextSpace:
    """Fit the map from prompts to vectors.

    Args:
        prompts: at least one prompt. If there are more than 5,000, only 5,000 evenly spaced ones are used.
        answers: one answer per prompt.
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
    answer_counts = _ngrams(answers)
    weighted_answers = _weighted(answer_counts, TfidfTransformer().fit(answer_counts).idf_.astype(np.float32))
    differing = np.unique(answers).size > 1
    targets = weighted_answers @ _main_axes(weighted_answers, _ANSWER_AXES if differing else 0).T
    return TextSpace(
        idf=idf,
        axes=axes.astype(np.float32),
        answers=_answer_map(placed, targets).astype(np.float32),
        words=np.unique(_words(prompts).indices).astype(np.int32),
    )


def save_text_space(path: Path, space: TextSpace) -> None:
    """Write a text space as a NumPy archive without pickled objects.

    Axes are stored in half precision, which does not affect any comparison.
    """
    arrays = {field.name: getattr(space, field.name) for field in fields(space)}
    np.savez_compressed(path, allow_pickle=False, **{**arrays, "axes": space.axes.astype(np.float16)})


def load_text_space(path: Path) -> TextSpace:
    """Load a text space from its archive.

    Raises:
        IntegrityError: the file is missing or is not a valid archive.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {field.name: archive[field.name] for field in fields(TextSpace)}
    except Exception as error:  # NumPy and zipfile raise ten types for a damaged file
        raise IntegrityError(
            f"cannot read {path}: {error}", todo="restore the file from a backup, or train again"
        ) from error
    return TextSpace(**{**arrays, "axes": arrays["axes"].astype(np.float32)})


def _answer_map(placed: Floats, targets: Floats) -> Floats:
    """Return the coefficients of a regression of answers on prompts, an array of shape (prompt axes, answer axes).

    The intercept is omitted because it would shift all prompts by the same amount.
    """
    from sklearn.linear_model import Ridge

    if not targets.shape[1]:
        return np.zeros((placed.shape[1], 0))
    coefficients = Ridge(_RIDGE).fit(placed, targets).coef_  # one-dimensional for one target
    return np.asarray(coefficients, dtype=np.float64).reshape(targets.shape[1], -1).T


def _main_axes(matrix: "csr_matrix", count: int) -> Floats:
    """Return the first `count` principal axes of a weight matrix, or fewer if the matrix is too small."""
    from sklearn.decomposition import TruncatedSVD

    count = min(count, min(matrix.shape) - 1)
    if count < 1:
        return np.zeros((0, matrix.shape[1]))
    # For equal texts, scikit-learn divides by their variance of 0, for an attribute that is not used.
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(TruncatedSVD(count, random_state=0).fit(matrix).components_, dtype=np.float64)


def _ngrams(texts: Sequence[str]) -> "csr_matrix":
    return _hashed(texts, n_features=_BUCKETS, analyzer="char_wb", ngram_range=(2, 5))


def _words(texts: Sequence[str]) -> "csr_matrix":
    return _hashed(texts, n_features=_WORD_BUCKETS, token_pattern=WORD)


def _hashed(texts: Sequence[str], **options: object) -> "csr_matrix":
    """Count each text's n-grams or words per hash bucket. The result has shape (texts, buckets)."""
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import HashingVectorizer

    hasher = HashingVectorizer(alternate_sign=False, norm=None, **options)
    cut = [head_and_tail(text) for text in texts]
    return vstack([hasher.transform(cut[at : at + _BATCH]) for at in range(0, len(cut), _BATCH)]).tocsr()


def _weighted(counts: "csr_matrix", idf: NDArray[np.float32]) -> "csr_matrix":
    """Convert counts to sublinear TF-IDF weights, and normalize each row to length 1."""
    from sklearn.preprocessing import normalize

    weighted = counts.astype(np.float64, copy=True)
    np.log(weighted.data, out=weighted.data)
    weighted.data += 1
    weighted.data *= idf[weighted.indices]
    return normalize(weighted, copy=False)
