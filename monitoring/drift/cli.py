"""`svc drift`: compare live traffic with the version's examples and show what has changed."""

from typing import TYPE_CHECKING

import click

from svc.errors import BusyError, NotFoundError
from svc.invocation import json_option, print_json, settings_of

if TYPE_CHECKING:
    from sqlalchemy import Engine as Store

    from monitoring.drift.check import DriftCheck
    from svc.registry.registry import Registry
    from svc.store.leases import Lease
    from svc.version import SERVED_FORMATS, Target


@click.command()
@click.argument("model")
@click.option(
    "--accept", is_flag=True, help="End the active alarms, and use the traffic since their start as the new reference."
)
@json_option
@click.pass_context
def drift(ctx: click.Context, model: str, accept: bool, as_json: bool) -> None:
    """Compare the live traffic of MODEL (NAME or NAME@N) with the examples it was trained on.

    NAME alone refers to the production version. Requests received since the last check are processed first. Alarms do
    not depend on how often checks run.
    """
    settings = settings_of(ctx)
    from monitoring.drift.check import DriftCheck, only_check
    from monitoring.drift.production import read_drift
    from monitoring.drift.render import Example, drift_json, drift_screen
    from monitoring.drift.rows import read_drift_alarms
    from svc.drift_reference.reference import read_prompt
    from svc.registry.registry import Registry
    from svc.store.answered import texts_of
    from svc.store.database import open_store
    from svc.terminal import console, output, waiting

    registry, store = Registry.of(settings), open_store(settings)
    target = _target(registry, store, model)
    try:
        with only_check(settings.home, store) as lease, waiting("comparing new requests"):
            check = DriftCheck(registry, store, settings.request_log)
            check.run(target, lease)
            if accept:
                _accept(check, store, target, lease)
    except BusyError:
        if accept:
            raise
        console.print("svc monitor is running a check now; showing the result of the previous check")
    reports, quality = read_drift(registry, store, target)
    alarms = read_drift_alarms(store, target)
    stored = texts_of(store, [id for alarm in alarms for id in alarm.examples])
    texts = {id: Example(read_prompt(prompt).text, answer) for id, (prompt, answer) in stored.items()}
    shown = (target, reports, quality, alarms, texts)
    if as_json:
        print_json(drift_json(*shown))
    else:
        output.print(drift_screen(*shown))


def _accept(check: "DriftCheck", store: "Store", target: "Target", lease: "Lease | None") -> None:
    from svc.identity.actor import Actor
    from svc.store.audit import Action, AuditEntry, record_event
    from svc.terminal import console

    features = check.accept(target, lease)
    details = {"format": target.format.value, "features": features}
    record_event(store, AuditEntry(Action.ACCEPT_DRIFT, str(target.version), Actor.local(), details=details))
    console.print(f"accepted: {', '.join(features)}; the new reference is the traffic since the alarms began")


def _target(registry: "Registry", store: "Store", model: str) -> "Target":
    """Return the version that a model name refers to, as a target.

    The target's format is the one in which the version is being served or was last served. If it was never served, the
    preferred format is used.
    """
    from svc.store.desired import read_desired
    from svc.version import Target

    version = registry.resolve(model)
    desired = read_desired(store, version.name)
    if desired is not None:
        for target in (desired.target, desired.previous):
            if target is not None and ("@" not in model or target.version == version):
                return target
    formats = registry.manifest(version).formats
    served = [format for format in SERVED_FORMATS if format in formats]
    if not served:
        raise NotFoundError(
            f"{version} has never been served, and none of its formats contains complete weights",
            expected="a version that has been served, or that has a merged or quantized format",
            todo="run `svc models` to see versions with their formats",
        )
    return Target(version, served[0])
