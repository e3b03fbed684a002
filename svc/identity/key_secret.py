"""An API key's secret: `ts_` + the key's id + `_` + 32 random characters + a 6-character checksum.

    ts_k3v9q0xa_5yD0...Qe1x4T9a
       └─ id ─┘ └ 190 bits ┘└ CRC-32 ┘

The id is public and appears in database rows, metrics and printed tables. The prefix lets secret scanners find keys in
repositories and logs, and the checksum detects a typo before any lookup.

Only the SHA-256 is stored. A slow password hash would add no security, because nobody can try 2^190 secrets, however
fast the hash is. A slow hash would also delay every request.
"""

import binascii
import hashlib
import hmac
import re
import secrets
import string

PREFIX = "ts_"
_ID_PATTERN = r"[0-9a-z]{8}"
KEY_BLANK = "[key]"
_SECRET = re.compile(rf"{PREFIX}({_ID_PATTERN})_[0-9A-Za-z]{{38}}")
# Matches truncated and mistyped secrets too: most of a secret is still a secret.
_PART = re.compile(rf"(?<![0-9A-Za-z]){PREFIX}{_ID_PATTERN}_[0-9A-Za-z]{{8,}}")
_ID_LETTERS = string.digits + string.ascii_lowercase
_LETTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_ID_LENGTH, _RANDOM_LENGTH, _CHECKSUM_LENGTH = 8, 32, 6


def new_key_id() -> str:
    """Return a random key id. The caller must ensure that it is unique when storing it."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))


def new_secret(key_id: str) -> str:
    """Return a new secret for a key."""
    start = f"{PREFIX}{key_id}_" + "".join(secrets.choice(_LETTERS) for _ in range(_RANDOM_LENGTH))
    return start + _checksum(start)


def key_id_of(secret: str) -> str | None:
    """Return the key id in a secret, or None if the text is not a secret or contains a typo."""
    match = _SECRET.fullmatch(secret)
    if match is None or secret[-_CHECKSUM_LENGTH:] != _checksum(secret[:-_CHECKSUM_LENGTH]):
        return None
    return match[1]


def hide_secrets(text: str) -> str:
    """Return the text with each complete or nearly complete secret replaced by `[key]`."""
    return _PART.sub(KEY_BLANK, text) if PREFIX in text else text


def hash_secret(secret: str) -> str:
    """Return the hash under which a secret is stored."""
    return hashlib.sha256(secret.encode("utf-8")).hexdigest()


def is_hash_of(stored: str, hashed: str) -> bool:
    """Return whether two hashes are equal, comparing them in constant time."""
    return hmac.compare_digest(stored, hashed)


def _checksum(text: str) -> str:
    """Return the CRC-32 checksum of the text, as a base-62 number."""
    rest, letters = binascii.crc32(text.encode("ascii")), ""
    for _ in range(_CHECKSUM_LENGTH):
        rest, digit = divmod(rest, len(_LETTERS))
        letters = _LETTERS[digit] + letters
    return letters
