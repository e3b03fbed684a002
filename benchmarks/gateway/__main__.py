"""`make bench-gateway`: measures all gateways in front of the same upstream, in alternating rounds.

CPU time shows the cost of a request even on a busy machine. Request rates and times to the first token
are meaningful only on a quiet machine, so the share of a gateway's core used by other processes is
printed as well.
"""

import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from benchmarks.gateway.bench import Bench, bench, make_ours
from benchmarks.gateway.engine import measure_engine
from benchmarks.gateway.engine import summary as engine_summary
from benchmarks.gateway.measure import Figures
from benchmarks.gateway.peers import Bare, Direct, LiteLLM, Nginx, Peer, VllmRouter
from benchmarks.gateway.table import (
    BARE,
    DIRECT,
    KEYLESS,
    OURS,
    REPLICATED,
    STORED,
    TRACED,
    Round,
    complete,
    summary,
    tables,
)
from svc.errors import EngineError
from svc.invocation import print_json
from svc.settings.load import load_settings
from svc.terminal import console, output

_BY_NAME = (TRACED, REPLICATED, BARE)
"""Gateways that are measured only if named by `--only`."""


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Number of rounds.")
@click.option("--only", metavar="NAMES", help="Comma-separated list of gateways to measure.")
@click.option(
    "--peers",
    type=click.Path(path_type=Path),
    default=Path(".venv/peers"),
    show_default=True,
    help="Folder in which install_peers.sh installed the other gateways.",
)
@click.option("--store", default="", metavar="URL", help=f"Empty PostgreSQL database; also measures {STORED!r}.")
@click.option("--engine", "model", metavar="MODEL", help="Measure this model's throughput on its real engine instead.")
@click.option("--home", type=click.Path(path_type=Path), help="Home that contains the model of --engine.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(
    rounds: int, only: str | None, peers: Path, store: str, model: str | None, home: Path | None, as_json: bool
) -> None:
    """Measure the cost of a request through each gateway."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that started processes are stopped
    with tempfile.TemporaryDirectory(prefix="gw") as name:
        folder = Path(name)
        if model:
            _measure_engine(model, home, rounds, folder / "serve.log", as_json=as_json)
        else:
            _measure_gateways(folder, rounds, only, peers.absolute() / "bin", store, as_json=as_json)


def _measure_gateways(folder: Path, rounds: int, only: str | None, bin: Path, store: str, *, as_json: bool) -> None:
    others: list[Peer] = [LiteLLM(bin), VllmRouter(bin), Nginx(bin)]
    stored = [STORED] if store else []
    names = _names([DIRECT, OURS, *stored, KEYLESS, TRACED, REPLICATED, BARE, *(peer.name for peer in others)], only)
    left_out = {peer.name: peer.missing for peer in others if peer.name in names and peer.missing}
    with bench(folder) as machine:
        ours = make_ours(folder, store) if {OURS, KEYLESS, TRACED, REPLICATED, *stored} & {*names} else []
        known: list[Peer] = [Direct(), *ours, Bare(), *others]
        peers = [peer for peer in known if peer.name in names and peer.name not in left_out]
        measured = [_round(machine, peers, number, rounds, left_out) for number in range(rounds)]
    measured = complete(measured)
    if as_json:
        raw = [{name: asdict(figures) for name, figures in each.items()} for each in measured]
        print_json({**summary(measured), "left_out": left_out, "rounds": raw})
        return
    for table in tables(summary(measured)):
        output.print(table)
    for name, why in left_out.items():
        output.print(f"{name} is skipped: {why}", markup=False)


def _names(known: Sequence[str], only: str | None) -> list[str]:
    """Return the names of the requested gateways, always including the upstream itself."""
    asked = [name.strip() for name in only.split(",")] if only else [name for name in known if name not in _BY_NAME]
    if unknown := {*asked} - {*known}:
        raise click.UsageError(
            f"unknown gateways: {', '.join(sorted(unknown))}; available gateways: {', '.join(known)}"
        )
    return [name for name in known if name in asked or name == DIRECT]


def _round(machine: Bench, peers: Sequence[Peer], number: int, rounds: int, left_out: dict[str, str]) -> Round:
    """Measure each gateway once, in reverse order every other round. Gateways that fail to start are dropped."""
    figures: dict[str, Figures] = {}
    for peer in reversed(peers) if number % 2 else peers:
        if peer.name in left_out:
            continue
        began = time.monotonic()
        try:
            figures[peer.name] = machine.measure(peer, f"{peer.name.replace(' ', '-')}-{number}")
        except EngineError as error:
            left_out[peer.name] = str(error)
        took = time.monotonic() - began
        console.print(f"round {number + 1} of {rounds}: {peer.name}, {took:.0f} s", markup=False)
    return figures


def _measure_engine(model: str, home: Path | None, pairs: int, log: Path, *, as_json: bool) -> None:
    result = engine_summary(measure_engine(load_settings(home=home), model, pairs, log))
    if as_json:
        print_json(result)
        return
    share = result["share"]
    output.print(f"vLLM alone         {result['direct']:.1f} tokens/s")
    output.print(f"through svc serve  {result['served']:.1f} tokens/s")
    interval = "" if share["low"] is None else f" (mean within {share['low']:.1%} to {share['high']:.1%})"
    output.print(f"ratio              {share['median']:.1%}{interval}, {pairs} pairs")


if __name__ == "__main__":
    main()
