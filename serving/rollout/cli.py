"""The commands `svc promote`, `svc rollback` and `svc rollout`."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import click

from serving.rollout.promotion import PromotionRequest, RolloutOptions, VersionChange
from serving.rollout.promotion_client import ServerResult, follow, follow_rollout, read_served
from serving.rollout.remote_client import RemoteAdministration
from svc.errors import (
    GateError,
    NotFoundError,
    RefusedError,
    RolledBackError,
    ServerNotRunningError,
    SvcError,
    SwapError,
    UndecidedError,
)
from svc.invocation import format_option, json_option, print_json, reason_option, remote_of, settings_of
from svc.store.gate_rows import GATE_ROWS, GateRow, GateVerdict
from svc.store.rollouts import RolloutOutcome
from svc.store.swaps import SwapOutcome, SwapResult
from svc.version import Format, VersionId


class _Percents(click.ParamType[tuple[float, ...]]):
    """click parameter type for a comma-separated list of increasing percentages, such as 5,25,100."""

    name = "percents"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Parse the option's value and return the percentages."""
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} must be percentages such as 5,25,100", param, ctx)


@click.command()
@click.argument("version")
@format_option
@click.option(
    "--shadow",
    type=int,
    metavar="N",
    help="First send copies of N requests to VERSION; clients do not get VERSION's answers.",
)
@click.option(
    "--canary",
    type=_Percents(),
    help="After any --shadow step, serve VERSION to these percentages of clients, such as 5,25,100.",
)
@click.option("--direct", is_flag=True, help="Promote in a single swap, without the configured steps.")
@click.option("--force", is_flag=True, help="Promote even if a gate rejects the version; requires --reason.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only evaluate the gates: exit code 0 if all pass, 23 if any gate rejects the version.",
)
@reason_option
@json_option
@click.pass_context
def promote(
    ctx: click.Context,
    version: str,
    format_name: str | None,
    shadow: int | None,
    canary: tuple[float, ...] | None,
    direct: bool,
    force: bool,
    dry_run: bool,
    reason: str | None,
    as_json: bool,
) -> None:
    """Promote VERSION (NAME@N) to production without dropping a request.

    First, gates compare the version's registered results with those of the production version. If a gate fails, the
    promotion is refused.

    With --shadow or --canary, or if such steps are configured for the model, the gates are followed by a comparison
    with production. If VERSION performs worse, it is rolled back instead of promoted. The server runs these steps;
    Ctrl-C stops only the display.
    """
    reason = reason and reason.strip()
    if force and not reason:
        raise click.UsageError("--force requires --reason")
    administration = _administration(ctx)
    format = Format(format_name) if format_name else None
    steps = RolloutOptions(shadow, canary, direct)
    change = administration.promote(PromotionRequest(VersionId.parse(version), format, force, reason, steps, dry_run))
    if dry_run:
        _show_dry_run(change, as_json=as_json)
        return
    if change.gates:
        _show_gates(change.gates, to_stdout=False)
    _follow(administration, change, as_json=as_json)


@click.command()
@click.argument("name")
@reason_option
@json_option
@click.pass_context
def rollback(ctx: click.Context, name: str, reason: str | None, as_json: bool) -> None:
    """Roll NAME back to its previous version.

    During a promotion, cancel the promotion and keep the current version.
    """
    administration = _administration(ctx)
    _follow(administration, administration.rollback(name, reason=reason), as_json=as_json, is_rollback=True)


@click.command()
@click.argument("name")
@click.option("--id", "rollout_id", type=int, help="Show this rollout instead of the latest one.")
@click.option("--watch", is_flag=True, help="Show the steps of a running rollout as they happen.")
@json_option
@click.pass_context
def rollout(ctx: click.Context, name: str, rollout_id: int | None, watch: bool, as_json: bool) -> None:
    """Show the latest rollout of model NAME, including its steps, figures and outcome."""
    from svc.store.rollout_text import SIGNAL_COLUMNS, place_of, signal_cells
    from svc.terminal import print_table

    administration = _administration(ctx)
    every = administration.rollouts(name)
    shown = next((view for view in reversed(every) if rollout_id in (None, view.id)), None)
    if shown is None:
        wanted = "rollout" if rollout_id is None else f"rollout {rollout_id}"
        raise NotFoundError(
            f"model {name!r} has no {wanted}", todo=f"start one: svc promote {name}@N --canary 5,25,100"
        )
    if watch:
        shown = follow_rollout(administration, name, shown.id, click.echo)
    if as_json:
        click.echo(shown.model_dump_json(indent=1))
        return
    click.echo(f"rollout {shown.id}: {shown.previous} -> {shown.version}, {place_of(shown)}")
    click.echo(
        f"requested {shown.requested_at:%Y-%m-%d %H:%M:%S} UTC by {shown.actor}: {shown.reason or 'no reason given'}"
    )
    if shown.why:
        click.echo(f"why: {shown.why}")
    if not watch:
        for step in shown.steps:
            click.echo(f"  {step}")
    if shown.gates:
        _show_gates(shown.gates, to_stdout=True)
    if shown.signals:
        print_table(SIGNAL_COLUMNS, map(signal_cells, shown.signals))


def _administration(ctx: click.Context) -> RemoteAdministration:
    if remote := remote_of(ctx):
        return RemoteAdministration(remote)
    from serving.rollout.local_client import LocalAdministration

    return LocalAdministration.of(settings_of(ctx))


def _follow(
    administration: RemoteAdministration, change: VersionChange, *, as_json: bool, is_rollback: bool = False
) -> None:
    target = change.target
    if change.rollout is not None:
        _follow_rollout(administration, change, change.rollout, as_json=as_json, is_rollback=is_rollback)
        return
    if change.generation is None:
        if as_json:
            print_json({"target": str(target), "outcome": "unchanged", "gates": _gates_json(change)})
        else:
            click.echo(f"{target} is already served")
        return
    steps: list[str] = []

    def show(step: str) -> None:
        click.echo(f"  {step}", err=True)
        steps.append(step)

    followed = follow(administration, change, show)
    result, servers = followed.result, followed.servers
    if as_json:
        rows = [_server_row(each) for each in servers if each.address]
        gates = _gates_json(change)
        print_json({"target": str(target), **asdict(result), "servers": rows, "steps": steps, "gates": gates})
    if result.outcome is not SwapOutcome.SUCCEEDED and len(servers) > 1:
        cancelled = result.outcome is SwapOutcome.CANCELLED
        now = "another version was requested" if cancelled else f"all servers return to {change.before}"
        lines = "".join(f"\n  {_server_text(each)}" for each in servers)
        raise RefusedError(f"{target} was not promoted ({result.outcome}): {now}{lines}")
    if result.outcome is not SwapOutcome.SUCCEEDED:
        raise RefusedError(
            f"{target} was not promoted ({result.outcome}): {_served_now(administration, result.outcome, change)}\n"
            f"  why: {result.reason}"
        )
    if not as_json:
        click.secho(f"{target} is served", fg="green")
        if result.kind is not None and result.took_s is not None:
            click.echo(f"  {result.kind} swap in {result.took_s:.1f} s; {_waits(result)}")
    for each in servers:
        if each.result is None:
            click.secho(
                f"warning: {_server_text(each)}; this server will serve {target} when it is next started",
                fg="yellow",
                err=True,
            )


def _follow_rollout(
    administration: RemoteAdministration, change: VersionChange, rollout: int, *, as_json: bool, is_rollback: bool
) -> None:
    from svc.store.rollout_text import place_of

    name = change.target.version.name
    ended = follow_rollout(administration, name, rollout, lambda step: click.echo(f"  {step}", err=True))
    if as_json:
        click.echo(ended.model_dump_json(indent=1))
    if is_rollback or ended.outcome is RolloutOutcome.PROMOTED:
        if not as_json:
            served = f"{ended.previous} is still" if is_rollback else f"{ended.version} is"
            click.secho(f"{served} served", fg="green")
        return
    text = f"{ended.version} was not promoted ({place_of(ended)}): {ended.previous} is still served\n  why: {ended.why}"
    kinds: dict[RolloutOutcome, type[SvcError]] = {
        RolloutOutcome.FAILED: SwapError,
        RolloutOutcome.UNDECIDED: UndecidedError,
    }
    raise kinds.get(ended.outcome or RolloutOutcome.FAILED, RolledBackError)(text)


def _served_now(administration: RemoteAdministration, outcome: SwapOutcome, change: VersionChange) -> str:
    """Return a message that says which version is served after a failed promotion."""
    served = change.before
    with suppress(ServerNotRunningError):  # the previously desired version may never have served
        served = read_served(administration.server).get(served.version.name, served)
    if outcome is SwapOutcome.FAILED:
        return f"the engine had to be replaced; `svc status` shows whether {served} is served again"
    return f"{served} is still served"


def _waits(result: SwapResult) -> str:
    if result.queued_s is None:
        return f"no request was queued; {result.running} were running"
    queued = f"requests were queued for {result.queued_s:.2f} s, up to {result.queued} at a time"
    return f"{queued}; {result.running} were running"


def _server_row(server: ServerResult) -> dict[str, Any]:
    result = server.result
    return {
        "address": server.address,
        "outcome": result.outcome if result else None,
        "reason": result.reason if result else None,
    }


def _server_text(server: ServerResult) -> str:
    address, result = server.address or "a stopped server", server.result
    if result is None:
        return f"{address}: stopped before it had a result"
    return f"{address}: {result.outcome}" + (f": {result.reason}" if result.reason else "")


def _show_dry_run(change: VersionChange, *, as_json: bool) -> None:
    """Show the gate results of a dry-run promotion, and raise GateError if a gate rejected it."""
    if as_json:
        print_json({"target": str(change.target), "before": str(change.before), "gates": _gates_json(change)})
    else:
        _show_gates(change.gates, to_stdout=True)
    if change.refused:
        raise GateError(f"{change.target.version} was rejected by a gate; nothing was changed")


def _show_gates(gates: Sequence[GateRow], *, to_stdout: bool) -> None:
    """Print a table of gate results, then a line on stderr for each gate that failed or is undecided."""
    from svc.terminal import console, output, print_table

    rows = [
        (
            gate.gate,
            gate.measured,
            gate.limit,
            f"skipped: {gate.reason}" if gate.verdict is GateVerdict.SKIPPED else gate.verdict.value,
        )
        for gate in gates
    ]
    print_table(("gate", "measured", "limit", "verdict"), rows, to=output if to_stdout else console)
    for gate in gates:
        if gate.verdict is GateVerdict.FAILED:
            click.secho(str(gate), fg="red", err=True)
        elif gate.verdict is GateVerdict.UNDECIDED:
            click.secho(f"warning: {gate}", fg="yellow", err=True)


def _gates_json(change: VersionChange) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = GATE_ROWS.dump_python(change.gates, mode="json")
    return rows
