"""A version's drift reference, which consists of a sample of its prompts and a sample of its answers.

The samples are read from the registry. The prompts are a random sample of all of the version's examples.
The answers are the version's answers to the held-out examples, which are the only examples that it has answered without
having been trained on them. Prompts and answers are redacted like live texts before they are stored, so that email
addresses are blanked in the reference as well as in traffic.

The hashes are computed with a random key. Each home folder has its own key, in a file next to the database. Without
this key, nobody can test whether a given word was in a prompt. Texts can still be compared, because equal texts have
equal hashes.
"""

import json
import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tool_calls import calls_in
from svc.drift_reference.answer import AnswerSampler, ComparedAnswer
from svc.drift_reference.drift_sample import DRIFT_SAMPLE_FILE
from svc.drift_reference.prompt import Prompt, PromptSampler
from svc.drift_reference.sample import Sample
from svc.drift_reference.text_embedding import TEXT_SPACE_FILE, WORD, head_and_tail, load_text_space
from svc.errors import IntegrityError, NotFoundError
from svc.evaluation.results import ExampleResult, largest_limit
from svc.files.disk import sync_folder
from svc.redaction import Redactor
from svc.registry.registry import Registry
from svc.version import Target

_MAX_ANSWERS = 1_000
"""Maximum number of held-out answers in the reference. The answers are chosen at even intervals. Redacting more answers
would take seconds, and the additional precision is not needed."""
KEY_FILE = "drift.key"
MAX_WORDS = 512
"""Maximum number of distinct words per prompt whose hashes are kept. A page of text has about 250 distinct words."""
_KEY_BYTES = 16
_WORD = re.compile(rf"{WORD}|\d+")


@dataclass(frozen=True, slots=True)
class KeyedHash:
    """Computes hashes with a home folder's key."""

    key: bytes = field(repr=False)

    @classmethod
    def of_home(cls, home: Path) -> "KeyedHash":
        """Return the hash function that uses a home folder's key, creating the key on first use.

        Raises:
            IntegrityError: the key file has the wrong size.
        """
        path = home / KEY_FILE
        if not path.exists():
            _make_key(path)
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise IntegrityError(
                f"the key in {path} has {len(key)} bytes",
                expected=f"a key of {_KEY_BYTES} bytes",
                todo="restore the file from a backup, or remove the file if there is no backup",
            )
        return cls(key)

    def words(self, text: str) -> NDArray[np.int32]:
        """Return the hashes of a text's distinct words in sorted order, keeping only the `MAX_WORDS` smallest.

        The smallest hashes are a consistent random sample of the words, because a word has the same hash in every text.
        """
        distinct = set(_WORD.findall(head_and_tail(text).lower()))
        hashes = {self._number(word, 4) for word in distinct}
        return np.array(sorted(hashes)[:MAX_WORDS], dtype=np.int32)

    def conversation(self, opening: str) -> int:
        """Return a hash that identifies a conversation by its opening."""
        return self._number(opening, 8)

    def _number(self, text: str, size: int) -> int:
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size, key=self.key).digest()
        return int.from_bytes(digest, "little", signed=True)


def _make_key(path: Path) -> None:
    """Write a new key, unless another process has already written one."""
    with NamedTemporaryFile(dir=path.parent, prefix=f".{KEY_FILE}.") as file:  # has mode 0600
        file.write(secrets.token_bytes(_KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(file.name, path)
    sync_folder(path.parent)


@dataclass(frozen=True)
class Reference:
    """Samples that a version's live traffic in one format is compared with.

    Attributes:
        prompts: prompts of the drift sample, or None if the version has no text space.
        answers: answers to the held-out examples, or None if the version has no stored answers.
        missing: the reason why `prompts` or `answers` is None.
        words: `KeyedHash.words` of each prompt.
        hashes: hashes the words and conversations of live traffic, with the home folder's key.
    """

    prompt_sampler: PromptSampler | None
    answer_sampler: AnswerSampler | None
    prompts: Sample | None
    answers: Sample | None
    missing: str
    words: list[NDArray[np.int32]]
    hashes: KeyedHash


def read_reference(registry: Registry, target: Target, redactor: Redactor) -> Reference:
    """Read a version's drift reference.

    Raises:
        NotFoundError: there is no such version.
        IntegrityError: the version's files differ from its manifest.
    """
    version = target.version
    examples = registry.heldout(version)
    missing, hashes = "", KeyedHash.of_home(registry.models.parent)
    compared: list[Prompt] = []
    prompt_sampler, answer_sampler, prompts, answers = None, None, None, None
    try:
        prompt_sampler = PromptSampler(load_text_space(registry.reference(version, TEXT_SPACE_FILE)))
        sample = read_examples(registry.reference(version, DRIFT_SAMPLE_FILE))
        compared = [_reference_prompt(example, redactor) for example in sample]
        prompts = prompt_sampler.sample(compared)
        results = registry.results(version, target.format)
        answer_sampler = AnswerSampler([example.answer for example in examples], largest_limit(results))
        answered = list(zip(examples, results, strict=False))
        every = -(-len(answered) // _MAX_ANSWERS) or 1
        answers = answer_sampler.sample(
            [_heldout_answer(example, result, redactor) for example, result in answered[::every]]
        )
    except NotFoundError as error:
        missing = error.wrong
    return Reference(
        prompt_sampler,
        answer_sampler,
        prompts,
        answers,
        missing,
        words=[hashes.words(prompt.text) for prompt in compared],
        hashes=hashes,
    )


def _heldout_answer(example: ChatExample, result: ExampleResult, redactor: Redactor) -> ComparedAnswer:
    """Return a held-out answer in the form in which a live answer would be stored.

    The answer has no score if it calls tools, or if the prompt or the answer contains text that is redacted.
    """
    texts = [*(message.content for message in example.prompt), result.answer]
    unredacted = all(redactor.text(text) == text for text in texts)
    logprob = result.logprob if unredacted and not calls_in(result.answer) else None
    return ComparedAnswer(redactor.text(result.answer), result.tokens, result.finish_reason, logprob, greedy=True)


def read_prompt(stored: str) -> Prompt:
    """Parse a stored prompt.

    A prompt is stored as JSON, which is either a list of messages or the text of a plain completion.
    """
    content = json.loads(stored) if stored else ""
    if not isinstance(content, list):
        return Prompt(str(content), opening=str(content))
    messages = [message for message in content if isinstance(message, dict)]
    if not messages:  # several plain prompts in one request
        text = "\n".join(str(part) for part in content)
        return Prompt(text, opening=text)
    return _prompt([(str(message.get("role")), _text(message.get("content"))) for message in messages])


def _reference_prompt(example: ChatExample, redactor: Redactor) -> Prompt:
    return _prompt([(message.role.value, redactor.text(message.content)) for message in example.prompt])


def _prompt(turns: Sequence[tuple[str, str]]) -> Prompt:
    questions = [text for role, text in turns if role == "user"]
    system = "\n".join(text for role, text in turns if role in ("system", "developer"))
    count = sum(role in ("user", "assistant") for role, _ in turns)
    first = next((place for place, (role, _) in enumerate(turns) if role == "user"), len(turns))
    opening = "\n".join(f"{role}: {text}" for role, text in turns[: first + 1])
    return Prompt(questions[-1] if questions else "", count, system, opening)


def _text(content: Any) -> str:
    """Return the text of a message's content, which may consist of several parts."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(text for text in parts if isinstance(text, str))
    return content if isinstance(content, str) else ""
