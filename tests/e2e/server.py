"""The server shared by the end-to-end tests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from examples.service import svc_json

PORT = 8941
HELDOUT_EXAMPLES = 24
"""Number of held-out examples: twice the smallest window of the drift tests, plus a few."""


def of_one_model(status: dict[str, Any]) -> dict[str, Any]:
    """Return a server's status merged with the status of its only model."""
    return {**status, **(status["models"] or [{}])[0]}


@dataclass(frozen=True)
class Server:
    """The server under test."""

    home: Path
    url: str
    client: openai.OpenAI
    prompts: list[list[dict[str, str]]]

    def answer(self, prompt: int, **options: Any) -> str:
        messages: Any = self.prompts[prompt]
        answer = self.client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=24, temperature=0, **options
        )
        return answer.choices[0].message.content or ""

    def answers(self) -> list[str]:
        return [self.answer(index) for index in range(len(self.prompts))]

    def status(self) -> Any:
        """Return the status of the server merged with that of its only model."""
        return of_one_model(svc_json(self.home, "status"))

    def folder(self, number: int) -> Path:
        return self.home / "models" / "tiny" / str(number)
