"""Load from the unmodified official OpenAI client: concurrent streams that each send requests in turn.

Retries are disabled, so that every failure is recorded.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import openai


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer received during the load, or its failure.

    Attributes:
        prompt: index of the prompt.
        version: version that answered, from the header `x-model-version`.
        began: start of the request, in seconds of the monotonic clock.
        seconds: time from then to the last token.
    """

    prompt: int
    version: str
    text: str
    error: str | None
    began: float
    seconds: float


class Load:
    """Context manager that runs streams of requests. On exit it waits for the requests in flight.

    Args:
        url: the server's root, without /v1.
        prompts: conversations without an answer, as OpenAI messages; used in turn.
        streams: number of concurrent streams.
        pause_s: pause before each of a stream's requests, in seconds.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompts: Sequence[list[dict[str, str]]],
        *,
        streams: int = 8,
        pause_s: float = 0.0,
        max_tokens: int = 24,
    ) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self._model = model
        self._prompts = prompts
        self._streams = streams
        self._pause_s = pause_s
        self._max_tokens = max_tokens
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self.answers: list[Answer] = []

    @property
    def failed(self) -> list[Answer]:
        """Return the requests that did not get a complete answer."""
        return [answer for answer in self.answers if answer.error]

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(self._streams)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def wait_for(self, answers: int, timeout_s: float = 120) -> None:
        """Wait for the given number of further answers, including failures.

        Raises:
            TimeoutError: the answers did not arrive in time.
        """
        wanted, deadline = len(self.answers) + answers, time.monotonic() + timeout_s
        while len(self.answers) < wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"received only {len(self.answers)} of {wanted} answers after {timeout_s:.0f} s")
            time.sleep(0.05)

    def _run(self, index: int) -> None:
        while not self._stop.wait(self._pause_s):
            self.answers.append(self._ask(index % len(self._prompts)))
            index += self._streams

    def _ask(self, prompt: int) -> Answer:
        began = time.monotonic()
        version, text, error = "", "", None
        messages: Any = self._prompts[prompt]
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=messages,
                max_tokens=self._max_tokens,
                temperature=0,
                stream=True,
            )
            version = raw.headers["x-model-version"]
            for chunk in raw.parse():
                text += chunk.choices[0].delta.content or ""
        except openai.OpenAIError as failure:
            error = repr(failure)
        return Answer(prompt, version, text, error, began, time.monotonic() - began)
