"""Tests that equal texts have equal hashes in one home, and cannot be tested without the home's key."""

import threading
from pathlib import Path

import numpy as np
import pytest

from svc.drift_reference.reference import KEY_FILE, MAX_WORDS, KeyedHash
from svc.errors import IntegrityError

ONE, OTHER = KeyedHash(bytes(16)), KeyedHash(b"1" * 16)


def test_hash_key_of_a_tuneserve_home_is_stored_with_owner_only_permissions(tmp_path: Path) -> None:
    made = KeyedHash.of_home(tmp_path)
    assert KeyedHash.of_home(tmp_path) == made
    assert len(made.key) == 16
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600


def test_different_tuneserve_homes_have_different_hash_keys(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    assert KeyedHash.of_home(tmp_path / "one") != KeyedHash.of_home(tmp_path / "other")


def test_concurrent_creation_of_a_hash_key_yields_one_key(tmp_path: Path) -> None:
    keys, start = list[bytes](), threading.Barrier(8)

    def make() -> None:
        start.wait()
        keys.append(KeyedHash.of_home(tmp_path).key)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1


def test_corrupt_hash_key_is_rejected_with_its_path(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_bytes(b"short")
    with pytest.raises(IntegrityError, match=r"drift\.key has 5 bytes"):
        KeyedHash.of_home(tmp_path)


def test_printed_keyed_hash_does_not_show_its_key() -> None:
    assert "111" not in repr(OTHER)


def test_different_keys_give_different_hashes_of_the_same_text() -> None:
    assert set(ONE.words("where is my parcel")).isdisjoint(OTHER.words("where is my parcel"))
    assert ONE.conversation("user: hello") != OTHER.conversation("user: hello")


def test_word_hashes_are_sorted_and_unique_regardless_of_order_and_case() -> None:
    words = ONE.words("Where is my parcel, where?")
    assert words.dtype == np.int32
    assert words.tolist() == sorted(set(words.tolist()))
    assert len(words) == 4
    assert words.tolist() == ONE.words("parcel MY is where").tolist()
    assert len(ONE.words("!")) == len(ONE.words("")) == 0


def test_only_the_smallest_word_hashes_of_a_long_text_are_kept() -> None:
    letters = [chr(code) for code in range(0x4E00, 0x4E00 + 1500)]
    words = ONE.words("".join(letters))
    assert len(words) == MAX_WORDS
    every = sorted(int(ONE.words(letter)[0]) for letter in letters)
    assert words.tolist() == every[:MAX_WORDS]


@pytest.mark.parametrize("text", ["\ud800", "\0", "😀"])
def test_any_text_can_be_hashed(text: str) -> None:
    assert -(2**63) <= ONE.conversation(text) < 2**63
    assert len(ONE.words(text)) <= 1


def test_prompts_differing_only_in_numbers_have_different_hashes() -> None:
    hashes = KeyedHash(bytes(16))
    assert len(hashes.words("12 + 7 = ?")) == 2
    assert not np.array_equal(hashes.words("12 + 7 = ?"), hashes.words("12 + 8 = ?"))
