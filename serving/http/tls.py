"""The certificate that the server shows, read again when its files change, as they do every few weeks."""

import asyncio
import logging
import os
import ssl
from pathlib import Path

from svc.errors import SettingsError

log = logging.getLogger(__name__)

_LOOK_S = 5.0
Stamp = tuple[tuple[int, int, int], ...]


class Certificate:
    """A certificate with its chain, and its key, both in PEM.

    Args:
        certificate: the file, the server's own first.
        key: the file, without a password.

    Attributes:
        context: for connections from now on; a new certificate goes into the same one.

    Raises:
        SettingsError: they cannot be read, or do not belong together.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = (certificate, key)
        self._stamp: Stamp | None = None
        try:
            self._stamp = self._stamp_now()
            self.context = self._load()
        except OSError as error:  # ssl.SSLError is one
            raise SettingsError(
                f"the certificate {certificate} cannot be used with the key {key}: {error}",
                expected="a certificate with its chain and its key without a password, in PEM",
                todo="correct serve.tls_certificate and serve.tls_key",
            ) from error

    async def follow(self) -> None:
        """Looks at the files again and again, until it is cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Takes a new certificate; where that cannot be used, the one before goes on, and the log says so once."""
        try:
            stamp = self._stamp_now()
        except OSError:  # they are exchanged at this moment, or have gone: then the log says so
            stamp = ()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._load()  # apart: a certificate whose key is another's would leave half of each in the context
            self.context.load_cert_chain(*self._files, password=_no_password)
        except OSError as error:
            log.error("the new certificate cannot be used, the one before goes on: %s", error)
        else:
            log.info("a new certificate was taken from %s", self._files[0])

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(*self._files, password=_no_password)
        return context

    def _stamp_now(self) -> Stamp:
        found = [os.stat(path) for path in self._files]  # of what a link leads to: Kubernetes exchanges those
        return tuple((each.st_ino, each.st_mtime_ns, each.st_size) for each in found)


def _no_password() -> str:
    """In place of a question on the terminal."""
    return ""
