"""Tests the output of `svc backup` and `svc restore`, and their events in the audit log."""

import json
from pathlib import Path

import pytest

from svc.errors import IntegrityError, NotFoundError, SettingsError
from svc.store.audit import read_events
from svc.store.database import open_database
from tests.command_line import Svc
from tests.serving.backup.conftest import UsedHome


@pytest.mark.slow
def test_backup_and_restore_report_their_results_as_json(svc: Svc, used: UsedHome, tmp_path: Path) -> None:
    version = used.publish()
    made = svc("--home", used.settings.home, "backup", "backups", "--json")
    assert made.code == 0, made.err
    output = json.loads(made.out)
    assert (output["versions"], output["copied"], output["left_out"]) == ([str(version)], [str(version)], {})
    assert [event.action for event in read_events(used.store, newest=9)] == ["backup"]
    restored = svc("--home", "again", "restore", "backups", "--json")
    assert restored.code == 0, restored.err
    assert json.loads(restored.out)["name"] == output["snapshot"]
    events = read_events(open_database(tmp_path / "again"), newest=9)
    assert sorted(event.action for event in events) == ["backup", "restore"]


@pytest.mark.slow
def test_backup_and_restore_report_their_results_as_text(svc: Svc, used: UsedHome) -> None:
    version = used.publish()
    assert "(versions: 1, newly copied: 1)" in svc("--home", used.settings.home, "backup", "backups").out
    assert str(version) in svc("restore", "backups", "--list").out
    assert "1 versions" in svc("--home", "again", "restore", "backups").out


@pytest.mark.slow
def test_error_names_a_required_version_that_the_home_folder_does_not_contain(
    svc: Svc, used: UsedHome, tmp_path: Path
) -> None:
    version = used.publish()
    used.promote(version)
    used.registry.folder(version).rename(tmp_path / "elsewhere")
    result = svc("--home", used.settings.home, "backup", "backups")
    assert result.code == IntegrityError.exit_code
    assert f"{version}: needed but missing" in result.err
    assert svc("--home", "again", "restore", "backups").code == 0


def test_backup_does_not_create_a_missing_home(svc: Svc, tmp_path: Path) -> None:
    assert svc("--home", "nowhere", "backup", "backups").code == NotFoundError.exit_code
    assert not (tmp_path / "nowhere").exists()


def test_backup_folder_inside_the_home_is_rejected(svc: Svc, used: UsedHome) -> None:
    result = svc("--home", used.settings.home, "backup", used.settings.home / "backups")
    assert result.code == 2
    assert "must be outside the home" in result.err


def test_restore_over_an_existing_home_is_rejected(svc: Svc, used: UsedHome) -> None:
    svc("--home", used.settings.home, "backup", "backups")
    result = svc("--home", used.settings.home, "restore", "backups")
    assert result.code == SettingsError.exit_code
    assert "is not empty" in result.err
