"""Compares two ways to spread conversations over the replicas of a running server.

    python -m benchmarks.affinity http://127.0.0.1:8000/v1#NAME --conversations 24

Requests with a `user` go to the replica that has probably cached the conversation. Prompts of token ids without a
`user` go to the replica with the fewest requests. Rounds of both kinds alternate. For each round, the share of prompt
tokens that the engines had cached and the times to first token are printed.
"""

import asyncio
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import click
import httpx
from prometheus_client.parser import text_string_to_metric_families

from serving.sizing.measure import LoadClient, server_client
from svc.evaluation.endpoint import Endpoint
from svc.terminal import counting, print_table, quiet_libraries

_ANSWER = 16
_TURN_TOKENS = 48
"""Number of new tokens in each turn: the answer to the previous turn, and the next question."""


@dataclass(frozen=True)
class Round:
    """Results of one round of conversations.

    Attributes:
        cached: share of the prompt tokens that the engines had cached.
        firsts: times to first token of all turns except the first one of each conversation, in seconds.
    """

    cached: float
    firsts: list[float]


@dataclass(frozen=True)
class Shape:
    """Conversations of a round.

    Attributes:
        concurrency: number of concurrent conversations. When one ends, the next one begins.
        begin: number of tokens in the first prompt.
        think_s: mean time between an answer and the next turn, in seconds. Without it, a conversation usually returns
            to the replica that it has just left, because that one has the fewest requests.
    """

    conversations: int
    turns: int
    concurrency: int
    begin: int
    think_s: float


async def play(client: LoadClient, shape: Shape, seed: int, *, affinity: bool) -> list[float]:
    """Send all conversations, and return the times to first token of their later turns, in seconds."""
    slots, rng = asyncio.Semaphore(shape.concurrency), random.Random(seed)  # noqa: S311 - no secret

    def tokens(count: int) -> list[int]:
        return [rng.randrange(256, 8192) for _ in range(count)]

    async def converse(number: int) -> list[float]:
        async with slots:
            user = f"conversation-{seed}-{number}" if affinity else None
            prompt, firsts = tokens(shape.begin), list[float]()
            for _ in range(shape.turns):
                firsts.append((await client.ask(prompt, _ANSWER, user)).first_s)
                await asyncio.sleep(rng.expovariate(1 / shape.think_s))
                prompt += tokens(_TURN_TOKENS)
            return firsts[1:]

    each = await asyncio.gather(*map(converse, range(shape.conversations)))
    return [first for firsts in each for first in firsts]


def _totals(text: str) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"):
                yield sample.name.split("_")[2], sample.value


async def counted(http: httpx.AsyncClient, metrics: httpx.URL) -> dict[str, float]:
    """Return how many prompt tokens all engines have looked up in their caches (queries), and how many of these they
    found (hits).
    """
    answer = (await http.get(metrics)).raise_for_status()
    sums = {"hits": 0.0, "queries": 0.0}
    for name, value in _totals(answer.text):
        sums[name] += value
    return sums


@click.command()
@click.argument("url")
@click.option("--conversations", default=24)
@click.option("--turns", default=6)
@click.option("--concurrency", default=6)
@click.option("--begin", default=256, help="Tokens of the first prompt.")
@click.option("--think", default=2.0, help="Mean seconds between an answer and the next turn.")
@click.option("--rounds", default=3)
def main(url: str, conversations: int, turns: int, concurrency: int, begin: int, think: float, rounds: int) -> None:
    """Send conversations to the server's model at URL, with and without affinity, and print both results."""
    quiet_libraries()
    shape = Shape(conversations, turns, concurrency, begin, think)

    async def run() -> dict[bool, list[Round]]:
        results: dict[bool, list[Round]] = {False: [], True: []}
        endpoint = Endpoint.parse(url, None)
        metrics = httpx.URL(endpoint.url).join("/metrics")
        async with server_client(endpoint) as client:
            with counting("rounds", 2 * rounds) as on_round:
                for number in range(rounds):
                    for affinity in (False, True):
                        before = await counted(client.http, metrics)
                        firsts = await play(client, shape, 2 * number + affinity, affinity=affinity)
                        await asyncio.sleep(2)  # the gateway reads the engines' metrics every second
                        after = await counted(client.http, metrics)
                        hits, queries = (after[each] - before[each] for each in ("hits", "queries"))
                        results[affinity].append(Round(hits / queries, firsts))
                        on_round()
        return results

    rows = [
        [
            "conversation" if affinity else "fewest requests",
            " ".join(f"{each.cached:.0%}" for each in each_way),
            *(" ".join(f"{1000 * _percentile(each.firsts, share):.0f}" for each in each_way) for share in (50, 95)),
        ]
        for affinity, each_way in asyncio.run(run()).items()
    ]
    print_table(("replica by", "cached", "first token p50, ms", "p95, ms"), rows)


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


if __name__ == "__main__":
    main()
