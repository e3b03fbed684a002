"""Tests that the gateway by default stores features but no texts of successful answers, once per request."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from serving.telemetry import drift_features
from svc.registry.registry import Registry
from svc.settings.monitoring import RequestLogSettings
from svc.store.drift_items import Item, read_items
from svc.store.requests import RequestRecord
from svc.store.tables import RequestRow
from tests.new_store import new_store
from tests.serving.engine_double import Fault
from tests.serving.service import CHAT, CHAT_PATH, ONE, Service
from tests.serving.versions import AliasBook, make_version

TEXT = "Featherstonehaugh lost 3 parcels, Cholmondeley none"
ASKED = {**CHAT, "messages": [{"role": "user", "content": TEXT}]}
PATIENCE_S = 300.0

Make = Callable[..., Service]


@pytest.fixture
def make(socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a function that creates a gateway on a home whose version 1 has a drift reference."""
    monkeypatch.setattr(drift_features, "_CLOSE_S", PATIENCE_S)
    make_version(Registry(socket_folder / "models", AliasBook()), 1, compared=True, answered=3)
    return lambda **keeping: Service(
        socket_folder, store=new_store(socket_folder), keeping=RequestLogSettings(**keeping)
    )


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[RequestRecord]:
    """Return the records passed on for feature extraction, without starting a process."""
    handed: list[RequestRecord] = []
    monkeypatch.setattr(drift_features.FeatureProcess, "add", lambda process, records: handed.extend(records))
    return handed


@pytest.fixture
async def service(make: Make) -> AsyncIterator[Service]:
    async with make().run() as service:
        yield service


async def ask(service: Service, *bodies: Any) -> None:
    async with service.client() as client:
        for body in bodies:
            await client.post(CHAT_PATH, json=body)
    assert service.request_log.flush(5)


def items(service: Service) -> list[Item]:
    assert service.store is not None
    return [row.item for row in read_items(service.store, ONE, after=0, newest=999)]


def rows(service: Service) -> list[RequestRow]:
    assert service.store is not None
    with Session(service.store) as session:
        return list(session.scalars(select(RequestRow).order_by(RequestRow.id)))


@pytest.mark.slow
async def test_default_settings_store_features_without_texts(make: Make) -> None:
    service = make()
    async with service.run():
        await ask(service, *[ASKED] * 5, *[{**ASKED, "stream": True}] * 5)
    stored = rows(service)
    assert [item.request_id for item in items(service)] == [row.request_id for row in stored]
    assert len(stored) == 10
    assert {(row.prompt, row.answer) for row in stored} == {(None, None)}
    assert {item.prompt["characters"] for item in items(service)} == {len(TEXT)}
    assert len({item.conversation for item in items(service)}) == 1
    content = b"".join(path.read_bytes() for path in service.folder.rglob("*") if path.is_file())
    assert [word for word in TEXT.split() if len(word) > 4 and word.encode() in content] == []
    assert service.count("svc_request_log_dropped_total", reason="features") == 0


@pytest.mark.slow
async def test_no_features_are_stored_if_they_are_disabled(make: Make) -> None:
    service = make(features=False)
    async with service.run():
        await ask(service, ASKED)
    assert len(rows(service)) == 1
    assert items(service) == []


async def test_text_is_redacted_before_features_are_computed(service: Service, handed: list[RequestRecord]) -> None:
    await ask(service, {**CHAT, "messages": [{"role": "user", "content": "I am a@b.de"}]})
    assert [record.prompt for record in handed] == ['[{"role": "user", "content": "I am [mail]"}]']
    assert handed[0].answer


async def test_request_with_stored_content_is_queued_for_feature_extraction_once(
    make: Make, handed: list[RequestRecord]
) -> None:
    service = make(content_share=1.0)
    async with service.run():
        await ask(service, ASKED)
    (row,) = rows(service)
    assert [(record.prompt, record.answer) for record in handed] == [(row.prompt, row.answer)]
    assert row.prompt


@pytest.mark.parametrize("fault", [Fault.ERROR_IN_STREAM, Fault.DIE_BEFORE_ANSWER])
async def test_no_drift_features_are_computed_for_an_incomplete_answer(
    service: Service, handed: list[RequestRecord], fault: Fault
) -> None:
    service.double.fault = fault
    await ask(service, {**ASKED, "stream": True})
    assert len(rows(service)) == 1
    assert handed == []


async def test_features_of_a_tokenized_prompt_are_counted_as_dropped_but_not_logged(
    service: Service, handed: list[RequestRecord], caplog: pytest.LogCaptureFixture
) -> None:
    async with service.client() as client:
        await client.post("/v1/completions", json={"model": CHAT["model"], "prompt": [52, 1287, 9]})
    assert service.request_log.flush(5)
    assert (handed, caplog.messages) == ([], [])
    assert service.count("svc_request_log_dropped_total", reason="features") == 1
    assert service.count("svc_request_log_dropped_total", reason="content_unreadable") == 0


async def test_number_of_requests_queued_for_feature_extraction_is_limited(
    service: Service, handed: list[RequestRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_features, "BURST", 2)
    await ask(service, *[ASKED] * 5)
    assert len(rows(service)) == 5
    assert len(handed) == 2
