"""Tests `svc add` and `svc remove` on the command line."""

import asyncio

import pytest

from svc.errors import NotFoundError, RefusedError
from svc.store.deployments import deployed_names
from svc.version import Format, Target, VersionId
from tests.builders.commands import error_of, models_of, type_in
from tests.postgresql import SHARED, PostgresServer
from tests.serving.home import Home
from tests.serving.other_server import serve_elsewhere
from tests.serving.versions import NAME

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("command", ["add", "serve"])
async def test_model_can_be_added_to_a_running_server_with_the_add_or_serve_command(
    serving: Home, other: str, command: str
) -> None:
    result = await type_in(serving, command, other)
    assert result.exit_code == 0, result.output
    assert "other@7 (merged) is served" in result.output
    assert [model["model"] for model in await asyncio.to_thread(models_of, serving)] == [NAME, "other"]


async def test_adding_an_already_served_model_fails(serving: Home) -> None:
    error = error_of(await type_in(serving, "add", NAME))
    assert isinstance(error, RefusedError)
    assert f"svc promote {NAME}@N" in error.todo


async def test_reason_is_shown_if_a_model_cannot_be_added(serving: Home, other: str) -> None:
    serving.park.room = "it needs 9 GiB"
    error = error_of(await type_in(serving, "add", other))
    assert isinstance(error, RefusedError)
    assert "it needs 9 GiB" in error.wrong


async def test_model_can_be_added_after_an_earlier_attempt_failed(serving: Home, other: str) -> None:
    serving.park.room = "it needs 9 GiB"
    error_of(await type_in(serving, "add", other))
    serving.park.room = None
    result = await type_in(serving, "add", other)
    assert result.exit_code == 0, result.output


async def test_adding_a_model_shows_why_this_server_cannot_serve_it_when_another_server_does(
    home: Home, other: str, postgresql: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.store = postgresql.empty()
    url = postgresql.settings(SHARED).url
    assert url is not None
    monkeypatch.setenv("SVC_STORE__URL", url.get_secret_value())
    async with home.serving(f"{NAME}@1"):
        serve_elsewhere(home.store, Target(VersionId(other, 7), Format.MERGED))
        home.park.room = "it needs 9 GiB"
        error = error_of(await type_in(home, "add", other))
    assert "it needs 9 GiB" in error.wrong and "another server serves the model" in error.wrong
    assert deployed_names(home.store) == [NAME, other]


async def test_adding_an_unknown_model_fails(serving: Home) -> None:
    assert isinstance(error_of(await type_in(serving, "add", "nothing")), NotFoundError)


async def test_remove_command_stops_serving_a_model(serving: Home, other: str) -> None:
    await type_in(serving, "add", other)
    result = await type_in(serving, "remove", NAME)
    assert result.exit_code == 0, result.output
    assert [model["model"] for model in await asyncio.to_thread(models_of, serving)] == ["other"]


async def test_removing_an_unserved_model_fails(serving: Home) -> None:
    error = error_of(await type_in(serving, "remove", "nothing"))
    assert isinstance(error, NotFoundError)
    assert NAME in error.expected
