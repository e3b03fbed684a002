"""Hashes of words and of conversations, from which a reader of the database alone learns nothing.

The hashes use a random key of the home, a file beside the database: a person who has only the database cannot
test whether a given word was in a prompt. They are equal for equal texts, which is all that a comparison needs.
"""

import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from numpy.typing import NDArray

from svc.drift_reference.text_embedding import WORD, head_and_tail
from svc.errors import IntegrityError
from svc.files.disk import sync_folder

KEY_FILE = "drift.key"
MAX_WORDS = 512
"""Maximum number of hashed words of a prompt; a page of text has about 250 distinct words."""
_KEY_BYTES = 16
_WORD = re.compile(rf"{WORD}|\d+")


@dataclass(frozen=True, slots=True)
class KeyedHash:
    """Hashes with the key of one home."""

    key: bytes = field(repr=False)

    @classmethod
    def of_home(cls, home: Path) -> "KeyedHash":
        """Return the keyed hash of a home; create the home's key at first use.

        Raises:
            IntegrityError: the file with the key is damaged.
        """
        path = home / KEY_FILE
        if not path.exists():
            _make_key(path)
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise IntegrityError(
                f"{path} has {len(key)} bytes",
                expected=f"a key of {_KEY_BYTES} bytes",
                todo="restore the file from a backup; if there is none, remove it",
            )
        return cls(key)

    def words(self, text: str) -> NDArray[np.int32]:
        """Return sorted hashes of the distinct words of a text: at most `MAX_WORDS`, the smallest ones.

        They are a random sample of the words that is consistent: a word has the same hash in every text.
        """
        distinct = set(_WORD.findall(head_and_tail(text).lower()))
        hashes = {self._number(word, 4) for word in distinct}
        return np.array(sorted(hashes)[:MAX_WORDS], dtype=np.int32)

    def conversation(self, opening: str) -> int:
        """Return the hash of the beginning of a conversation."""
        return self._number(opening, 8)

    def _number(self, text: str, size: int) -> int:
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size, key=self.key).digest()
        return int.from_bytes(digest, "little", signed=True)


def _make_key(path: Path) -> None:
    """Write a new key, if no other process has written one meanwhile."""
    with NamedTemporaryFile(dir=path.parent, prefix=f".{KEY_FILE}.") as file:  # has mode 0600
        file.write(secrets.token_bytes(_KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(file.name, path)
    sync_folder(path.parent)
