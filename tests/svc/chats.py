"""Chat examples by the line."""

import json
from pathlib import Path
from typing import Any

from svc.dataset.schema.example import ChatExample, Message, Role


def turn(role: str, content: Any) -> dict[str, Any]:
    """One turn as JSON has it."""
    return {"role": role, "content": content}


def chat(user: str = "What is red?", answer: str = "a colour") -> ChatExample:
    """A question with its answer."""
    return ChatExample((Message(Role.USER, user), Message(Role.ASSISTANT, answer)))


def write_lines(path: Path, *values: Any) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
    return path
