"""Tests that a secret identifies its key, cannot be guessed, and makes typos detectable."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.identity.key_secret import hash_secret, hide_secrets, is_hash_of, key_id_of, new_key_id, new_secret
from svc.redaction import Redactor

LETTERS = string.digits + string.ascii_letters


def test_secret_contains_its_key_id() -> None:
    key_id = new_key_id()
    assert key_id_of(new_secret(key_id)) == key_id


def test_secret_matches_the_pattern_used_by_secret_scanners() -> None:
    assert re.fullmatch(r"ts_[0-9a-z]{8}_[0-9A-Za-z]{38}", new_secret(new_key_id()))


def test_secrets_with_the_same_key_id_share_nothing_else() -> None:
    parts = {new_secret("abcd0123").removeprefix("ts_abcd0123_")[:32] for _ in range(200)}
    assert len(parts) == 200
    assert {part[place] for part in parts for place in range(32)} == set(LETTERS)


@given(st.integers(0, 49), st.sampled_from(LETTERS))
def test_one_wrong_character_in_a_secret_is_detected(place: int, letter: str) -> None:
    secret = new_secret("abcd0123")
    typo = secret[:place] + letter + secret[place + 1 :]
    assert (key_id_of(typo) is None) == (typo != secret)


@given(st.integers(12, 48))
def test_two_swapped_characters_in_a_secret_are_detected(place: int) -> None:
    secret = new_secret("abcd0123")
    typo = secret[:place] + secret[place + 1] + secret[place] + secret[place + 2 :]
    assert (key_id_of(typo) is None) == (typo != secret)


def test_secret_with_a_leading_space_is_invalid() -> None:
    assert key_id_of(" " + new_secret("abcd0123")) is None


@pytest.mark.parametrize("text", ["", "none", "sk-1234", "ts_abcd0123_", "ts_é"])
def test_text_not_in_the_api_key_format_is_not_accepted_as_a_secret(text: str) -> None:
    assert key_id_of(text) is None


@pytest.mark.slow
@given(st.text())
def test_arbitrary_text_is_not_recognized_as_a_secret(text: str) -> None:
    assert key_id_of(text) is None
    assert len(hash_secret(text.encode("utf-8", "replace").decode())) == 64


def test_line_ending_after_a_secret_is_ignored() -> None:
    assert key_id_of(new_secret("abcd0123") + "\n") is None


def test_different_secrets_have_different_hashes() -> None:
    one, other = new_secret("abcd0123"), new_secret("abcd0123")
    assert is_hash_of(hash_secret(one), hash_secret(one))
    assert not is_hash_of(hash_secret(one), hash_secret(other))


@given(st.text(max_size=20), st.text(alphabet=st.characters(exclude_categories=["L", "N"]), max_size=5))
def test_no_api_key_secret_survives_redaction(before: str, after: str) -> None:
    secret = new_secret(new_key_id())
    assert secret not in Redactor([r"\d{4}"]).text(f"{before}:{secret}{after}")


def test_secrets_within_a_text_are_redacted() -> None:
    one, other = new_secret("abcd0123"), new_secret("abcd0124")
    assert hide_secrets(f"say {one}, {other[:30]} and ts_abcd0123") == "say [key], [key] and ts_abcd0123"


@pytest.mark.parametrize("text", ["", "nothing", "rts_abcd0123_0123456789", "ts_short_0123456789"])
def test_text_that_resembles_an_api_key_secret_is_not_redacted(text: str) -> None:
    assert hide_secrets(text) == text
