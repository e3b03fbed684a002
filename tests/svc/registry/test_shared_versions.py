"""Tests that homes share versions through an object store, and that a home can be a cache of bounded size."""

import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import obstore
import pytest
from sqlalchemy import Engine as Store

from svc.errors import BusyError, IntegrityError, NotFoundError, RegistryError, SettingsError
from svc.files.lock import hold_lock
from svc.registry.files import record_files
from svc.registry.housekeeping import evict, find_evictable, remove_version
from svc.registry.manifest import MANIFEST_FILE, Manifest
from svc.registry.objects import ObjectStore
from svc.registry.registry import HELDOUT_FILE, Registry
from svc.registry.tracking import Tracking
from svc.store.desired import change_desired
from svc.version import Alias, Format, Target, VersionId
from tests.command_line import Svc
from tests.hub_models.build import build_hub_model
from tests.new_store import new_store
from tests.svc.registry.manifests import make_manifest

pytestmark = pytest.mark.slow

Publish = Callable[[], Manifest]


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    (tmp_path / "shared").mkdir()
    return ObjectStore((tmp_path / "shared").as_uri())


@pytest.fixture
def registry(tmp_path: Path, tracking: Tracking, objects: ObjectStore) -> Registry:
    """Return the registry of the machine that trains."""
    return Registry(tmp_path / "trains" / "models", tracking, objects)


@pytest.fixture
def other(tmp_path: Path, tracking: Tracking, objects: ObjectStore) -> Registry:
    """Return the registry of a machine that serves. Both use the same tracking server."""
    return Registry(tmp_path / "serves" / "models", tracking, objects)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path / "serves")


def weights(registry: Registry, version: VersionId) -> Path:
    return registry.folder(version) / "merged" / "model.safetensors"


def damage(objects: ObjectStore, content: bytes) -> None:
    for page in obstore.list(objects._client, "files"):
        for entry in page:
            if entry["path"].endswith("model.safetensors"):
                obstore.put(objects._client, entry["path"], content)


def test_version_published_on_a_different_machine_is_found_by_its_id(
    registry: Registry, other: Registry, publish: Publish
) -> None:
    manifest = publish()
    assert other.versions() == []
    assert other.resolve(str(manifest.id)) == manifest.id
    assert other.manifest(manifest.id) == manifest
    assert other.heldout(manifest.id) == registry.heldout(manifest.id)


def test_version_published_on_a_different_machine_is_found_by_name_and_alias(
    registry: Registry, other: Registry, publish: Publish
) -> None:
    first, second = publish().id, publish().id
    assert other.resolve(first.name) == second
    registry.tracking.set_alias(first, Alias.PRODUCTION)
    assert other.resolve(f"{first.name}@production") == first


def test_weights_are_downloaded_only_when_they_are_needed(
    registry: Registry, other: Registry, publish: Publish
) -> None:
    version = publish().id
    other.refresh()
    assert other.versions() == [version]
    assert not weights(other, version).exists()
    folder, source = other.artifact(version, Format.MERGED), registry.artifact(version, Format.MERGED)
    assert record_files(folder, folder) == record_files(source, source)


def test_verification_downloads_the_weights(other: Registry, publish: Publish) -> None:
    version = publish().id
    other.verify(version, Format.MERGED)
    assert weights(other, version).is_file()


def test_fetched_version_is_read_only(other: Registry, publish: Publish) -> None:
    version = publish().id
    other.artifact(version, Format.MERGED)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in other.folder(version).rglob("*") if path.is_file()}
    assert modes == {0o444}


@pytest.mark.parametrize("family", ["smollm2", "gemma_3"])
def test_published_model_files_are_unchanged_after_upload_and_download(
    registry: Registry, other: Registry, name: str, content: dict[str, Path], run: str, tmp_path: Path, family: str
) -> None:
    model = build_hub_model(tmp_path / "hub", family)
    manifest = registry.publish(name, run, content | {"merged": model}, make_manifest)
    folder = other.artifact(manifest.id, Format.MERGED)
    assert record_files(folder, folder) == record_files(model, model)


def test_altered_object_is_not_downloaded_until_it_is_repaired(
    registry: Registry, other: Registry, objects: ObjectStore, publish: Publish
) -> None:
    manifest = publish()
    good = weights(registry, manifest.id).read_bytes()
    damage(objects, bytes(len(good)))
    with pytest.raises(IntegrityError, match=r"model\.safetensors\) was altered"):
        other.artifact(manifest.id, Format.MERGED)
    assert not weights(other, manifest.id).exists()
    damage(objects, b"short")
    registry.push(manifest.id)
    assert (other.artifact(manifest.id, Format.MERGED) / "model.safetensors").read_bytes() == good


def test_corrupt_manifest_does_not_hide_the_other_versions(
    other: Registry, objects: ObjectStore, publish: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    damaged, intact = publish().id, publish().id
    obstore.put(objects._client, f"manifests/{damaged.name}/{damaged.number}.json", b"{}")
    other.refresh()
    assert other.versions() == [intact]
    assert f"could not fetch {damaged}" in caplog.text


def test_local_versions_stay_usable_when_the_object_store_is_unavailable(
    registry: Registry, publish: Publish, objects: ObjectStore, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    version = publish().id
    (tmp_path / "shared").rename(tmp_path / "unmounted")
    offline = Registry(registry.models, registry.tracking, ObjectStore(objects.url))
    assert offline.resolve(version.name) == version
    offline.verify(version, Format.MERGED)
    assert "only the versions in" in caplog.text


def test_failed_upload_publishes_nothing_and_the_next_registration_reuses_uploaded_files(
    registry: Registry, publish: Publish, objects: ObjectStore, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ObjectStore, manifest: Manifest) -> None:
        raise RegistryError("the network is down")

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "_publish", fail)
        with pytest.raises(RegistryError, match="network is down"):
            publish()
    assert registry.versions() == [] and objects.versions() == []
    sent: list[str] = []
    monkeypatch.setattr(ObjectStore, "send_file", lambda self, key, *rest: sent.append(key))
    assert publish().id == VersionId(name, 2)
    assert sent == []


def test_registration_skips_version_numbers_published_by_a_different_machine(
    objects: ObjectStore, publish: Publish, name: str, content: dict[str, Path], tmp_path: Path
) -> None:
    publish()
    publish()
    mlflow = Tracking(f"sqlite:///{tmp_path / 'own.db'}", tmp_path / "own-artifacts")
    machine = Registry(tmp_path / "third" / "models", mlflow, objects)
    published = machine.publish(name, mlflow.start_run("own", {}), content, make_manifest)
    assert published.number == 3
    assert [version.number for version in objects.versions(name)] == [1, 2, 3]


class Third(Tracking):
    """MLflow of a machine that allocates the number 3 to everything."""

    def allocate(self, name: str, source: str, run_id: str | None) -> VersionId:
        return VersionId(name, 3)

    def discard(self, version: VersionId) -> None:
        """Do nothing."""


def test_two_machines_cannot_publish_the_same_version_number(
    objects: ObjectStore, name: str, content: dict[str, Path], tmp_path: Path
) -> None:
    first, second = (Registry(tmp_path / machine / "models", Third("unused"), objects) for machine in ("a", "b"))

    def make_during_the_other_s_registration(version: VersionId, folder: Path) -> Manifest:
        first.publish(name, "run", content, make_manifest)
        return make_manifest(version, folder, run="another")

    with pytest.raises(RegistryError, match=f"{name}@3 is already in"):
        second.publish(name, "run", content, make_during_the_other_s_registration)
    assert second.versions() == [] and list((second.models / name).glob(".*")) == []
    assert objects.manifest(VersionId(name, 3)).run == "run-1"


def test_machine_with_its_own_mlflow_database_can_set_an_alias_for_a_fetched_version(
    objects: ObjectStore, publish: Publish, tmp_path: Path, name: str
) -> None:
    publish()
    second = publish().id
    mlflow = Tracking(f"sqlite:///{tmp_path / 'own.db'}", tmp_path / "own-artifacts")
    machine = Registry(tmp_path / "third" / "models", mlflow, objects)
    machine.manifest(second)
    mlflow.set_alias(second, Alias.PRODUCTION)
    assert machine.resolve(f"{name}@production") == second
    assert machine.manifest(VersionId(name, 1)).number == 1


def test_version_registered_before_the_object_store_existed_can_be_pushed(
    tmp_path: Path, tracking: Tracking, name: str, content: dict[str, Path], run: str, svc: Svc
) -> None:
    home = tmp_path / "home"
    manifest = Registry(home / "models", tracking).publish(name, run, content, make_manifest)
    with pytest.raises(SettingsError, match="no object store"):
        Registry(home / "models", tracking).push(manifest.id)
    (tmp_path / "shared").mkdir()
    url = (tmp_path / "shared").as_uri()
    (tmp_path / "svc.yaml").write_text(f"home: home\ntracking_uri: {tracking.uri}\nartifacts:\n  url: {url}\n")
    assert svc("models", "push", str(manifest.id)).code == 0
    assert ObjectStore(url).versions() == [manifest.id]
    (tmp_path / "svc.yaml").write_text(f"home: second\ntracking_uri: {tracking.uri}\nartifacts:\n  url: {url}\n")
    assert str(manifest.id) in svc("models").out
    assert svc("show", str(manifest.id)).code == 0


def test_version_absent_from_the_object_store_raises_not_found(other: Registry) -> None:
    with pytest.raises(NotFoundError, match="there is no version nobody@1"):
        other.manifest(VersionId("nobody", 1))


def test_version_that_is_in_the_object_store_cannot_be_removed_locally(
    registry: Registry, objects: ObjectStore, publish: Publish, store: Store
) -> None:
    version = publish().id
    with pytest.raises(BusyError, match="is in the object store"):
        remove_version(registry, store, version)
    obstore.delete(objects._client, f"manifests/{version.name}/{version.number}.json")
    remove_version(registry, store, version)
    assert registry.versions() == []


def age(registry: Registry, version: VersionId, hours: float) -> None:
    """Set the time since a version's weights were used."""
    used = time.time() - hours * 3600
    os.utime(registry.folder(version) / "merged", (used, used))


@pytest.fixture
def cached(other: Registry, publish: Publish) -> list[VersionId]:
    """Return three versions whose weights are in the cache. The second was used least recently, then the first."""
    versions = [publish().id for _ in range(3)]
    for version, hours in zip(versions, (5, 9, 3), strict=True):
        other.artifact(version, Format.MERGED)
        age(other, version, hours)
    return versions


def evictable(registry: Registry, store: Store, max_bytes: float = 0) -> list[int]:
    return [int(item.path.parent.name) for item in find_evictable(registry, store, max_bytes)]


def test_least_recently_used_weights_are_evicted_first(other: Registry, store: Store, cached: list[VersionId]) -> None:
    assert evictable(other, store) == [2, 1, 3]


def test_only_as_many_weights_are_evicted_as_the_size_limit_requires(
    other: Registry, store: Store, cached: list[VersionId]
) -> None:
    total = sum(path.stat().st_size for path in other.models.rglob("*") if path.is_file())
    assert evictable(other, store, total) == []
    assert evictable(other, store, total - 1) == [2]


def test_evicted_weights_are_downloaded_again_when_needed(
    other: Registry, store: Store, cached: list[VersionId]
) -> None:
    item = next(find_evictable(other, store, 0))
    evict(other, store, item)
    assert not item.path.exists() and (item.path.parent / MANIFEST_FILE).is_file()
    assert (item.path.parent / HELDOUT_FILE).is_file()
    other.verify(cached[1], Format.MERGED)
    assert weights(other, cached[1]).is_file()


def test_served_weights_are_not_evicted(other: Registry, store: Store, cached: list[VersionId]) -> None:
    change_desired(store, None, Target(cached[1], Format.MERGED), previous=Target(cached[0], Format.MERGED))
    assert evictable(other, store) == [3]


def test_weights_used_in_the_last_hour_are_not_evicted(other: Registry, store: Store, cached: list[VersionId]) -> None:
    age(other, cached[1], 0.5)
    assert evictable(other, store) == [1, 3]


@pytest.mark.parametrize("missing", ["manifest", "weights"])
def test_weights_absent_from_the_object_store_are_not_evicted(
    other: Registry, store: Store, cached: list[VersionId], objects: ObjectStore, missing: str
) -> None:
    if missing == "manifest":
        obstore.delete(objects._client, f"manifests/{cached[1].name}/{cached[1].number}.json")
        assert evictable(other, store) == [1, 3]
    else:
        damage(objects, b"short")
        assert evictable(other, store) == []


def test_no_weights_are_evicted_during_a_training_run(other: Registry, store: Store, cached: list[VersionId]) -> None:
    with hold_lock(other.models.parent / "runs" / "name-key" / "lock", "it"):
        assert evictable(other, store) == []


@pytest.mark.parametrize("event", ["used", "served"])
def test_weights_that_become_needed_during_eviction_are_not_evicted(
    other: Registry, store: Store, cached: list[VersionId], event: str
) -> None:
    item = next(find_evictable(other, store, 0))
    if event == "used":
        other.artifact(cached[1], Format.MERGED)
    else:
        change_desired(store, None, Target(cached[1], Format.MERGED), previous=None)
    with pytest.raises(BusyError):
        evict(other, store, item)
    assert weights(other, cached[1]).is_file()


def test_gc_command_evicts_weights_when_the_weight_cache_exceeds_its_size_limit(
    other: Registry, store: Store, cached: list[VersionId], objects: ObjectStore, tmp_path: Path, svc: Svc
) -> None:
    (tmp_path / "svc.yaml").write_text(
        f"home: serves\ntracking_uri: {other.tracking.uri}\nartifacts:\n  url: {objects.url}\n  cache_gb: 0.000000001\n"
    )
    assert "also in the object store" in svc("gc", "--dry-run").out
    assert weights(other, cached[0]).is_file()
    assert svc("gc").code == 0
    assert [weights(other, version).exists() for version in cached] == [False, False, False]


def test_registry_refresh_without_an_object_store_logs_no_warning(
    tmp_path: Path, tracking: Tracking, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        Registry(tmp_path / "models", tracking).refresh()
    assert caplog.text == ""
