"""A prompt in a form in which two that differ only in spacing and case are equal."""

from svc.dataset.schema.example import ChatExample, Message
from svc.dataset.text.plain_text import normal


def normal_prompt(example: ChatExample) -> str:
    """Equal for equal prompts, spacing and case aside."""
    return "\x1f".join(map(_normal_turn, example.prompt))


def _normal_turn(message: Message) -> str:
    calls = "".join(f"\x1d{call.name}\x1d{call.arguments}" for call in message.tool_calls)
    return f"{message.role}:{normal(message.content)}{calls}"
