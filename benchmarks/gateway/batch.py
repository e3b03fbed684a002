"""`python -m benchmarks.gateway.batch`: compares the server's CPU time per request in a batch and over HTTP.

Both run on one server in front of the benchmark's upstream, alternately and with the same concurrency. The figure for
the batch includes its creation, the check of its input file and the writing of its result file.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import httpx
import uvloop

from benchmarks.gateway.bench import bench, make_ours
from benchmarks.gateway.load import Address, Ask, send
from benchmarks.gateway.peers import Ours
from benchmarks.gateway.processes import cpu_seconds
from benchmarks.gateway.table import KEYLESS
from serving.files.client_files import ClientFiles
from serving.files.rows import FileStatus, Purpose
from svc.errors import EngineError
from svc.invocation import print_json
from svc.settings.load import load_settings
from svc.store.database import open_store
from svc.terminal import console, output

_ASK = Ask(chunks=16)
_CONCURRENCY = 16
"""Number of clients, and the default of `batches.concurrency`."""
_SETTLE_S, _POLL_S, _PATIENCE_S = 1.0, 0.5, 120.0


@dataclass(frozen=True, slots=True)
class BatchFigures:
    """Measurements of one round.

    Attributes:
        live_ms, batch_ms: CPU time per request, over HTTP and in a batch.
    """

    live_ms: float
    batch_ms: float


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Number of rounds.")
@click.option("--requests", type=click.IntRange(1, 50_000), default=1000, show_default=True, help="Requests per round.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(rounds: int, requests: int, as_json: bool) -> None:
    """Measure the cost of a request in a batch."""
    with tempfile.TemporaryDirectory(prefix="gwb") as name, bench(Path(name)) as machine:
        ours = next(peer for peer in make_ours(Path(name)) if isinstance(peer, Ours) and peer.name == KEYLESS)
        file = _add_input(ours.home, requests)
        with machine.started(ours, "batch") as (address, pid):
            if pid is None:
                raise EngineError("the server did not start")
            _live(address, pid, requests)  # to warm up
            measured = []
            for number in range(rounds):
                live_ms, batch_ms = _live(address, pid, requests), _batch(address, pid, file, requests)
                measured.append(BatchFigures(live_ms, batch_ms))
                console.print(f"round {number + 1} of {rounds}", markup=False)
    if as_json:
        print_json({"rounds": [asdict(figures) for figures in measured]})
        return
    for title, name in (("over HTTP", "live_ms"), ("in a batch", "batch_ms")):
        values = [getattr(figures, name) for figures in measured]
        spread = f"{min(values):.3f} to {max(values):.3f}"
        output.print(f"{title:11} {statistics.median(values):.3f} ms/request ({spread})")


def _add_input(home: Path, requests: int) -> str:
    """Add an input file to the server's home, and return its id."""
    store = open_store(load_settings(home=home))
    files = ClientFiles(store, home / "files")
    with files.writing() as (id, writer):
        for number in range(requests):
            head = f'{{"custom_id":"request-{number}","method":"POST","url":"/v1/chat/completions","body":'
            writer.write(f"{head}{_ASK.body()}}}\n".encode())
        files.add(id, writer, owner="", purpose=Purpose.BATCH, filename="requests.jsonl", status=FileStatus.PROCESSED)
    store.dispose()
    return id


def _live(address: Address, pid: int, requests: int) -> float:
    """Return the CPU time in ms per request over HTTP."""

    def run() -> None:
        load = uvloop.run(send(address, _ASK, clients=_CONCURRENCY, requests=requests))
        if load.failed:
            raise EngineError(f"{load.failed} requests failed: {load.wrong}")

    return _measured(pid, requests, run)


def _batch(address: Address, pid: int, file: str, requests: int) -> float:
    """Return the CPU time in ms per request in a batch."""

    def run() -> None:
        began = time.monotonic()
        with httpx.Client(base_url=f"http://127.0.0.1:{address.port}/v1") as client:
            given = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
            batch = client.post("/batches", json=given).raise_for_status().json()
            while batch["status"] in ("validating", "in_progress", "finalizing"):
                time.sleep(_POLL_S)
                batch = client.get(f"/batches/{batch['id']}").json()
                if time.monotonic() - began > _PATIENCE_S:
                    raise EngineError(f"the batch did not end: {batch}")
        if batch["request_counts"]["completed"] != requests:
            raise EngineError(f"not all requests of the batch were answered: {batch}")

    return _measured(pid, requests, run)


def _measured(pid: int, requests: int, run: Callable[[], None]) -> float:
    before = cpu_seconds(pid)
    run()
    time.sleep(_SETTLE_S)
    return 1e3 * (cpu_seconds(pid) - before) / requests


if __name__ == "__main__":
    main()
