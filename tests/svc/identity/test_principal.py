"""What a key may do, and what it may ask."""

import pytest

from svc.errors import PermissionDeniedError
from svc.identity.principal import Principal, Scope

CLIENT = Principal("abcd0123", "ci", frozenset({Scope.INFER}), frozenset({"tickets"}))
ADMIN = Principal("admin000", "admin", frozenset({Scope.ADMIN}))


@pytest.mark.parametrize("scope", Scope)
def test_a_key_may_do_what_its_scopes_say(scope: Scope) -> None:
    assert CLIENT.may(scope) == (scope is Scope.INFER)


@pytest.mark.parametrize("scope", Scope)
def test_an_admin_may_do_everything(scope: Scope) -> None:
    ADMIN.require(scope)


def test_who_lacks_a_scope_is_told_which() -> None:
    with pytest.raises(PermissionDeniedError, match="lacks the scope train"):
        CLIENT.require(Scope.TRAIN)


@pytest.mark.parametrize("model", ["tickets", "tickets@2", "tickets@production"])
def test_a_model_may_be_asked_in_every_version(model: str) -> None:
    assert CLIENT.may_ask(model)


@pytest.mark.parametrize("model", ["reviews", "ticket", "tickets2", "", "@tickets", "TICKETS"])
def test_other_models_may_not(model: str) -> None:
    assert not CLIENT.may_ask(model)


def test_a_key_without_a_list_may_ask_every_model() -> None:
    assert ADMIN.may_ask("anything@7")
