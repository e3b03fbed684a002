"""Real prompts and their variants: rephrasings, prompts of a templated client, and a fixed text as prefix.

Each prompt is embedded once. A stream is a list of indexes into the pool.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from monitoring.drift.detector import Baseline, Requests
from svc.dataset.readers.reader import read_examples
from svc.drift_reference.answer import AnswerSampler, ComparedAnswer
from svc.drift_reference.prompt import Prompt, PromptSampler
from svc.drift_reference.reference import KeyedHash
from svc.drift_reference.sample import Sample
from svc.drift_reference.text_embedding import fit_text_space

ROOT = Path(__file__).parents[2]
TASK = ROOT / "examples" / "debian-triage"
STREAMS = ROOT / "benchmarks" / "drift"
REPHRASINGS = 19
"""Number of rephrasings per prompt; together with the prompt they form a session of 20 requests."""
_FIXED_CHARS = 2_100
_TEMPLATED = 600
_WORD = re.compile(r"[^\W\d_]+")
_TOGETHER = 2_000

Places = NDArray[np.intp]


@dataclass(frozen=True)
class Pool:
    """Pool of all prompts and their variants.

    Attributes:
        sample: features of the prompts.
        answers: answers of a version that names each package's section; a changed prompt gets a random
            section.
        words: words of each prompt.
        sections: section of each prompt's package; empty if it has none.
        kinds: indexes of prompts by kind: `alike`, the grades of shift, `templated`, `fixed`.
        rephrased: indexes of the rephrasings, with shape [prompts of kind `alike`, `REPHRASINGS`].
    """

    sample: Sample
    answers: Sample
    words: list[NDArray[np.int32]]
    sections: list[str]
    kinds: dict[str, Places]
    rephrased: Places

    def requests(
        self, places: Places, *, first: int, conversations: Places | None = None, clients: Sequence[str] | None = None
    ) -> Requests:
        """Return the given prompts as requests, at a rate of 10,000 per day.

        Args:
            first: position of the first request in its stream.
            conversations: conversation of each request, or None if each request has its own.
            clients: client of each request, or None if unknown.
        """
        numbers = np.arange(first, first + len(places), dtype=np.int64)
        return Requests(
            self.sample.at(places),
            self.answers.at(places),
            [self.words[place] for place in places],
            numbers if conversations is None else conversations,
            np.asarray(numbers * 8.64, dtype=np.float64),
            [""] * len(places) if clients is None else clients,
        )

    def baseline(self, places: Places) -> Baseline:
        """Return the given prompts as a drift baseline."""
        words = [self.words[place] for place in places]
        return Baseline(self.sample.at(places), words, self.answers.at(places))


def read_pool() -> Pool:
    """Read and embed all prompts, in a text space built from the example's training prompts. Takes a minute."""
    train, heldout = read_examples(TASK / "train.jsonl"), read_examples(TASK / "heldout.jsonl")
    rows = [json.loads(line) for line in (STREAMS / "in_distribution.jsonl").read_text("utf-8").splitlines()]
    alike = [example.question for example in heldout] + [row["prompt"] for row in rows]
    sections = [json.loads(example.answer)["section"] for example in heldout] + [row["section"] for row in rows]
    chance = random.Random(0)  # noqa: S311 - no secret
    context = ("Context: " + " ".join(example.question for example in train[:12]))[:_FIXED_CHARS]
    texts, kinds = list(alike), {"alike": _places(0, len(alike))}
    grades: dict[str, list[str]] = {}
    for line in (STREAMS / "shifted.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        grades.setdefault(row["grade"], []).append(row["prompt"])
    grades["templated"] = [_templated(text, chance) for text in alike[:_TEMPLATED]]
    grades["fixed"] = [f"{context}\n\n{text}" for text in alike]
    for kind, prompts in grades.items():
        kinds[kind] = _places(len(texts), len(prompts))
        texts += prompts
    vocabulary = [word for text in alike for word in _WORD.findall(text)]
    rephrased = _places(len(texts), len(alike) * REPHRASINGS).reshape(len(alike), REPHRASINGS)
    texts += [rephrase(text, vocabulary, chance) for text in alike for _ in range(REPHRASINGS)]
    sampler = PromptSampler(fit_text_space([e.question for e in train], [e.answer for e in train]))
    parts = [
        sampler.sample([Prompt(text) for text in texts[at : at + _TOGETHER]]) for at in range(0, len(texts), _TOGETHER)
    ]
    sample = parts[0]
    for part in parts[1:]:
        sample = sample.followed_by(part)
    hashes = KeyedHash(bytes(16))
    between = [""] * (len(texts) - len(alike) - rephrased.size)
    of_rephrased = [section for section in sections for _ in range(REPHRASINGS)]
    named = sections + between + of_rephrased
    return Pool(sample, _answers(named, chance), [hashes.words(text) for text in texts], named, kinds, rephrased)


def _answers(sections: Sequence[str], chance: random.Random) -> Sample:
    names = sorted({section for section in sections if section})
    texts = [json.dumps({"section": section or chance.choice(names)}) for section in sections]
    sampler = AnswerSampler([text for text, section in zip(texts, sections, strict=True) if section], cut=16)
    return sampler.sample([ComparedAnswer(text, len(text) // 3, "stop", None, greedy=True) for text in texts])


def rephrase(text: str, vocabulary: Sequence[str], chance: random.Random) -> str:
    """Return the text with 8 to 25% of its words replaced, dropped or moved."""
    words = text.split(" ")
    for _ in range(max(1, int(len(words) * chance.uniform(0.08, 0.25)))):
        place, kind = chance.randrange(len(words)), chance.random()
        if kind < 0.4:
            words[place] = chance.choice(vocabulary)
        elif kind < 0.7 and len(words) > 5:
            words.pop(place)
        else:
            other = chance.randrange(len(words))
            words[place], words[other] = words[other], words[place]
    return " ".join(words)


def _templated(text: str, chance: random.Random) -> str:
    return (
        f"Ticket {chance.randint(1000, 9999)}: classify the following package. Answer with one word.\n\n"
        f"Package: {text[:60]}\nPriority: {chance.choice(['low', 'high'])}"
    )


def _places(first: int, count: int) -> Places:
    return np.arange(first, first + count, dtype=np.intp)
