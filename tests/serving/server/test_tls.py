"""Tests that a certificate is loaded only if it is valid, and reloaded when its files change."""

import logging
import os
import ssl
from pathlib import Path

import pytest

from serving.server.tls import Certificate
from svc.errors import SettingsError
from tests.serving.certificates import make_certificate


def shown(certificate: Certificate, authority: Path) -> bool:
    """Return whether a client that trusts only one authority completes the handshake."""
    trusting = ssl.create_default_context(cafile=str(authority))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(to_client, to_server, server_hostname="localhost")
    server = certificate.context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                return False
    return client.version() in ("TLSv1.2", "TLSv1.3")


def exchange(folder: Path, name: str, into: tuple[Path, Path]) -> Path:
    """Replace a certificate with another and return a copy of the new one for clients to trust."""
    made = make_certificate(folder, name)
    (folder / f"{name}.ca").write_bytes(made[0].read_bytes())
    for new, old in zip(made, into, strict=True):
        os.replace(new, old)
    return folder / f"{name}.ca"


def test_client_that_trusts_the_certificate_connects(tmp_path: Path) -> None:
    files = make_certificate(tmp_path)
    other, _ = make_certificate(tmp_path, "other")
    certificate = Certificate(*files)
    assert shown(certificate, files[0])
    assert not shown(certificate, other)


def test_tls_versions_before_1_2_are_rejected(tmp_path: Path) -> None:
    assert Certificate(*make_certificate(tmp_path)).context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_new_certificate_is_loaded_into_the_same_tls_context(tmp_path: Path) -> None:
    files = make_certificate(tmp_path)
    certificate = Certificate(*files)
    context = certificate.context
    new = exchange(tmp_path, "new", files)
    certificate.refresh()
    assert shown(certificate, new)
    assert certificate.context is context


@pytest.mark.parametrize("broken", ["no PEM", "another's key", "gone"])
def test_previous_certificate_stays_in_use_if_the_new_one_is_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    files = make_certificate(tmp_path)
    certificate, trusted = Certificate(*files), tmp_path / "trusted"
    trusted.write_bytes(files[0].read_bytes())
    if broken == "gone":
        files[1].unlink()
    elif broken == "no PEM":
        files[0].write_text("no certificate")
    else:
        os.replace(make_certificate(tmp_path, "other")[0], files[0])
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            certificate.refresh()
    assert caplog.text.count("keeping the previous one") == 1
    assert shown(certificate, trusted)
    if broken == "gone":
        return
    good = exchange(tmp_path, "good", files)
    certificate.refresh()
    assert shown(certificate, good)


@pytest.mark.parametrize("broken", ["no file", "no PEM", "another's key", "a password"])
def test_server_does_not_start_if_its_certificate_is_broken(tmp_path: Path, broken: str) -> None:
    certificate, key = make_certificate(tmp_path)
    match broken:
        case "no file":
            key.unlink()
        case "no PEM":
            certificate.write_text("no certificate")
        case "another's key":
            _, key = make_certificate(tmp_path, "other")
        case "a password":
            key.write_text(PROTECTED)
    with pytest.raises(SettingsError) as raised:
        Certificate(certificate, key)
    assert "serve.tls_certificate" in raised.value.todo


PROTECTED = """-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAiU7XM1qXvNTwICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEMwSx0GdLu9b2aGHsYcJxkIEgZDm
-----END ENCRYPTED PRIVATE KEY-----
"""
