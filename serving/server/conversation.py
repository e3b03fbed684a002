"""A conversation with a served model in the terminal."""

import json
from collections.abc import Iterator
from typing import Any

import httpx

from serving.protocols.server_sent_events import json_of
from svc.errors import EngineError
from svc.remote.server_url import ServerAddress

_PATH = "/v1/chat/completions"
_TIMEOUT_S = 600.0


class Conversation:
    """A conversation with a model, kept as a list of turns.

    Args:
        server: the server that answers.
        model: name of the model.
        system: text of the system turn, if any.
    """

    def __init__(self, server: ServerAddress, model: str, system: str | None = None) -> None:
        self._server = server
        self._model = model
        self._turns = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str) -> Iterator[str]:
        """Send a user turn and yield the answer as it arrives.

        Raises:
            EngineError: the server rejected the request, or the answer was interrupted. In both cases, the user
                turn is removed.
        """
        turns = [*self._turns, {"role": "user", "content": text}]
        answer = ""
        try:
            for piece in self._stream({"model": self._model, "messages": turns, "stream": True}):
                answer += piece
                yield piece
        except httpx.HTTPError as error:
            raise EngineError(f"the server is not responding: {error!r}", todo="check `svc status`") from error
        self._turns = [*turns, {"role": "assistant", "content": answer}]

    def _stream(self, body: dict[str, Any]) -> Iterator[str]:
        with self._server.client(_TIMEOUT_S) as client, client.stream("POST", _PATH, json=body) as response:
            if response.is_error:
                response.read()
                raise EngineError(f"the server responded with status {response.status_code}: {_message(response.text)}")
            for line in response.iter_lines():
                if piece := _piece(line):
                    yield piece


def _piece(line: str) -> str:
    event = json_of(line.encode())
    if "error" in event:
        raise EngineError(f"the server aborted the response: {event['error'].get('message')}")
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
