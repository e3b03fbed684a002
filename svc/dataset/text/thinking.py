"""Thinking in the text of an answer: everything up to the tag that closes it."""

CLOSING = "</think>"


def without_thinking(text: str) -> str:
    """Return an answer without the thinking before it; unchanged if it has none, or if the thinking does not end."""
    before, closed, after = text.partition(CLOSING)
    return after.lstrip() if closed else before
