"""Extracts a request's prompt and answer as text from the bytes that the gateway forwarded.

This runs in the thread that writes records, after the client has received its answer.
"""

import json
from dataclasses import dataclass, field

from serving.protocols.route import Route
from serving.protocols.wire_formats import wire_format
from svc.redaction import Redactor

MAX_ANSWER_BYTES = 4 * 2**20
"""Maximum size of a stored answer, in bytes. It is enough for 20,000 tokens sent as events of about 200 bytes."""


@dataclass(slots=True)
class Content:
    """The forwarded bytes of a request and its answer, and the purposes for which they are kept.

    Attributes:
        route: route of the request, which determines the format of `payload` and `answer`.
        payload: the JSON body for the engine, without `model`.
        answer: a JSON body, or the events of a stream.
        size: number of bytes kept in memory.
        too_long: whether the answer exceeded the limit and is no longer kept in memory.
        stored: whether the prompt and the answer are stored in the request log.
        features: whether drift features of the prompt and the answer are stored.
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
        """Whether the prompt or the answer is needed for a purpose other than storing it."""
        return self.features or self.expects_json

    def __post_init__(self) -> None:
        self.size = len(self.payload)

    def add(self, part: bytes) -> None:
        """Append a chunk of the answer."""
        self.too_long = self.too_long or self.size + len(part) > len(self.payload) + MAX_ANSWER_BYTES
        if self.too_long:
            self.answer.clear()
            return
        self.answer.append(part)
        self.size += len(part)


def prompt_text(content: Content, redactor: Redactor) -> str:
    """Return the redacted JSON of a request's messages, or of a plain completion's prompt.

    Raises:
        ValueError: the prompt consists of token ids, which anyone with the tokenizer can read but which cannot
            be redacted.
    """
    prompt = wire_format(content.route).prompt(json.loads(content.payload))
    texts = prompt if isinstance(prompt, list) else [prompt]
    if not all(isinstance(text, str | dict) for text in texts):
        raise ValueError("the prompt is not text")
    return _encodable(json.dumps(redactor.strings(prompt), ensure_ascii=False))


def answer_text(content: Content, redactor: Redactor) -> str:
    """Return the redacted text of the answer's first choice, including its tool calls.

    The text is redacted after its events have been joined, because a phone number may be split across several events.
    """
    return _encodable(redactor.text(wire_format(content.route).text(content.answer)))


def is_json_answer(content: Content) -> bool:
    """Return whether the text of the answer's first choice is JSON once its thinking text is removed."""
    from svc.dataset.text.thinking import without_thinking
    from svc.evaluation.metrics.json_answers import is_json  # imports numpy

    return is_json(without_thinking(wire_format(content.route).text(content.answer)))


def _encodable(text: str) -> str:
    """Return the text with lone surrogates replaced, because they are valid in JSON but not in UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")
