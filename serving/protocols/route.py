"""The HTTP paths whose requests are forwarded to the engine."""

from enum import StrEnum


class Route(StrEnum):
    """A URL path for completion requests. The engine's path is the same."""

    CHAT_COMPLETIONS = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"


class TokenRoute(StrEnum):
    """A URL path for counting a prompt's tokens. The engine's path is the same."""

    COUNT_TOKENS = "/v1/messages/count_tokens"
    TOKENIZE = "/tokenize"


ANTHROPIC_PATHS = frozenset({Route.MESSAGES.value, TokenRoute.COUNT_TOKENS.value})
"""Paths used by Anthropic's clients, which expect different headers and errors from OpenAI's clients."""
