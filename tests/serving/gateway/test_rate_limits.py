"""Tests key limits over HTTP: the responses, and how unmodified clients react to them."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from sqlalchemy import Engine as Store
from sqlalchemy import select
from sqlalchemy.orm import Session

from serving.access.usage import Usage, UsageTotal, usage_since
from serving.admission.rate_limiter import Limit, RateLimiter
from serving.telemetry.metrics import UNKNOWN_MODEL
from svc.store.tables import RequestRow
from tests.serving.control import until
from tests.serving.engine_double import Fault
from tests.serving.keyed import principal
from tests.serving.service import CHAT, CHAT_PATH, NAME, STREAM, Service, error_of

LIMITED = {"authorization": "Bearer limited"}
MESSAGE: dict[str, Any] = {"model": NAME, "max_tokens": 4, "messages": [{"role": "user", "content": "one two three"}]}
SHORT = {**CHAT, "max_tokens": 4}


class Time:
    """The limiter's clock, which does not advance by itself."""

    now = 0.0


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
async def service(socket_folder: Any, time: Time) -> AsyncIterator[Service]:
    limiter = RateLimiter(clock=lambda: time.now, wall=lambda: 1e9 + time.now)
    async with Service(socket_folder, limiter=limiter).run() as service:
        service.principals["other"] = principal("other")
        yield service


def limit(service: Service, **limits: int) -> None:
    service.principals["limited"] = principal("limited", **limits)


def left(service: Service, of: Limit) -> int:
    return service.limiter.allowances(service.principals["limited"])[of].remaining


async def test_rate_limit_response_names_the_limit_and_the_wait(service: Service, client: httpx.AsyncClient) -> None:
    limit(service, requests_per_minute=1)
    assert (await client.post(CHAT_PATH, json=SHORT, headers=LIMITED)).status_code == 200
    answer = await client.post(CHAT_PATH, json=SHORT, headers=LIMITED)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["type"]) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert "1 requests per minute" in error["message"]
    assert answer.headers["retry-after"] == "60"
    assert "x-should-retry" not in answer.headers


async def test_rate_limit_headers_are_on_every_response(service: Service, client: httpx.AsyncClient) -> None:
    limit(service, requests_per_minute=60, tokens_out_per_minute=100)
    good = await client.post(CHAT_PATH, json=SHORT, headers=LIMITED)
    assert good.headers["x-ratelimit-limit-requests"] == "60"
    assert good.headers["x-ratelimit-remaining-requests"] == "59"
    assert good.headers["x-ratelimit-limit-tokens"] == "100"
    assert good.headers["x-ratelimit-remaining-tokens"] == "96"
    assert (await client.get("/v1/models", headers=LIMITED)).headers["x-ratelimit-reset-requests"] == "1s"
    for path, body in ((CHAT_PATH, {"model": 1}), ("/nowhere", {})):
        bad = await client.post(path, json=body, headers=LIMITED)
        assert bad.status_code >= 400
        assert bad.headers["x-ratelimit-remaining-tokens"] == "96"


async def test_every_response_has_a_processing_time_header(client: httpx.AsyncClient) -> None:
    for path in (CHAT_PATH, "/v1/models", "/health", "/nowhere"):
        took = (await client.post(path, json=CHAT)).headers["openai-processing-ms"]
        assert 0 <= int(took) < 5000, path


async def test_no_rate_limits_are_shown_without_a_key(client: httpx.AsyncClient) -> None:
    answer = await client.post(CHAT_PATH, json=CHAT)
    assert not [name for name in answer.headers if "ratelimit" in name]


@pytest.mark.parametrize("body", [SHORT, {**SHORT, "stream": True}], ids=["whole", "streamed"])
async def test_answer_is_charged_according_to_the_engines_token_counts(
    service: Service, client: httpx.AsyncClient, body: Any
) -> None:
    limit(service, tokens_in_per_minute=100, tokens_out_per_minute=100, tokens_per_day=1000, concurrent=1)
    await client.post(CHAT_PATH, json={**body, "max_tokens": 60}, headers=LIMITED)
    assert left(service, Limit.TOKENS_IN_PER_MINUTE) == 97
    assert left(service, Limit.TOKENS_OUT_PER_MINUTE) == 96
    assert left(service, Limit.TOKENS_PER_DAY) == 993
    assert left(service, Limit.CONCURRENT) == 1


async def test_max_tokens_is_charged_n_times_for_n_choices(service: Service, client: httpx.AsyncClient) -> None:
    limit(service, tokens_out_per_minute=100)
    answer = await client.post(CHAT_PATH, json={**CHAT, "max_tokens": 30, "n": 4}, headers=LIMITED)
    assert error_of(answer)["code"] == "rate_limit_exceeded"
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize(("status", "requests"), [(400, 4), (503, 5)])
async def test_no_tokens_are_charged_if_the_engine_rejects_a_request(
    service: Service, client: httpx.AsyncClient, status: int, requests: int
) -> None:
    limit(service, requests_per_minute=5, tokens_per_day=10_000)
    service.double.refuse_with = status, {"message": "no"}
    assert (await client.post(CHAT_PATH, json=SHORT, headers=LIMITED)).status_code == status
    assert left(service, Limit.REQUESTS_PER_MINUTE) == requests
    assert left(service, Limit.TOKENS_PER_DAY) == 10_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT_PATH, b"{"),
        ("/tokenize", b'{"model": 1}'),
        (CHAT_PATH, b'{"model": "tuned", "messages": [' + b"{}," * 9999 + b"{}]}"),
    ],
    ids=["no JSON", "no model", "too many messages"],
)
async def test_request_with_a_rejected_body_counts_towards_the_request_limit(
    service: Service, client: httpx.AsyncClient, path: str, body: bytes
) -> None:
    limit(service, requests_per_minute=2)
    headers = LIMITED | {"content-type": "application/json"}
    answers = [await client.post(path, content=body, headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [400, 400, 429]


async def test_request_for_an_unknown_model_counts_towards_the_request_limit(
    service: Service, client: httpx.AsyncClient
) -> None:
    limit(service, requests_per_minute=2)
    await client.post(CHAT_PATH, json={**SHORT, "model": "unknown"}, headers=LIMITED)
    assert left(service, Limit.REQUESTS_PER_MINUTE) == 1


async def test_nothing_is_charged_if_admission_rejects_a_request(service: Service, client: httpx.AsyncClient) -> None:
    limit(service, requests_per_minute=1)
    service.admission.unavailable("the engine is starting")
    assert (await client.post(CHAT_PATH, json=SHORT, headers=LIMITED)).status_code == 503
    assert left(service, Limit.REQUESTS_PER_MINUTE) == 1


@pytest.mark.slow
@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "streamed"])
async def test_estimated_generated_tokens_are_charged_if_the_client_abandons_its_answer(
    service: Service, live: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    limit(service, tokens_out_per_minute=100, concurrent=1)
    service.pace.observe(1000, 10.0)
    service.double.proceed.clear()
    service.double.fault = Fault.SILENCE
    with pytest.raises(httpx.ReadTimeout):
        await live.post(CHAT_PATH, json={**body, "max_tokens": 90}, headers=LIMITED, timeout=0.3)
    await until(lambda: left(service, Limit.CONCURRENT) == 1)
    assert 25 <= 100 - left(service, Limit.TOKENS_OUT_PER_MINUTE) <= 60


async def test_abandoned_stream_is_charged_for_at_least_the_forwarded_tokens(
    service: Service, live: httpx.AsyncClient
) -> None:
    limit(service, tokens_out_per_minute=100, concurrent=1)
    service.pace.observe(1, 1000.0)
    service.double.tokens, service.double.token_delay_s = 50, 0.02
    async with live.stream("POST", CHAT_PATH, json={**STREAM, "max_tokens": 50}, headers=LIMITED) as answer:
        async for line in answer.aiter_lines():
            if "1.4" in line:
                break
    await until(lambda: left(service, Limit.CONCURRENT) == 1)
    assert 5 <= 100 - left(service, Limit.TOKENS_OUT_PER_MINUTE) < 50


@pytest.mark.slow
async def test_abandoned_answer_is_charged_for_at_most_the_reserved_tokens(
    service: Service, live: httpx.AsyncClient
) -> None:
    limit(service, tokens_out_per_minute=100, concurrent=1)
    service.double.fault = Fault.SILENCE
    with pytest.raises(httpx.ReadTimeout):
        await live.post(CHAT_PATH, json={**CHAT, "n": 4, "max_tokens": 10}, headers=LIMITED, timeout=0.3)
    await until(lambda: left(service, Limit.CONCURRENT) == 1)
    assert left(service, Limit.TOKENS_OUT_PER_MINUTE) == 60


async def test_request_rejected_by_a_token_limit_still_counts_towards_the_request_limit(
    service: Service, client: httpx.AsyncClient
) -> None:
    limit(service, requests_per_minute=2, tokens_out_per_minute=10)
    answers = [await client.post(CHAT_PATH, json={**SHORT, "max_tokens": 50}, headers=LIMITED) for _ in range(3)]
    assert [error_of(answer)["message"].partition(" of ")[0] for answer in answers[1:]] == [
        "the answers to this request could reach 50 tokens, more than this key's limit",
        "this key has reached its limit",
    ]


@pytest.mark.slow
async def test_concurrent_requests_count_towards_the_limit_before_their_bodies_are_parsed(
    service: Service, client: httpx.AsyncClient
) -> None:
    limit(service, requests_per_minute=1)
    service.double.token_delay_s = 0.05
    answers = await asyncio.gather(*(client.post(CHAT_PATH, json=SHORT, headers=LIMITED) for _ in range(3)))
    assert sorted(answer.status_code for answer in answers) == [200, 429, 429]


async def test_completed_answers_update_the_estimated_token_rate_of_the_engine(
    service: Service, client: httpx.AsyncClient
) -> None:
    service.double.token_delay_s = 0.02
    for body in (SHORT, {**SHORT, "stream": True}):
        await client.post(CHAT_PATH, json=body)
    assert 20 <= service.pace.tokens_in(1.0) <= 50


async def test_forwarded_tokens_are_charged_if_the_engine_fails_mid_stream(
    service: Service, client: httpx.AsyncClient
) -> None:
    limit(service, tokens_out_per_minute=100, concurrent=1)
    service.double.fault = Fault.ERROR_IN_STREAM
    await client.post(CHAT_PATH, json={**STREAM, "max_tokens": 50}, headers=LIMITED)
    assert (left(service, Limit.TOKENS_OUT_PER_MINUTE), left(service, Limit.CONCURRENT)) == (98, 1)


@pytest.mark.slow
async def test_requests_over_the_concurrency_limit_are_rejected_until_a_running_request_ends(
    service: Service, client: httpx.AsyncClient
) -> None:
    limit(service, concurrent=1)
    service.double.token_delay_s = 0.05
    first = asyncio.create_task(client.post(CHAT_PATH, json=SHORT, headers=LIMITED))
    await until(lambda: service.double.running == 1)
    second = await client.post(CHAT_PATH, json=SHORT, headers=LIMITED)
    assert "1 concurrent requests" in error_of(second)["message"]
    assert (await client.post(CHAT_PATH, json=SHORT, headers={"x-api-key": "other"})).status_code == 200
    await first
    assert (await client.post(CHAT_PATH, json=SHORT, headers=LIMITED)).status_code == 200


async def test_daily_limit_error_tells_the_client_not_to_retry(service: Service, client: httpx.AsyncClient) -> None:
    limit(service, tokens_per_day=100)
    service.limiter.add_used_today({"limited": 100})
    answer = await client.post(CHAT_PATH, json=SHORT, headers=LIMITED)
    assert 120 < int(answer.headers["retry-after"]) <= 86_400
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-ratelimit-remaining-tokens"] == "0"


async def test_anthropic_routes_return_rate_limit_errors_and_headers_in_anthropic_format(
    service: Service, client: httpx.AsyncClient
) -> None:
    limit(service, requests_per_minute=1)
    await client.post("/v1/messages", json=MESSAGE, headers={"x-api-key": "limited"})
    answer = await client.post("/v1/messages", json=MESSAGE, headers={"x-api-key": "limited"})
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert answer.headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert answer.headers["retry-after"] == "60"


class TestFull:
    """Tests sending more requests than may run."""

    @pytest.fixture
    async def service(self, socket_folder: Any) -> AsyncIterator[Service]:
        async with Service(socket_folder, max_running=2, max_queued=40).run() as service:
            service.double.token_delay_s = 0.002
            service.principals |= {"light": principal("light"), "heavy": principal("heavy", weight=3)}
            yield service

    @pytest.mark.slow
    async def test_requests_with_keys_are_queued_and_scheduled_by_weight(
        self, service: Service, client: httpx.AsyncClient
    ) -> None:
        ended = list[str]()

        async def ask(key: str) -> int:
            answer = await client.post(CHAT_PATH, json=SHORT, headers={"x-api-key": key})
            ended.append(key)
            return answer.status_code

        statuses = await asyncio.gather(*(ask(key) for key in ["light"] * 16 + ["heavy"] * 16))
        assert set(statuses) == {200}
        assert 10 <= ended[:16].count("heavy") <= 13

    async def test_requests_without_a_key_are_rejected_if_all_slots_are_taken(
        self, service: Service, client: httpx.AsyncClient
    ) -> None:
        answers = await asyncio.gather(*(client.post(CHAT_PATH, json=SHORT) for _ in range(8)))
        codes = [error_of(answer)["code"] for answer in answers if answer.status_code == 429]
        assert codes == ["overloaded"] * 6

    @pytest.mark.slow
    async def test_only_the_key_that_sends_too_many_requests_is_rate_limited(
        self, service: Service, client: httpx.AsyncClient
    ) -> None:
        async def ask(key: str) -> tuple[str, int]:
            answer = await client.post(CHAT_PATH, json=SHORT, headers={"x-api-key": key})
            return key, answer.status_code

        answers = await asyncio.gather(*(ask(key) for key in ["heavy"] * 80 + ["light"] * 4))
        assert answers.count(("light", 200)) == 4
        assert answers.count(("heavy", 429)) == 84 - 42


def used(service: Service, key_id: str) -> tuple[float, ...]:
    """Return a key's used requests, input tokens and output tokens."""
    of = {"model": NAME, "key_id": key_id}
    tokens = (service.count("svc_key_tokens_total", **of, direction=direction) for direction in ("in", "out"))
    return service.count("svc_key_requests_total", **of), *tokens


class TestUsage:
    async def test_usage_is_counted_separately_for_each_key_id(
        self, service: Service, client: httpx.AsyncClient
    ) -> None:
        limit(service, requests_per_minute=2)
        for body in (SHORT, {**SHORT, "stream": True}, SHORT):
            await client.post(CHAT_PATH, json=body, headers=LIMITED)
        await client.post(CHAT_PATH, json=SHORT)
        assert used(service, "limited") == (2, 6, 8)
        assert used(service, "") == (1, 3, 4)
        refused = {"model": UNKNOWN_MODEL, "key_id": "limited", "limit": "requests_per_minute"}
        assert service.count("svc_key_refused_total", **refused) == 1

    async def test_usage_is_stored_separately_for_each_key_and_model(self, socket_folder: Path, store: Store) -> None:
        async with Service(socket_folder, store=store).run() as service, service.client() as client:
            limit(service)
            await client.post(CHAT_PATH, json=SHORT, headers=LIMITED)
            await client.post(CHAT_PATH, json={**SHORT, "model": "unknown"}, headers=LIMITED)
            await asyncio.to_thread(service.usage_writer.close)
        totals = usage_since(store, datetime.now(UTC) - timedelta(hours=1))
        assert totals == [UsageTotal("limited", NAME, Usage(1, 3, 4))]

    async def test_request_row_stores_the_id_of_its_key(self, socket_folder: Path, store: Store) -> None:
        async with Service(socket_folder, store=store).run() as service, service.client() as client:
            limit(service)
            await client.post(CHAT_PATH, json=SHORT, headers=LIMITED)
            await client.post(CHAT_PATH, json=SHORT)
        with Session(store) as session:
            rows = session.scalars(select(RequestRow).order_by(RequestRow.started_at)).all()
        assert [row.key_id for row in rows] == ["limited", None]


class TestClients:
    """Tests unmodified clients, with the retry delays that they choose themselves."""

    @pytest.fixture
    def waits(self, monkeypatch: pytest.MonkeyPatch, time: Time) -> list[float]:
        """Return the clients' delays before their retries. Only the limiter's clock advances."""
        waited: list[float] = []

        async def sleep(seconds: float) -> None:
            waited.append(seconds)
            time.now += seconds

        monkeypatch.setattr("openai._base_client.anyio.sleep", sleep)
        return waited

    async def test_openai_client_retries_after_the_wait_stated_in_the_response(
        self, service: Service, waits: list[float]
    ) -> None:
        limit(service, requests_per_minute=2)
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(service.app))
        async with AsyncOpenAI(api_key="limited", base_url="http://localhost/v1", http_client=http) as official:
            for _ in range(4):
                await official.chat.completions.create(
                    model=NAME, messages=[{"role": "user", "content": "one"}], max_tokens=4
                )
        assert waits == [30.0, 30.0]

    async def test_openai_client_does_not_retry_after_a_daily_limit_error(
        self, service: Service, waits: list[float]
    ) -> None:
        limit(service, tokens_per_day=1)
        service.limiter.add_used_today({"limited": 1})
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(service.app))
        async with AsyncOpenAI(api_key="limited", base_url="http://localhost/v1", http_client=http) as official:
            with pytest.raises(openai.RateLimitError) as caught:
                await official.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "one"}])
        assert (caught.value.code, waits) == ("rate_limit_exceeded", [])

    @pytest.mark.slow
    async def test_anthropic_client_retries_after_the_wait_stated_in_the_response(
        self, service: Service, waits: list[float]
    ) -> None:
        import anthropic

        limit(service, requests_per_minute=2)
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(service.app))
        async with anthropic.AsyncAnthropic(
            api_key="limited", base_url="http://localhost", http_client=http
        ) as official:
            for _ in range(3):
                await official.messages.create(**MESSAGE)
            with pytest.raises(anthropic.RateLimitError) as caught:
                await official.with_options(max_retries=0).messages.create(**MESSAGE)
        assert waits == [30.0]
        assert caught.value.type == "rate_limit_error"
