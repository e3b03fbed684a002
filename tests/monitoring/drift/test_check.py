"""Tests that a check detects changes in real prompts, with their start and examples, and reports each once."""

import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine as Store

from monitoring.drift.budget import Signal
from monitoring.drift.check import DriftCheck, only_check
from monitoring.drift.report import Status
from monitoring.drift.rows import DriftAlarm, keep_drift, read_drift_alarms, read_drift_states
from svc.errors import BusyError, NotFoundError
from svc.evaluation.results import ExampleResult
from svc.registry.registry import Registry
from svc.settings.monitoring import RequestLogSettings
from svc.store.leases import Lease, LeaseLostError
from svc.version import Format, VersionId
from tests.monitoring.drift.conftest import Check
from tests.monitoring.drift.traffic import NOON, Traffic, prompts, register, system_prompt, target
from tests.new_store import new_store

pytestmark = pytest.mark.slow

ALIKE = prompts("none")
STRONG = prompts("strong")


def alarms(store: Store, signal: Signal) -> list[DriftAlarm]:
    return [alarm for alarm in read_drift_alarms(store, target()) if alarm.signal == signal]


def alarmed(store: Store, signal: Signal) -> set[str]:
    return {alarm.feature for alarm in alarms(store, signal)}


def test_drift_status_is_steady_if_traffic_resembles_the_held_out_set(
    check: Check, traffic: Traffic, store: Store
) -> None:
    traffic.ask(ALIKE[:120])
    reports = check()
    assert [reports[signal].status for signal in (Signal.INPUT, Signal.OUTPUT)] == [Status.STEADY] * 2
    assert read_drift_alarms(store, target()) == []


def test_drift_status_is_waiting_if_there_are_too_few_requests(check: Check, traffic: Traffic) -> None:
    traffic.ask(ALIKE[:9])
    assert check()[Signal.INPUT].status is Status.WAITING


def test_alarm_on_changed_prompts_reports_example_requests_and_when_the_change_began(
    check: Check, traffic: Traffic, store: Store
) -> None:
    traffic.ask(ALIKE[:100])
    shifted = traffic.ask(STRONG[:20])
    report = check()[Signal.INPUT]
    (alarm,) = [alarm for alarm in alarms(store, Signal.INPUT) if alarm.feature == "characters"]
    assert report.status is Status.ALARM
    assert abs(alarm.since - (NOON + timedelta(minutes=101))) <= timedelta(minutes=5)
    assert alarm.called_at <= traffic.now
    assert alarm.examples
    assert set(alarm.examples) <= set(shifted)


def test_alarm_starts_once_and_ends_when_traffic_returns_to_normal(
    check: Check, traffic: Traffic, store: Store
) -> None:
    traffic.ask([*ALIKE[500:850], *STRONG[:30]])
    check()
    traffic.ask(STRONG[30:60])
    check()
    first = [alarm for alarm in alarms(store, Signal.INPUT) if alarm.feature == "characters"]
    assert [alarm.ended_at for alarm in first] == [None]
    traffic.ask(ALIKE[:330])
    assert check()[Signal.INPUT].status is Status.STEADY
    ended = [alarm.ended_at for alarm in alarms(store, Signal.INPUT)]
    assert all(time is not None and time > NOON + timedelta(minutes=410) for time in ended)


def test_more_frequent_checks_give_the_same_results(
    registry: Registry, store: Store, check: Check, traffic: Traffic, tmp_path: Path
) -> None:
    once_store = new_store(tmp_path / "other")
    once = Traffic(once_store, registry)
    for start in range(0, 90, 7):
        texts = [*ALIKE[:60], *STRONG[:30]][start : start + 7]
        traffic.ask(texts)
        once.ask(texts)
        check()
    DriftCheck(registry, once_store, RequestLogSettings(), clock=lambda: once.now).run(target())
    often, at_once = (
        [(alarm.since, alarm.called_at, alarm.moved, alarm.examples) for alarm in read_drift_alarms(one, target())]
        for one in (store, once_store)
    )
    assert often == at_once != []


def test_repeated_prompt_counts_once(check: Check, traffic: Traffic, store: Store) -> None:
    traffic.ask(ALIKE[:50])
    before = check()[Signal.INPUT].items
    traffic.ask(["ping me when the build is done"] * 100)
    assert check()[Signal.INPUT].items == before + 1
    assert alarms(store, Signal.INPUT) == []


def test_drift_signals_are_unwatched_and_the_report_says_why_if_all_recent_requests_are_repeats(
    check: Check, traffic: Traffic
) -> None:
    traffic.ask(ALIKE[:12] * 81)
    reports = check()
    for signal in (Signal.INPUT, Signal.OUTPUT):
        assert reports[signal].status is Status.UNWATCHED
        assert "of the newest 972 requests are compared" in reports[signal].why


def test_report_includes_a_note_if_less_than_one_fifth_of_requests_is_compared(check: Check, traffic: Traffic) -> None:
    traffic.ask([text for text in ALIKE[:50] for _ in range(7)])
    report = check()[Signal.INPUT]
    assert report.status is Status.STEADY
    assert "14% of the newest 350 requests are compared" in report.why


def test_later_change_starts_a_second_alarm_while_the_first_alarm_is_active(
    check: Check, traffic: Traffic, store: Store
) -> None:
    traffic.ask([*ALIKE[:350], *STRONG[:60]])
    check()
    first = alarmed(store, Signal.INPUT)
    traffic.ask(STRONG[60:90], system="You are a pirate.")
    check()
    assert "system_prompt" not in first
    assert "system_prompt" in alarmed(store, Signal.INPUT)


def test_conversation_turns_count_less_than_independent_requests(
    registry: Registry, check: Check, traffic: Traffic, store: Store
) -> None:
    """In 800 turns of 16 long conversations, the topic of a single conversation is not a change in traffic."""
    register(registry, 2, sample=ALIKE[:400])
    for start in range(0, 800, 50):
        traffic.ask(ALIKE[start % 400 : start % 400 + 50], conversation=f"Talk {start}", number=2)
    check(2)
    state = json.loads(read_drift_states(store, target(2))[Signal.INPUT].state)
    assert 30 < state["watch"]["dependence"] <= 50


def test_output_alarm_starts_when_answers_are_no_longer_json(check: Check, traffic: Traffic, store: Store) -> None:
    traffic.ask(ALIKE[:60])
    traffic.ask(ALIKE[60:90], ["I think it is science."] * 30)
    reports = check()
    assert reports[Signal.INPUT].status is Status.STEADY
    assert "valid_json" in alarmed(store, Signal.OUTPUT)


def test_output_alarm_starts_when_answers_become_refusals(check: Check, traffic: Traffic, store: Store) -> None:
    traffic.ask(ALIKE[:100])
    traffic.ask(ALIKE[100:140], ["I'm sorry, but I can't help with that."] * 40)
    check()
    assert "refusal" in alarmed(store, Signal.OUTPUT)


@pytest.mark.parametrize(("temperature", "status"), [(0.0, Status.ALARM), (0.7, Status.STEADY), (None, Status.STEADY)])
def test_answer_lengths_are_compared_only_for_greedy_answers(
    check: Check, traffic: Traffic, temperature: float | None, status: Status
) -> None:
    traffic.ask(ALIKE[:100])
    traffic.ask(ALIKE[100:160], tokens=16, finish_reason="length", temperature=temperature)
    assert check()[Signal.OUTPUT].status is status


def test_live_answer_longer_than_the_held_out_token_limit_counts_as_truncated(check: Check, traffic: Traffic) -> None:
    traffic.ask(ALIKE[:30], tokens=900)
    lines = {line.name: line for line in check()[Signal.OUTPUT].lines}
    assert lines["answer_tokens"].live == "16"
    assert lines["finish_reason"].live == "length 100%"


def test_live_answer_length_is_capped_at_the_largest_token_limit_of_any_held_out_answer(
    registry: Registry, check: Check, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(registry, 2)
    first, *others = registry.results(target(2).version, target(2).format)
    results = (first.model_copy(update={"limit": 40}), *others)
    monkeypatch.setattr(Registry, "results", lambda self, version, format: results)
    traffic.ask(ALIKE[:30], number=2, tokens=900)
    lines = {line.name: line for report in check(2).values() for line in report.lines}
    assert lines["answer_tokens"].live == "40"
    assert lines["finish_reason"].live == "length 100%"


def test_traffic_is_compared_even_if_request_content_is_not_stored(
    check: Check, traffic: Traffic, store: Store
) -> None:
    traffic.ask(ALIKE[:60], content=False)
    traffic.ask(STRONG[:30], content=False, tokens=16, finish_reason="length")
    reports = check()
    assert reports[Signal.INPUT].status is Status.ALARM
    assert "finish_reason" in alarmed(store, Signal.OUTPUT)


def test_without_stored_features_input_and_output_drift_are_off_and_the_reason_names_the_setting(
    check: Check, traffic: Traffic
) -> None:
    traffic.ask(ALIKE[:60], features=False)
    reports = check()
    for signal in (Signal.INPUT, Signal.OUTPUT):
        assert reports[signal].status is Status.OFF
        assert "request_log.features" in reports[signal].why


def test_drift_status_is_waiting_before_the_first_request(check: Check) -> None:
    assert check()[Signal.INPUT].status is Status.WAITING


def test_alarm_ends_when_features_are_no_longer_stored(check: Check, traffic: Traffic, store: Store) -> None:
    traffic.ask([*ALIKE[:100], *STRONG[:30]])
    check()
    traffic.ask(ALIKE[:50], features=False)
    with store.begin() as connection:
        connection.exec_driver_sql("delete from drift_items")
    assert check()[Signal.INPUT].status is Status.OFF
    assert {alarm.ended_at for alarm in alarms(store, Signal.INPUT)} == {traffic.now}


def test_new_rows_are_compared_after_all_earlier_rows_were_deleted(
    check: Check, traffic: Traffic, store: Store
) -> None:
    traffic.ask(ALIKE[:100])
    check()
    with store.begin() as connection:
        connection.exec_driver_sql("delete from requests")
    traffic.ask(STRONG[:30])
    assert check()[Signal.INPUT].status is Status.ALARM


def test_repeated_prompts_cause_no_alarm_if_the_drift_sample_also_repeats_them(
    registry: Registry, check: Check, traffic: Traffic
) -> None:
    """Repeated prompts count equally in the reference sample and in live traffic."""
    frequent, rare = ALIKE[:12], ALIKE[12:]
    generator = np.random.default_rng(5)

    def mixed(count: int, start: int) -> list[str]:
        chosen = generator.integers(0, len(frequent), count)
        repeats = generator.random(count) < 0.6
        return [frequent[chosen[i]] if repeats[i] else rare[start + i] for i in range(count)]

    register(registry, 2, prompts=mixed(300, 0))
    traffic.ask(mixed(500, 300), number=2)
    assert check(2)[Signal.INPUT].status is Status.STEADY


def test_complete_json_causes_no_alarm_if_held_out_json_was_truncated(
    registry: Registry, check: Check, traffic: Traffic
) -> None:
    register(registry, 2, cut=True)
    whole = ['{"section": "net", "why": "it says so, at some length"}'] * 40
    traffic.ask(ALIKE[:40], whole, number=2, tokens=40)
    assert check(2)[Signal.OUTPUT].status is Status.STEADY


def test_tool_call_only_answers_do_not_count_as_empty(check: Check, traffic: Traffic) -> None:
    traffic.ask(ALIKE[:40], [""] * 40, finish_reason="tool_calls", temperature=0.7)
    assert check()[Signal.OUTPUT].status is Status.STEADY


def test_drift_detection_restarts_if_its_stored_state_is_from_a_different_release(
    check: Check, traffic: Traffic, store: Store
) -> None:
    traffic.ask(ALIKE[:20])
    check()
    with store.begin() as connection:
        connection.exec_driver_sql("update drift_states set state = '{\"watch\": 3}'")
    assert check()[Signal.INPUT].items == 20


def test_losing_the_stored_drift_state_causes_no_second_active_alarm_for_a_feature(
    check: Check, traffic: Traffic, store: Store
) -> None:
    traffic.ask([*ALIKE[:100], *STRONG[:40]])
    check()
    with store.begin() as connection:
        connection.exec_driver_sql("update drift_states set state = '{}'")
    check()
    lasting = [alarm.feature for alarm in alarms(store, Signal.INPUT) if alarm.ended_at is None]
    assert "characters" in lasting
    assert len(lasting) == len(set(lasting))


def test_alarm_ends_if_its_feature_is_missing_from_the_stored_state(
    check: Check, traffic: Traffic, store: Store
) -> None:
    traffic.ask(ALIKE[:40])
    check()
    past = DriftAlarm(Signal.INPUT, "of_another_release", NOON, NOON, None, "{}", ())
    keep_drift(store, target(), [], [past])
    check()
    assert [alarm.ended_at for alarm in alarms(store, Signal.INPUT)] == [traffic.now]


def test_only_a_checksum_of_the_system_prompt_is_stored(check: Check, traffic: Traffic, store: Store) -> None:
    traffic.ask(ALIKE[:100])
    traffic.ask(ALIKE[100:130], system="SECRET-TOKEN is the password.")
    check()
    with store.begin() as connection:
        for table in ("drift_states", "drift_alarms", "drift_items"):
            rows = connection.exec_driver_sql(f"select * from {table}").all()
            assert rows and "SECRET" not in str(rows)


def test_alarm_examples_are_requests_that_show_the_change(check: Check, traffic: Traffic, store: Store) -> None:
    traffic.ask(ALIKE[:60])
    bad = traffic.ask(ALIKE[60:75], ["no json"] * 15)
    traffic.ask(ALIKE[75:76])
    check()
    (alarm,) = [alarm for alarm in alarms(store, Signal.OUTPUT) if alarm.feature == "valid_json"]
    assert set(alarm.examples) <= set(bad)


def test_only_the_newest_ended_alarms_of_a_version_are_kept(
    check: Check, traffic: Traffic, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitoring.drift.rows.KEPT_ALARMS", 2)
    for start in range(0, 90, 30):
        traffic.ask(STRONG[start : start + 20])
        traffic.ask(ALIKE[start * 10 : start * 10 + 200])
        check()
    assert check()[Signal.INPUT].status is Status.STEADY
    assert len(read_drift_alarms(store, target())) == 2


def test_drift_signals_are_off_and_the_reason_is_given_if_the_version_has_no_reference_files(
    registry: Registry, check: Check, traffic: Traffic
) -> None:
    register(registry, 2, space=False)
    traffic.ask(ALIKE[:20], number=2)
    reports = check(2)
    assert [reports[signal].status for signal in (Signal.INPUT, Signal.OUTPUT)] == [Status.OFF] * 2
    assert "triage@2 has no file reference/" in reports[Signal.INPUT].why


def test_prompts_are_compared_even_if_the_version_has_no_stored_answers(
    registry: Registry, check: Check, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An example is an adapter whose registered answers are those of another format."""
    register(registry, 2)

    def results(registry: Registry, version: VersionId, format: Format) -> tuple[ExampleResult, ...]:
        raise NotFoundError("there are no answers of an adapter")

    monkeypatch.setattr(Registry, "results", results)
    traffic.ask([*ALIKE[:60], *STRONG[:20]], number=2)
    reports = check(2)
    assert [reports[signal].status for signal in (Signal.INPUT, Signal.OUTPUT)] == [Status.ALARM, Status.OFF]
    assert reports[Signal.OUTPUT].why == "there are no answers of an adapter"


def test_alarm_starts_only_when_traffic_changes_even_if_the_held_out_set_is_small(
    registry: Registry, check: Check, traffic: Traffic
) -> None:
    register(registry, 2, examples=12)
    traffic.ask(ALIKE[:300], number=2)
    assert check(2)[Signal.INPUT].status is Status.STEADY
    traffic.ask(STRONG[:60], number=2)
    assert check(2)[Signal.INPUT].status is Status.ALARM


def test_prompt_reference_is_the_drift_sample_and_answer_reference_is_the_held_out_set(
    registry: Registry, check: Check, traffic: Traffic
) -> None:
    """The held-out prompts of this version differ from its traffic, but its answers to them do not."""
    register(registry, 2, prompts=STRONG[:200], sample=ALIKE[:200])
    traffic.ask(ALIKE[200:300], number=2)
    reports = check(2)
    assert [reports[signal].status for signal in (Signal.INPUT, Signal.OUTPUT)] == [Status.STEADY] * 2


def test_alarm_starts_if_traffic_matches_held_out_prompts_but_not_drift_sample(
    registry: Registry, check: Check, traffic: Traffic
) -> None:
    register(registry, 2, prompts=STRONG[:200], sample=ALIKE[:200])
    traffic.ask([*ALIKE[200:300], *STRONG[200:240]], number=2)
    assert check(2)[Signal.INPUT].status is Status.ALARM


def test_drift_sample_is_redacted_like_live_prompts(registry: Registry, store: Store, traffic: Traffic) -> None:
    """Live texts are redacted when they are stored, so the reference sample is redacted before the comparison."""
    checks = DriftCheck(registry, store, RequestLogSettings(redact=("package",)), clock=lambda: traffic.now)
    system = system_prompt().replace("package", "[redacted]")
    traffic.ask([text.replace("package", "[redacted]") for text in ALIKE[:110]], system=system)
    reports = {report.signal: report for report in checks.run(target())}
    assert reports[Signal.INPUT].status is Status.STEADY


def test_alarm_starts_when_the_system_prompt_changes(check: Check, traffic: Traffic, store: Store) -> None:
    traffic.ask(ALIKE[:100])
    traffic.ask(ALIKE[100:130], system="You are a pirate.")
    check()
    assert alarmed(store, Signal.INPUT) == {"system_prompt"}


def test_alarm_starts_if_a_version_gets_more_bad_ratings_than_the_previous_version(
    check: Check, traffic: Traffic, store: Store
) -> None:
    traffic.rate(traffic.ask(ALIKE[:100], number=2), bad=6)
    traffic.rate(traffic.ask(ALIKE[100:160]), bad=36)
    report = check()[Signal.PEOPLE]
    assert report.status is Status.ALARM
    assert [alarm.feature for alarm in report.alarms] == ["bad_ratings"]
    assert len(alarms(store, Signal.PEOPLE)) == 1


def test_fewer_bad_ratings_cause_no_alarm(check: Check, traffic: Traffic) -> None:
    traffic.rate(traffic.ask(ALIKE[:100], number=2), bad=95)
    traffic.rate(traffic.ask(ALIKE[100:140]), bad=0)
    assert check()[Signal.PEOPLE].status is Status.STEADY


def test_first_ratings_are_the_reference_if_there_is_no_previous_version(check: Check, traffic: Traffic) -> None:
    traffic.rate(traffic.ask(ALIKE[:99]), bad=6)
    assert check()[Signal.PEOPLE].status is Status.WAITING
    traffic.rate(traffic.ask(ALIKE[99:100]), bad=0)
    assert check()[Signal.PEOPLE].items == 0
    traffic.rate(traffic.ask(ALIKE[100:120]), bad=1)
    assert check()[Signal.PEOPLE].items == 20
    traffic.rate(traffic.ask(ALIKE[120:150]), bad=30)
    report = check()[Signal.PEOPLE]
    assert report.status is Status.ALARM
    assert report.items == 50


def test_alarm_starts_within_100_ratings_when_the_share_of_bad_ratings_rises_to_half(
    check: Check, traffic: Traffic
) -> None:
    traffic.rate(traffic.ask(ALIKE[:200], number=2), bad=12)
    for start in range(200, 300, 10):
        traffic.rate(traffic.ask(ALIKE[start : start + 10]), bad=5)
    assert check()[Signal.PEOPLE].status is Status.ALARM


def test_ratings_are_counted_even_if_an_earlier_rating_has_a_future_timestamp(
    check: Check, traffic: Traffic, store: Store
) -> None:
    traffic.rate(traffic.ask(ALIKE[:100], number=2), bad=6)
    traffic.rate(traffic.ask(ALIKE[100:120]), bad=1)
    with store.begin() as connection:
        connection.exec_driver_sql("update feedback set given_at = '2030-01-01 00:00:00' where request = 110")
    assert check()[Signal.PEOPLE].items == 20
    traffic.rate(traffic.ask(ALIKE[120:160]), bad=40)
    assert check()[Signal.PEOPLE].items >= 59


def test_next_drift_check_continues_from_the_stored_state(check: Check, traffic: Traffic, store: Store) -> None:
    traffic.ask(ALIKE[:30])
    check()
    assert check()[Signal.INPUT].items == 30
    assert {state.checked_at for state in read_drift_states(store, target()).values()} == {traffic.now}


def test_drift_check_succeeds_after_already_checked_requests_are_deleted(
    check: Check, traffic: Traffic, store: Store
) -> None:
    traffic.ask(ALIKE[:60])
    check()
    with store.begin() as connection:
        connection.exec_driver_sql("delete from requests where id <= 50")
    traffic.ask(ALIKE[60:80])
    assert check()[Signal.INPUT].status is Status.STEADY


def test_checking_two_thousand_requests_takes_less_than_ten_cpu_seconds(check: Check, traffic: Traffic) -> None:
    import time

    from threadpoolctl import threadpool_limits

    traffic.ask([f"{text} {turn}" for turn in range(2) for text in ALIKE])
    started = time.process_time()
    with threadpool_limits(1):
        assert check()[Signal.INPUT].items > 500
    assert time.process_time() - started < 10


def test_drift_signal_status_is_unwatched_if_new_requests_have_no_stored_features(
    check: Check, traffic: Traffic
) -> None:
    traffic.ask(ALIKE[:100])
    assert check()[Signal.INPUT].status is Status.STEADY
    traffic.ask(ALIKE[100:200], features=False)
    assert check()[Signal.INPUT].status is Status.UNWATCHED


def test_drift_status_is_waiting_if_old_requests_have_expired_and_few_new_ones_have_arrived(
    check: Check, traffic: Traffic, store: Store
) -> None:
    traffic.ask(ALIKE[:100])
    check()
    with store.begin() as connection:
        connection.exec_driver_sql("delete from requests")
    traffic.ask(ALIKE[100:104])
    assert check()[Signal.INPUT].status is Status.WAITING


def test_alarm_ends_when_new_requests_lack_values_for_its_feature(check: Check, traffic: Traffic, store: Store) -> None:
    traffic.ask(ALIKE[:350])
    traffic.ask(ALIKE[350:380], tokens=900)
    check()
    assert "answer_tokens" in alarmed(store, Signal.OUTPUT)
    traffic.ask(ALIKE[380:700], temperature=0.7)
    check()
    assert [
        alarm.ended_at is not None for alarm in alarms(store, Signal.OUTPUT) if alarm.feature == "answer_tokens"
    ] == [True]


def test_model_is_checked_even_if_its_stored_report_is_from_a_different_release(
    check: Check, traffic: Traffic, store: Store
) -> None:
    traffic.ask(ALIKE[:20])
    check()
    with store.begin() as connection:
        connection.exec_driver_sql("update drift_states set report = '{\"moved\": 3}'")
    assert check()[Signal.INPUT].items > 0


def test_input_drift_signal_is_waiting_after_5_requests_without_features_and_off_after_20(
    check: Check, traffic: Traffic
) -> None:
    traffic.ask(ALIKE[:5], features=False)
    assert check()[Signal.INPUT].status is Status.WAITING
    traffic.ask(ALIKE[5:20], features=False)
    assert check()[Signal.INPUT].status is Status.OFF


def test_log_probability_computed_late_is_still_included_in_the_drift_check(
    registry: Registry, store: Store, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitoring.drift.check.SEEN", 1)  # older rows are deleted, unless they are still needed
    now = NOON
    checks = DriftCheck(registry, store, RequestLogSettings(content_share=1), clock=lambda: now)

    def items() -> int:
        return {report.signal: report.items for report in checks.run(target())}[Signal.INPUT]

    traffic.ask(ALIKE[:3])  # at 12:01, 12:02 and 12:03
    now = NOON + timedelta(minutes=4)
    assert items() == 0
    with store.begin() as connection:
        connection.exec_driver_sql("update requests set logprob = -0.1 where id = 1")
    assert items() == 1
    now = NOON + timedelta(minutes=20)
    assert items() == 3


def test_request_is_compared_even_if_the_log_probability_of_a_later_request_is_computed_first(
    registry: Registry, store: Store, traffic: Traffic
) -> None:
    now = NOON + timedelta(minutes=3)
    checks = DriftCheck(registry, store, RequestLogSettings(content_share=1), clock=lambda: now)
    traffic.ask(ALIKE[:2])
    with store.begin() as connection:
        connection.exec_driver_sql("update requests set logprob = -0.1 where id = 2")
    checks.run(target())
    now = NOON + timedelta(minutes=20)
    assert {report.signal: report.items for report in checks.run(target())}[Signal.INPUT] == 2


def test_traffic_drift_can_be_accepted_even_if_rating_drift_cannot(
    registry: Registry, store: Store, check: Check, traffic: Traffic
) -> None:
    traffic.rate(traffic.ask(ALIKE[:100], number=2), bad=6)
    traffic.rate(traffic.ask(ALIKE[100:140]), bad=40)
    traffic.ask([*ALIKE[140:350], *STRONG[:100]])
    check()
    assert alarms(store, Signal.PEOPLE) and alarms(store, Signal.INPUT)
    accepted = DriftCheck(registry, store, RequestLogSettings(), clock=lambda: traffic.now).accept(target())
    assert "characters" in accepted and "bad_ratings" not in accepted
    lasting = {alarm.feature for alarm in read_drift_alarms(store, target()) if alarm.ended_at is None}
    assert lasting == {"bad_ratings"}


def test_home_folders_that_share_a_store_cannot_run_drift_checks_at_the_same_time(
    postgresql_store: Store, tmp_path: Path
) -> None:
    with only_check(tmp_path / "a", postgresql_store) as lease:
        assert lease is not None
        with pytest.raises(BusyError, match="the drift check is in use"), only_check(tmp_path / "b", postgresql_store):
            pass
    with only_check(tmp_path / "b", postgresql_store):
        pass


def test_drift_check_stores_nothing_if_its_lease_was_taken_over(
    registry: Registry, store: Store, traffic: Traffic
) -> None:
    traffic.ask(prompts("none")[:12])
    checks = DriftCheck(registry, store, RequestLogSettings(), clock=lambda: traffic.now)
    with pytest.raises(LeaseLostError):
        checks.run(target(), Lease("*drift", "process 1", 1))
    assert read_drift_states(store, target()) == {}
