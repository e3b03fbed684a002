"""The server's TLS certificate, which is reloaded whenever its files change, for example on renewal."""

import asyncio
import logging
import os
import ssl
from pathlib import Path

from svc.errors import SettingsError

log = logging.getLogger(__name__)

_CHECK_INTERVAL_S = 5.0
Stamp = tuple[tuple[int, int, int], ...]


class Certificate:
    """A certificate chain and its private key, both in PEM format.

    Args:
        certificate: file that contains the chain, with the server's own certificate first.
        key: file that contains the private key, without a password.

    Attributes:
        context: TLS context for new connections. A renewed certificate is loaded into the same context.

    Raises:
        SettingsError: the files cannot be read, or the key does not match the certificate.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = (certificate, key)
        self._stamp: Stamp | None = None
        try:
            self._stamp = self._stamp_now()
            self.context = self._load()
        except OSError as error:  # ssl.SSLError is one
            raise SettingsError(
                f"certificate {certificate} cannot be used with key {key}: {error}",
                expected="a certificate chain and its private key in PEM format, with no password on the key",
                todo="correct `serve.tls_certificate` and `serve.tls_key`",
            ) from error

    async def follow(self) -> None:
        """Check periodically whether the certificate files have changed, until cancelled."""
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Load the certificate if it has changed. If it cannot be used, keep the current one and log the error once."""
        try:
            stamp = self._stamp_now()
        except OSError:  # the files are being exchanged, or are missing, which is logged below
            stamp = ()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._load()  # into a separate context: a certificate with another's key would leave ours half replaced
            self.context.load_cert_chain(*self._files, password=_no_password)
        except OSError as error:
            log.error("could not load the new certificate; keeping the previous one: %s", error)
        else:
            log.info("loaded a new certificate from %s", self._files[0])

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(*self._files, password=_no_password)
        return context

    def _stamp_now(self) -> Stamp:
        stats = [os.stat(path) for path in self._files]  # follows links, which Kubernetes exchanges
        return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)


def _no_password() -> str:
    """Return an empty password, so that OpenSSL does not prompt for a password on the terminal."""
    return ""
