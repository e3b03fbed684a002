"""The paths that reach the engine."""

from enum import StrEnum


class Route(StrEnum):
    """One kind of completion; the engine's own paths are the same."""

    CHAT_COMPLETIONS = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"


class TokenRoute(StrEnum):
    """Counts the tokens of a prompt; the engine's own paths are the same."""

    COUNT_TOKENS = "/v1/messages/count_tokens"
    TOKENIZE = "/tokenize"


ANTHROPIC_PATHS = frozenset({Route.MESSAGES.value, TokenRoute.COUNT_TOKENS.value})
"""Paths of Anthropic's clients, which read other headers and errors than OpenAI's."""
