"""`svc status`: what runs, and how well, on one screen."""

import dataclasses
from typing import Any

import click

from svc.errors import ServerNotRunningError
from svc.invocation import json_option, settings_of
from svc.server_url import server_url

_TIMEOUT_S = 10.0


@click.command()
@json_option
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Show version, engine, requests, latency and errors of the running server."""
    from monitoring.figures import read_figures

    url = server_url(settings_of(ctx))
    state, exposition = _fetch(url)
    figures = read_figures(exposition)
    if as_json:
        from svc.terminal import print_json

        print_json({"url": url, **state, **dataclasses.asdict(figures)})
        return
    from monitoring.screen import print_status

    print_status(url, state, figures)


def _fetch(url: str) -> tuple[dict[str, Any], str]:
    import httpx

    try:
        # The server is on this machine: a proxy from the environment would look for it elsewhere.
        with httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client:
            state, metrics = client.get("/svc/status"), client.get("/metrics")
            state.raise_for_status()
            metrics.raise_for_status()
            return state.json(), metrics.text
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ServerNotRunningError(f"the server at {url} does not answer: {error}", todo="see its log") from error
