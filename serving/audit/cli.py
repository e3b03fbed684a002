"""Commands that show a service's history, and delete logged requests.

`svc audit` shows the audit log, `svc history` shows served versions and rollouts, and `svc forget` deletes
requests.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from serving.access.time_options import time_past
from svc.errors import IntegrityError, NotFoundError
from svc.identity.actor import Actor
from svc.invocation import confirm, json_option, print_json, reason_option, settings_of, yes_option

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy import Engine as Store

    from svc.store.audit import AuditEvent


@click.command()
@click.option("--verify", is_flag=True, help="Recompute all hashes and report the first altered row, if any.")
@click.option(
    "--expect", "expected", metavar="HASH", help="Hash printed by an earlier --verify; the log must contain it."
)
@click.option(
    "--last",
    "newest",
    default=50,
    show_default=True,
    type=click.IntRange(1),
    help="Maximum number of events to show; older events are skipped.",
)
@click.option("--action", metavar="TEXT", help="Show only events with this action, for example promote.")
@click.option("--subject", metavar="TEXT", help="Show only events about this subject: NAME, NAME@N or key:ID.")
@click.option(
    "--since",
    type=time_past,
    metavar="TIME",
    help="Show only events since this time: a date (UTC), or an age such as 30d.",
)
@json_option
@click.pass_context
def audit(ctx: click.Context, /, verify: bool, expected: str | None, as_json: bool, **chosen: Any) -> None:
    """Show promotions, rollbacks, key changes and deletions: who requested each one, when, from where and why."""
    if expected and not verify:
        raise click.UsageError("--expect requires --verify")
    from svc.store.audit import read_events
    from svc.store.database import open_store
    from svc.terminal import print_table

    store = open_store(settings_of(ctx))
    if verify:
        _verify(store, expected, as_json=as_json)
        return
    events = read_events(store, **chosen)
    if as_json:
        print_json([asdict(event) for event in events])
    elif not events:
        click.echo("no matching events")
    else:
        print_table(("", "when (UTC)", "who", "from", "did", "to", "why", "details"), map(_cells, events))


def _cells(event: "AuditEvent") -> tuple[object, ...]:
    texts = dict(event.details) | {"gates": _verdicts(event.details.get("gates"))}
    details = ", ".join(f"{name} {_as_text(value)}" for name, value in texts.items() if value)
    return event.id, _second(event.at), event.actor, event.origin, event.action, event.subject, event.reason, details


def _verify(store: "Store", expected: str | None, *, as_json: bool) -> None:
    from svc.store.audit import verify_chain

    report = verify_chain(store, expected=expected)
    if as_json:
        print_json(asdict(report))
    elif report.fault is None:
        click.secho(f"unaltered events: {report.events}", fg="green")
        click.echo(
            f"keep the newest hash on another machine, so that you can check it later with --expect: {report.head}"
        )
    if report.fault is not None:
        raise IntegrityError(
            f"the audit log was altered; the first altered row is {report.fault.id}: {report.fault.wrong}",
            expected="an unbroken chain of unaltered rows",
            todo="find out who can write to the store, and compare the store with a backup",
        )


def _verdicts(gates: Any) -> dict[str, int]:
    """Return the number of gates with each verdict. Malformed input is ignored: the log may have been altered."""
    rows = gates if isinstance(gates, list) else []
    return dict(Counter(str(row.get("verdict")) for row in rows if isinstance(row, dict)))


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={each}" for name, each in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _second(moment: str) -> str:
    return moment[:19].replace("T", " ")


@click.command()
@click.argument("name")
@json_option
@click.pass_context
def history(ctx: click.Context, name: str, as_json: bool) -> None:
    """Show when each version of NAME was served, how each rollout of NAME ended, and who requested each change."""
    from serving.audit.history import read_history
    from svc.store.database import open_store
    from svc.terminal import print_table

    rows = read_history(open_store(settings_of(ctx)), name)
    if as_json:
        print_json(rows)
        return
    if not rows:
        raise NotFoundError(f"{name!r} has never been served", todo="list the models: svc models")
    shown = ("version", "format", "began_by", "ended_by", "who")
    print_table(
        ("from (UTC)", "until", "version", "format", "began by", "ended by", "who", "why", "gates"),
        [
            (
                _second(row["from"]),
                _second(row["until"] or ""),
                *(row[name] for name in shown),
                _reasons(row),
                _as_text(_verdicts(row["gates"])),
            )
            for row in rows
        ],
    )


def _reasons(row: Mapping[str, Any]) -> str:
    """Return the reason for requesting a version and, for a rollout, its verdicts and the reason for its outcome."""
    rollout = row["rollout"] or {"why": None, "signals": []}
    verdicts = ", ".join(f"{signal['signal']} {signal['outcome']}" for signal in rollout["signals"])
    return "; ".join(filter(None, (row["why"], rollout["why"], verdicts)))


@click.command()
@click.option("--user", metavar="ID", help="Delete all requests from this user (the id that clients send as `user`).")
@click.option("--key", metavar="KEY", help="Delete requests made with this key (id or name).")
@click.option(
    "--before",
    type=time_past,
    metavar="TIME",
    help="Delete requests made before this time: a date (UTC), or an age such as 90d.",
)
@reason_option
@yes_option
@json_option
@click.pass_context
def forget(
    ctx: click.Context,
    user: str | None,
    key: str | None,
    before: datetime | None,
    reason: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete logged requests with their prompts, answers and feedback, selected by user, key or time."""
    if sum(given is not None for given in (user, key, before)) != 1:
        raise click.UsageError("give exactly one of --user, --key and --before")
    from serving.audit.erasure import count_requests, forget_requests
    from svc.store.audit import Action, AuditEntry, record_event
    from svc.store.database import open_store

    store = open_store(settings_of(ctx))
    which, subject = _which(store, user, key, before)
    counts = count_requests(store, which)
    confirm(
        f"{counts.requests} requests will be deleted; {counts.contents} have stored content and {counts.feedback} have "
        "feedback. Continue?",
        yes=yes,
        as_json=as_json,
    )
    # Recorded first, because an interrupted deletion has also deleted rows.
    record_event(store, AuditEntry(Action.FORGET, subject, Actor.local(), reason, asdict(counts)))
    deleted = forget_requests(store, which)
    if as_json:
        print_json(asdict(deleted))
    else:
        summary = f"{deleted.requests} requests, {deleted.contents} with content, {deleted.feedback} with feedback"
        click.echo(f"deleted {summary}")


def _which(
    store: "Store", user: str | None, key: str | None, before: datetime | None
) -> tuple["ColumnElement[bool]", str]:
    """Return a condition that selects the requests to delete, and the subject to record in the audit event.

    If requests are selected by user, the subject contains a hash of the user's name instead of the name itself.
    """
    from serving.audit import erasure as forgetting
    from svc.store.keys import find_key
    from svc.store.requests import hash_user

    if user is not None:
        return forgetting.of_user(user), f"user:{hash_user(user)}"
    if key is not None:
        key_id = find_key(store, key).id
        return forgetting.of_key(key_id), f"key:{key_id}"
    assert before is not None  # noqa: S101 - exactly one of the three is given
    return forgetting.before(before), f"before:{before.isoformat(timespec='seconds')}"
