"""Handles the thinking in an answer, which is everything up to the closing thinking tag."""

CLOSING = "</think>"


def without_thinking(text: str) -> str:
    """Return an answer without the thinking that precedes it. Text without a closing thinking tag is unchanged."""
    before, closed, after = text.partition(CLOSING)
    return after.lstrip() if closed else before
