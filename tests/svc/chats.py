"""Chat examples in one line."""

import json
from pathlib import Path
from typing import Any

from svc.dataset.schema.example import ChatExample, Message, Role


def turn(role: str, content: Any) -> dict[str, Any]:
    """Return a turn as JSON."""
    return {"role": role, "content": content}


def chat(user: str = "What is red?", answer: str = "a colour") -> ChatExample:
    """Return an example of a question and its answer."""
    return ChatExample((Message(Role.USER, user), Message(Role.ASSISTANT, answer)))


def write_lines(path: Path, *values: Any) -> Path:
    """Write one JSON value per line."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
    return path
