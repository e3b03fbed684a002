"""Tests how batches are answered, with the official client and an engine double."""

import asyncio
import errno
import json
import os
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Batch
from sqlalchemy import Engine as Store
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from serving.access.usage import usage_since
from serving.batches import batch_run, batch_runner, progress
from serving.batches.batch_runner import MAX_RUNNING, next_batches
from serving.batches.rows import Batch as StoredBatch
from serving.batches.rows import find_batch, read_open_batches
from serving.files.rows import Purpose, find_file
from svc.identity.principal import Limits, Scope
from svc.store.statuses import BatchStatus
from svc.store.tables import BatchRow, RequestRow
from tests.serving.batches.batch_service import BatchService, create, ended, line, lines
from tests.serving.control import until
from tests.serving.engine_double import Fault
from tests.serving.fine_tuning.fine_tuning_service import strict
from tests.serving.service import CHAT, NAME, closed

CLIENT = (Scope.FILES, Scope.INFER)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten all pauses."""
    monkeypatch.setattr(batch_runner, "_POLL_S", 0.02)
    monkeypatch.setattr(batch_run, "_RECORD_S", 0.02)
    monkeypatch.setattr(batch_run, "_pause_s", lambda answer, pauses: 0.01)
    monkeypatch.setattr(batch_run, "RETRY_S", 0.01)
    monkeypatch.setattr(progress, "RETRY_S", 0.01)


async def in_progress(client: AsyncOpenAI, id: str, completed: int) -> Batch:
    """Return a batch once a number of its requests are answered."""
    async with asyncio.timeout(20):
        while True:
            batch = await client.batches.retrieve(id)
            assert batch.request_counts is not None
            if batch.request_counts.completed >= completed:
                return batch
            await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_all_requests_of_a_batch_are_answered(service: BatchService, client: AsyncOpenAI, store: Store) -> None:
    async with service.running_batches():
        id = await create(client, service.add_input(lines(10) + "\n" + line('a line\n"é"')))
        batch = await ended(client, id)
        await until(lambda: not (service.folder / "batches" / id).exists())
    raw = await client.get(f"/batches/{id}", cast_to=object)
    assert strict(Batch, raw) == batch
    assert (batch.status, batch.model, batch.error_file_id, batch.errors) == ("completed", NAME, None, None)
    counts, usage = batch.request_counts, batch.usage
    assert counts is not None and (counts.total, counts.completed, counts.failed) == (11, 11, 0)
    assert usage is not None and (usage.input_tokens, usage.output_tokens > 0) == (33, True)
    times = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert sorted(time for time in times if time is not None) == list(times)
    results = service.content(batch.output_file_id)
    assert set(results) == {f"r{number}" for number in range(10)} | {'a line\n"é"'}
    result = results["r0"]
    assert set(result) == {"id", "custom_id", "response", "error"} and result["error"] is None
    assert set(result["response"]) == {"status_code", "request_id", "body"}
    assert result["response"]["body"]["choices"][0]["message"]["content"].startswith("1.0")
    file = find_file(store, batch.output_file_id or "", "")
    assert (file.purpose, file.filename, file.expires_at) == (Purpose.BATCH_OUTPUT, f"{id}_output.jsonl", None)


@pytest.mark.slow
async def test_batch_input_and_output_go_through_the_files_api(service: BatchService) -> None:
    key, other = service.key(*CLIENT), service.key(*CLIENT)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(service.official(key))
        stranger = await stack.enter_async_context(service.official(other))
        await stack.enter_async_context(service.running_batches())
        file = await client.files.create(file=("requests.jsonl", lines(3).encode()), purpose="batch")
        given: Any = {"anchor": "created_at", "seconds": 3600}
        batch = await ended(client, await create(client, file.id, output_expires_after=given))
        assert batch.output_file_id is not None
        results = (await client.files.content(batch.output_file_id)).text.splitlines()
        assert sorted(json.loads(result)["custom_id"] for result in results) == ["r0", "r1", "r2"]
        output = await client.files.retrieve(batch.output_file_id)
        assert (output.purpose, output.status, output.filename) == (
            "batch_output",
            "processed",
            f"{batch.id}_output.jsonl",
        )
        assert output.expires_at is not None and output.expires_at - output.created_at == 3600
        for call in (stranger.files.content, stranger.files.retrieve):
            with pytest.raises(openai.NotFoundError):
                await call(batch.output_file_id)


@pytest.mark.slow
async def test_input_file_of_an_unfinished_batch_cannot_be_deleted(service: BatchService, client: AsyncOpenAI) -> None:
    file = service.add_input(lines(1))
    id = await create(client, file)
    with pytest.raises(openai.APIStatusError, match="batch"):
        await client.files.delete(file)
    async with service.running_batches():
        await ended(client, id)
    assert (await client.files.delete(file)).deleted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": NAME, "prompt": "one two"}),
        ("/v1/responses", {"model": NAME, "input": "one two"}),
    ],
)
async def test_batch_completes_on_every_supported_endpoint(
    service: BatchService, client: AsyncOpenAI, path: str, body: dict[str, Any]
) -> None:
    content = json.dumps({"custom_id": "a", "method": "POST", "url": path, "body": body}) + "\n"
    async with service.running_batches():
        batch = await ended(client, await create(client, service.add_input(content), endpoint=path))
    assert service.content(batch.output_file_id)["a"]["response"]["body"]["model"]
    assert batch.usage is not None and batch.usage.input_tokens == 2


@pytest.mark.slow
async def test_failed_requests_are_in_the_error_file(service: BatchService, client: AsyncOpenAI) -> None:
    content = (
        line("good")
        + line("surrogate", user="\ud800")
        + line("unknown", model="other")
        + line("stream", stream=True)
        + line("many", n=100_000)
        + line("refused", messages="x")
        + line("deep", tools=json.loads("[" * 900 + "]" * 900))
        + line("large", seed=10**400)
    )
    async with service.running_batches():
        batch = await ended(client, await create(client, service.add_input(content)))
    assert batch.request_counts is not None and batch.request_counts.failed == batch.request_counts.total - 3
    assert set(service.content(batch.output_file_id)) == {"good", "surrogate", "large"}
    failed = service.content(batch.error_file_id)
    assert {id: result["response"]["status_code"] for id, result in failed.items()} == {
        "unknown": 404,
        "stream": 400,
        "many": 400,
        "refused": 400,
        "deep": 400,
    }
    assert failed["unknown"]["error"] is None
    assert failed["unknown"]["response"]["body"]["error"]["code"] == "model_not_found"
    assert failed["stream"]["response"]["body"]["error"]["param"] == "stream"


@pytest.mark.slow
async def test_batch_input_may_have_a_byte_order_mark_and_blank_lines_and_windows_line_endings(
    service: BatchService, client: AsyncOpenAI
) -> None:
    mark = "\ufeff"
    async with service.running_batches():
        for content in (mark + line("a"), f"{mark}\n" + line("a"), f"{mark} \r\n" + line("a").replace("\n", "\r\n")):
            batch = await ended(client, await create(client, service.add_input(content)))
            assert (batch.status, list(service.content(batch.output_file_id))) == ("completed", ["a"])


@pytest.mark.slow
async def test_batch_with_invalid_input_fails_and_names_the_invalid_lines(
    service: BatchService, client: AsyncOpenAI
) -> None:
    async with service.running_batches():
        batch = await ended(client, await create(client, service.add_input(line("a") + line("a") + "{\n")))
        assert batch.errors is not None and batch.errors.data is not None
        assert [error.line for error in batch.errors.data] == [2, 3]
        assert (batch.status, batch.output_file_id, batch.failed_at is None) == ("failed", None, False)
        other = service.add_input(line("a", url="/v1/completions"))
        batch = await ended(client, await create(client, other))
    assert batch.errors is not None and batch.errors.data is not None
    assert [error.code for error in batch.errors.data] == ["mismatched_endpoint"]
    assert service.double.requests == []


@pytest.mark.slow
async def test_batch_fails_when_its_input_file_is_missing(service: BatchService, client: AsyncOpenAI) -> None:
    file = service.add_input(line("a"))
    id = await create(client, file)
    service.files.path(file).unlink()
    async with service.running_batches():
        batch = await ended(client, id)
    assert batch.errors is not None and batch.errors.data is not None
    assert batch.errors.data[0].code == "input_file_unavailable"


@pytest.mark.slow
async def test_finished_requests_are_not_sent_again_after_a_batch_is_interrupted(
    service: BatchService, client: AsyncOpenAI, store: Store
) -> None:
    service.double.token_delay_s = 0.002
    id = await create(client, service.add_input(lines(60) + line("bad", model="other")))
    for completed in (10, 30):
        async with service.running_batches(concurrency=4):
            await in_progress(client, id, completed)
    folder = service.folder / "batches" / id
    with (folder / "output.jsonl").open("ab") as file:
        file.write(b'{"id":"batch_req_1","custom_id":"r59","resp')  # a kill in the middle of a line
    async with service.running_batches(concurrency=4):
        batch = await ended(client, id)
    assert batch.status == "completed"
    assert len(service.content(batch.output_file_id)) == 60
    assert set(service.content(batch.error_file_id)) == {"bad"}
    assert len(service.double.requests) <= 60 + 2 * 4
    assert batch.usage is not None and batch.usage.input_tokens == 180


async def test_batch_folders_left_by_a_killed_server_are_removed(service: BatchService, client: AsyncOpenAI) -> None:
    left = service.folder / "batches/batch_ended"
    left.mkdir(parents=True)
    service.leads = False
    async with service.running_batches():
        await asyncio.sleep(0.1)
        assert left.exists()
        service.leads = True
        await until(lambda: not left.exists())


@pytest.mark.slow
async def test_batch_is_paused_while_the_server_is_not_the_leader(service: BatchService, client: AsyncOpenAI) -> None:
    service.double.token_delay_s = 0.002
    id = await create(client, service.add_input(lines(40)))
    async with service.running_batches():
        await in_progress(client, id, 4)
        service.leads = False
        await until(lambda: not service.running)
        asked = len(service.double.requests)
        await asyncio.sleep(0.1)
        assert len(service.double.requests) == asked
        service.leads = True
        assert (await ended(client, id)).status == "completed"


@pytest.mark.slow
async def test_cancelled_batch_stops_within_seconds_and_keeps_its_answers(
    service: BatchService, client: AsyncOpenAI
) -> None:
    service.double.token_delay_s = 0.002
    async with service.running_batches():
        id = await create(client, service.add_input(lines(2000)))
        await in_progress(client, id, 8)
        assert (await client.batches.cancel(id)).status == "cancelling"
        async with asyncio.timeout(3):
            batch = await ended(client, id)
        await until(lambda: service.double.running == 0)
    assert batch.status == "cancelled" and batch.cancelled_at is not None and batch.request_counts is not None
    assert 8 <= batch.request_counts.completed == len(service.content(batch.output_file_id)) < 2000


@pytest.mark.slow
async def test_unanswered_requests_of_a_cancelled_batch_do_not_count_as_failed(
    service: BatchService, client: AsyncOpenAI
) -> None:
    service.double.proceed.clear()
    async with service.running_batches():
        id = await create(client, service.add_input(lines(2)))
        await until(lambda: service.double.running == 2)
        await client.batches.cancel(id)
        batch = await ended(client, id)
    assert batch.request_counts is not None
    assert (batch.status, batch.request_counts.failed, batch.error_file_id) == ("cancelled", 0, None)


@pytest.mark.slow
async def test_waiting_batch_can_be_cancelled(service: BatchService, client: AsyncOpenAI) -> None:
    id = await create(client, service.add_input(lines(2)))
    await client.batches.cancel(id)
    async with service.running_batches():
        batch = await ended(client, id)
    assert (batch.status, batch.output_file_id, service.double.requests) == ("cancelled", None, [])


@pytest.mark.slow
async def test_expired_batch_keeps_its_answers_and_lists_the_unanswered_requests(
    service: BatchService, client: AsyncOpenAI, store: Store
) -> None:
    service.double.token_delay_s = 0.002
    id = await create(client, service.add_input(lines(500)))
    with store.begin() as connection:
        soon = datetime.now(UTC) + timedelta(seconds=1)
        connection.execute(update(BatchRow).where(BatchRow.id == id).values(expires_at=soon))
    async with service.running_batches():
        batch = await ended(client, id)
    assert batch.status == "expired" and batch.expired_at is not None
    answered, open_ = service.content(batch.output_file_id), service.content(batch.error_file_id)
    assert answered.keys() | open_.keys() == {f"r{number}" for number in range(500)}
    assert not answered.keys() & open_.keys()
    result = next(iter(open_.values()))
    assert (result["response"], result["error"]["code"]) == (None, "batch_expired")


@pytest.mark.slow
async def test_live_requests_interrupt_batch_requests_when_no_slot_is_free(socket_folder: Path, store: Store) -> None:
    service = BatchService(socket_folder, store=store, max_running=4)
    service.double.proceed.clear()
    async with service.run(), service.official() as client, service.running_batches(concurrency=8):
        id = await create(client, service.add_input(lines(20)))
        await until(lambda: service.double.running == 3)  # a quarter stays free
        assert (service.admission.running, service.admission.batch_slots.running) == (0, 3)
        live = [asyncio.create_task(client.chat.completions.create(**CHAT, user="live")) for _ in range(4)]
        await until(lambda: sum(body.get("user") == "live" for body in service.double.requests) == 4)
        assert (service.admission.running, service.admission.batch_slots.running) == (4, 0)
        await until(lambda: service.double.running == 4)  # those of the batch were interrupted
        service.double.proceed.set()
        await asyncio.gather(*live)
        batch = await ended(client, id)
    assert batch.status == "completed" and len(service.content(batch.output_file_id)) == 20


@pytest.mark.slow
async def test_batch_requests_wait_while_admission_is_closed_for_a_swap(
    service: BatchService, client: AsyncOpenAI
) -> None:
    service.double.token_delay_s = 0.002
    async with service.running_batches():
        id = await create(client, service.add_input(lines(60)))
        await in_progress(client, id, 8)
        async with closed(service.admission):
            await until(lambda: service.double.running == 0)
        batch = await ended(client, id)
    assert (batch.status, batch.error_file_id) == ("completed", None)


@pytest.mark.slow
async def test_batch_request_is_sent_at_most_three_times_to_a_failing_engine(
    service: BatchService, client: AsyncOpenAI
) -> None:
    service.double.refuse_with = 500, {"message": "no", "type": "InternalServerError", "code": 500}
    async with service.running_batches():
        batch = await ended(client, await create(client, service.add_input(lines(1))))
    assert service.content(batch.error_file_id)["r0"]["response"]["status_code"] == 502
    assert len(service.double.requests) == 3


@pytest.mark.slow
async def test_batch_requests_are_counted_and_logged_but_their_durations_are_not_measured(
    service: BatchService, client: AsyncOpenAI, store: Store
) -> None:
    key = service.key(*CLIENT)
    async with service.official(key) as official, service.running_batches():
        batch = await ended(official, await create(official, service.add_input(lines(5), owner=key.key.id)))
    assert batch.usage is not None
    of_version = {"model": NAME, "version": "1"}
    route = {"route": "/v1/chat/completions"}
    assert service.count("svc_requests_total", **of_version, **route, status="200", outcome="complete") == 5
    assert service.count("svc_key_tokens_total", model=NAME, key_id=key.key.id, direction="in") == 15
    assert service.count("svc_request_duration_seconds_count", **of_version, **route) == 0
    await asyncio.to_thread(service.request_log.close)
    with Session(store) as session:
        rows = list(session.scalars(select(RequestRow)))
    assert [(row.key_id, row.status, row.tokens_in) for row in rows] == [(key.key.id, 200, 3)] * 5
    ids = {result["response"]["request_id"] for result in service.content(batch.output_file_id).values()}
    assert ids == {row.request_id for row in rows}
    await asyncio.to_thread(service.usage_writer.close)
    (used,) = usage_since(store, datetime.now(UTC) - timedelta(hours=2))
    assert (used.usage.requests, used.usage.tokens_in) == (5, 15)


@pytest.mark.slow
async def test_batch_fails_when_its_key_is_revoked(service: BatchService) -> None:
    service.double.token_delay_s = 0.002
    alice, root = service.key(*CLIENT), service.key(Scope.ADMIN)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(service.official(alice))
        admin = await stack.enter_async_context(service.official(root))
        await stack.enter_async_context(service.running_batches())
        id = await create(client, service.add_input(lines(2000), owner=alice.key.id))
        await in_progress(client, id, 4)
        service.revoke(alice)
        service.authenticator.refresh()
        batch = await ended(admin, id)
    assert batch.status == "failed" and batch.errors is not None and batch.errors.data is not None
    (error,) = batch.errors.data
    assert (error.code, error.message) == ("invalid_api_key", f"key {alice.key.id} has been revoked")
    assert len(service.content(batch.output_file_id)) >= 4


@pytest.mark.slow
async def test_batch_requests_have_the_permissions_and_limits_of_their_key(service: BatchService) -> None:
    other = service.key(*CLIENT, models=frozenset({"other"}))
    limited = service.key(*CLIENT, limits=Limits(concurrent=4))
    async with service.official(other) as client, service.running_batches():
        batch = await ended(client, await create(client, service.add_input(lines(2), owner=other.key.id)))
    failed = service.content(batch.error_file_id).values()
    assert [result["response"]["body"]["error"]["code"] for result in failed] == ["model_not_found"] * 2
    service.double.proceed.clear()
    async with service.official(limited) as client, service.running_batches(concurrency=8):
        id = await create(client, service.add_input(lines(12), owner=limited.key.id))
        await until(lambda: service.double.running == 3)
        await asyncio.sleep(0.1)
        assert service.double.running == 3  # half of the limit was free when the last one began
        live = asyncio.create_task(client.chat.completions.create(**CHAT))
        await until(lambda: service.double.running == 4)
        service.double.proceed.set()
        await live
        assert (await ended(client, id)).status == "completed"


@pytest.mark.slow
async def test_batch_starts_on_a_creation_notification_without_polling_the_store(
    service: BatchService, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []

    def read(store: Store) -> list[StoredBatch]:
        reads.append(store)
        return read_open_batches(store)

    monkeypatch.setattr(batch_runner, "read_open_batches", read)
    monkeypatch.setattr("serving.store_changes.changes.FALLBACK_POLL_S", 1000.0)
    service.changes.trust(1000.0)
    async with service.running_batches():
        await until(lambda: reads)
        await asyncio.sleep(0.2)
        assert len(reads) == 1
        id = await create(client, service.add_input(lines(2)))
        service.changes.announce()
        assert (await ended(client, id)).status == "completed"


@pytest.mark.slow
async def test_batch_waits_while_the_disk_is_full(
    service: BatchService, client: AsyncOpenAI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full, write = True, os.write

    def write_some(descriptor: int, data: Any) -> int:
        if full and len(data) > 100:
            write(descriptor, bytes(data[:20]))
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr("serving.batches.progress.os.write", write_some)
    async with service.running_batches():
        id = await create(client, service.add_input(lines(20)))
        await until(lambda: "No space left on device" in caplog.text)
        assert len(service.double.requests) <= 4
        full = False
        batch = await ended(client, id)
    assert batch.status == "completed" and len(service.content(batch.output_file_id)) == 20


@pytest.mark.slow
async def test_batch_survives_an_engine_death(service: BatchService, client: AsyncOpenAI) -> None:
    service.double.fault = Fault.SILENCE
    async with service.running_batches():
        id = await create(client, service.add_input(lines(2)))
        await until(lambda: service.double.running == 2)
        service.admission.unavailable("the engine has failed")
        await until(lambda: service.double.running == 0)
        service.double.fault = Fault.NONE
        service.admission.available()
        batch = await ended(client, id)
    assert (batch.status, batch.error_file_id) == ("completed", None)


def test_next_batch_is_taken_from_the_owner_with_the_fewest_running_batches() -> None:
    now = datetime.now(UTC)

    def batch(id: str, owner: str, **fields: Any) -> StoredBatch:
        times = {"created_at": now, "expires_at": now + timedelta(hours=1)}
        return StoredBatch(id, owner, "file", "/v1/chat/completions", "24h", **(times | fields))

    batches = [batch(f"a{number}", "alice") for number in range(9)] + [batch("b0", "bob")]
    assert [each.id for each in next_batches(batches, {})] == ["a0", "b0", *(f"a{number}" for number in range(1, 7))]
    running = {f"a{number}": "alice" for number in range(MAX_RUNNING)}
    assert next_batches(batches, running) == []
    ending = [batch("c", "carol", status=BatchStatus.CANCELLING), batch("d", "dora", expires_at=now)]
    assert next_batches([*batches, *ending], running) == ending


@pytest.mark.slow
async def test_finished_batch_cannot_be_cancelled_and_its_output_file_expires_as_requested(
    service: BatchService, client: AsyncOpenAI, store: Store
) -> None:
    async with service.running_batches():
        expiry = {"anchor": "created_at", "seconds": 3600}
        id = await create(client, service.add_input(lines(1)), output_expires_after=expiry)
        batch = await ended(client, id)
    file = find_file(store, find_batch(store, id, None).output_file or "", None)
    assert file.expires_at is not None and file.expires_at - file.created_at == timedelta(hours=1)
    with pytest.raises(openai.BadRequestError):
        await client.batches.cancel(batch.id)
