"""The commands `svc serve` and `svc chat`."""

import asyncio
import gc
import logging
import sys
from contextlib import ExitStack, nullcontext

import click
from rich.markup import escape

from serving.models.cli import add_to_server
from svc.errors import (
    SvcError,
)
from svc.files.lock import lock_holder
from svc.invocation import format_option, settings_of
from svc.remote.server_url import LOCK_FILE
from svc.version import Format, Target

_COLLECTED_AFTER = 10_000
"""Number of container allocations between two garbage collections. A request makes about a hundred such
allocations, and nearly all of them are freed without a collection."""


@click.command()
@click.argument("models", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Serve every model that has ever been served.")
@format_option
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

    Each model is given as NAME or NAME@N. By default, the server serves the models that were served last or, if there
    are none, the only registered model. If `fine_tuning.bases` is set, no model is required. NAME@N becomes the
    production version, while NAME alone keeps the version that was served last. If a server already uses this home
    folder, MODELS are added to that server, as with `svc add`. While servers with other home folders use the same
    store, MODELS can only name models that those servers serve.
    """
    if every and models:
        raise click.UsageError("MODELS and --all cannot be combined")
    listen = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    settings = settings_of(ctx, serve=listen or None)
    if models and not listen and lock_holder(settings.home / LOCK_FILE):
        for model in models:
            add_to_server(settings, model, format_name)
        return
    import uvloop

    from serving.engines.ray.machines import RayMachines
    from serving.rollout.initial_state import choose_deployments
    from serving.server import server
    from serving.server.assembly import assemble
    from serving.server.systemd_notify import ServiceManager, inherited_listener
    from svc.engine.device import read_capabilities
    from svc.engine.state import EnginePhase
    from svc.registry.registry import Registry
    from svc.store.database import open_store
    from svc.store.keys import keys_revision
    from svc.terminal import advancing, console, quiet_libraries

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    quiet_libraries()
    inherited = inherited_listener()
    if inherited:
        settings = server.at_address(settings, inherited)
    registry, store = Registry.of(settings), open_store(settings)
    capabilities = read_capabilities(settings.home)
    RayMachines(settings, registry.models).check()

    async def run() -> None:
        has_keys = keys_revision(store) > 0
        with server.claim(settings, has_keys=has_keys, inherited=inherited) as claim, ExitStack() as bar:
            format = Format(format_name) if format_name else None
            needed = not settings.fine_tuning.bases
            wanted = choose_deployments(registry, store, models, format, every=every, needed=needed)
            targets = ", ".join(str(desired.target) for desired in wanted)
            manager = ServiceManager.of()
            if wanted:
                logs = settings.home / "logs"
                console.print(f"{targets}: starting vLLM (about 40 s each, unless already running); logs in {logs}")
            else:
                manager.ready("not serving any model yet")
                hint = f"clients can create fine-tuning jobs at {claim.url}/v1"
                console.print(f"[green]not serving any model yet; {hint}[/green]")
            phases = advancing("engine", tuple(EnginePhase)) if wanted else nullcontext(lambda phase: None)
            on_phase = bar.enter_context(phases)
            pending = {desired.name for desired in wanted}

            def show(target: Target, message: str) -> None:
                pending.discard(target.version.name)
                if not pending:
                    bar.close()
                console.print(message)

            def show_served(target: Target) -> None:
                manager.ready(f"serving {target}")
                show(target, f"[green]serving {target} at {claim.url}/v1[/green]")

            def show_failed(target: Target, error: SvcError) -> None:
                show(target, f"[red]could not serve {target}:[/red] {escape(str(error))}")

            parts = assemble(
                settings,
                registry,
                store,
                capabilities,
                on_phase=on_phase,
                on_ready=show_served,
                on_failure=show_failed,
            )
            await server.serve(parts, settings.serve, wanted, claim, manager)

    _spare_collector()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    console.print("stopped")


def _spare_collector() -> None:
    """Make Python's garbage collector run less often and ignore existing objects, which live until exit anyway.

    Collections took a twelfth of a request's CPU time, although nearly all of its objects are freed without
    a collection.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECTED_AFTER)


@click.command()
@click.argument("model")
@click.option("--system", help="System prompt of the conversation.")
@click.pass_context
def chat(ctx: click.Context, model: str, system: str | None) -> None:
    """Chat with MODEL. An empty line or Ctrl-D ends the chat."""
    from serving.server.conversation import Conversation
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
