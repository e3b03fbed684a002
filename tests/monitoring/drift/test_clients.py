"""Tests that a client counts for its usual share, and that one client's batch is not a change in traffic."""

import random

import pytest

from monitoring.drift.detector import COMPARED, ClientShares


def counted(shares: ClientShares, clients: list[str]) -> list[bool]:
    results = []
    for client in clients:
        results.append(shares.may_count(client))
        if results[-1]:
            shares.keep(client)
    return results


def mixed(count: int, shares: dict[str, float], seed: int = 0) -> list[str]:
    return random.Random(seed).choices(list(shares), list(shares.values()), k=count)


def test_drift_check_uses_only_a_few_requests_of_a_sudden_burst_from_a_new_client() -> None:
    shares = ClientShares([], [], 1_000)
    counted(shares, mixed(600, {f"client {number}": 1 for number in range(100)}))
    assert sum(counted(shares, ["batch"] * 100)) == 5


def test_drift_check_counts_less_than_a_third_of_a_burst_from_one_client() -> None:
    shares = ClientShares([], [], 1_000)
    counted(shares, mixed(900, {"large": 0.3, **{f"client {number}": 0.007 for number in range(100)}}))
    assert sum(counted(shares, ["large"] * 100)) < 30


@pytest.mark.parametrize("client", ["", "only"])
def test_drift_check_uses_every_request_if_there_is_only_one_client_or_no_known_client(client: str) -> None:
    assert all(counted(ClientShares([], [], 1_000), [client] * 1_500))


def test_drift_check_counts_all_requests_from_unknown_clients_even_if_earlier_clients_were_known() -> None:
    shares = ClientShares(["one"] * 300, ["one"] * COMPARED, 1_000)
    assert all(counted(shares, [""] * COMPARED))


def test_drift_check_counts_nearly_all_requests_if_two_clients_are_equally_active() -> None:
    results = counted(ClientShares([], [], 1_000), mixed(2_000, {"one": 0.5, "other": 0.5}))
    assert sum(results) > 0.9 * len(results)


def test_drift_check_uses_all_requests_while_the_usual_shares_of_clients_are_unknown() -> None:
    assert all(counted(ClientShares([], [], 1_000), ["one"] * 2 * COMPARED))


def test_drift_check_uses_a_growing_share_of_the_requests_of_a_new_client() -> None:
    shares = ClientShares([], [], 1_000)
    counted(shares, mixed(1_200, {f"client {number}": 1 for number in range(50)}))
    after = mixed(2_000, {"new": 0.2, **{f"client {number}": 0.016 for number in range(50)}}, seed=1)
    results = [one for one, client in zip(counted(shares, after), after, strict=True) if client == "new"]
    assert sum(results[-100:]) > 2 * sum(results[:100])


def test_drift_check_counts_the_same_requests_after_a_restart() -> None:
    clients = mixed(1_500, {"large": 0.4, **{f"client {number}": 0.006 for number in range(100)}}, seed=2)
    whole = counted(ClientShares([], [], 1_000), clients)
    seen, kept = clients[:1_200], [one for one, counts in zip(clients[:1_200], whole, strict=False) if counts]
    assert counted(ClientShares(seen, kept, 1_000), clients[1_200:]) == whole[1_200:]
