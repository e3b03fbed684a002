"""Tests that a version exists completely or not at all, never changes, and is found by all its names."""

import logging
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from svc.dataset.prompt_hashes import TRAINED_PROMPTS_FILE, hash_prompts, write_prompt_hashes
from svc.dataset.schema.example import ChatExample
from svc.errors import IntegrityError, NotFoundError
from svc.evaluation.results import write_results
from svc.registry.manifest import MANIFEST_FILE, Manifest
from svc.registry.registry import HELDOUT_FILE, REFERENCE_FOLDER, Registry, results_file
from svc.registry.tracking import Tracking
from svc.version import Alias, Format, VersionId
from tests.svc.chats import chat
from tests.svc.registry.manifests import make_manifest, result

Publish = Callable[[], Manifest]
KILLED = """
import os, signal, sys
from pathlib import Path
from svc.registry.registry import Registry
from svc.registry.tracking import Tracking
from svc.version import VersionId
from tests.svc.registry.manifests import make_manifest

models, name, moment, merged, heldout = sys.argv[1:]

class Seventh(Tracking):
    def allocate(self, name, source, run_id):
        return VersionId(name, 7)

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "at the manifest":
    make_manifest = die
else:
    Path.rename = die
content = {"merged": Path(merged), "heldout.jsonl": Path(heldout)}
Registry(Path(models), Seventh("unused")).publish(name, "run", content, make_manifest)
"""


@pytest.mark.slow
def test_published_version_contains_all_given_files(registry: Registry, publish: Publish) -> None:
    manifest = publish()
    folder = registry.folder(manifest.id)
    assert {path.name for path in folder.iterdir()} == {"merged", HELDOUT_FILE, MANIFEST_FILE}
    assert registry.manifest(manifest.id) == manifest
    registry.verify(manifest.id, Format.MERGED)


@pytest.mark.slow
def test_version_numbers_start_at_1(registry: Registry, publish: Publish, name: str) -> None:
    assert [publish().number, publish().number] == [1, 2]
    assert registry.versions(name) == [VersionId(name, 1), VersionId(name, 2)]
    assert registry.names() == [name]


def test_version_files_are_read_only(registry: Registry, publish: Publish) -> None:
    folder = registry.folder(publish().id)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o444}
    assert MANIFEST_FILE in modes


@pytest.mark.slow
def test_failed_publication_leaves_no_version(
    registry: Registry, name: str, content: dict[str, Path], run: str
) -> None:
    def fail(version: VersionId, folder: Path) -> Manifest:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        registry.publish(name, run, content, fail)
    assert registry.versions() == []
    assert list((registry.models / name).iterdir()) == []


@pytest.mark.slow
def test_version_number_of_a_failed_publication_is_not_reused(
    registry: Registry, name: str, content: dict[str, Path], run: str, publish: Publish
) -> None:
    def interrupt(version: VersionId, folder: Path) -> Manifest:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.publish(name, run, content, interrupt)
    assert publish().number == 2


@pytest.mark.slow
def test_failed_publication_is_not_shown_in_mlflow(
    registry: Registry, name: str, content: dict[str, Path], run: str, tracking: Tracking
) -> None:
    from mlflow import MlflowClient

    def fail(version: VersionId, folder: Path) -> Manifest:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        registry.publish(name, run, content, fail)
    assert MlflowClient(tracking.uri, tracking.uri).search_model_versions(f"name='{name}'") == []


def test_publication_with_a_missing_source_file_leaves_no_version(
    registry: Registry, name: str, content: dict[str, Path], run: str, tmp_path: Path
) -> None:
    content["gptq"] = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError):
        registry.publish(name, run, content, make_manifest)
    assert registry.versions() == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["at the manifest", "at the last step"])
def test_publication_succeeds_after_an_earlier_publication_was_killed(
    registry: Registry, name: str, content: dict[str, Path], publish: Publish, moment: str
) -> None:
    arguments = [str(registry.models), name, moment, str(content["merged"]), str(content[HELDOUT_FILE])]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=Path(__file__).parents[3], check=False)
    assert done.returncode == -9
    assert registry.versions() == []
    with pytest.raises(NotFoundError):
        registry.resolve(name)
    manifest = publish()
    assert registry.versions() == [manifest.id]


def test_version_number_is_skipped_if_its_folder_already_exists(
    registry: Registry, publish: Publish, name: str
) -> None:
    registry.folder(VersionId(name, 1)).mkdir(parents=True)
    assert publish().number == 2


@pytest.mark.parametrize("stray", ["5", ".5", "0", "007", "²", "٣", "old", "5.bak"])
def test_folder_that_is_not_a_version_is_not_listed(
    registry: Registry, publish: Publish, name: str, stray: str
) -> None:
    manifest = publish()
    (registry.models / name / stray).mkdir()
    if stray != "5":
        (registry.models / name / stray / MANIFEST_FILE).touch()
    assert registry.versions() == [manifest.id]
    assert registry.resolve(name) == manifest.id


def test_registry_without_versions_returns_empty_lists(registry: Registry) -> None:
    assert registry.versions() == []
    assert registry.names() == []


def test_modified_version_file_is_named_in_the_error(registry: Registry, publish: Publish) -> None:
    manifest = publish()
    weights = registry.artifact(manifest.id, Format.MERGED) / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match="was changed after registration") as caught:
        registry.verify(manifest.id, Format.MERGED)
    assert str(weights) in caught.value.wrong


@pytest.fixture
def with_results(registry: Registry, name: str, content: dict[str, Path], run: str, tmp_path: Path) -> Manifest:
    """Return a version that stores the answer to the first of its two held-out examples."""
    (tmp_path / REFERENCE_FOLDER).mkdir()
    write_results(tmp_path / REFERENCE_FOLDER / results_file(Format.MERGED), [result("first")])
    return registry.publish(name, run, content | {REFERENCE_FOLDER: tmp_path / REFERENCE_FOLDER}, make_manifest)


def test_stored_answers_of_a_version_are_found(registry: Registry, with_results: Manifest) -> None:
    assert registry.results(with_results.id, Format.MERGED) == (result("first"),)
    assert registry.heldout(with_results.id) == [chat("a"), chat("b")]


def test_requesting_answers_that_a_version_lacks_raises_not_found(
    registry: Registry, with_results: Manifest, publish: Publish
) -> None:
    with pytest.raises(NotFoundError, match=r"has no file reference/gptq\.jsonl"):
        registry.results(with_results.id, Format.GPTQ)
    with pytest.raises(NotFoundError, match=r"has no file reference/merged\.jsonl"):
        registry.results(publish().id, Format.MERGED)


def test_modified_stored_answers_are_rejected(registry: Registry, with_results: Manifest) -> None:
    path = registry.reference(with_results.id, results_file(Format.MERGED))
    path.chmod(0o644)
    write_results(path, [result("other")])
    with pytest.raises(IntegrityError, match="was changed after registration"):
        registry.results(with_results.id, Format.MERGED)


def test_modified_held_out_set_is_rejected(registry: Registry, publish: Publish) -> None:
    manifest = publish()
    path = registry.folder(manifest.id) / HELDOUT_FILE
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(IntegrityError, match="was changed after registration"):
        registry.heldout(manifest.id)


@pytest.fixture
def publish_trained(
    registry: Registry, name: str, content: dict[str, Path], run: str, tmp_path: Path
) -> Callable[[ChatExample], Manifest]:
    """Return a function that publishes a version trained on a single example."""

    def publish(example: ChatExample) -> Manifest:
        folder = tmp_path / REFERENCE_FOLDER
        folder.mkdir(exist_ok=True)
        path = folder / TRAINED_PROMPTS_FILE
        path.unlink(missing_ok=True)  # it is one file with the version's before
        write_prompt_hashes(path, hash_prompts([example]))
        return registry.publish(name, run, content | {REFERENCE_FOLDER: folder}, make_manifest)

    return publish


def learnt(registry: Registry, name: str, *examples: ChatExample) -> list[bool]:
    return [bool(known) for known in np.isin(hash_prompts(examples), registry.learnt_prompts(name))]


@pytest.mark.slow
def test_trained_prompts_of_all_versions_of_a_model_are_recognized(
    registry: Registry, name: str, publish_trained: Callable[[ChatExample], Manifest]
) -> None:
    publish_trained(chat("one"))
    publish_trained(chat("two"))
    assert learnt(registry, name, chat("one"), chat("two"), chat("a")) == [True, True, False]


def test_trained_prompts_of_a_different_model_are_ignored(
    registry: Registry, publish_trained: Callable[[ChatExample], Manifest]
) -> None:
    publish_trained(chat("one"))
    assert learnt(registry, "another-name", chat("one")) == [False]


@pytest.mark.slow
def test_corrupt_version_is_reported_without_preventing_training(
    registry: Registry,
    name: str,
    publish_trained: Callable[[ChatExample], Manifest],
    caplog: pytest.LogCaptureFixture,
) -> None:
    damaged = publish_trained(chat("one"))
    publish_trained(chat("two"))
    path = registry.reference(damaged.id, TRAINED_PROMPTS_FILE)
    path.unlink()
    with caplog.at_level(logging.WARNING):
        assert learnt(registry, name, chat("one"), chat("two")) == [False, True]
    assert f"could not read the training prompts of {damaged.id}" in caplog.text


@pytest.mark.parametrize("file", ["../heldout.jsonl", "", ".", "../merged/config.json", "/etc/passwd"])
def test_reference_file_name_cannot_escape_its_folder(registry: Registry, with_results: Manifest, file: str) -> None:
    with pytest.raises(NotFoundError):
        registry.reference(with_results.id, file)


def test_manifest_with_a_mismatched_version_id_is_rejected(registry: Registry, publish: Publish) -> None:
    one, two = publish(), publish()
    path = registry.folder(two.id) / MANIFEST_FILE
    path.unlink()
    path.write_bytes((registry.folder(one.id) / MANIFEST_FILE).read_bytes())
    with pytest.raises(IntegrityError, match=f"is the manifest of {one.id}"):
        registry.manifest(two.id)


@pytest.mark.slow
def test_name_without_a_version_resolves_to_production_or_else_the_newest_version(
    registry: Registry, publish: Publish, name: str, tracking: Tracking
) -> None:
    one, two = publish(), publish()
    assert registry.resolve(name) == two.id
    tracking.set_alias(one.id, Alias.PRODUCTION)
    assert registry.resolve(name) == one.id


@pytest.mark.slow
def test_version_10_is_newer_than_version_9(registry: Registry, publish: Publish, name: str) -> None:
    for number in range(1, 10):
        registry.folder(VersionId(name, number)).mkdir(parents=True)
    ten = publish()
    (registry.folder(VersionId(name, 9)) / MANIFEST_FILE).touch()
    assert registry.resolve(name) == ten.id == VersionId(name, 10)


def test_name_with_a_version_number_resolves_to_that_version(registry: Registry, publish: Publish, name: str) -> None:
    publish()
    publish()
    assert registry.resolve(f"{name}@1") == VersionId(name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("alias", Alias)
def test_alias_selects_its_version(
    registry: Registry, publish: Publish, name: str, tracking: Tracking, alias: Alias
) -> None:
    one = publish()
    publish()
    tracking.set_alias(one.id, alias)
    assert registry.resolve(f"{name}@{alias}") == one.id


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("@3", "there is no version {name}@3"),
        ("@candidate", "{name} has no alias 'candidate'"),
        ("@newest", "'{name}@newest' is not a valid version"),
        ("-x", "there is no model '{name}-x'"),
        ("@1@1", "'{name}@1@1' is not a valid version"),
    ],
)
def test_error_for_a_nonexistent_version_lists_existing_versions(
    registry: Registry, publish: Publish, name: str, suffix: str, text: str
) -> None:
    publish()
    with pytest.raises(NotFoundError) as caught:
        registry.resolve(name + suffix)
    assert text.format(name=name) in caught.value.wrong
    assert caught.value.expected or caught.value.todo


@pytest.mark.parametrize("text", ["", "*", "**", "/etc", "..", "[", "a/../..", "@production", "*@production", "\0"])
def test_resolving_an_invalid_version_string_raises_not_found(registry: Registry, publish: Publish, text: str) -> None:
    publish()
    with pytest.raises(NotFoundError):
        registry.resolve(text)


def test_missing_manifest_error_suggests_existing_versions(registry: Registry, publish: Publish, name: str) -> None:
    publish()
    with pytest.raises(NotFoundError) as caught:
        registry.manifest(VersionId(name, 9))
    assert f"{name}@1" in caught.value.expected


def test_requesting_a_format_missing_from_a_version_raises_not_found(registry: Registry, publish: Publish) -> None:
    manifest = publish()
    with pytest.raises(NotFoundError, match="has no format gptq") as caught:
        registry.artifact(manifest.id, Format.GPTQ)
    assert caught.value.expected == "one of merged"


def test_version_stays_complete_after_its_source_files_are_deleted(
    registry: Registry, publish: Publish, content: dict[str, Path]
) -> None:
    manifest = publish()
    for path in content["merged"].iterdir():
        path.unlink()
    registry.verify(manifest.id, Format.MERGED)
