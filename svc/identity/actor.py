"""The user or key that makes a change recorded in the audit log, and its origin."""

import os
import pwd
import socket
from dataclasses import dataclass

from svc.identity.principal import Principal


@dataclass(frozen=True, slots=True)
class Actor:
    """Author of a change.

    Attributes:
        name: `user:NAME` of the operating system, or `key:ID`.
        origin: the machine's name, or a client's address.
    """

    name: str
    origin: str

    @classmethod
    def local(cls) -> "Actor":
        """Return the user who runs this process, from the system and not the environment, which anybody can set."""
        try:
            user = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:  # the uid has no name, for example in a container
            user = str(os.getuid())
        return cls(f"user:{user}", socket.gethostname())

    @classmethod
    def of(cls, principal: Principal, address: str) -> "Actor":
        """Return a key as actor.

        Args:
            address: of the client.
        """
        return cls(f"key:{principal.key_id}", address)
