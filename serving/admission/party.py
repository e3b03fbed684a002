"""The tenants that share a model: each key, and all requests without a key together."""

from typing import NamedTuple


class Party(NamedTuple):
    """A tenant with its share. A tuple, which is cheaper to create for each request.

    Attributes:
        name: the id of a key, which only the operator creates; empty for all requests without a key together.
        weight: its share relative to others when slots are short.
    """

    name: str = ""
    weight: int = 1

    @property
    def has_key(self) -> bool:
        """Whether the tenant is a key."""
        return bool(self.name)


NO_KEY = Party()
