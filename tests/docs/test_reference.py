"""Tests that the handwritten pages list exactly the errors, states and dependencies in the code."""

import re
import tomllib

import serving.server.app  # noqa: F401 - declares the errors of every feature
from serving.fine_tuning.recipe import BASE_KEY, RECIPE_KEYS
from serving.http.errors import _CHANGE_SHAPES, _FRAMEWORK_CODES
from serving.protocols.error_code import ANSWERS, ErrorCode
from svc import errors
from svc.dataset.problem.problem import Code, severity_of
from svc.engine.state import EngineState
from svc.errors import SvcError
from svc.store.swaps import SwapOutcome
from tests.docs.pages import read, rows

RUNBOOK = read("docs/runbook.md")
NOT_ERRORS = {0, 130}  # done, interrupted


def test_every_error_class_is_in_the_runbook_with_its_exit_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SvcError)]
    documented = {(int(code), name.strip("`")) for code, name, *_ in rows(RUNBOOK, "code | error") if name}
    assert documented == {(kind.exit_code, kind.__name__) for kind in kinds}


def test_exit_codes_without_an_error_class_are_in_the_runbook() -> None:
    assert {int(code) for code, name, *_ in rows(RUNBOOK, "code | error") if not name} == NOT_ERRORS


def test_every_engine_state_is_in_the_runbook() -> None:
    assert {state.strip("`") for state, *_ in rows(RUNBOOK, "state")} == {state.value for state in EngineState}


def test_every_swap_outcome_is_in_the_runbook() -> None:
    assert {name.strip("`") for name, *_ in rows(RUNBOOK, "outcome")} == {outcome.value for outcome in SwapOutcome}


def test_api_page_lists_every_http_error_with_its_status() -> None:
    documented = {(int(status), code.strip("`")) for status, code, *_ in rows(read("docs/api.md"), "status")}
    sent = {*ANSWERS.values(), *_CHANGE_SHAPES.values(), *_FRAMEWORK_CODES.items(), (500, ErrorCode.INTERNAL_ERROR)}
    assert documented == {(status, code.value) for status, code in sent}
    assert {code for _, code in documented} == {code.value for code in ErrorCode} - {"client_gone", "client_slow"}


def test_every_recipe_key_of_a_fine_tuning_job_is_documented() -> None:
    table = rows(read("docs/fine-tuning-api.md"), "section")
    documented = {
        key if section == "top level" else f"{section.strip('`')}.{key}"
        for section, keys, *_ in table
        for key in re.findall(r"`(\w+)`", keys)
    }
    assert documented == {*RECIPE_KEYS, BASE_KEY}


def test_every_dependency_has_a_documented_reason() -> None:
    project = tomllib.loads(read("pyproject.toml"))
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    groups += project["dependency-groups"].values()
    names = {re.split(r"[<>=!~\[; ]", requirement)[0] for group in groups for requirement in group}
    table = rows(read("docs/dependencies.md"), "package")
    assert {name.strip("`").partition("[")[0] for name, _ in table} == names - {project["project"]["name"]}
    assert all(reason for _, reason in table)


def test_every_data_problem_is_documented() -> None:
    table = read("docs/data.md").partition("| code | severity |")[2]
    documented = re.findall(r"^\| `(\w+)` \| (\w+) \|", table, re.MULTILINE)
    assert dict(documented) == {code.value: severity_of(code).value for code in Code}
