"""The reason why the gateway rejects a request."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """A field for which the gateway rejects a request, and the text of the error message.

    Attributes:
        param: the invalid field.
        wrong: what is wrong with the field.
        expected: the accepted values; may be empty.
        todo: what the client can do; may be empty.
    """

    param: str
    wrong: str
    expected: str = ""
    todo: str = "leave it out"
