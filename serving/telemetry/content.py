"""Extract a request's prompt and answer as text from the forwarded bytes.

This runs in the thread that writes records, long after the client got its answer.
"""

import json
from dataclasses import dataclass, field

from serving.protocols.route import Route
from serving.protocols.wire_formats import wire_format
from svc.redaction import Redactor

MAX_ANSWER_BYTES = 4 * 2**20
"""Maximum size of a stored answer in bytes, which is 20,000 tokens as events of about 200 bytes."""


@dataclass(slots=True)
class Content:
    """The forwarded bytes of one request and its answer.

    Attributes:
        route: determines the format of `payload` and `answer`.
        payload: the JSON for the engine, without `model`.
        answer: a JSON body, or the events of a stream.
        size: bytes in memory.
        too_long: whether the answer exceeded the limit, and is no longer kept in memory.
        stored: whether prompt and answer are stored with the row.
        features: whether drift features of prompt and answer are stored.
        expects_json: whether a rollout needs to know if the answer is JSON.
    """

    route: Route
    payload: bytes
    answer: list[bytes] = field(default_factory=list)
    size: int = 0
    too_long: bool = False
    stored: bool = True
    features: bool = False
    expects_json: bool = False

    @property
    def is_read(self) -> bool:
        """Whether prompt or answer are read although they are not stored."""
        return self.features or self.expects_json

    def __post_init__(self) -> None:
        self.size = len(self.payload)

    def add(self, part: bytes) -> None:
        """Append part of the answer's bytes."""
        self.too_long = self.too_long or self.size + len(part) > len(self.payload) + MAX_ANSWER_BYTES
        if self.too_long:
            self.answer.clear()
            return
        self.answer.append(part)
        self.size += len(part)


def prompt_text(content: Content, redactor: Redactor) -> str:
    """Return the redacted JSON of a request's messages, or of a plain completion's prompt.

    Raises:
        ValueError: the prompt consists of token ids, which are readable with the tokenizer but cannot be redacted.
    """
    prompt = wire_format(content.route).prompt(json.loads(content.payload))
    texts = prompt if isinstance(prompt, list) else [prompt]
    if not all(isinstance(text, str | dict) for text in texts):
        raise ValueError("the prompt is not text")
    return _encodable(json.dumps(redactor.strings(prompt), ensure_ascii=False))


def answer_text(content: Content, redactor: Redactor) -> str:
    """Return the redacted text of the answer's first choice, including its tool calls.

    The text is redacted after its events are joined, because a number may be spread over many events.
    """
    return _encodable(redactor.text(wire_format(content.route).text(content.answer)))


def is_json_answer(content: Content) -> bool:
    """Return whether the text of the first choice, without thinking, is JSON."""
    from svc.dataset.text.thinking import without_thinking
    from svc.evaluation.metrics.json_answers import is_json  # imports numpy

    return is_json(without_thinking(wire_format(content.route).text(content.answer)))


def _encodable(text: str) -> str:
    """Return the text with lone surrogates replaced, because JSON can hold them but UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")
