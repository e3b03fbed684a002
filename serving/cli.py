"""`svc serve`, `svc add`, `svc remove`, `svc promote`, `svc rollback`, `svc chat`."""

import asyncio
import gc
import logging
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict

import click

from serving.client.promotion import Administration, LocalAdministration, follow, read_served
from serving.rollout.version_changes import VersionChange
from svc.errors import RefusedError, ServerNotRunningError
from svc.files.lock import lock_holder
from svc.invocation import json_option, reason_option, remote_of, settings_of
from svc.registry.registry import Registry
from svc.remote.server_url import LOCK_FILE
from svc.settings import Settings
from svc.store.swaps import SwapOutcome, SwapResult
from svc.version import Format, Target, VersionId

_COLLECTED_AFTER = 10_000
"""New objects that hold others. A request makes some hundred, and few of them outlive it."""

_format_option = click.option(
    "--format",
    "format_name",
    type=click.Choice([Format.GPTQ.value, Format.MERGED.value, Format.ADAPTER.value]),
    help="How the version is served; as an adapter, many beside one base.",
)


@click.command()
@click.argument("models", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Every model that was ever served.")
@_format_option
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="Port to listen on.")
@click.pass_context
def serve(
    ctx: click.Context,
    models: tuple[str, ...],
    every: bool,
    format_name: str | None,
    host: str | None,
    port: int | None,
) -> None:
    """Serve MODELS to OpenAI clients until SIGTERM or Ctrl-C.

    Each is NAME or NAME@N; without any, those that were served last, or the only one that there is. A version that is
    named here becomes the production version; without one, the version that served last goes on. Where a server runs
    on this home already, it serves MODELS too, as by `svc add`.
    """
    if every and models:
        raise click.UsageError("name models, or say --all")
    listen = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    settings = settings_of(ctx, serve=listen or None)
    if models and not listen and lock_holder(settings.home / LOCK_FILE):
        for model in models:
            _add(settings, model, format_name)
        return
    import uvloop

    from serving import server
    from serving.rollout.initial_state import choose_deployments
    from serving.systemd_notify import ServiceManager, inherited_listener
    from svc.engine.device import read_capabilities
    from svc.engine.state import EnginePhase
    from svc.store.database import open_database
    from svc.store.keys import keys_revision
    from svc.terminal import advancing, console, quiet_libraries

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    quiet_libraries()
    inherited = inherited_listener()
    if inherited:
        settings = server.at_address(settings, inherited)
    registry, store = Registry.of(settings), open_database(settings.home)
    capabilities = read_capabilities(settings.home)

    async def run() -> None:
        has_keys = keys_revision(store) > 0
        with server.claim(settings, has_keys=has_keys, inherited=inherited) as claim, ExitStack() as bar:
            format = Format(format_name) if format_name else None
            wanted = choose_deployments(registry, store, models, format, every=every)
            named = ", ".join(str(desired.target) for desired in wanted)
            console.print(
                f"{named}: starting vLLM, about 40 s each where none was left running; logs {settings.home / 'logs'}"
            )
            on_phase = bar.enter_context(advancing("engine", tuple(EnginePhase)))
            coming = {desired.name for desired in wanted}

            def came(target: Target, said: str) -> None:
                coming.discard(target.version.name)
                if not coming:
                    bar.close()
                console.print(said)

            await server.serve(
                settings,
                registry,
                store,
                wanted,
                claim,
                capabilities=capabilities,
                on_phase=on_phase,
                on_ready=lambda target: came(target, f"[green]serving {target} on {claim.url}/v1[/green]"),
                on_failure=lambda target, error: came(target, f"[red]{target} is not served:[/red] {error}"),
                manager=ServiceManager.of(),
            )

    _spare_collector()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    console.print("stopped")


def _spare_collector() -> None:
    """Has Python's garbage collector look less often, and never at what is here now, which stays until the end.

    It took a twelfth of what a request costs; nearly all that a request leaves is freed without it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECTED_AFTER)


@click.command()
@click.argument("model")
@_format_option
@click.pass_context
def add(ctx: click.Context, model: str, format_name: str | None) -> None:
    """Have the running server serve MODEL (NAME or NAME@N) too."""
    _add(settings_of(ctx), model, format_name)


def _add(settings: Settings, model: str, format_name: str | None) -> None:
    from serving.client.membership import Membership

    target = Membership.of(settings).add(model, Format(format_name) if format_name else None)
    click.secho(f"{target} serves", fg="green")


@click.command()
@click.argument("name")
@click.pass_context
def remove(ctx: click.Context, name: str) -> None:
    """Have the running server serve NAME no more, once its last requests have ended."""
    from serving.client.membership import Membership

    Membership.of(settings_of(ctx)).remove(name)
    click.echo(f"{name} is served no more; `svc add {name}` brings it back")


@click.command()
@click.argument("version")
@_format_option
@click.option("--force", is_flag=True, help="Though it failed a check when it was registered; with --reason.")
@reason_option
@json_option
@click.pass_context
def promote(
    ctx: click.Context, version: str, format_name: str | None, force: bool, reason: str | None, as_json: bool
) -> None:
    """Bring VERSION (NAME@N) into production, without losing a request."""
    reason = reason and reason.strip()
    if force and not reason:
        raise click.UsageError("--force needs a --reason")
    administration = _administration(ctx)
    format = Format(format_name) if format_name else None
    change = administration.promote(VersionId.parse(version), format, force=force, reason=reason)
    for gate in change.undecided:
        click.secho(f"warning: {gate}", fg="yellow", err=True)
    _follow(administration, change, as_json=as_json)


@click.command()
@click.argument("name")
@reason_option
@json_option
@click.pass_context
def rollback(ctx: click.Context, name: str, reason: str | None, as_json: bool) -> None:
    """Bring back the version that NAME served before; while another is on its way, keep the one that serves."""
    administration = _administration(ctx)
    _follow(administration, administration.rollback(name, reason=reason), as_json=as_json)


def _administration(ctx: click.Context) -> Administration:
    if remote := remote_of(ctx):
        from serving.client.remote import RemoteAdministration

        return RemoteAdministration(remote)
    return LocalAdministration.of(settings_of(ctx))


def _follow(administration: Administration, change: VersionChange, *, as_json: bool) -> None:
    target = change.target
    if change.generation is None:
        if as_json:
            from svc.terminal import print_json

            print_json({"target": str(target), "outcome": "unchanged"})
        else:
            click.echo(f"{target} serves already")
        return
    steps: list[str] = []

    def show(step: str) -> None:
        click.echo(f"  {step}", err=True)
        steps.append(step)

    result = follow(administration, change, show)
    if as_json:
        from svc.terminal import print_json

        print_json({"target": str(target), **asdict(result), "steps": steps})
    if result.outcome is not SwapOutcome.SUCCEEDED:
        raise RefusedError(
            f"{target} was not promoted ({result.outcome}), {_left(administration, result.outcome, change)}\n"
            f"  why: {result.reason}"
        )
    if not as_json:
        click.secho(f"{target} serves", fg="green")
        if result.kind is not None and result.took_s is not None:
            click.echo(f"  {result.kind} swap in {result.took_s:.1f} s; {_waits(result)}")


def _left(administration: Administration, outcome: SwapOutcome, change: VersionChange) -> str:
    """What a promotion that was not completed leaves behind."""
    served = change.before
    with suppress(ServerNotRunningError):  # what was desired before may never have served
        served = read_served(administration.server).get(served.version.name, served)
    if outcome is SwapOutcome.FAILED:
        return f"and the engine had to be replaced; `svc status` shows whether {served} serves again"
    return f"{served} serves"


def _waits(result: SwapResult) -> str:
    if result.queued_s is None:
        return f"no request had to wait, {result.running} were running"
    return f"requests were queued for {result.queued_s:.2f} s, {result.queued} of them; {result.running} were running"


@click.command()
@click.argument("model")
@click.option("--system", help="System prompt.")
@click.pass_context
def chat(ctx: click.Context, model: str, system: str | None) -> None:
    """Talk to MODEL; an empty line or Ctrl-D ends it."""
    from serving.client.conversation import Conversation
    from svc.remote.server_url import server_address

    conversation = Conversation(server_address(settings_of(ctx)), model, system)
    while True:
        try:
            text = click.prompt("you", prompt_suffix="> ", default="", show_default=False)
        except click.exceptions.Abort:
            break
        if not text.strip():
            break
        for piece in conversation.ask(text):
            sys.stdout.write(piece)
            sys.stdout.flush()
        click.echo()
