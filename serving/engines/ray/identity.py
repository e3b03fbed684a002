"""Certificates with which a server and an engine on another machine authenticate each other.

Each side creates a key pair, whose private key never leaves its machine, and accepts exactly one certificate: the other
side's. The certificates are exchanged through Ray's authenticated API. There is no certificate authority. The
names in the certificates are not checked, and a certificate is valid for 100 years.
"""

import ssl
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

_VALID = timedelta(days=36_500)


@dataclass(frozen=True, slots=True)
class Identity:
    """A key pair.

    Attributes:
        certificate: PEM text of the self-signed certificate.
        key: PEM text of the private key.
    """

    certificate: str
    key: str


def make_identity() -> Identity:
    """Create a new key pair."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name.from_rfc4514_string("CN=tuneserve")
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks differ
        .not_valid_after(now + _VALID)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Identity(certificate.public_bytes(pem).decode(), private.decode())


def server_context(own: Identity, peer: str) -> ssl.SSLContext:
    """Return a server's TLS context. It accepts only one peer, whose certificate is given as PEM text."""
    return _context(ssl.PROTOCOL_TLS_SERVER, own, peer)


def client_context(own: Identity, peer: str) -> ssl.SSLContext:
    """Return a client's TLS context. It accepts only one peer, whose certificate is given as PEM text."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, own, peer)


def _context(side: int, own: Identity, peer: str) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=peer)
    with tempfile.NamedTemporaryFile("w") as file:  # ssl reads keys from files only; its mode is 0600
        file.write(own.certificate + own.key)
        file.flush()
        context.load_cert_chain(file.name)
    return context
