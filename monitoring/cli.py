"""Commands that watch a server: `svc status` shows its current state on one screen; `svc monitor` exports metrics."""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from svc.errors import IntegrityError, NotFoundError, ServerNotRunningError
from svc.invocation import json_option, print_json, remote_of, settings_of
from svc.remote.server_url import ServerAddress, read_json, server_address
from svc.settings.settings import Settings
from svc.settings.storage import StoreSettings

if TYPE_CHECKING:
    from rich.console import RenderableType
    from sqlalchemy import Engine as Store

    from monitoring.status.figures import Figures, StatusView


@click.command()
@click.argument("models", nargs=-1)
@click.option("--watch", is_flag=True, help="Keep refreshing until Ctrl-C.")
@click.option(
    "--interval", type=click.FloatRange(0.2), default=2.0, show_default=True, help="Seconds between refreshes."
)
@click.option("--verbose", is_flag=True, help="Also show the engine's settings and the source of each value.")
@json_option
@click.pass_context
def status(
    ctx: click.Context, models: tuple[str, ...], watch: bool, interval: float, verbose: bool, as_json: bool
) -> None:
    """Show the running server's versions, engines, requests, latency and errors.

    MODELS are model names. By default, all served models are shown.
    """
    of = remote_of(ctx) or settings_of(ctx)
    if watch:
        if as_json:
            raise click.UsageError("--watch and --json cannot be combined; to poll, run `svc status --json` repeatedly")
        _watch(of, models, interval, verbose=verbose)
        return
    view = _read_status(of, models)
    if as_json:
        shown = [_as_json(model, view.drift, verbose=verbose) for model in view.state["models"]]
        print_json({"url": view.url, **view.state, "models": shown, **dataclasses.asdict(view.figures)})
        return
    from monitoring.status.render import status_screen
    from svc.terminal import output

    output.print(status_screen(view, verbose=verbose))


def _as_json(model: Mapping[str, Any], drift: Mapping[str, Any], *, verbose: bool) -> dict[str, Any]:
    engine = {key: value for key, value in model["engine"].items() if verbose or key != "plan"}
    return {**model, "engine": engine, "drift": drift.get(model["model"], {})}


def _watch(of: ServerAddress | Settings, models: Sequence[str], interval_s: float, *, verbose: bool) -> None:
    """Show the status until Ctrl-C is pressed. If the server or a model cannot be found, show the error instead."""
    from rich.live import Live
    from rich.text import Text

    from monitoring.status.figures import rates_between
    from monitoring.status.render import status_screen
    from svc.terminal import output

    last: tuple[Figures, float] | None = None

    def screen() -> "RenderableType":
        nonlocal last
        try:
            view, now = _read_status(of, models), time.monotonic()
        except (ServerNotRunningError, NotFoundError) as error:
            return Text(str(error), "red")
        before, last = last, (view.figures, now)
        rates = rates_between(before[0], view.figures, now - before[1]) if before else {}
        return status_screen(view, rates, verbose=verbose)

    # On a terminal each screen replaces the previous one; in a pipe they follow each other.
    with Live(console=output, auto_refresh=False, screen=True) if output.is_terminal else nullcontext() as live:
        while True:
            if live is None:
                output.print(screen())
            else:
                live.update(screen(), refresh=True)
            time.sleep(interval_s)


@click.command()
@click.option("--server", help="URL of the server to watch.  [default: the home folder's server]")
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="Port to listen on.")
@click.pass_context
def monitor(ctx: click.Context, server: str | None, host: str | None, port: int | None) -> None:
    """Export metrics to Prometheus and check live traffic for drift, until SIGTERM or Ctrl-C.

    The metrics cover the server, versions, training runs, drift, keys and backups.
    """
    given = {"server": server, "host": host, "port": port}
    settings = settings_of(ctx, monitor={key: value for key, value in given.items() if value is not None} or None)
    from monitoring.drift.worker import checking_drift
    from monitoring.exporter.app import exporting
    from svc.registry.registry import Registry
    from svc.store.database import open_store
    from svc.terminal import console

    # A hung tracking server must not delay the server's metrics: Prometheus times out after ten seconds.
    os.environ |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    watch = settings.monitor
    watched = ServerAddress.with_key(watch.server, watch.key_file, watch.authority) if watch.server else None
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with ExitStack() as running:
        url = running.enter_context(
            exporting(
                Registry.of(settings),
                open_store(settings),
                settings.home,
                lambda: watched or server_address(settings),
                settings.monitor.host,
                settings.monitor.port,
                checking=settings.monitor.drift_every_s > 0,
                certificate=settings.serve.tls_certificate,
            )
        )
        if settings.monitor.drift_every_s:
            running.enter_context(checking_drift(settings))
        console.print(f"[green]metrics at {url}[/green]")
        stop.wait()
    console.print("stopped")


def _read_status(of: ServerAddress | Settings, models: Sequence[str]) -> "StatusView":
    """Return a snapshot of a server's status, metrics and drift.

    Args:
        of: a remote server's address, or the settings of a local home folder. Drift results are available only
            for a local home folder.
        models: names of the models to show; if empty, all models are shown.

    Raises:
        ServerNotRunningError: no server is running, or it is not responding or gives an unexpected response.
        NotFoundError: one of `models` is neither served nor listed among the models that the server could not start.
    """
    import httpx

    from monitoring.status.figures import StatusView, read_figures
    from svc.remote.remote_server import error_from_answer

    server = server_address(of) if isinstance(of, Settings) else of
    try:
        with server.client() as client:
            state, metrics = client.get("/svc/status"), client.get("/metrics")
            for answer in (state, metrics):
                if answer.status_code in (401, 403):
                    raise error_from_answer(server.url, answer.status_code, read_json(server.url, answer))
                answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerNotRunningError(
            f"the server at {server.url} is not responding: {error}", todo="check the server's log"
        ) from error
    status = read_json(server.url, state)
    try:
        figures = read_figures(metrics.text, models)
    except ValueError as error:
        raise ServerNotRunningError(
            f"{server.url}/metrics returned status {metrics.status_code}, but no valid metrics: {error}",
            todo="check that the URL points to the server, not to a proxy",
        ) from error
    if models:
        status = _only(status, models)
    drift = {model["model"]: _drift(of, model) for model in status["models"]} if isinstance(of, Settings) else {}
    return StatusView(server.url, status, figures, drift)


def _only(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the server state restricted to the selected models."""
    served = [model["model"] for model in state["models"]]
    for name in names:
        if name not in served and name not in state["refused"]:
            expected = f"one of {', '.join(served)}" if served else "a served model, but none is served yet"
            raise NotFoundError(f"{name!r} is not served", expected=expected)
    return {
        **state,
        "models": [model for model in state["models"] if model["model"] in names],
        "refused": {name: why for name, why in state["refused"].items() if name in names},
    }


@cache
def _store(home: Path, store: StoreSettings) -> "Store":
    from svc.store.database import open_store

    return open_store(Settings(home=home, store=store))


def _drift(settings: Settings, state: Mapping[str, Any]) -> dict[str, str]:
    """Return the latest status of the served version's drift signals and of its held-out quality.

    The result is empty if no check has run yet or its results cannot be read.
    """
    from monitoring.drift.production import read_drift
    from svc.registry.registry import Registry
    from svc.store.unavailable import StoreUnavailableError
    from svc.version import Format, Target, VersionId

    try:
        target = Target(VersionId.parse(state["version"]), Format(state["format"]))
        reports, quality = read_drift(Registry.of(settings), _store(settings.home, settings.store), target)
    # ValidationError: a result that another release wrote
    except (NotFoundError, IntegrityError, ValidationError, StoreUnavailableError):
        return {}
    signals = {report.signal.value: report.status.value for report in reports}
    return {**signals, "quality": quality.quality.value} if signals or quality.asked_at else {}
