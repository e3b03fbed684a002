"""Tests `svc show NAME@N --parity`, which shows the checks and the path of their page."""

import json

from svc.errors import NotFoundError
from svc.registry.parity import ParityReport
from tests.command_line import Svc
from tests.svc.registry.conftest import Register
from tests.svc.registry.parity import make_parity


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
