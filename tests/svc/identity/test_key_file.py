"""Tests that a key is read only from a file that no other user can read."""

from pathlib import Path

import pytest

from svc.errors import SettingsError
from svc.identity.key_file import read_key
from svc.identity.key_secret import new_secret

SECRET = new_secret("abcd0123")


def key_file(folder: Path, content: str = f"{SECRET}\n", mode: int = 0o600) -> Path:
    path = folder / "key"
    path.write_text(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_key_file_with_owner_only_permissions_is_read(tmp_path: Path, mode: int) -> None:
    assert read_key(key_file(tmp_path, mode=mode)) == SECRET


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_key_file_accessible_to_other_users_is_rejected(tmp_path: Path, mode: int) -> None:
    with pytest.raises(SettingsError, match="can be read by other users") as raised:
        read_key(key_file(tmp_path, mode=mode))
    assert "chmod 600" in raised.value.todo
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    "content", ["", "none", SECRET[:-1], f"Bearer {SECRET}"], ids=["empty", "other", "cut", "more"]
)
def test_key_file_that_contains_no_key_is_rejected_without_quoting_its_content(tmp_path: Path, content: str) -> None:
    with pytest.raises(SettingsError, match=r"contains no API key|is empty") as raised:
        read_key(key_file(tmp_path, content))
    assert not content or content not in str(raised.value)


def test_missing_key_file_raises_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read"):
        read_key(tmp_path / "none")
