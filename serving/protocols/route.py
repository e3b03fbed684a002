"""The paths that reach the engine."""

from enum import StrEnum


class Route(StrEnum):
    """One kind of completion; the engine's own paths are the same."""

    CHAT_COMPLETIONS = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"


ANTHROPIC_PATHS = frozenset({Route.MESSAGES.value})
"""Those that Anthropic's clients ask, which read other headers and errors than OpenAI's."""
