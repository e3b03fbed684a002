"""Compares the latency that `svc plan` predicts with that of a running server, at three loads.

    python -m benchmarks.sizing http://127.0.0.1:8000/v1#NAME --seconds 60

It measures the server's step times, then sends requests at random times (Poisson) at 30, 60 and 85% of the
capacity that the simulation predicts from them.
"""

import asyncio
import json
import random
from dataclasses import asdict
from pathlib import Path

import click

from serving.sizing.measure import Answered, LoadClient, levels, measure, server_client
from serving.sizing.plan import Latency, predict
from serving.sizing.service_times import MeasuredTimes
from serving.sizing.simulation import Limits, Request, Workload, simulate
from svc.evaluation.endpoint import Endpoint
from svc.terminal import counting, print_table, quiet_libraries

_SHARES = (0.3, 0.6, 0.85)
_SEED = 7


def capacity(times: MeasuredTimes, workload: Workload, sequences: int) -> float:
    """Return the requests per second that one replica answers if there is always a request waiting."""
    requests = [Request(0.0, workload.prompt, workload.answer) for _ in range(20 * sequences)]
    simulate(requests, 1, times, Limits(sequences))
    return len(requests) / max(request.last for request in requests)


async def load(client: LoadClient, workload: Workload, seconds: float) -> list[Request]:
    """Send requests for a time, and return them with the times at which they were answered."""
    drawn = workload.requests(int(seconds * workload.rps * 2) + 50, _SEED)
    requests = [request for request in drawn if request.arrived < seconds]
    rng = random.Random(_SEED)  # noqa: S311
    began = asyncio.get_running_loop().time()

    async def send(request: Request) -> None:
        prompt = [rng.randrange(256, 8192) for _ in range(request.prompt)]
        await asyncio.sleep(began + request.arrived - asyncio.get_running_loop().time())
        answered: Answered = await client.ask(prompt, request.answer)
        request.first, request.last = request.arrived + answered.first_s, request.arrived + answered.last_s

    await asyncio.gather(*map(send, requests))
    return requests


@click.command()
@click.argument("url")
@click.option("--prompt", default=128)
@click.option("--answer", default=32)
@click.option("--spread", default=0.5)
@click.option("--concurrency", default=16)
@click.option("--seconds", default=45.0)
@click.option("--times", type=click.Path(path_type=Path), help="An earlier measurement, used instead of a new one.")
def main(
    url: str, prompt: int, answer: int, spread: float, concurrency: int, seconds: float, times: Path | None
) -> None:
    """Measure the server's model at URL, load it, and print predicted and measured latency."""
    quiet_libraries()

    async def run() -> None:
        async with server_client(Endpoint.parse(url, None)) as client:
            if times and times.exists():
                measured = MeasuredTimes.read(times)
            else:
                with counting("measurement", len(levels(concurrency)) + 2) as on_step:
                    measured = await measure(
                        client, prompt=prompt, answer=answer, concurrency=concurrency, label=url, on_step=on_step
                    )
                if times:
                    measured.write(times)
            print(measured.model_dump_json(), f"overhead {measured.overhead_s:.4f} s")
            most = capacity(measured, Workload(1.0, prompt, answer), concurrency)
            rows, answers = [], dict[str, list[Request]]()
            for share in _SHARES:
                workload = Workload(most * share, prompt, answer, spread)
                answers[f"{share:.0%}"] = answered = await load(client, workload, seconds)
                real, expected = Latency.of(answered), predict(workload, 1, measured, concurrency)
                simulated = workload.requests(len(answered), _SEED)
                simulate(simulated, 1, measured, Limits(concurrency))
                same = Latency.of(simulated)
                rows.append(
                    [f"{share:.0%}", f"{workload.rps:.2f}", len(answered), *_cells(real, expected), *_cells(real, same)]
                )
            if times:
                raw = {name: [asdict(request) for request in requests] for name, requests in answers.items()}
                times.with_suffix(".requests.json").write_text(json.dumps(raw))
            print_table(("load", "rps", "requests", *_HEADERS, *(f"same {each}" for each in _HEADERS)), rows)

    asyncio.run(run())


_HEADERS = ("p50", "p95", "first p50", "first p95")


def _cells(real: Latency, expected: Latency) -> list[str]:
    pairs = [(getattr(real, name), getattr(expected, name)) for name in ("p50", "p95", "first_p50", "first_p95")]
    return [f"{measured:.2f}/{predicted:.2f} {predicted / measured - 1:+.0%}" for measured, predicted in pairs]


if __name__ == "__main__":
    main()
