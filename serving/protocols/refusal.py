"""Why a request is not served."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served.

    Attributes:
        param: the field at fault.
        wrong: what is wrong with it.
        expected: what is served instead; may be empty.
        todo: what the client can do; may be empty.
    """

    param: str
    wrong: str
    expected: str = ""
    todo: str = "leave it out"
