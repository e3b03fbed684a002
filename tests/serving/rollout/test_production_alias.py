"""Tests that MLflow's alias follows the served version, whatever MLflow does."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from serving.rollout.production_alias import ProductionAlias
from svc.registry.tracking import Tracking
from svc.version import Alias, VersionId
from tests.serving.control import until
from tests.serving.versions import NAME, AliasBook

ONE, TWO = VersionId(NAME, 1), VersionId(NAME, 2)


@pytest.fixture
def book() -> AliasBook:
    return AliasBook()


@pytest.fixture
async def alias(book: AliasBook, quick: None) -> AsyncIterator[ProductionAlias]:
    """Yield a running production alias."""
    alias = ProductionAlias(book)
    task = asyncio.create_task(alias.run())
    yield alias
    task.cancel()
    await asyncio.wait({task})


async def test_production_alias_moves_to_the_served_version(alias: ProductionAlias, book: AliasBook) -> None:
    alias.move(ONE)
    assert await alias.settled(1)
    assert book.book == {Alias.PRODUCTION: ONE}
    assert await alias.read(NAME) == ONE


async def test_alias_move_is_retried_until_mlflow_accepts_it(alias: ProductionAlias, book: AliasBook) -> None:
    book.failures = 3
    alias.move(ONE)
    assert await alias.settled(1)
    assert book.book == {Alias.PRODUCTION: ONE}


async def test_waiting_for_an_alias_move_ends_after_the_timeout(alias: ProductionAlias, book: AliasBook) -> None:
    book.failures = 1000
    alias.move(ONE)
    assert not await alias.settled(0.05)


async def test_production_alias_is_none_if_mlflow_is_down(alias: ProductionAlias, book: AliasBook) -> None:
    book.failures = 1
    assert await alias.read(NAME) is None


async def test_older_production_alias_is_never_written_over_a_newer_one(
    alias: ProductionAlias, book: AliasBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, writes = threading.Semaphore(0), list[VersionId]()
    write = book.set_alias

    def slow_write(version: VersionId, alias: Alias) -> None:
        writes.append(version)
        go_on.acquire(timeout=3)
        write(version, alias)

    monkeypatch.setattr(book, "set_alias", slow_write)
    alias.move(ONE)
    await until(lambda: writes == [ONE])
    alias.move(TWO)
    assert not await alias.settled(0.01)
    go_on.release()
    await until(lambda: writes == [ONE, TWO])
    assert not await alias.settled(0.01)
    go_on.release()
    assert await alias.settled(1)
    assert writes == [ONE, TWO]
    assert book.book == {Alias.PRODUCTION: TWO}


@pytest.mark.slow
async def test_password_in_the_mlflow_url_is_not_logged_when_mlflow_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert await ProductionAlias(Tracking("http://mlflow:secret@127.0.0.1:9")).read("tiny") is None
    assert "could not read the production alias of tiny" in caplog.text
    assert "secret" not in caplog.text
