"""The secret of a key: `ts_` + the key's id + `_` + 32 random characters + a checksum of 6.

    ts_k3v9q0xa_5yD0...Qe1x4T9a
       └─ id ─┘ └ 190 bits ┘└ CRC-32 ┘

Everybody may read the id: it stands in rows, metrics and tables. The prefix lets scanners of repositories and logs find
a secret, and the checksum tells a typo from a wrong secret before anything is looked up.

Kept is its SHA-256. A slow hash as for passwords would defend nothing: nobody can try 2^190 secrets, however fast the
hash is, and each request would pay for it.
"""

import binascii
import hashlib
import hmac
import re
import secrets
import string

PREFIX = "ts_"
KEY_ID_PATTERN = r"[0-9a-z]{8}"
_SECRET = re.compile(rf"{PREFIX}({KEY_ID_PATTERN})_[0-9A-Za-z]{{38}}")
_PART = re.compile(rf"(?<![0-9A-Za-z]){PREFIX}{KEY_ID_PATTERN}_[0-9A-Za-z]{{8,}}")
_ID_LETTERS = string.digits + string.ascii_lowercase
_LETTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_ID_LENGTH, _RANDOM_LENGTH, _CHECKSUM_LENGTH = 8, 32, 6


def new_key_id() -> str:
    """A random id; whoever keeps it sees to it that it is new."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))


def new_secret(key_id: str) -> str:
    """A new secret of a key."""
    start = f"{PREFIX}{key_id}_" + "".join(secrets.choice(_LETTERS) for _ in range(_RANDOM_LENGTH))
    return start + _checksum(start)


def key_id_of(secret: str) -> str | None:
    """The id in a secret; None of what is none, or has a typo."""
    match = _SECRET.fullmatch(secret)
    if match is None or secret[-_CHECKSUM_LENGTH:] != _checksum(secret[:-_CHECKSUM_LENGTH]):
        return None
    return match[1]


def hide_secrets(text: str) -> str:
    """A text with `[key]` in place of each secret, or a good part of one: for what is told or kept."""
    return _PART.sub("[key]", text) if PREFIX in text else text


def hash_secret(secret: str) -> str:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode("utf-8")).hexdigest()


def is_hash_of(kept: str, found: str) -> bool:
    """Whether two hashes are one; takes as long whether they are or not."""
    return hmac.compare_digest(kept, found)


def _checksum(text: str) -> str:
    """CRC-32 in base 62."""
    left, letters = binascii.crc32(text.encode("ascii")), ""
    for _ in range(_CHECKSUM_LENGTH):
        left, digit = divmod(left, len(_LETTERS))
        letters = _LETTERS[digit] + letters
    return letters
