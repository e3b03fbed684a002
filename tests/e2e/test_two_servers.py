"""Two servers with their own homes and engines over one PostgreSQL and one S3 store, under load: promotions, rollouts
whose leader is killed, a database that restarts, a network that is cut, and objects that cannot be read.

The versions are adapters, so that each server needs one engine: two engines on one core are too slow.
"""

import itertools
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from sqlalchemy import Engine as Store

from serving.models.server_views import server_views
from svc.settings.settings import Settings
from svc.store.database import open_store
from svc.store.rollouts import RolloutOutcome, RolloutRecord, RolloutState, find_rollout
from tests.builders.live_rollouts import PLAN, Users
from tests.cut_link import Link
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import ANY_QUALITY, Instance
from tests.e2e.json_versions import prompts
from tests.object_store import Bucket, Fault, running_s3
from tests.postgresql import PostgresServer

pytestmark = [pytest.mark.slow, pytest.mark.matrix]

PORT = 8971
STEPS = ("--shadow", "20", "--canary", "50,100")
SETTINGS = {
    "SVC_MODELS": json.dumps({"tiny": {"rollout": PLAN}}),
    "SVC_ENGINE__ENVIRONMENT": '["OMP_WAIT_POLICY"]',
    "OMP_WAIT_POLICY": "PASSIVE",  # several engines share the cores
}


class Pair:
    """Two servers of `tiny`. The second one began with an empty home.

    Attributes:
        link: connection of the second server to the database.
        bucket: the store from which the second server reads versions.
    """

    def __init__(self, servers: Sequence[Instance], store: Store, link: Link, bucket: Bucket) -> None:
        self.servers = servers
        self.store = store
        self.link = link
        self.bucket = bucket

    def start(self) -> None:
        """Start the servers that do not run, and wait until both serve version 1."""
        for server in self.servers:
            if not server.is_running:
                server.start("tiny")
        if self.rollout() is not None:
            self.until(lambda: (record := self.rollout()) is not None and record.outcome is not None)
        if self.served() != ["tiny@1"] * 2:
            assert self.servers[0].command("promote", "tiny@1", "--direct", *ANY_QUALITY).returncode == 0
        self.until(lambda: self.served() == ["tiny@1"] * 2)

    def served(self) -> list[str]:
        """Return the version that each server serves."""
        return [server.status()["version"] for server in self.servers]

    def leader(self) -> int:
        """Wait until a server leads the rollouts, and return its index."""
        ports = [server.url.rpartition(":")[2] for server in self.servers]
        leaders: list[int] = []
        while not leaders:
            views = [view for view in server_views(self.store) if "tiny" in view.leads]
            leaders = [ports.index(view.address.rpartition(":")[2]) for view in views]
        return leaders[0]

    def rollout(self) -> RolloutRecord | None:
        return find_rollout(self.store, "tiny")

    def until(self, condition: Callable[[], bool], timeout_s: float = 240) -> None:
        """Wait until a condition is met."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, (self.served(), self.rollout())
            time.sleep(0.05)


@pytest.fixture(scope="module")
def pair(home: Path, postgresql: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("two")
    (folder / "empty").mkdir()
    with ExitStack() as stack:
        new_bucket = stack.enter_context(running_s3())
        database = stack.enter_context(postgresql.new_database())
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="link-")))
        link = stack.enter_context(Link(sockets, postgresql.folder).running())
        assert database.url is not None
        bucket, url = new_bucket(), database.url.get_secret_value()
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        environment.setenv("SVC_STORE__URL", url)
        environment.setenv("SVC_ARTIFACTS__URL", bucket.url)
        linked = url.replace(str(postgresql.folder), str(sockets))
        first = stack.enter_context(closing(Instance(home, folder / "1", PORT, PROMPTS, **SETTINGS)))
        second = stack.enter_context(
            closing(Instance(folder / "empty", folder / "2", PORT + 1, PROMPTS, **SETTINGS, SVC_STORE__URL=linked))
        )
        first.core, second.core = 0, 1
        pushed = first.command("models", "push", "tiny@1", "tiny@2")
        assert pushed.returncode == 0, pushed.stderr
        first.start("tiny@1", "--format", "adapter")
        second.start("tiny")
        store = open_store(Settings(home=folder / "1", store=database))
        yield Pair((first, second), store, link, bucket)


@pytest.fixture
def clients(pair: Pair) -> Iterator[list[Users]]:
    """Yield the clients of each server, while both serve version 1."""
    pair.start()
    with ExitStack() as stack:
        clients = [
            stack.enter_context(Users(server.url, "tiny", prompts(50), streams=2).asking()) for server in pair.servers
        ]
        for each in clients:
            each.wait_for(10)
        yield clients
    assert [each.failed for each in clients] == [[], []]


def test_both_servers_serve_a_promoted_version_even_if_the_object_store_fails_temporarily(
    pair: Pair, clients: list[Users], report: Report
) -> None:
    faults = itertools.cycle([Fault.ERROR, None, Fault.CUT, None, Fault.STALL, None])
    pair.bucket.fault = lambda method, path: next(faults) if method == "GET" and "safetensors" in path else None
    began = time.monotonic()
    done = pair.servers[0].command("promote", "tiny@2", "--direct", *ANY_QUALITY)
    took_s = time.monotonic() - began
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert pair.served() == ["tiny@2"] * 2
    for each in clients:
        each.wait_for(10)
        assert each.versions[-1] == "tiny@2"
    report(f"two servers: promoted after {took_s:.1f} s, {sum(len(each.versions) for each in clients)} answers")


def test_no_request_fails_when_the_database_restarts_under_load(
    pair: Pair, clients: list[Users], postgresql: PostgresServer
) -> None:
    postgresql.stop()
    for each in clients:
        each.wait_for(20)
    postgresql.start()
    for each in clients:
        each.wait_for(20)
    done = pair.servers[1].command("promote", "tiny@2", "--direct", *ANY_QUALITY)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert pair.served() == ["tiny@2"] * 2


def test_server_keeps_serving_during_a_network_outage_and_catches_up_afterwards(
    pair: Pair, clients: list[Users]
) -> None:
    with pair.link.cut():
        time.sleep(20)  # its leases end after 15 s
        done = pair.servers[0].command("promote", "tiny@2", "--direct", *ANY_QUALITY)
        assert done.returncode == 0, (done.stdout, done.stderr)
        assert pair.served() == ["tiny@2", "tiny@1"]
        clients[1].wait_for(10)
    pair.until(lambda: pair.served() == ["tiny@2"] * 2)


def test_candidate_receives_traffic_on_both_servers_and_is_promoted(
    pair: Pair, clients: list[Users], report: Report
) -> None:
    began = time.monotonic()
    done = pair.servers[1].command("promote", "tiny@2", *STEPS, *ANY_QUALITY)
    assert done.returncode == 0, (done.stdout, done.stderr)
    pair.until(lambda: pair.served() == ["tiny@2"] * 2)
    assert all({"tiny@1", "tiny@2"} == set(each.versions) for each in clients)
    report(f"two servers: rollout promoted after {time.monotonic() - began:.0f} s")


@pytest.mark.parametrize("state", [RolloutState.SHADOW, RolloutState.CANARY])
def test_rollback_ends_a_rollout_on_both_servers(pair: Pair, clients: list[Users], state: RolloutState) -> None:
    promotion = pair.servers[0].try_to_promote("tiny@2", *STEPS)
    pair.until(lambda: (record := pair.rollout()) is not None and record.state is state)
    assert pair.servers[1].command("rollback", "tiny").returncode == 0
    promotion.wait(60)
    asked = [len(each.versions) for each in clients]
    for each in clients:
        each.wait_for(20)
    assert all(set(each.versions[count + 4 :]) == {"tiny@1"} for each, count in zip(clients, asked, strict=True))


@pytest.mark.parametrize(
    "state", [RolloutState.LOADING, RolloutState.SHADOW, RolloutState.CANARY, RolloutState.SWITCHING]
)
def test_surviving_server_completes_a_rollout_when_the_leader_is_killed(
    pair: Pair, clients: list[Users], state: RolloutState, report: Report
) -> None:
    leader = pair.leader()
    promotion = pair.servers[1 - leader].try_to_promote("tiny@2", *STEPS)
    pair.until(lambda: (record := pair.rollout()) is not None and record.outcome is None and record.state is state)
    clients[leader].stop()  # a killed server answers nobody
    began = time.monotonic()
    pair.servers[leader].end(signal.SIGKILL)
    pair.until(lambda: (record := pair.rollout()) is not None and record.outcome is not None)
    took_s = time.monotonic() - began
    promotion.wait(60)
    record = pair.rollout()
    assert record is not None and record.outcome is RolloutOutcome.PROMOTED, record
    clients[1 - leader].wait_for(10)
    assert clients[1 - leader].versions[-1] == "tiny@2"
    clients[leader].failed.clear()  # of requests that were running when the server was killed
    report(f"two servers: leader killed during {state}: promoted {took_s:.0f} s later")
