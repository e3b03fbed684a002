"""Helpers that build chat examples in one line."""

import json
from pathlib import Path
from typing import Any

from svc.dataset.schema.example import ChatExample, Message, Role


def turn(role: str, content: Any) -> dict[str, Any]:
    """Return a chat turn as a JSON object."""
    return {"role": role, "content": content}


def chat(user: str = "What is red?", answer: str = "a colour") -> ChatExample:
    """Return a chat example with a question and its answer."""
    return ChatExample((Message(Role.USER, user), Message(Role.ASSISTANT, answer)))


def write_lines(path: Path, *values: Any) -> Path:
    """Write each value as one line of JSON, and return the path."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
    return path
