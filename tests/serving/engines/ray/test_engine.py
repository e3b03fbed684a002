"""Tests that an engine with an actor on another machine behaves as a local one, with a double of the cluster."""

import asyncio
import shutil
import ssl
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from serving.engines.ray.engine import Placement, RayEngine
from serving.engines.ray.identity import Identity, client_context, make_identity
from serving.engines.ray.record import RECORD_FILE, ActorRecord, end_postponed, read_actor, write_actor
from serving.engines.slots import EngineSlots
from svc.engine.address import TlsAddress
from svc.engine.client import EngineClient, Health
from svc.engine.state import EnginePhase
from svc.engine.vllm.connection import UnreachableError
from svc.engine.vllm.connection_pool import EngineConnections
from svc.engine.vllm.folders import state_folder
from svc.engine.vllm.launch import EngineSpec
from svc.errors import EngineError, IntegrityError
from svc.ray.need import Need
from svc.registry.objects import ObjectStore
from svc.registry.registry import HELDOUT_FILE, Registry
from svc.settings.engine import Device, EngineSettings
from svc.settings.settings import Settings
from svc.version import VersionId
from tests.serving.engines.ray.cluster_double import ClusterDouble, ProcessDouble
from tests.svc.engine.devices import AVX512
from tests.svc.registry.manifests import make_manifest

Make = Callable[..., RayEngine]
NAME = "tuned"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Yield a folder with two versions, of which the artifact store has copies."""
    with TemporaryDirectory(prefix="svc") as name:
        folder = Path(name)
        (folder / "store").mkdir()
        (folder / "state").mkdir()
        for number in (1, 2):
            version = folder / "home" / "models" / NAME / str(number)
            (version / "merged").mkdir(parents=True)
            (version / "merged" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
            (version / "merged" / "model.safetensors").write_bytes(bytes([number]) * 100)
            (version / HELDOUT_FILE).write_text("{}\n")
            manifest = make_manifest(VersionId(NAME, number), version)
            ObjectStore((folder / "store").as_uri()).upload(manifest, version)
        yield folder


@pytest.fixture
async def cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ClusterDouble]:
    cluster = ClusterDouble(folder / "node")
    monkeypatch.setattr("serving.engines.ray.record.RayCluster", lambda address: cluster)
    yield cluster
    await cluster.close()


def version_folder(folder: Path, number: int) -> Path:
    return folder / "home" / "models" / NAME / str(number) / "merged"


@pytest.fixture
async def make(folder: Path, cluster: ClusterDouble) -> AsyncIterator[Make]:
    """Yield a function that creates an engine. All engines are detached at the end."""
    made: list[RayEngine] = []

    def new(**settings: object) -> RayEngine:
        spec = EngineSpec(
            model=version_folder(folder, 1),
            served_name=NAME,
            runtime=folder,
            state=folder / "state",
            log=folder / "engine.log",
            cache=folder,
            capabilities=AVX512,
            settings=EngineSettings.model_validate({"device": Device.CPU, **settings}),
        )
        of_home = Settings.model_validate({"artifacts": {"url": (folder / "store").as_uri()}, "ray": {"wait_s": 5}})
        made.append(RayEngine(spec, Placement(cluster, Need(cpus=1), of_home, folder / "home" / "models")))
        return made[-1]

    yield new
    for engine in made:
        await engine.leave()


def engine_of(cluster: ClusterDouble) -> ProcessDouble:
    """Return the engine that was started last."""
    return list(cluster.engines.values())[-1]


@pytest.mark.slow
async def test_ray_engine_serves_over_tls_and_loads_weights_from_its_own_machine(
    make: Make, folder: Path, cluster: ClusterDouble
) -> None:
    engine, phases = make(), list[EnginePhase]()
    await engine.start(phases.append)
    with closing(EngineConnections(engine.address, silence_s=5)) as pool:
        async with pool.get("/v1/models") as answer:
            assert NAME in (await answer.read()).decode()
    assert await engine.client.health() is Health.GOOD
    assert engine_of(cluster).double.weights == str(folder / "node" / "models" / NAME / "1" / "merged")
    assert phases == [EnginePhase.WEIGHTS]
    assert engine.plan == engine_of(cluster).plan


@pytest.mark.slow
async def test_weight_reload_uses_the_path_on_the_remote_machine(
    make: Make, folder: Path, cluster: ClusterDouble
) -> None:
    engine = make()
    await engine.start()
    await engine.fetch(version_folder(folder, 2))
    await engine.client.reload_weights(version_folder(folder, 2))
    assert engine_of(cluster).double.weights == str(folder / "node" / "models" / NAME / "2" / "merged")


async def test_weights_modified_on_the_remote_machine_are_not_loaded(
    make: Make, folder: Path, cluster: ClusterDouble
) -> None:
    engine = make()
    await engine.start()
    await engine.fetch(version_folder(folder, 2))
    there = folder / "node" / "models" / NAME / "2" / "merged" / "model.safetensors"
    there.chmod(0o644)
    there.write_bytes(b"x" * 100)
    with pytest.raises(IntegrityError):
        await engine.client.reload_weights(version_folder(folder, 2))
    assert "/collective_rpc" not in engine_of(cluster).double.calls


async def test_error_for_a_version_absent_from_the_object_store_names_the_push_command(
    make: Make, folder: Path
) -> None:
    (folder / "store" / "manifests" / NAME / "1.json").unlink()
    with pytest.raises(EngineError, match="no version tuned@1") as error:
        await make().start()
    assert "svc models push tuned@1" in error.value.todo


async def answers(port: int, context: ssl.SSLContext) -> bool:
    """Return whether a port sends anything to a connection with this context."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="")
    except OSError:
        return False
    try:
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        return bool(await reader.read(1))
    except OSError:
        return False
    finally:
        writer.transport.abort()


async def test_engine_and_actor_ports_reject_an_unknown_client_certificate(make: Make, folder: Path) -> None:
    engine = make()
    await engine.start()
    record = read_actor(folder / "state")
    assert record and record.placed
    own = client_context(Identity(record.certificate, record.key), record.placed.certificate)
    stranger = client_context(make_identity(), record.placed.certificate)
    assert await answers(engine.address.port, own)
    assert not await answers(engine.address.port, stranger)
    assert not await answers(record.placed.port, stranger)


async def test_actor_record_with_the_private_key_is_readable_only_by_its_owner(make: Make, folder: Path) -> None:
    await make().start()
    assert stat.S_IMODE((folder / "state" / RECORD_FILE).stat().st_mode) == 0o600


async def test_actor_record_in_a_copied_state_folder_is_ignored(make: Make, folder: Path) -> None:
    await make().start()
    shutil.copytree(folder / "state", folder / "copy")
    assert read_actor(folder / "copy") is None
    assert read_actor(folder / "state")


async def test_new_server_adopts_the_engine_that_the_previous_server_left_running(
    make: Make, cluster: ClusterDouble
) -> None:
    first = make()
    await first.start()
    await first.record("tuned@1 (merged)")
    await first.leave()
    second = make()
    assert await second.orphan_holds() == "tuned@1 (merged)"
    await second.adopt()
    assert await second.client.health() is Health.GOOD
    assert len(cluster.engines) == 1


@pytest.mark.slow
async def test_new_server_stops_an_engine_with_different_options_instead_of_adopting_it(
    make: Make, cluster: ClusterDouble
) -> None:
    first = make()
    await first.start()
    await first.record("tuned@1 (merged)")
    await first.leave()
    second = make(max_model_len=64)
    assert await second.orphan_holds() is None
    await second.start()
    assert cluster.ended == [next(iter(cluster.engines))]
    assert len(cluster.running) == 1


async def test_exited_engine_is_reported_with_its_exit_code_and_refuses_connections(
    make: Make, cluster: ClusterDouble
) -> None:
    engine = make()
    await engine.start()
    engine_of(cluster).die()
    assert await asyncio.wait_for(engine.wait(), 5) == -9
    with closing(EngineConnections(engine.address, silence_s=5)) as pool, pytest.raises(UnreachableError):
        async with pool.get("/health"):
            pass
    assert await engine.client.health() is Health.DEAD
    await asyncio.wait_for(next(iter(cluster.running.values())), 5)  # the actor ends, too, and frees its resources


async def test_losing_the_ray_actor_is_reported_as_engine_death_and_makes_later_commands_fail(
    make: Make, cluster: ClusterDouble
) -> None:
    engine = make()
    await engine.start()
    await cluster.kill(next(iter(cluster.running)))
    assert await asyncio.wait_for(engine.wait(), 5) is None
    with pytest.raises(EngineError, match="was lost"):
        await engine.sleep()


@pytest.mark.slow
async def test_engine_on_an_unresponsive_machine_is_reported_lost_after_a_few_seconds(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.engines.ray.node.BEAT_S", 0.02)
    engine = make()
    await engine.start()
    monkeypatch.setattr("serving.engines.ray.link.SILENCE_S", 0.2)
    monkeypatch.setattr("serving.engines.ray.node.BEAT_S", 60.0)
    assert await asyncio.wait_for(engine.wait(), 5) is None


async def test_engine_and_actor_can_be_stopped_without_ray(make: Make, folder: Path, cluster: ClusterDouble) -> None:
    engine = make()
    await engine.start()
    await engine.stop()
    await asyncio.wait_for(next(iter(cluster.running.values())), 5)
    assert cluster.ended == []
    assert not (folder / "state" / RECORD_FILE).exists()


async def test_error_for_a_failed_engine_start_names_the_machine_and_no_ray_actor_remains(
    make: Make, folder: Path, cluster: ClusterDouble
) -> None:
    vars(cluster)["failure"] = EngineError("vLLM exited with code 1", todo="check the log")
    with pytest.raises(EngineError, match=r"on 127\.0\.0\.1: vLLM exited with code 1"):
        await make().start()
    await asyncio.wait_for(next(iter(cluster.running.values())), 5)
    assert not (folder / "state" / RECORD_FILE).exists()


async def test_engine_start_fails_on_a_machine_whose_capabilities_differ_from_those_of_other_machines(
    make: Make, cluster: ClusterDouble
) -> None:
    vars(cluster)["machine"] = AVX512.model_copy(update={"vllm": "0.31.0"})
    with pytest.raises(EngineError, match="has different capabilities from the other") as error:
        await make().start()
    assert "ray.gpu_type" in error.value.todo


async def test_sleep_and_wake_commands_are_forwarded_to_the_remote_engine(make: Make, cluster: ClusterDouble) -> None:
    engine = make()
    await engine.start()
    await engine.sleep()
    assert engine_of(cluster).slept
    await engine.wake()
    assert not engine_of(cluster).slept


async def test_memory_and_cpu_time_of_the_engine_are_reported(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engines.ray.node.BEAT_S", 0.01)
    engine = make()
    await engine.start()
    while engine.memory() is None:
        await asyncio.sleep(0.01)
    assert (engine.memory(), engine.processor_s(), engine.front_s()) == (2**30, 3.0, 1.0)


async def test_engine_stops_generating_when_a_client_disconnects(make: Make, cluster: ClusterDouble) -> None:
    engine = make()
    await engine.start()
    double = engine_of(cluster).double
    double.token_delay_s = 10.0
    body = b'{"model": "tuned", "messages": [{"role": "user", "content": "hi"}], "stream": true}'
    with closing(EngineConnections(engine.address, silence_s=5)) as pool:
        async with pool.post("/v1/chat/completions", body, "id"):
            pass
    async with asyncio.timeout(5):
        while not double.cancelled:
            await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_long_response_is_delivered_in_full_to_a_slow_client(make: Make, cluster: ClusterDouble) -> None:
    engine = make()
    await engine.start()
    engine_of(cluster).double.metrics = "x" * 5_000_000
    async with EngineClient.of(engine.address, NAME) as client:
        assert len(await client.metrics(timeout_s=20)) == 5_000_000
    assert isinstance(engine.address, TlsAddress)


def test_record_of_a_ray_actor_is_kept_if_the_cluster_is_unreachable_when_the_actor_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.engines.ray.cluster.sys.executable", "/bin/false")
    slots = EngineSlots(Settings(home=tmp_path), Registry.of(Settings(home=tmp_path)), AVX512, lambda: ())
    folder = state_folder(tmp_path, 3)
    write_actor(folder, ActorRecord(name="tuned-3", cluster="head:6379", certificate="", key=""))
    slots.end(3)
    assert end_postponed(folder.parent) == ([], ["tuned-3"])


@pytest.mark.slow
async def test_ray_actor_that_could_not_be_stopped_is_stopped_later_even_after_a_replacement_starts(
    make: Make, folder: Path, cluster: ClusterDouble
) -> None:
    first = make()
    await first.start()
    await first.leave()
    vars(cluster)["away"] = True
    await make().start()
    vars(cluster)["away"] = False
    ended, left = await asyncio.to_thread(end_postponed, folder)
    assert (ended, left) == ([next(iter(cluster.engines))], [])
    assert cluster.ended == ended
