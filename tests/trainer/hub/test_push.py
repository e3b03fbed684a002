"""Tests `svc push` with the real client of the Hub, against a server on this machine."""

import json
from pathlib import Path

import pytest

from svc.errors import (
    AuthenticationError,
    IntegrityError,
    NotFoundError,
    PermissionDeniedError,
    RefusedError,
    ServerNotRunningError,
)
from svc.registry.files import record_files
from svc.registry.manifest import BaseRecord, FormatRecord, Manifest, write_manifest
from svc.registry.registry import Registry
from svc.settings.load import load_settings
from svc.store.audit import Action, read_events
from svc.store.database import open_store
from svc.version import Format
from tests.builders.judged_versions import LABELS, JudgedVersions
from tests.command_line import Svc
from tests.trainer.hub.hub_server import HubServer, Repository

pytestmark = pytest.mark.slow


def test_version_is_uploaded_as_one_private_commit_with_a_tag(
    svc: Svc, manifest: Manifest, versions: JudgedVersions, hub: HubServer
) -> None:
    ended = svc("push", str(manifest.id), "org/tickets", "--yes", "--json")
    assert ended.code == 0, ended.err
    uploaded = hub.repositories["org/tickets"]
    assert uploaded.private
    assert uploaded.commits[1:] == [f"Upload {manifest.id}"]
    result = json.loads(ended.out)
    assert uploaded.tags == {f"v{manifest.number}": result["commit"]} == {result["tag"]: uploaded.head}
    merged = versions.registry.artifact(manifest.id, Format.MERGED)
    content = {path.name: path.read_bytes() for path in merged.iterdir()}
    assert uploaded.files.pop("README.md").startswith(b"---\nbase_model: org/base\n")
    assert uploaded.files == content | {".gitattributes": b""}
    assert list(hub.objects.values()) == [content["model.safetensors"]]  # sent once, as a large file


def test_push_with_the_public_option_creates_a_public_repository(svc: Svc, manifest: Manifest, hub: HubServer) -> None:
    assert svc("push", str(manifest.id), "org/tickets", "--format", "gptq", "--public", "--yes").code == 0
    assert not hub.repositories["org/tickets"].private


def test_push_sends_nothing_without_confirmation(
    svc: Svc, manifest: Manifest, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda prompt: "n")
    ended = svc("push", str(manifest.id), "org/tickets")
    assert ended.code == 130
    assert "model.safetensors" in ended.err
    assert "private" in ended.err
    assert all(request.startswith("GET ") for request in hub.requests)
    assert svc("push", str(manifest.id), "org/tickets", "--json").code == 2


def test_push_dry_run_writes_the_model_card_without_a_token_or_network_access(
    svc: Svc, manifest: Manifest, hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    ended = svc("push", str(manifest.id), "org/tickets", "--dry-run", "--output", tmp_path / "card.md", "--json")
    assert ended.code == 0, ended.err
    assert hub.requests == []
    assert (tmp_path / "card.md").read_text("utf-8").startswith("---\n")
    assert {file["path"] for file in json.loads(ended.out)["files"]} >= {"README.md", "model.safetensors"}


def test_push_is_recorded_in_the_audit_log_even_if_it_fails(
    svc: Svc, manifest: Manifest, hub: HubServer, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    command = ("--home", home, "push", str(manifest.id), "closed/tickets", "--yes", "--reason", "for the partner")
    assert svc(*command).code == PermissionDeniedError.exit_code
    (event,) = read_events(open_store(load_settings(None, home=home)), newest=1, action=Action.PUSH)
    assert (event.subject, event.reason) == (str(manifest.id), "for the partner")
    assert event.details["repo"] == "closed/tickets"


def test_non_empty_repository_is_replaced_only_with_the_replace_option(
    svc: Svc, manifest: Manifest, hub: HubServer
) -> None:
    hub.repositories["org/tickets"] = Repository(
        private=True, files={"other.bin": b"1", "config.json": b"{}"}, tags={f"v{manifest.number}": "older"}
    )
    refused = svc("push", str(manifest.id), "org/tickets", "--yes")
    assert refused.code == RefusedError.exit_code
    assert "already has 2 files, such as config.json" in refused.err
    assert hub.repositories["org/tickets"].commits == ["initial commit"]
    ended = svc("push", str(manifest.id), "org/tickets", "--yes", "--replace")
    assert ended.code == 0, ended.err
    replaced = hub.repositories["org/tickets"]
    assert "other.bin" not in replaced.files
    assert replaced.files["config.json"] != b"{}"
    assert replaced.tags == {f"v{manifest.number}": replaced.head}


@pytest.mark.parametrize("options", [(), ("--public",)])
def test_push_to_an_existing_repository_of_different_visibility_is_refused(
    svc: Svc, manifest: Manifest, hub: HubServer, options: tuple[str, ...]
) -> None:
    hub.repositories["org/tickets"] = Repository(private=bool(options), files={})
    ended = svc("push", str(manifest.id), "org/tickets", "--yes", "--replace", *options)
    assert ended.code == RefusedError.exit_code
    assert "model.safetensors" not in hub.repositories["org/tickets"].files


def test_push_is_refused_if_the_hub_server_cannot_make_the_repository_private(
    svc: Svc, manifest: Manifest, hub: HubServer
) -> None:
    hub.knows_visibility = False
    ended = svc("push", str(manifest.id), "org/tickets", "--yes")
    assert ended.code == RefusedError.exit_code
    assert "everyone can read it" in ended.err
    assert not hub.objects


def test_repository_that_changed_since_the_check_is_not_overwritten(
    svc: Svc, manifest: Manifest, hub: HubServer
) -> None:
    hub.repositories["org/tickets"] = Repository(private=True)
    hub.before_commit = lambda: hub.repositories["org/tickets"].commits.append("by someone else")
    ended = svc("push", str(manifest.id), "org/tickets", "--yes")
    assert ended.code == RefusedError.exit_code
    assert "was changed during the upload" in ended.err


def test_error_for_a_missing_token_says_how_to_log_in(
    svc: Svc, manifest: Manifest, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    ended = svc("push", str(manifest.id), "org/tickets", "--yes")
    assert ended.code == AuthenticationError.exit_code
    assert "set HF_TOKEN, or run `hf auth login`" in ended.err


def test_rejected_token_is_not_printed(
    svc: Svc, manifest: Manifest, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_token")
    ended = svc("push", str(manifest.id), "org/tickets", "--yes")
    assert ended.code == AuthenticationError.exit_code
    assert "hf_wrong_token" not in ended.out + ended.err


def test_unresponsive_hub_raises_error(
    svc: Svc, manifest: Manifest, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert svc("push", str(manifest.id), "org/tickets", "--yes").code == ServerNotRunningError.exit_code


def test_error_for_a_server_without_xet_names_the_setting_that_disables_xet(
    svc: Svc, manifest: Manifest, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    ended = svc("push", str(manifest.id), "org/tickets", "--yes")
    assert ended.code == ServerNotRunningError.exit_code
    assert "set HF_HUB_DISABLE_XET=1" in ended.err
    assert "model.safetensors" not in hub.repositories["org/tickets"].files


def test_push_is_refused_if_a_version_file_was_modified(
    svc: Svc, manifest: Manifest, versions: JudgedVersions, hub: HubServer
) -> None:
    weights = versions.registry.artifact(manifest.id, Format.MERGED) / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert svc("push", str(manifest.id), "org/tickets", "--yes").code == IntegrityError.exit_code
    assert hub.requests == []


def test_push_of_a_version_that_failed_a_check_is_refused(
    svc: Svc, versions: JudgedVersions, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Registry, "of", lambda settings: versions.registry)
    failed = versions.publish(LABELS, {}, failed=("merge: 3 tensors differ",))
    ended = svc("push", str(failed.id), "org/tickets", "--format", "adapter", "--yes")
    assert ended.code == RefusedError.exit_code
    assert "merge: 3 tensors differ" in ended.err
    assert hub.requests == []


def test_pushed_adapter_config_names_the_base_model_on_the_hub_instead_of_a_local_folder(
    svc: Svc, versions: JudgedVersions, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Registry, "of", lambda settings: versions.registry)
    manifest = versions.publish(LABELS, {}, base=BaseRecord(origin="org/base", revision="1", licence=None))
    folder = versions.registry.folder(manifest.id)
    config = {"peft_type": "LORA", "r": 12, "target_modules": ["q_proj"], "base_model_name_or_path": str(folder)}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "adapter" / "README.md").write_text(f"base_model: {folder}", "utf-8")
    changed = manifest.model_copy(
        update={"formats": {Format.ADAPTER: FormatRecord(files=record_files(folder, folder / "adapter"))}}
    )
    (folder / "manifest.json").unlink()
    write_manifest(folder, changed)
    ended = svc("push", str(manifest.id), "org/lora", "--format", "adapter", "--yes")
    assert ended.code == 0, ended.err
    files = hub.repositories["org/lora"].files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert all(str(folder).encode() not in content for content in files.values())
    card = files["README.md"].decode()
    assert "vllm serve" not in card  # the base is no longer in its folder
    assert "PeftModel.from_pretrained" in card


@pytest.mark.parametrize(
    "changes",
    [{"new_tokens": ["<tool>"]}, {"chat_template": "/home/alice/t.jinja"}, {"rope_scaling": {"type": "yarn"}}],
)
def test_push_of_an_adapter_trained_on_a_modified_base_is_refused(
    svc: Svc, versions: JudgedVersions, hub: HubServer, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    monkeypatch.setattr(Registry, "of", lambda settings: versions.registry)
    manifest = versions.publish(LABELS, {}, recipe={"name": "tickets"} | changes)
    ended = svc("push", str(manifest.id), "org/lora", "--format", "adapter", "--yes")
    assert ended.code == RefusedError.exit_code
    assert f"its recipe sets {next(iter(changes))}" in ended.err
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["tickets", "org/a/b", "../org/tickets", "https://hub/org/tickets"])
def test_invalid_repository_name_is_rejected(svc: Svc, manifest: Manifest, hub: HubServer, repo: str) -> None:
    assert svc("push", str(manifest.id), repo, "--yes").code == 2
    assert hub.requests == []


def test_push_of_a_format_that_the_version_lacks_is_refused(svc: Svc, manifest: Manifest, hub: HubServer) -> None:
    ended = svc("push", str(manifest.id), "org/tickets", "--format", "gguf", "--yes")
    assert ended.code == NotFoundError.exit_code
    assert "choose one with --format" in ended.err
