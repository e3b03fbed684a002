"""Tests `svc show NAME@N --parity`, which shows the checks and the path of their page."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from svc.errors import NotFoundError
from svc.registry.files import record_files
from svc.registry.manifest import Manifest
from svc.registry.parity import ParityReport
from svc.registry.registry import Registry
from svc.version import VersionId
from tests.command_line import Svc
from tests.svc.registry.manifests import make_manifest
from tests.svc.registry.parity import make_parity

Register = Callable[[ParityReport | None], Manifest]


@pytest.fixture
def register(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    registry: Registry,
    run: str,
    name: str,
    content: dict[str, Path],
) -> Register:
    """Return a function that registers a version with a report and its page where the commands find it."""
    monkeypatch.setattr(Registry, "of", lambda settings: registry)

    def register(parity: ParityReport | None) -> Manifest:
        reference = tmp_path / "reference"
        reference.mkdir()
        (reference / "parity.html").write_text("<p>page</p>")

        def manifest(version: VersionId, folder: Path) -> Manifest:
            return make_manifest(version, folder, parity=parity, reference=record_files(folder, folder / "reference"))

        return registry.publish(name, run, content | {"reference": reference}, manifest)

    return register


def test_parity_checks_are_shown_with_the_path_of_the_parity_page(svc: Svc, register: Register) -> None:
    made = register(make_parity("template"))
    result = svc("show", str(made.id), "--parity")
    told = " ".join(result.out.split())
    assert result.code == 0
    assert "template failed <other> the base's" in told
    assert f"models/{made.name}/{made.number}/reference/parity.html" in "".join(result.out.split())


def test_show_command_prints_the_complete_parity_report_as_json(svc: Svc, register: Register) -> None:
    made = register(make_parity())
    output = json.loads(svc("show", str(made.id), "--parity", "--json").out)
    assert ParityReport.model_validate(output) == make_parity()


def test_show_parity_fails_if_the_version_has_no_parity_report(svc: Svc, register: Register) -> None:
    made = register(None)
    result = svc("show", str(made.id), "--parity")
    assert result.code == NotFoundError.exit_code
    assert "has no parity report" in result.err
