"""Handles thinking in an answer's text, which is everything up to the closing thinking tag."""

CLOSING = "</think>"


def without_thinking(text: str) -> str:
    """Return an answer without the thinking before it, or unchanged if there is none or it is not closed."""
    before, closed, after = text.partition(CLOSING)
    return after.lstrip() if closed else before
