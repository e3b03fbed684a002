"""Hashes words and conversations so that the hashes reveal nothing to someone who has only the database.

The hashes are computed with a random key. Each home folder has its own key, in a file next to the database. Without
this key, nobody can test whether a given word was in a prompt. Texts can still be compared, because equal texts have
equal hashes.
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
"""Maximum number of distinct words per prompt whose hashes are kept. A page of text has about 250 distinct words."""
_KEY_BYTES = 16
_WORD = re.compile(rf"{WORD}|\d+")


@dataclass(frozen=True, slots=True)
class KeyedHash:
    """Computes hashes with a home folder's key."""

    key: bytes = field(repr=False)

    @classmethod
    def of_home(cls, home: Path) -> "KeyedHash":
        """Return the hash function that uses a home folder's key, creating the key on first use.

        Raises:
            IntegrityError: the key file has the wrong size.
        """
        path = home / KEY_FILE
        if not path.exists():
            _make_key(path)
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise IntegrityError(
                f"the key in {path} has {len(key)} bytes",
                expected=f"a key of {_KEY_BYTES} bytes",
                todo="restore the file from a backup, or remove the file if there is no backup",
            )
        return cls(key)

    def words(self, text: str) -> NDArray[np.int32]:
        """Return the hashes of a text's distinct words in sorted order, keeping only the `MAX_WORDS` smallest.

        The smallest hashes are a consistent random sample of the words, because a word has the same hash in every text.
        """
        distinct = set(_WORD.findall(head_and_tail(text).lower()))
        hashes = {self._number(word, 4) for word in distinct}
        return np.array(sorted(hashes)[:MAX_WORDS], dtype=np.int32)

    def conversation(self, opening: str) -> int:
        """Return a hash that identifies a conversation by its opening."""
        return self._number(opening, 8)

    def _number(self, text: str, size: int) -> int:
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size, key=self.key).digest()
        return int.from_bytes(digest, "little", signed=True)


def _make_key(path: Path) -> None:
    """Write a new key, unless another process has already written one."""
    with NamedTemporaryFile(dir=path.parent, prefix=f".{KEY_FILE}.") as file:  # has mode 0600
        file.write(secrets.token_bytes(_KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(file.name, path)
    sync_folder(path.parent)
