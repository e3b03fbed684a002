"""Tests that `svc report` writes a file to the working folder."""

import json
from pathlib import Path

import pytest

from svc.errors import NotFoundError
from svc.registry.registry import Registry
from tests.builders.judged_versions import LABELS, JudgedVersions, right
from tests.command_line import Svc
from trainer.report.judged import BASE

pytestmark = pytest.mark.slow


@pytest.fixture
def version(versions: JudgedVersions, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a version in the registry that the command uses."""
    monkeypatch.setattr(Registry, "of", lambda settings: versions.registry)
    return str(versions.publish(LABELS, {BASE: right(LABELS, 9), "merged": right(LABELS, 50)}).id)


def test_report_is_written_to_the_working_directory_and_its_path_printed(
    svc: Svc, version: str, tmp_path: Path
) -> None:
    result = svc("report", version)
    path = tmp_path / f"{version.replace('@', '-')}.html"
    assert (result.code, result.out) == (0, f"{path}\n")
    assert f"<title>{version}</title>" in path.read_text("utf-8")


def test_report_is_written_to_the_given_output_path(svc: Svc, version: str, tmp_path: Path) -> None:
    assert svc("report", version, "--output", "other.html").out == f"{tmp_path / 'other.html'}\n"
    assert (tmp_path / "other.html").is_file()


def test_report_is_written_for_a_model_name_without_a_version_number(svc: Svc, version: str) -> None:
    assert svc("report", version.partition("@")[0]).out.endswith("-1.html\n")


def test_json_output_has_the_report_path_and_all_metrics(svc: Svc, version: str, tmp_path: Path) -> None:
    output = json.loads(svc("report", version, "--json").out)
    assert output["path"] == str(tmp_path / f"{version.replace('@', '-')}.html")
    assert output["version"] == version
    assert output["metrics"]["accuracy"]["estimates"]["merged"]["value"] == pytest.approx(50 / 60)
    assert output["metrics"]["accuracy"]["changes"]["merged"]["value"] == pytest.approx(41 / 60)
    assert output["verdicts"][0]["outcome"] == "better"
    assert len(output["side_by_side"]) == 20


def test_report_error_names_the_missing_output_folder(svc: Svc, version: str) -> None:
    result = svc("report", version, "--output", "nowhere/page.html")
    assert result.code == 2
    assert "nowhere" in result.err


def test_report_for_a_nonexistent_version_exits_with_not_found(svc: Svc, version: str, tmp_path: Path) -> None:
    result = svc("report", version.replace("@1", "@7"))
    assert result.code == NotFoundError.exit_code
    assert list(tmp_path.glob("*.html")) == []


def test_show_command_prints_the_command_that_creates_the_report(svc: Svc, version: str) -> None:
    assert f"svc report {version}" in svc("show", version).out
