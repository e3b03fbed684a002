"""Tests the actor in the audit log."""

import os
import pwd
import socket

import pytest

from svc.identity.actor import Actor
from svc.identity.principal import Principal, Scope


def test_actor_is_the_process_user_regardless_of_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, "somebody-else")
    assert Actor.local() == Actor(f"user:{pwd.getpwuid(os.getuid()).pw_name}", socket.gethostname())


def test_user_without_a_name_is_identified_by_user_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)
    assert Actor.local().name == "user:4000000000"


def test_api_key_actor_is_identified_by_key_id() -> None:
    principal = Principal("abcd0123", "ci", frozenset({Scope.ADMIN}))
    assert Actor.of(principal, "192.0.2.1") == Actor("key:abcd0123", "192.0.2.1")
