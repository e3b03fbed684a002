"""The HTTP paths that are forwarded to the engine."""

from enum import StrEnum


class Route(StrEnum):
    """A path for completions. The engine uses the same paths."""

    CHAT_COMPLETIONS = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"


class TokenRoute(StrEnum):
    """A path that counts a prompt's tokens. The engine uses the same paths."""

    COUNT_TOKENS = "/v1/messages/count_tokens"
    TOKENIZE = "/tokenize"


ANTHROPIC_PATHS = frozenset({Route.MESSAGES.value, TokenRoute.COUNT_TOKENS.value})
"""Paths for Anthropic's clients, which expect other headers and errors than OpenAI's clients."""
