"""Tests that needed versions are kept, whoever removes versions, and unneeded ones removed completely."""

import json
import os
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine as Store
from sqlalchemy.orm import Session

from serving.batches.rows import Batch
from svc.errors import BusyError, NotFoundError, RegistryError
from svc.files.lock import hold_lock
from svc.identity.actor import Actor
from svc.registry import housekeeping
from svc.registry.housekeeping import find_ended, find_reclaimable, reclaim, remove_version, size_on_disk
from svc.registry.manifest import BaseRecord, Manifest
from svc.registry.registry import Registry
from svc.registry.tracking import Tracking
from svc.settings.rollout import RolloutSettings
from svc.store.audit import Action, AuditEntry, read_events
from svc.store.database import open_database
from svc.store.desired import change_desired, read_desired
from svc.store.rollouts import begin_rollout
from svc.store.statuses import BatchStatus, JobStatus
from svc.store.swaps import begin_swap
from svc.store.tables import BatchRow
from svc.version import Alias, Format, Target, VersionId
from tests.command_line import Svc
from tests.new_store import new_store
from tests.serving.trained import add_job
from tests.svc.registry.manifests import make_manifest

pytestmark = pytest.mark.slow

Publish = Callable[[], Manifest]


def add_batch(store: Store, status: BatchStatus) -> str:
    now = datetime.now(UTC)
    batch = Batch(f"batch_{status}", "alice", "file-1", "/v1/completions", "24h", now, now, status=status)
    with Session(store) as session, session.begin():
        session.add(BatchRow.of(batch, status=status.value))
    return batch.id


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return new_store(tmp_path)


def test_removed_version_leaves_no_files_and_its_number_is_never_reused(
    registry: Registry,
    store: Store,
    publish: Publish,
) -> None:
    kept, gone = publish().id, publish().id
    size = sum(path.stat().st_size for path in registry.folder(gone).rglob("*") if path.is_file())
    assert 0 < remove_version(registry, store, gone) <= size
    assert registry.versions(gone.name) == [kept]
    assert sorted(path.name for path in registry.folder(kept).parent.iterdir()) == [".removing", str(kept.number)]
    assert publish().number == gone.number + 1


def run_of(registry: Registry, made: Manifest) -> Path:
    """Return the run's folder with its own links to the version's weights."""
    run = registry.models.parent / "runs" / made.run
    shutil.copytree(registry.folder(made.id) / "merged", run / "merged", copy_function=os.link)
    return run


def test_removing_a_version_also_removes_its_run_files_and_counts_them_as_freed_space(
    registry: Registry, store: Store, publish: Publish
) -> None:
    manifest = publish()
    run = run_of(registry, manifest)
    size = manifest.formats[Format.MERGED].bytes
    assert remove_version(registry, store, manifest.id) >= size > 0
    assert [path.name for path in run.iterdir()] == ["lock"]


def test_weights_of_a_running_training_run_are_not_removed(registry: Registry, store: Store, publish: Publish) -> None:
    manifest = publish()
    run = run_of(registry, manifest)
    with hold_lock(run / "lock", "it"):
        remove_version(registry, store, manifest.id)
    assert list((run / "merged").iterdir())


@pytest.mark.parametrize("alias", Alias)
def test_version_with_an_alias_is_not_removed(
    registry: Registry,
    store: Store,
    publish: Publish,
    alias: Alias,
) -> None:
    version = publish().id
    registry.tracking.set_alias(version, alias)
    with pytest.raises(BusyError, match=f"has alias {alias}"):
        remove_version(registry, store, version)
    assert registry.versions(version.name) == [version]


def serve(store: Store, version: VersionId, before: VersionId | None) -> None:
    previous = Target(before, Format.MERGED) if before else None
    change_desired(store, None, Target(version, Format.MERGED), previous)


def test_served_and_previous_versions_are_not_removed(
    registry: Registry,
    store: Store,
    publish: Publish,
) -> None:
    before, served, other = publish().id, publish().id, publish().id
    serve(store, served, before)
    with pytest.raises(BusyError, match="is served"):
        remove_version(registry, store, served)
    with pytest.raises(BusyError, match="is the target of a rollback"):
        remove_version(registry, store, before)
    remove_version(registry, store, other)
    assert registry.versions(served.name) == [before, served]


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("format", Format)
def test_base_version_of_a_served_or_previous_adapter_is_not_removed(
    registry: Registry, store: Store, name: str, content: dict[str, Path], run: str, format: Format, served: bool
) -> None:
    base = registry.publish(name, run, content, make_manifest).id
    record = BaseRecord(origin=str(base), revision="sha256:1", licence=None)
    built = [
        registry.publish(f"{name}-b", run, content, lambda *made: make_manifest(*made, base=record)).id
        for _ in range(2)
    ]
    targets = [Target(built[0], format), Target(built[1], Format.MERGED)]
    change_desired(store, None, *(targets if served else reversed(targets)))
    if format is Format.ADAPTER:
        with pytest.raises(BusyError, match=f"is the base of adapter {built[0]}"):
            remove_version(registry, store, base)
    else:
        remove_version(registry, store, base)


def test_other_versions_can_be_removed_when_the_served_version_is_corrupt(
    registry: Registry, store: Store, publish: Publish
) -> None:
    damaged, other = publish().id, publish().id
    change_desired(store, None, Target(damaged, Format.ADAPTER), None)
    manifest = registry.folder(damaged) / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text("{", "utf-8")
    remove_version(registry, store, other)
    assert registry.versions(damaged.name) == [damaged]


def test_version_promoted_during_its_removal_is_not_removed(
    registry: Registry,
    store: Store,
    publish: Publish,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = publish().id
    rename = Path.rename

    def promoted_before(self: Path, target: Path) -> Path:
        if self == registry.folder(version):
            serve(store, version, None)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", promoted_before)
    with pytest.raises(BusyError, match="is served"):
        remove_version(registry, store, version)
    registry.verify(version, Format.MERGED)
    assert registry.versions(version.name) == [version]


def test_potential_rollback_target_is_not_removed_during_a_swap(
    registry: Registry, store: Store, publish: Publish
) -> None:
    before, served, other = publish().id, publish().id, publish().id
    serve(store, served, before)
    desired = read_desired(store, served.name)
    assert desired
    begin_swap(store, change_desired(store, desired, Target(other, Format.MERGED), desired.target))
    with pytest.raises(BusyError, match="is already being swapped to"):
        remove_version(registry, store, before)
    assert before in registry.versions(before.name)


def test_candidate_of_a_rollout_in_progress_is_not_removed(registry: Registry, store: Store, publish: Publish) -> None:
    served, candidate = publish().id, publish().id
    seen = change_desired(store, None, Target(served, Format.MERGED), None)
    entry = AuditEntry(Action.ROLLOUT, str(candidate), Actor.local())
    begin_rollout(store, seen, Target(candidate, Format.MERGED), RolloutSettings(shadow=9), entry)
    with pytest.raises(BusyError, match=f"{candidate} is part of a rollout"):
        remove_version(registry, store, candidate)
    assert registry.versions(served.name) == [served, candidate]


def test_removal_in_progress_is_not_mistaken_for_an_interrupted_one(
    registry: Registry, store: Store, tmp_path: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removal is never old enough to be cleaned up, because the version may still be restored."""
    version = publish().id
    age(registry.folder(version), 100)
    found: list[list[Path]] = []
    monkeypatch.setattr(Tracking, "discard", lambda self, version: found.append(paths(registry, tmp_path)))
    remove_version(registry, store, version)
    assert found == [[]]


def test_version_unknown_to_mlflow_can_be_removed(registry: Registry, store: Store, publish: Publish) -> None:
    version = publish().id
    registry.tracking.discard(version)
    remove_version(registry, store, version)
    assert registry.versions(version.name) == []


def test_version_is_not_removed_when_mlflow_fails(
    registry: Registry, store: Store, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish().id

    def fail(self: Tracking, version: VersionId) -> None:
        raise RegistryError("MLflow is not responding")

    with monkeypatch.context() as patch:
        patch.setattr(Tracking, "discard", fail)
        with pytest.raises(RegistryError):
            remove_version(registry, store, version)
    registry.verify(version, Format.MERGED)


def test_freed_space_excludes_files_with_additional_hard_links(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "own").write_bytes(bytes(10))
    (folder / "shared").write_bytes(bytes(100))
    os.link(folder / "shared", tmp_path / "link")
    assert size_on_disk(folder) == 10


def test_removing_a_nonexistent_version_raises_an_error_that_names_it(registry: Registry, store: Store) -> None:
    with pytest.raises(NotFoundError, match="no version nobody@7"):
        remove_version(registry, store, VersionId("nobody", 7))


def age(path: Path, days: float) -> None:
    """Set the age of all files in a folder."""
    when = time.time() - days * 86_400
    for one in (*path.rglob("*"), path):
        os.utime(one, (when, when))


def make_run(home: Path, name: str, days: float, kind: str = "runs") -> Path:
    folder = home / kind / name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "lock").write_text("{}")
    (folder / "checkpoints" / "weights").write_bytes(bytes(1000))
    age(folder, days)
    return folder


def paths(registry: Registry, home: Path, days: float = 14) -> list[Path]:
    return [found.path for found in find_reclaimable(registry, home, days)]


@pytest.mark.parametrize("kind", ["runs", "sweeps"])
def test_old_runs_are_removed_but_recent_and_running_ones_are_kept(
    registry: Registry, tmp_path: Path, kind: str
) -> None:
    old, _ = make_run(tmp_path, "old", 15, kind), make_run(tmp_path, "young", 13, kind)
    working = make_run(tmp_path, "working", 15, kind)
    with hold_lock(working / "lock", "a run"):
        age(working, 15)
        assert paths(registry, tmp_path) == [old]
        for found in find_reclaimable(registry, tmp_path, 14):
            reclaim(found)
    assert sorted(path.name for path in (tmp_path / kind).iterdir()) == ["working", "young"]


@pytest.mark.parametrize("kind", ["runs", "sweeps"])
def test_run_resumed_during_cleanup_is_kept(registry: Registry, tmp_path: Path, kind: str) -> None:
    old = make_run(tmp_path, "old", 15, kind)
    (found,) = find_reclaimable(registry, tmp_path, 14)
    assert found.size >= 1000
    with hold_lock(old / "lock", "a run"), pytest.raises(BusyError):
        reclaim(found)
    assert (old / "checkpoints" / "weights").is_file()


def test_run_whose_files_change_during_cleanup_is_kept(registry: Registry, tmp_path: Path) -> None:
    old = make_run(tmp_path, "old", 15)
    (found,) = find_reclaimable(registry, tmp_path, 14)
    (old / "checkpoints" / "newer").touch()
    with pytest.raises(BusyError, match="just changed"):
        reclaim(found)
    assert old.is_dir()


def test_symbolic_link_to_a_run_in_a_different_folder_is_not_removed(registry: Registry, tmp_path: Path) -> None:
    elsewhere = make_run(tmp_path / "elsewhere", "old", 15)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "old").symlink_to(elsewhere)
    assert paths(registry, tmp_path) == []


def test_interrupted_registration_is_removed_but_a_running_one_is_kept(
    registry: Registry,
    tmp_path: Path,
    publish: Publish,
) -> None:
    parent = registry.folder(publish().id).parent
    for number, days in ((".7", 2), (".8", 0)):
        (parent / number / "merged").mkdir(parents=True)
        age(parent / number, days)
    assert paths(registry, tmp_path, 0) == [parent / ".7"]


def test_rotated_logs_are_removed_but_current_ones_are_kept(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for log in ("engine-0.log", "engine-0.log.1"):
        (tmp_path / "logs" / log).write_text("x")
    age(tmp_path / "logs", 15)
    assert paths(registry, tmp_path) == [tmp_path / "logs" / "engine-0.log.1"]


def test_old_caches_are_removed_but_recent_ones_are_kept(registry: Registry, tmp_path: Path) -> None:
    compiled, judged, young = (
        tmp_path / "cache" / name for name in ("vllm/compiled", "evaluations/1", "evaluations/2")
    )
    compiled.mkdir(parents=True)
    judged.parent.mkdir()
    for file in (compiled / "kernel.so", judged, young):
        file.write_text("x", "utf-8")
    for path in (compiled / "kernel.so", compiled, judged):
        os.utime(path, (0, 0))
    found = list(find_reclaimable(registry, tmp_path, older_than_days=14))
    for one in found:
        reclaim(one)
    assert [one.path for one in found] == [judged, compiled]
    assert [path for path in (compiled, judged, young) if path.exists()] == [young]


def make_folder(home: Path, name: str, days: float) -> Path:
    """Make the folder of a job or batch."""
    folder = home / name
    folder.mkdir(parents=True)
    (folder / "log").write_bytes(bytes(1000))
    age(folder, days)
    return folder


def test_old_job_and_batch_folders_are_removed_if_the_job_or_batch_has_ended_or_is_unknown(
    any_store: Store, tmp_path: Path
) -> None:
    store, old = any_store, set[Path]()
    for status in JobStatus:
        job = add_job(store, owner="alice", status=status)
        make_folder(tmp_path, f"jobs/{add_job(store, owner='alice', status=status).id}", 13)
        folder = make_folder(tmp_path, f"jobs/{job.id}", 15)
        if status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED):
            old.add(folder)
    for state in BatchStatus:
        folder = make_folder(tmp_path, f"batches/{add_batch(store, state)}", 15)
        if state in (BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED):
            old.add(folder)
    old |= {make_folder(tmp_path, f"jobs/{name}", 15) for name in ("ftjob-gone", ".removed-ftjob-half")}
    old.add(make_folder(tmp_path, "batches/batch_gone", 15))
    make_folder(tmp_path, "jobs/of-a-user", 15)
    (tmp_path / "jobs" / "worker").write_text("1")
    kept = {path for parent in ("jobs", "batches") for path in (tmp_path / parent).iterdir()} - old
    found = list(find_ended(store, tmp_path, 14))
    assert {each.path for each in found} == old
    for each in found:
        reclaim(each)
    left = {path for parent in ("jobs", "batches") for path in (tmp_path / parent).iterdir()}
    assert {path for path in left if path.name != ".removing"} == kept


def test_folder_of_an_unknown_job_is_kept_for_a_day_even_with_a_lower_age_limit(store: Store, tmp_path: Path) -> None:
    ended = make_folder(tmp_path, f"jobs/{add_job(store, owner='alice').id}", 0.5)
    make_folder(tmp_path, "jobs/ftjob-gone", 0.5)
    assert [found.path for found in find_ended(store, tmp_path, 0)] == [ended]


def test_housekeeping_dry_run_removes_nothing(svc: Svc, tmp_path: Path) -> None:
    old, job = make_run(tmp_path / ".svc", "old", 15), make_folder(tmp_path / ".svc", "jobs/ftjob-gone", 15)
    result = svc("gc", "--dry-run")
    assert result.code == 0
    assert "nothing was deleted" in result.out
    assert old.is_dir()
    assert read_events(open_database(tmp_path / ".svc"), newest=9) == []
    result = svc("gc", "--json")
    assert [Path(row["path"]).name for row in json.loads(result.out)] == ["old", "ftjob-gone"]
    assert not old.exists()
    assert not job.exists()


def test_removals_are_audited_with_their_reasons(svc: Svc, tmp_path: Path) -> None:
    old = make_run(tmp_path / ".svc", "old", 15)
    svc("gc", "--reason", "the disk is full")
    (event,) = read_events(open_database(tmp_path / ".svc"), newest=9)
    assert (event.action, event.subject, event.reason) == ("gc", str(old), "the disk is full")
    assert event.details["bytes"] >= 1000


def test_only_versions_actually_removed_are_audited(
    svc: Svc, registry: Registry, tmp_path: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Registry, "of", lambda settings: registry)
    needed, gone = publish().id, publish().id
    registry.tracking.set_alias(needed, Alias.PRODUCTION)
    assert svc("models", "rm", str(gone), str(needed), "--reason", "too old").code == BusyError.exit_code
    (event,) = read_events(open_database(tmp_path / ".svc"), newest=9)
    assert (event.action, event.subject, event.reason) == ("version.remove", str(gone), "too old")


def test_rm_command_error_names_the_nonexistent_version(svc: Svc) -> None:
    result = svc("models", "rm", "nobody@1")
    assert result.code == NotFoundError.exit_code
    assert "nobody@1" in result.err


def test_housekeeping_and_trainer_agree_on_run_file_names() -> None:
    """The file name is repeated in housekeeping, because svc does not import the trainer."""
    from trainer.pipeline.run_folder import Run
    from trainer.recipe.stage import Stage

    made = Run(Path("run"), {})
    assert [folder.name for folder in made._weights] == list(Format)
    assert made._result(Stage.REGISTER).name == housekeeping._REGISTERED
