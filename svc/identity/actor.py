"""The author of a change in the audit log: a user or a key, and the machine or address that the change came from."""

import os
import pwd
import socket
from dataclasses import dataclass

from svc.identity.principal import Principal


@dataclass(frozen=True, slots=True)
class Actor:
    """The user or key that makes a change.

    Attributes:
        name: `user:NAME` with the operating system's user name, or `key:ID`.
        origin: the machine's name, or the client's address.
    """

    name: str
    origin: str

    @classmethod
    def local(cls) -> "Actor":
        """Return the user who runs this process, as reported by the system, because environment variables can be
        forged.
        """
        try:
            user = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:  # the uid has no name, for example in a container
            user = str(os.getuid())
        return cls(f"user:{user}", socket.gethostname())

    @classmethod
    def of(cls, principal: Principal, address: str) -> "Actor":
        """Return the given key as the author of a change.

        Args:
            address: the client's address.
        """
        return cls(f"key:{principal.key_id}", address)
