"""Tests that live answers are scored, newest first, and that answers that cannot be scored have no effect."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from statistics import fmean
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from serving.background import scoring
from serving.background.scheduler import BackgroundScheduler
from serving.background.scoring import LiveScores
from svc.settings.monitoring import HoldoutSettings
from svc.store.kept_requests import newest_unscored
from svc.store.requests import RequestRecord, add_requests
from svc.store.swaps import SwapOutcome
from svc.store.tables import RequestRow
from svc.version import Format
from tests.builders.requests import RECORD
from tests.serving.control import Control, Make, until
from tests.serving.engine_double import Fault
from tests.serving.home import Home
from tests.serving.versions import MAX_TOKENS, NAME, make_version, target

pytestmark = pytest.mark.slow

PROMPT = [{"role": "user", "content": "one two three"}]
KEPT = RECORD._replace(
    model=NAME,
    version=target(1).version,
    format=Format.MERGED,
    temperature=0.0,
    prompt=json.dumps(PROMPT),
    answer="an answer",
)
FAST: dict[str, Any] = {"requests_per_minute": 1e6, "scored_per_hour": 10**9}


def kept(*, minutes_ago: float = 1, **fields: Any) -> RequestRecord:
    return KEPT._replace(started_at=datetime.now(UTC) - timedelta(minutes=minutes_ago), **fields)


@asynccontextmanager
async def scoring_of(
    control: Control, *, busy: Callable[[], bool] = lambda: False, **settings: Any
) -> AsyncIterator[LiveScores]:
    chosen = HoldoutSettings.model_validate(FAST | settings)
    scores = LiveScores(
        BackgroundScheduler(control.admission, control.pool, chosen),
        busy=busy,
        pool=control.pool,
        registry=control.registry,
        store=control.store,
        per_hour=chosen.scored_per_hour,
    )
    task = asyncio.create_task(scores.run())
    try:
        yield scores
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=1)
        assert task.done()


@pytest.fixture
async def control(make: Make) -> AsyncIterator[Control]:
    """Yield a server with version 1, whose answers were stored at registration."""
    async with make(answered=1).run() as control:
        yield control


def logprobs(control: Control) -> list[float | None]:
    with Session(control.store) as session:
        return list(session.scalars(select(RequestRow.logprob).order_by(RequestRow.id)))


async def test_live_answer_score_is_the_mean_log_probability_of_its_tokens(control: Control) -> None:
    add_requests(control.store, [kept()])
    async with scoring_of(control):
        await until(lambda: logprobs(control) != [None])
    client = control.replica.client
    prompt, answer = await client.prompt_tokens(PROMPT), await client.tokens("an answer")
    assert logprobs(control) == [pytest.approx(fmean(await client.logprobs(prompt + answer, len(prompt))))]


async def test_long_live_answer_is_truncated_like_a_held_out_answer(control: Control) -> None:
    words = [f"word{number}" for number in range(MAX_TOKENS + 2)]
    add_requests(control.store, [kept(answer=" ".join(words))])
    async with scoring_of(control):
        await until(lambda: logprobs(control) != [None])
    client = control.replica.client
    prompt, answer = await client.prompt_tokens(PROMPT), await client.tokens(" ".join(words[:MAX_TOKENS]))
    assert logprobs(control) == [pytest.approx(fmean(await client.logprobs(prompt + answer, len(prompt))))]


async def test_store_is_polled_infrequently_if_there_is_nothing_to_score(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def look(*arguments: Any, **options: Any) -> Any:
        nonlocal looks
        looks += 1
        return newest_unscored(*arguments, **options)

    monkeypatch.setattr(scoring, "newest_unscored", look)
    monkeypatch.setattr(scoring, "_PAUSE_S", 60.0)
    async with scoring_of(control):
        await until(lambda: looks)
        await asyncio.sleep(0.05)
    assert looks == 1


async def test_every_scorable_answer_is_scored(control: Control) -> None:
    add_requests(
        control.store, [kept(), kept(temperature=1.0), kept(answer="mail [mail]"), kept(minutes_ago=61), kept()]
    )
    async with scoring_of(control):
        await until(lambda: sum(score is not None for score in logprobs(control)) == 2)
        await asyncio.sleep(0.05)
    assert [score is not None for score in logprobs(control)] == [True, False, False, False, True]


async def test_newest_answer_is_scored_first(control: Control) -> None:
    add_requests(control.store, [kept(minutes_ago=2), kept(minutes_ago=1), kept(minutes_ago=3)])
    async with scoring_of(control, scored_per_hour=1):
        await until(lambda: any(logprobs(control)))
        await asyncio.sleep(0.05)
    assert [score is not None for score in logprobs(control)] == [False, True, False]


async def test_number_of_answers_scored_per_hour_is_limited(control: Control) -> None:
    add_requests(control.store, [kept()] * 5)
    async with scoring_of(control, scored_per_hour=3600 * 20):
        await until(lambda: sum(score is not None for score in logprobs(control)) == 1)
        await asyncio.sleep(0.11)
        assert sum(score is not None for score in logprobs(control)) <= 4


async def test_answer_that_the_engine_refuses_to_score_is_not_retried(control: Control) -> None:
    control.double.max_model_len = 10
    long = json.dumps([{"role": "user", "content": "long " * 20}])
    add_requests(control.store, [kept(prompt=long), kept(minutes_ago=2)])
    async with scoring_of(control):
        await until(lambda: logprobs(control)[1] is not None)
        asked = len(control.double.requests)
        await asyncio.sleep(0.05)
        assert len(control.double.requests) == asked
    assert logprobs(control)[0] is None


async def test_nothing_is_scored_during_a_held_out_evaluation(control: Control) -> None:
    busy = True
    add_requests(control.store, [kept()])
    async with scoring_of(control, busy=lambda: busy):
        await asyncio.sleep(0.05)
        assert logprobs(control) == [None]
        busy = False
        await until(lambda: logprobs(control) != [None])


async def test_only_answers_of_the_served_version_are_scored(control: Control) -> None:
    add_requests(control.store, [kept()])
    async with scoring_of(control, scored_per_hour=10**9):
        await until(lambda: logprobs(control) != [None])
        assert (await control.promote(2)).outcome is SwapOutcome.SUCCEEDED
        add_requests(control.store, [kept(), kept(version=target(2).version)])
        await until(lambda: logprobs(control)[2] is not None)
        assert logprobs(control)[1] is None


@pytest.mark.parametrize(("unprobed", "settings"), [("the engine dies of it", {}), (None, {"scored_per_hour": 0})])
async def test_nothing_is_scored_if_background_requests_are_off(
    make: Make, unprobed: str | None, settings: dict[str, Any]
) -> None:
    control = make(answered=3)
    control.park.unprobed = unprobed
    async with control.run():
        add_requests(control.store, [kept()])
        asked = len(control.double.requests)
        async with scoring_of(control, **settings):
            await asyncio.sleep(0.05)
        assert len(control.double.requests) == asked


async def test_nothing_is_scored_if_the_version_has_no_held_out_results(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async with make().run() as control:
        add_requests(control.store, [kept()])
        async with scoring_of(control):
            await asyncio.sleep(0.1)
        assert logprobs(control) == [None]
    assert caplog.text.count("not scoring live answers of tuned@1 (merged)") == 1


async def test_answer_whose_scoring_kills_the_engine_is_not_retried(control: Control) -> None:
    add_requests(control.store, [kept()])
    control.double.fault = Fault.DIE_BEFORE_ANSWER
    async with scoring_of(control):
        await until(lambda: len(control.park.engines) == 2)
        await control.serves(target(1))
        control.double.fault = Fault.DIE_BEFORE_ANSWER
        await asyncio.sleep(0.1)
        assert len(control.park.engines) == 2


async def test_scoring_continues_after_a_store_failure(
    control: Control, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = 2

    def fail_twice(*arguments: Any, **options: Any) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OperationalError("select", {}, OSError("database is locked"))
        return newest_unscored(*arguments, **options)

    monkeypatch.setattr(scoring, "newest_unscored", fail_twice)
    add_requests(control.store, [kept()])
    async with scoring_of(control):
        await until(lambda: logprobs(control) != [None])
    assert "database is locked" in caplog.text


async def test_multi_part_prompt_is_sent_for_scoring_unchanged(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    async def prompt_tokens(self: object, messages: Any) -> list[int]:
        asked.append(messages)
        return [1, 2]

    monkeypatch.setattr("svc.engine.client.EngineClient.prompt_tokens", prompt_tokens)
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    add_requests(control.store, [kept(prompt=json.dumps(parts))])
    async with scoring_of(control):
        await until(lambda: logprobs(control) != [None])
    assert asked == [parts]


async def test_server_scores_its_live_answers(home: Home) -> None:
    make_version(home.registry, 4, answered=1)
    changes = {"holdout": HoldoutSettings.model_validate(FAST), "request_log": {"content_share": 1.0}}
    home.settings = type(home.settings).model_validate(home.settings.model_dump() | changes)
    body = {"model": NAME, "messages": PROMPT, "temperature": 0}

    def score() -> float | None:
        with Session(home.store) as session:
            return session.scalar(select(RequestRow.logprob))

    async with home.serving(f"{NAME}@4") as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == httpx.codes.OK
        await until(lambda: score() is not None)
    assert -10 < (score() or 0) < 0


async def test_scoring_reads_no_answers_if_content_is_not_stored(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []
    monkeypatch.setattr(scoring, "newest_unscored", lambda *_, **__: looks.append(None))
    make_version(home.registry, 4, answered=1)
    home.settings = home.settings.model_copy(update={"holdout": HoldoutSettings.model_validate(FAST)})
    async with home.serving(f"{NAME}@4"):
        await asyncio.sleep(0.2)
    assert looks == []
