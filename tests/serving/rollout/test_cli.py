"""Tests `svc promote`, `svc rollback` and `svc rollout` on the command line."""

import asyncio
import json
import time

import pytest

from serving.rollout.promotion_client import FollowedChange, ServerResult
from serving.rollout.served import served_spans
from svc.cli import group
from svc.errors import BusyError, GateError, NotFoundError, RefusedError, SvcError
from svc.identity.actor import Actor
from svc.settings.rollout import RolloutSettings
from svc.settings.settings import Settings
from svc.store.audit import Action, AuditEntry, read_events
from svc.store.desired import change_desired, read_desired
from svc.store.rollouts import (
    RolloutOutcome,
    SignalRow,
    add_rollout_step,
    begin_rollout,
    end_rollout,
    store_signals,
)
from svc.store.swaps import SwapOutcome, SwapResult
from svc.version import VersionId
from tests.builders.actors import ANN
from tests.builders.commands import error_of, models_of, type_in
from tests.serving.control import until
from tests.serving.home import Home
from tests.serving.versions import NAME, make_version, target
from tests.svc.registry.manifests import gate_report

pytestmark = pytest.mark.slow


async def test_promote_and_rollback_commands_affect_only_one_model(serving: Home, other: str) -> None:
    make_version(serving.registry, 8, name="other")
    await type_in(serving, "add", f"{other}@7")
    assert (await type_in(serving, "promote", f"{other}@8")).exit_code == 0
    versions = {model["model"]: model["version"] for model in await asyncio.to_thread(models_of, serving)}
    assert versions == {NAME: f"{NAME}@1", "other": "other@8"}
    assert (await type_in(serving, "rollback", other)).exit_code == 0
    versions = {model["model"]: model["version"] for model in await asyncio.to_thread(models_of, serving)}
    assert versions == {NAME: f"{NAME}@1", "other": "other@7"}


async def test_promote_command_shows_the_served_version_and_the_swap(serving: Home) -> None:
    result = await type_in(serving, "promote", f"{NAME}@2")
    assert result.exit_code == 0, result.output
    assert "tuned@2 (merged) is served\n  inplace swap in " in result.output
    assert "files match the manifest" in result.output


async def test_promote_command_prints_json_if_requested(serving: Home) -> None:
    result = await type_in(serving, "promote", f"{NAME}@2", "--json")
    result_json = json.loads(result.stdout)
    assert (result_json["target"], result_json["outcome"], result_json["queued"]) == (str(target(2)), "succeeded", 0)


def end_promotions_with(monkeypatch: pytest.MonkeyPatch, *results: SwapResult | None) -> None:
    """Let every promotion end with the given results of servers gpu-1, gpu-2 and so on."""
    servers = tuple(ServerResult(f"gpu-{number}:8000", result) for number, result in enumerate(results, start=1))
    monkeypatch.setattr("serving.rollout.cli.follow", lambda *_: FollowedChange(servers))


async def test_failed_promotion_shows_the_result_of_every_server(
    serving: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = SwapResult(SwapOutcome.CANCELLED, "superseded by tuned@1")
    end_promotions_with(monkeypatch, cancelled, SwapResult(SwapOutcome.REFUSED, "no memory"), None)
    error = error_of(await type_in(serving, "promote", f"{NAME}@2"))
    assert error.wrong.splitlines() == [
        "tuned@2 (merged) was not promoted (refused): all servers return to tuned@1 (merged)",
        "  gpu-1:8000: cancelled: superseded by tuned@1",
        "  gpu-2:8000: refused: no memory",
        "  gpu-3:8000: stopped before it had a result",
    ]


async def test_promotion_warns_about_a_server_that_has_stopped(serving: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    end_promotions_with(monkeypatch, SwapResult(SwapOutcome.SUCCEEDED), None)
    result = await type_in(serving, "promote", f"{NAME}@2", "--json")
    assert result.exit_code == 0
    assert "warning: gpu-2:8000: stopped before it had a result" in result.stderr
    servers = [(server["address"], server["outcome"]) for server in json.loads(result.stdout)["servers"]]
    assert servers == [("gpu-1:8000", "succeeded"), ("gpu-2:8000", None)]


async def test_version_that_failed_a_check_is_not_promoted(serving: Home) -> None:
    make_version(serving.registry, 4, failed=("GPTQ lost 0.3",))
    error = error_of(await type_in(serving, "promote", f"{NAME}@4"))
    assert isinstance(error, GateError)
    assert "GPTQ lost 0.3" in error.wrong
    assert "svc promote tuned@4 --force --reason TEXT" in error.todo


async def test_dry_run_shows_the_gates_and_changes_nothing(serving: Home) -> None:
    make_version(serving.registry, 4, failed=("GPTQ lost 0.3",))
    passed = await type_in(serving, "promote", f"{NAME}@2", "--dry-run")
    assert passed.exit_code == 0, passed.output
    assert [line.split()[0] for line in passed.stdout.splitlines()[:4]] == ["gate", "checks", "files", "parity"]
    refused = await type_in(serving, "promote", f"{NAME}@4", "--dry-run", "--json")
    gates = {row["gate"]: row for row in json.loads(refused.stdout)["gates"]}
    assert isinstance(error_of(refused), GateError)
    assert (gates["checks"]["verdict"], gates["checks"]["reason"]) == ("failed", "GPTQ lost 0.3")
    assert (await type_in(serving, "promote", f"{NAME}@4", "--dry-run", "--force", "--reason", "x")).exit_code == 0
    desired = read_desired(serving.store, NAME)
    assert desired is not None and desired.target == target(1)
    assert [event.action for event in read_events(serving.store, newest=9)] == ["serve"]


async def test_promotion_dry_run_says_that_the_version_is_already_in_production(serving: Home) -> None:
    result = await type_in(serving, "promote", f"{NAME}@1", "--dry-run", "--json")
    gates = {row["gate"]: row["reason"] for row in json.loads(result.stdout)["gates"]}
    assert gates["speed"] == "the version is in production"


async def test_promotion_error_contains_the_output_of_the_failed_custom_gate(home: Home) -> None:
    gate = {"name": "own", "command": ["sh", "-c", "echo 3 tests failed; exit 1"]}
    models = {NAME: {"gates": {"custom": [gate]}}}
    home.settings = Settings.model_validate(home.settings.model_dump() | {"models": models})
    async with home.serving(f"{NAME}@1"):
        error = error_of(await type_in(home, "promote", f"{NAME}@2"))
    assert isinstance(error, GateError)
    assert "own: 3 tests failed: failed" in error.wrong


async def test_gates_are_stored_with_the_promotion_and_shown_in_the_history(home: Home) -> None:
    async with home.serving(f"{NAME}@1"):
        make_version(home.registry, 4, failed=("GPTQ lost 0.3",))
        shown = json.loads(
            (await type_in(home, "promote", f"{NAME}@4", "--force", "--reason", "demo", "--json")).stdout
        )["gates"]
    (event,) = read_events(home.store, newest=1)
    assert event.details["forced"] and event.details["gates"] == shown
    assert [row["gate"] for row in shown if row["verdict"] == "failed"] == ["checks"]
    rows = json.loads((await type_in(home, "history", NAME, "--json")).stdout)
    assert [row["gates"] for row in rows] == [[], shown]
    assert "passed=" in (await type_in(home, "history", NAME)).stdout
    assert "gates failed=1 passed=" in " ".join((await type_in(home, "audit")).stdout.split())


async def test_version_with_an_undecided_verdict_is_promoted_with_a_warning(serving: Home) -> None:
    make_version(serving.registry, 4, gates=(gate_report(0.04), gate_report(0.09)))
    result = await type_in(serving, "promote", f"{NAME}@4")
    assert result.stdout.startswith("tuned@4 (merged) is served")
    assert result.stderr.count("warning: gptq_quality: GPTQ lowered accuracy by 0.010") == 1
    assert "a loss of up to 0.090 cannot be excluded with 60 examples; about 500 would decide" in result.stderr


async def test_force_option_promotes_a_version_that_failed_a_check_and_prints_the_given_reason(serving: Home) -> None:
    make_version(serving.registry, 4, failed=("GPTQ lost 0.3",))
    result = await type_in(serving, "promote", f"{NAME}@4", "--force", "--reason", "the demo of Monday")
    assert "tuned@4 (merged) is served" in result.output
    assert "the version failed a check; it is promoted anyway, for this reason: the demo of Monday" in result.output


async def test_force_option_requires_a_reason(serving: Home) -> None:
    cases: list[list[str]] = [["--force"], ["--force", "--reason", " "]]
    for options in cases:
        result = await type_in(serving, "promote", f"{NAME}@2", *options)
        assert result.exit_code == 2, options
        assert "--force requires --reason" in result.output, options


async def test_force_option_is_not_recorded_if_the_version_passed_its_checks(serving: Home) -> None:
    await type_in(serving, "promote", f"{NAME}@2", "--force", "--reason", "why")
    desired = read_desired(serving.store, NAME)
    assert desired is not None
    assert desired.forced is None


async def test_audit_log_has_promotions_and_rollbacks_with_actor_and_reason(serving: Home) -> None:
    await type_in(serving, "promote", f"{NAME}@2", "--reason", "it is better")
    await type_in(serving, "rollback", NAME, "--reason", "it is not")
    await type_in(serving, "promote", f"{NAME}@1")  # already served
    events = read_events(serving.store, newest=9)
    me = Actor.local()
    assert [(event.action, event.subject, event.reason) for event in events] == [
        ("serve", f"{NAME}@1", None),
        ("promote", f"{NAME}@2", "it is better"),
        ("rollback", f"{NAME}@1", "it is not"),
    ]
    assert {(event.actor, event.origin) for event in events} == {(me.name, me.origin)}


async def test_failed_promotion_is_recorded_in_the_audit_log_but_its_version_is_never_served(serving: Home) -> None:
    weights = serving.registry.folder(VersionId(NAME, 2)) / "merged" / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    error_of(await type_in(serving, "promote", f"{NAME}@2"))
    assert [event.subject for event in read_events(serving.store, newest=1)] == [f"{NAME}@2"]
    assert {span.target.version.number for span in served_spans(serving.store, NAME)} == {1}


async def test_history_shows_the_server_startup_the_swap_and_the_shutdown(home: Home) -> None:
    async with home.serving(f"{NAME}@1"):
        await type_in(home, "promote", f"{NAME}@2", "--reason", "it is better")
    rows = json.loads((await type_in(home, "history", NAME, "--json")).stdout)
    assert [(row["version"], row["began_by"], row["ended_by"], row["action"], row["why"]) for row in rows] == [
        (f"{NAME}@1", "start", "swap", "serve", None),
        (f"{NAME}@2", "swap", "stop", "promote", "it is better"),
    ]
    assert rows[0]["until"] == rows[1]["from"] < rows[1]["until"]


async def test_second_rollback_undoes_the_first(serving: Home) -> None:
    await type_in(serving, "promote", f"{NAME}@2")
    result = await type_in(serving, "rollback", NAME)
    assert "tuned@1 (merged) is served" in result.output
    result = await type_in(serving, "rollback", NAME)
    assert "tuned@2 (merged) is served" in result.output


@pytest.fixture
def starting(serving: Home) -> Home:
    """Return a server whose versions 4 and 5 need a second engine, which starts slowly."""
    make_version(serving.registry, 4, width=8)
    make_version(serving.registry, 5, width=16)
    serving.park.start_delay_s = 30.0
    return serving


async def promote_beside(home: Home, number: int) -> SvcError:
    """Return the error of a promotion that runs next to other commands, only one of which can be captured."""
    arguments = ["--home", str(home.settings.home), "promote", f"{NAME}@{number}"]
    with pytest.raises(SvcError) as failure:
        await asyncio.to_thread(group.main, arguments, standalone_mode=False)
    return failure.value


async def test_rollback_during_a_promotion_keeps_the_served_version(starting: Home) -> None:
    promotion = asyncio.create_task(promote_beside(starting, 4))
    await until(lambda: starting.park.alive == 2)
    began = time.monotonic()
    result = await type_in(starting, "rollback", NAME)
    assert time.monotonic() - began < 2.0
    assert (result.exit_code, "tuned@1 (merged) is served" in result.output) == (0, True)
    error = await promotion
    assert isinstance(error, RefusedError)
    assert "tuned@4 (merged) was not promoted (cancelled): tuned@1 (merged) is still served" in error.wrong
    assert "superseded by tuned@1 (merged)" in error.wrong


async def test_rollback_never_returns_to_a_superseded_version(starting: Home) -> None:
    first = asyncio.create_task(promote_beside(starting, 4))
    await until(lambda: len(starting.park.engines) == 2)
    second = asyncio.create_task(promote_beside(starting, 5))
    await until(lambda: len(starting.park.engines) == 3)
    result = await type_in(starting, "rollback", NAME)
    assert "tuned@1 (merged) is served" in result.output
    for promotion in (first, second):
        assert "tuned@1 (merged) is still served" in (await promotion).wrong
    assert isinstance(error_of(await type_in(starting, "rollback", NAME)), NotFoundError)


async def test_rollback_fails_if_there_is_no_previous_version(serving: Home) -> None:
    error = error_of(await type_in(serving, "rollback", NAME))
    assert isinstance(error, NotFoundError)
    assert "no version before" in error.wrong


async def test_no_swap_runs_if_the_version_is_already_served(serving: Home) -> None:
    cases: list[tuple[str, ...]] = [(), ("--json",)]
    for json_flag in cases:
        result = await type_in(serving, "promote", f"{NAME}@1", *json_flag)
        assert result.exit_code == 0, json_flag
        assert "is already served" in result.output or json.loads(result.stdout)["outcome"] == "unchanged", json_flag
        assert "/collective_rpc" not in serving.park.double.calls, json_flag


async def test_promotion_is_rejected_if_the_same_promotion_is_in_progress(serving: Home) -> None:
    serving.park.double.reload_delay_s = 0.3
    first = asyncio.create_task(type_in(serving, "promote", f"{NAME}@2"))
    await until(lambda: "/collective_rpc" in serving.park.double.calls)
    error = error_of(await type_in(serving, "promote", f"{NAME}@2"))
    assert isinstance(error, BusyError)
    assert "already in progress" in error.wrong
    assert (await first).exit_code == 0


async def test_promoting_an_unknown_version_fails(serving: Home) -> None:
    for version in (f"{NAME}@9", NAME, f"{NAME}@production", "other@1", f"{NAME}@0"):
        before = read_desired(serving.store, NAME)
        assert isinstance(error_of(await type_in(serving, "promote", version)), NotFoundError), version
        assert read_desired(serving.store, NAME) == before, version


async def test_promoting_a_format_that_does_not_exist_fails(serving: Home) -> None:
    error = error_of(await type_in(serving, "promote", f"{NAME}@2", "--format", "gptq"))
    assert "has no format gptq" in error.wrong


async def test_refused_promotion_shows_the_reason_and_the_served_version(serving: Home) -> None:
    make_version(serving.registry, 4, probes_of="/elsewhere")
    result = await type_in(serving, "promote", f"{NAME}@4", "--json")
    error = error_of(result)
    assert isinstance(error, RefusedError)
    assert "tuned@1 (merged) is still served" in error.wrong
    assert "not the version's weights" in error.wrong
    assert json.loads(result.stdout)["outcome"] == "restored"


async def test_failed_promotion_does_not_claim_that_the_previous_version_is_served(serving: Home) -> None:
    serving.park.double.loadable = lambda folder: False
    error = error_of(await type_in(serving, "promote", f"{NAME}@2"))
    assert "`svc status` shows whether tuned@1 (merged) is served again" in error.wrong


async def test_rollout_command_shows_the_figures_and_outcome_of_the_latest_rollout(home: Home) -> None:
    seen = change_desired(home.store, None, target(1), None)
    entry = AuditEntry(Action.PROMOTE, f"{NAME}@2", ANN, "better")
    tried = begin_rollout(home.store, seen, target(2), RolloutSettings(canary=(5, 100)), entry)
    add_rollout_step(home.store, tried.id, "canary: 5% of clients")
    loss = SignalRow("errors", "failed", production=0.0, candidate=0.3, low=0.1, high=None, margin=0.01, units=90)
    store_signals(home.store, tried.id, (loss,))
    end_rollout(home.store, tried.id, RolloutOutcome.ROLLED_BACK, "it fails")
    async with home.serving(f"{NAME}@1"):
        lines = (await type_in(home, "rollout", NAME)).output.splitlines()
        as_json = json.loads((await type_in(home, "rollout", NAME, "--json")).output)
    assert lines[0] == f"rollout {tried.id}: {NAME}@1 -> {NAME}@2, rolled back"
    assert lines[2:4] == ["why: it fails", "  canary: 5% of clients"]
    assert as_json["outcome"] == "rolled_back"
    assert [(signal["signal"], signal["candidate"]) for signal in as_json["signals"]] == [("errors", 0.3)]
