"""Who shares a model with others: a key, or all requests that came without one."""

from typing import NamedTuple


class Party(NamedTuple):
    """One that has its share. A tuple, since it is made for each request.

    Attributes:
        name: the id of a key, which only the operator makes; empty for all requests without a key together.
        weight: its share beside others where there is not enough for all.
    """

    name: str = ""
    weight: int = 1

    @property
    def has_key(self) -> bool:
        """Whether it is a key."""
        return bool(self.name)


NO_KEY = Party()
