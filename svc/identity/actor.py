"""Who does something that is written into the audit log, and from where."""

import os
import pwd
import socket
from dataclasses import dataclass

from svc.identity.principal import Principal


@dataclass(frozen=True, slots=True)
class Actor:
    """Somebody.

    Attributes:
        name: `user:NAME` of the operating system, or `key:ID`.
        origin: the machine's name, or a client's address.
    """

    name: str
    origin: str

    @classmethod
    def local(cls) -> "Actor":
        """Whoever runs this process; not what the environment says, which anybody can set."""
        try:
            user = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:  # as in a container
            user = str(os.getuid())
        return cls(f"user:{user}", socket.gethostname())

    @classmethod
    def of(cls, principal: Principal, address: str) -> "Actor":
        """Whoever has a key.

        Args:
            address: where the request came from.
        """
        return cls(f"key:{principal.key_id}", address)
