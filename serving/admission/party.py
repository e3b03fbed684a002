"""The tenants that share a model: each key is one, and all requests without a key together are another."""

from typing import NamedTuple


class Party(NamedTuple):
    """A tenant and its share. A tuple, because one is created for each request and tuples are cheap to create.

    Attributes:
        name: the key's id (only the operator creates keys); empty for the tenant of all requests without a key.
        weight: the tenant's share, relative to others, when slots are scarce.
    """

    name: str = ""
    weight: int = 1

    @property
    def has_key(self) -> bool:
        """Whether the tenant is a key."""
        return bool(self.name)


NO_KEY = Party()
