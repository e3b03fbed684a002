"""Tests held-out evaluations: after every load and on a schedule, with stored results and unaffected requests."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from serving.background import holdout
from serving.background.holdout import HoldoutRuns
from serving.background.scheduler import ID_PREFIX, BackgroundScheduler
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.probes import EngineFacts
from svc.engine.state import EngineState
from svc.errors import RecipeError
from svc.evaluation.metrics.metric import Metric
from svc.evaluation.metrics.text import Rouge
from svc.registry.registry import Registry
from svc.settings.monitoring import HoldoutSettings
from svc.settings.serve import SwapChoice
from svc.store.holdouts import (
    HoldoutCause,
    HoldoutOutcome,
    HoldoutRun,
    add_holdout_run,
    newest_holdout_run,
)
from svc.store.kept_requests import MOST_TOKENS
from svc.store.swaps import SwapOutcome
from svc.store.tables import HoldoutRunRow
from svc.version import Target
from tests.serving.control import Control, Load, Make, until
from tests.serving.engine_double import Fault, logprob_of, tokenized
from tests.serving.home import Home
from tests.serving.versions import FACTS, HELDOUT, MAX_TOKENS, NAME, RESULT, make_version, target

pytestmark = pytest.mark.slow

FAST: dict[str, Any] = {"requests_per_minute": 1e6}


def runs_of(control: Control, **settings: Any) -> HoldoutRuns:
    chosen = HoldoutSettings.model_validate(FAST | settings)
    return HoldoutRuns(
        BackgroundScheduler(control.admission, control.pool, chosen),
        pool=control.pool,
        registry=control.registry,
        store=control.store,
        metrics=control.deployment.metrics,
        facts=_facts,
        every_hours=chosen.every_hours,
    )


async def _facts(target: Target) -> EngineFacts:
    return FACTS


@asynccontextmanager
async def running(runs: HoldoutRuns) -> AsyncIterator[HoldoutRuns]:
    """Run the loop while the context is active. A defect that ends the loop fails the test."""
    task = asyncio.create_task(runs.run())
    try:
        yield runs
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=1)
        assert task.done()


@asynccontextmanager
async def asked(make: Make, answered: int = 3, **settings: Any) -> AsyncIterator[tuple[Control, HoldoutRuns]]:
    """Yield a control plane whose versions have registered answers to the held-out set, and its evaluations."""
    async with make(answered=answered).run() as control, running(runs_of(control, **settings)) as runs:
        yield control, runs


def due(control: Control, number: int) -> float | None:
    """Return the interval at which a version must be run, in seconds."""
    labels = {"model": NAME, "version": str(number)}
    return control.collector.get_sample_value("svc_holdout_interval_seconds", labels)


def rows(control: Control) -> list[HoldoutRunRow]:
    with Session(control.store) as session:
        return list(session.scalars(select(HoldoutRunRow).order_by(HoldoutRunRow.id)))


async def run_of(control: Control, of: Target, runs: int = 1, *, completed: bool = True) -> HoldoutRun:
    """Return a version's newest run after waiting for the given number of runs."""

    def enough() -> bool:
        mine = [row.outcome for row in rows(control) if row.number == of.version.number]
        return (mine.count(HoldoutOutcome.COMPLETED) if completed else len(mine)) >= runs

    await until(enough)
    run = newest_holdout_run(control.store, of, completed=completed)
    assert run is not None
    return run


async def test_all_held_out_examples_are_evaluated_after_startup(make: Make) -> None:
    async with asked(make) as (control, _):
        run = await run_of(control, target(1))
        assert (run.cause, run.outcome, run.reason, run.engine) == (
            HoldoutCause.START,
            HoldoutOutcome.COMPLETED,
            None,
            FACTS,
        )
        assert (run.places, run.hits) == ((0, 1, 2), (True, False, False))
        assert run.started_at <= run.ended_at
        assert len(rows(control)) == 1


async def test_each_answer_is_scored_with_the_versions_metric(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rouge = Rouge("1")
    monkeypatch.setattr(holdout, "watched_metric", lambda registry, target, run_functions: rouge)
    async with asked(make) as (control, _):
        run = await run_of(control, target(1))
    assert (run.metric, run.scores[0]) == ("rouge_1", 1.0)
    assert all(0 < score < 1 for score in run.scores[1:])
    assert run.hits == (True, False, False)


async def test_each_answer_is_scored_by_exact_match_if_that_is_the_primary_metric(make: Make) -> None:
    async with asked(make) as (control, _):
        run = await run_of(control, target(1))
    assert (run.metric, run.scores) == ("exact_match", (1.0, 0.0, 0.0))


async def test_held_out_evaluation_is_stored_even_if_the_versions_own_metric_is_unavailable(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(registry: Registry, target: Target, *, run_functions: bool) -> Metric:
        raise RecipeError("there is no metric 'own'")

    monkeypatch.setattr(holdout, "watched_metric", refuse)
    async with asked(make) as (control, _):
        run = await run_of(control, target(1))
    assert (run.outcome, run.metric, run.scores) == (HoldoutOutcome.COMPLETED, "exact_match", (1.0, 0.0, 0.0))
    assert "there is no metric 'own'" in caplog.text


async def test_held_out_evaluation_computes_log_probabilities_of_the_registered_tokens(make: Make) -> None:
    async with asked(make) as (control, _):
        run = await run_of(control, target(1))
        for example, nll in zip(HELDOUT, run.nll, strict=True):
            seen = tokenized(example)
            places = range(*seen.learnt[0])
            logprobs = [logprob_of(control.double.weights, seen.input_ids[place], place) for place in places]
            assert nll == pytest.approx(-sum(logprobs) / len(logprobs))


async def test_requests_for_held_out_examples_have_the_same_messages_and_parameters_as_at_registration(
    make: Make,
) -> None:
    async with asked(make) as (control, _):
        await run_of(control, target(1))
        chats = [body for body in control.double.requests if "messages" in body]
    assert [body["messages"] for body in chats] == [[m.as_dict() for m in example.prompt] for example in HELDOUT]
    assert {(body["max_tokens"], body["temperature"]) for body in chats} == {(MAX_TOKENS, 0)}
    ids = control.double.request_ids[1:]  # the first id is a probe's
    assert len(ids) == 2 * len(HELDOUT)
    assert all(request_id.startswith(ID_PREFIX) for request_id in ids)


async def test_each_held_out_example_uses_its_registered_token_limit(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = tuple(RESULT.model_copy(update={"limit": limit}) for limit in (5, 9, 3))
    monkeypatch.setattr(Registry, "results", lambda self, version, format: registered)
    async with asked(make) as (control, _):
        await run_of(control, target(1))
        chats = [body for body in control.double.requests if "messages" in body]
    assert [body["max_tokens"] for body in chats] == [5, 9, 3]


async def test_only_examples_answered_at_registration_are_evaluated(make: Make) -> None:
    async with asked(make, answered=2) as (control, _):
        assert (await run_of(control, target(1))).hits == (True, False)


async def test_only_a_sample_of_a_large_held_out_set_is_evaluated(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holdout, "MAX_EXAMPLES", 2)
    async with asked(make) as (control, _):
        run = await run_of(control, target(1))
        chats = [body for body in control.double.requests if "messages" in body]
    assert (run.places, run.hits, len(run.nll)) == ((0, 2), (True, False), 2)
    assert [body["messages"] for body in chats] == [[m.as_dict() for m in HELDOUT[at].prompt] for at in (0, 2)]


async def test_held_out_example_with_too_many_tokens_is_skipped(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = map(tokenized, HELDOUT)
    long = TokenizedExample(second.input_ids + (1,) * MOST_TOKENS, second.learnt)
    monkeypatch.setattr(Registry, "heldout_tokens", lambda self, version: (first, long, third))
    async with asked(make) as (control, _):
        assert (await run_of(control, target(1))).places == (0, 2)


async def test_held_out_evaluation_is_skipped_with_a_reason_if_all_examples_are_too_long(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdout, "MOST_TOKENS", 1)
    async with asked(make) as (control, runs):
        await until(lambda: runs.status(target(1))["reason"])
        assert "longer than 1 tokens" in runs.status(target(1))["reason"]
        assert rows(control) == []


def test_sample_is_spread_evenly_over_the_held_out_set() -> None:
    cases: list[tuple[int, int]] = [(1000, 200), (201, 200), (399, 200), (200, 200), (5, 200), (1, 1)]
    for total, most in cases:
        places = holdout._evenly(total, most)
        assert len(set(places)) == min(total, most), total
        gaps = [after - before for before, after in pairwise([-1, *places, total])]
        assert min(gaps) >= 1 and max(gaps) <= -(-total // most), total


async def test_held_out_evaluation_does_not_appear_in_request_metrics(make: Make) -> None:
    async with asked(make) as (control, _):
        await run_of(control, target(1))
        assert control.sample("svc_tokens_total", model=NAME, version="1", direction="out") == 0
        assert [
            s for family in control.collector.collect() if family.name == "svc_requests" for s in family.samples
        ] == []


async def test_new_version_is_evaluated_on_the_held_out_set_after_a_swap(make: Make) -> None:
    async with asked(make) as (control, _):
        await run_of(control, target(1))
        await control.promote(2)
        run = await run_of(control, target(2))
        assert (run.cause, run.hits) == (HoldoutCause.SWAP, (False, True, False))


async def test_restored_version_is_evaluated_again_on_the_held_out_set_after_a_failed_swap(make: Make) -> None:
    async with asked(make) as (control, _):
        make_version(control.registry, 4, probes_of="/elsewhere", answered=3)
        await run_of(control, target(1))
        assert (await control.promote(4)).outcome is SwapOutcome.RESTORED
        assert (await run_of(control, target(1), 2)).cause is HoldoutCause.SWAP
        assert {row.number for row in rows(control)} == {1}


async def test_replacement_engine_is_evaluated_on_the_held_out_set_after_an_engine_dies(make: Make) -> None:
    async with asked(make) as (control, _):
        await run_of(control, target(1))
        control.park.engines[0].kill()
        assert (await run_of(control, target(1), 2)).cause is HoldoutCause.START


async def test_held_out_evaluation_is_repeated_on_schedule(make: Make) -> None:
    async with asked(make, every_hours=0.05 / 3600) as (control, _):
        assert (await run_of(control, target(1), 3)).cause is HoldoutCause.SCHEDULE
        assert [row.cause for row in rows(control)][:3] == ["start", "schedule", "schedule"]


async def test_held_out_evaluation_is_not_repeated_before_its_scheduled_time(make: Make) -> None:
    async with asked(make) as (control, runs):
        await run_of(control, target(1))
        await asyncio.sleep(0.1)
        assert len(rows(control)) == 1
        assert not runs.under_way


async def test_held_out_evaluation_restarts_after_a_swap_interrupts_it(make: Make) -> None:
    control = make(answered=3)
    control.park.prepare = lambda double: setattr(double, "token_delay_s", 0.05)
    async with control.run(), running(runs_of(control)) as runs:
        await until(lambda: runs.status(target(1))["asked"] == 1)
        swap = await control.promote(2)
        assert swap.outcome is SwapOutcome.SUCCEEDED
        assert swap.queued_s is not None and swap.queued_s < 1
        await run_of(control, target(2))
        assert [row.number for row in rows(control)] == [2]


async def test_held_out_evaluation_restarts_after_engine_death_interrupts_it(make: Make) -> None:
    control = make(answered=3)
    control.park.prepare = lambda double: setattr(double, "token_delay_s", 0.05)
    async with control.run(), running(runs_of(control)) as runs:
        await until(lambda: runs.status(target(1))["asked"] == 1)
        control.park.prepare = lambda double: None
        control.park.engines[0].kill()
        run = await run_of(control, target(1), completed=False)
        assert (run.outcome, run.hits) == (HoldoutOutcome.COMPLETED, (True, False, False))
        assert len(rows(control)) == 1


@pytest.mark.slow
async def test_held_out_evaluation_completes_under_load_without_a_failed_request(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.background.scheduler.PATIENCE_S", 0.02)
    control = make(answered=3)
    control.park.prepare = lambda double: setattr(double, "token_delay_s", 0.002)
    async with (
        control.run(),
        running(runs_of(control)),
        control.client() as client,
        Load(client).run() as load,
    ):
        await run_of(control, target(1))
        await control.promote(2)
        run = await run_of(control, target(2))
    assert run.hits == (False, True, False)
    load.check()


async def test_rejected_example_fails_the_held_out_evaluation_but_does_not_stop_later_scheduled_runs(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    control = make(answered=3)
    async with control.run():
        control.double.max_model_len = 4
        async with running(runs_of(control, every_hours=0.1 / 3600)):
            run = await run_of(control, target(1), completed=False)
            assert (run.outcome, run.hits, run.nll) == (HoldoutOutcome.FAILED, (), ())
            assert run.reason is not None and "maximum context length" in run.reason
            control.double.max_model_len = 1000
            assert (await run_of(control, target(1))).cause is HoldoutCause.SCHEDULE
    assert "the held-out evaluation of tuned@1 (merged) failed" in caplog.text


async def test_held_out_evaluation_fails_if_registered_answers_were_altered(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    control = make(answered=3)
    path = control.registry.folder(target(1).version) / "reference" / "merged.jsonl"
    path.write_bytes(path.read_bytes() * 2)
    async with control.run(), running(runs_of(control)):
        run = await run_of(control, target(1), completed=False)
    assert run.outcome is HoldoutOutcome.FAILED
    assert run.reason is not None and "was changed after registration" in run.reason


async def test_failed_held_out_evaluation_reports_the_exception_as_its_reason(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no")

    monkeypatch.setattr(holdout, "ask_example", fail)
    async with asked(make) as (control, _):
        run = await run_of(control, target(1), completed=False)
    assert run.reason == "ZeroDivisionError('no')"


async def test_held_out_evaluation_is_stored_even_if_the_store_failed_temporarily(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = 2

    def fail_twice(store: Any, run: HoldoutRun) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OperationalError("insert", {}, OSError("database is locked"))
        add_holdout_run(store, run)

    monkeypatch.setattr(holdout, "add_holdout_run", fail_twice)
    async with asked(make) as (control, _):
        assert (await run_of(control, target(1))).hits == (True, False, False)
        assert len([body for body in control.double.requests if "messages" in body]) == len(HELDOUT)
    assert caplog.text.count("could not store the held-out evaluation") == 2
    assert "database is locked" in caplog.text


async def test_held_out_evaluation_that_fails_with_an_unexpected_exception_is_repeated(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = 1

    def fail_once(store: Any, run: HoldoutRun) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise ZeroDivisionError("no")
        add_holdout_run(store, run)

    monkeypatch.setattr(holdout, "add_holdout_run", fail_once)
    async with asked(make, every_hours=0.05 / 3600) as (control, _):
        await run_of(control, target(1))
    assert "the held-out evaluation failed unexpectedly" in caplog.text


async def test_version_without_registered_answers_is_skipped_and_logged_once(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    async with asked(make, answered=0, every_hours=0.01 / 3600) as (control, runs):
        await until(lambda: runs.status(target(1))["state"] == "off")
        await asyncio.sleep(0.1)
        assert "has no file reference/merged.jsonl" in runs.status(target(1))["reason"]
        assert rows(control) == []
        assert not runs.under_way
        assert due(control, 1) is None
        make_version(control.registry, 4, answered=1)
        await control.promote(4)
        await run_of(control, target(4))
        assert runs.status(target(4))["state"] == "waiting"
    assert caplog.text.count("skipping the held-out evaluation of") == 1


@pytest.mark.parametrize(
    ("unprobed", "settings", "reason"),
    [("the engine dies of it", {}, "the engine dies of it"), (None, {"every_hours": 0}, "`holdout.every_hours` is 0")],
)
async def test_held_out_evaluation_is_skipped_with_a_reason_if_held_out_evaluations_are_disabled(
    make: Make, caplog: pytest.LogCaptureFixture, unprobed: str | None, settings: dict[str, Any], reason: str
) -> None:
    control = make(answered=3)
    control.park.unprobed = unprobed
    async with control.run(), running(runs_of(control, **settings)) as runs:
        await asyncio.sleep(0.1)
        await control.promote(2)
        await asyncio.sleep(0.1)
        status = runs.status(target(2))
        assert (status["state"], status["reason"], status["last_run"]) == ("off", reason, None)
        assert rows(control) == []
        assert due(control, 2) is None
        assert not [body for body in control.double.requests if "messages" in body]
    assert [record for record in caplog.records if record.levelno == logging.WARNING and reason in record.message]


async def test_interval_between_held_out_evaluations_is_exported_before_the_first_evaluation_ends(make: Make) -> None:
    control = make(answered=3)
    control.park.prepare = lambda double: setattr(double, "token_delay_s", 0.05)
    async with control.run(), running(runs_of(control, every_hours=2)) as runs:
        await until(lambda: runs.status(target(1))["asked"] == 1)
        assert (due(control, 1), due(control, 2)) == (2 * 3600, None)
        await control.promote(2)
        await until(lambda: runs.status(target(2))["asked"] == 1)
        assert (due(control, 1), due(control, 2)) == (None, 2 * 3600)


async def test_status_shows_held_out_evaluation_progress(make: Make) -> None:
    control = make(answered=3)
    control.park.prepare = lambda double: setattr(double, "token_delay_s", 0.02)
    async with control.run(), running(runs_of(control)) as runs:
        await until(lambda: runs.status(target(1))["asked"] == 2)
        assert runs.under_way
        assert runs.status(target(1)) == {
            "state": "running",
            "reason": None,
            "asked": 2,
            "total": 3,
            "last_run": None,
        }
        run = await run_of(control, target(1))
        await until(lambda: not runs.under_way)
        status = runs.status(target(1))
    assert (status["state"], status["asked"], status["total"]) == ("waiting", 0, 0)
    assert status["last_run"] == {
        "cause": "start",
        "ended_at": run.ended_at.isoformat(timespec="seconds"),
        "outcome": "completed",
        "reason": None,
    }


async def test_held_out_evaluations_are_disabled_after_three_engine_deaths(make: Make) -> None:
    """Otherwise, each new engine would be killed by the held-out evaluation that its start triggers."""
    control = make(answered=3)

    def kill_chats(path: str) -> None:
        if path == "/v1/chat/completions":
            control.double.fault = Fault.DIE_BEFORE_ANSWER

    control.park.prepare = lambda double: setattr(double, "on_call", kill_chats)
    async with control.run(), running(runs_of(control)) as runs:
        run = await run_of(control, target(1), completed=False)
        assert (run.outcome, run.places, run.hits) == (HoldoutOutcome.FAILED, (), ())
        assert run.reason is not None and "died 3 times" in run.reason
        status = runs.status(target(1))
        assert (status["state"], status["reason"], status["last_run"]["reason"]) == ("off", run.reason, run.reason)
        assert due(control, 1) == 6 * 3600
        await control.serves(target(1))
        starts = len(control.park.engines)
        await asyncio.sleep(0.1)
        assert len(control.park.engines) == starts <= 4
        assert control.state is EngineState.READY


async def test_server_evaluates_the_held_out_set_and_reports_the_result_in_its_status(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_version(home.registry, 4, answered=3)
    home.settings = home.settings.model_copy(update={"holdout": HoldoutSettings.model_validate(FAST)})
    async with home.serving(f"{NAME}@4") as client:
        async with asyncio.timeout(5):
            while not (status := (await client.get("/svc/status")).json()["models"][0]["holdout"])["last_run"]:
                await asyncio.sleep(0.01)
    assert (status["state"], status["last_run"]["outcome"]) == ("waiting", "completed")
    with Session(home.store) as session:
        assert session.scalars(select(HoldoutRunRow.number)).all() == [4]


async def test_held_out_evaluation_does_not_delay_the_shutdown_of_the_server(home: Home) -> None:
    make_version(home.registry, 4, answered=3)
    async with home.serving(f"{NAME}@4"):
        home.park.double.token_delay_s = 30
        await until(lambda: home.park.double.running)
        stopping = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - stopping < 2


async def test_held_out_evaluation_is_attributed_to_the_version_that_answered(make: Make) -> None:
    """In a swap of two engines, the first one loads the new version long before that version is in production."""
    control = make(answered=3, replicas=2, swap=SwapChoice.BLUEGREEN)
    async with control.run(), running(runs_of(control)):
        await until(lambda: len(control.pool.ready) == 2)
        await run_of(control, target(1))
        control.park.start_delay_s = 0.3
        wish = control.wish(2)
        first = await run_of(control, target(2))
        assert control.names.served == Target(target(1).version, target(1).format), "too late to tell"
        await control.outcome(wish)
        assert first.nll != (await run_of(control, target(1))).nll
        assert [row.number for row in rows(control)] == [1, 2]
