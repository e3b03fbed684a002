"""Tests the permissions of a key and the models that it may request."""

import pytest

from svc.errors import PermissionDeniedError
from svc.identity.principal import Principal, Scope

CLIENT = Principal("abcd0123", "ci", frozenset({Scope.INFER}), frozenset({"tickets"}))
ADMIN = Principal("admin000", "admin", frozenset({Scope.ADMIN}))


@pytest.mark.parametrize("scope", Scope)
def test_api_key_has_the_permissions_of_its_scopes(scope: Scope) -> None:
    assert CLIENT.may(scope) == (scope is Scope.INFER)


@pytest.mark.parametrize("scope", Scope)
def test_admin_scope_grants_all_permissions(scope: Scope) -> None:
    ADMIN.require(scope)


def test_missing_scope_is_named_in_the_error() -> None:
    with pytest.raises(PermissionDeniedError, match="lacks scope jobs"):
        CLIENT.require(Scope.JOBS)


@pytest.mark.parametrize("model", ["tickets", "tickets@2", "tickets@production"])
def test_permitted_model_may_be_requested_in_any_version(model: str) -> None:
    assert CLIENT.may_ask(model)


@pytest.mark.parametrize("model", ["reviews", "ticket", "tickets2", "", "@tickets", "TICKETS"])
def test_model_missing_from_the_model_list_of_an_api_key_cannot_be_requested(model: str) -> None:
    assert not CLIENT.may_ask(model)


def test_api_key_without_a_model_list_may_request_any_model() -> None:
    assert ADMIN.may_ask("anything@7")


@pytest.mark.parametrize(
    ("principal", "allowed"),
    [
        (Principal("alice000", "alice", frozenset({Scope.INFER})), True),
        (Principal("alice000", "alice", frozenset({Scope.INFER}), frozenset({"reviews"})), True),
        (Principal("bob00000", "bob", frozenset({Scope.INFER})), False),
        (Principal("bob00000", "bob", frozenset({Scope.INFER}), frozenset({"reviews"})), False),
        (CLIENT, True),
        (ADMIN, True),
    ],
)
def test_model_with_owners_is_available_only_to_owners_and_admins_and_keys_limited_to_that_model(
    principal: Principal, allowed: bool
) -> None:
    assert principal.may_ask("tickets@1", {"alice000"}) == allowed
