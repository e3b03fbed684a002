"""The reason why the gateway rejects a request."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the gateway rejects a request.

    Attributes:
        param: the invalid field.
        wrong: what is wrong with it.
        expected: the values that are accepted; may be empty.
        todo: what the client can do; may be empty.
    """

    param: str
    wrong: str
    expected: str = ""
    todo: str = "leave it out"
