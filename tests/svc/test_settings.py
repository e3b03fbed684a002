"""Tests that settings come from four sources, later ones take precedence, and misspelt names are rejected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from svc.errors import SettingsError
from svc.settings.engine import Device
from svc.settings.load import environment_without_store, load_settings, setting_keys
from svc.settings.settings import Settings
from svc.settings.storage import ArtifactSettings
from tests.svc.json_values import mappings_of

Write = Callable[[str], Path]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Write:
    def write(text: str) -> Path:
        path = folder / "svc.yaml"
        path.write_text(text, "utf-8")
        return path

    return write


def refusal(config: Path | None = None, **flags: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(config, **flags)
    return str(caught.value)


def test_settings_have_default_values_when_no_source_sets_them(folder: Path) -> None:
    settings = load_settings()
    assert settings.home == folder / ".svc"
    assert settings.serve.host == "127.0.0.1"
    assert settings.serve.port == 8000
    assert settings.engine.device is Device.AUTO


def test_settings_file_overrides_defaults(write: Write) -> None:
    write("serve: {port: 1111}")
    assert load_settings().serve.port == 1111


def test_environment_overrides_the_settings_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("serve: {port: 1111}")
    monkeypatch.setenv("SVC_SERVE__PORT", "2222")
    assert load_settings().serve.port == 2222


def test_flags_override_the_environment(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("serve: {port: 1111}")
    monkeypatch.setenv("SVC_SERVE__PORT", "2222")
    assert load_settings(serve={"port": 3333}).serve.port == 3333


def test_settings_sources_are_merged_key_by_key_within_a_section(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("serve: {max_running: 11, max_queued: 11, host: 0.0.0.0}")
    monkeypatch.setenv("SVC_SERVE__MAX_QUEUED", "22")
    settings = load_settings(serve={"host": "::1"}).serve
    assert (settings.max_running, settings.max_queued, settings.host) == (11, 22, "::1")


def test_omitted_flag_overrides_no_setting(write: Write) -> None:
    write("home: elsewhere")
    assert load_settings(home=None, serve=None).home.name == "elsewhere"


def test_explicitly_named_settings_file_is_read_instead_of_svc_yaml(write: Write, folder: Path) -> None:
    write("serve: {port: 1111}")
    other = folder / "other.yaml"
    other.write_text("serve: {max_queued: 7}")
    settings = load_settings(other).serve
    assert (settings.port, settings.max_queued) == (8000, 7)


def test_empty_settings_file_is_valid(write: Write) -> None:
    assert load_settings(write("# nothing yet\n")).serve.port == 8000


def test_environment_variable_may_set_a_whole_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVC_ENGINE", '{"device": "cpu", "args": ["--seed", "1"]}')
    engine = load_settings().engine
    assert (engine.device, engine.args) == (Device.CPU, ("--seed", "1"))


def test_empty_environment_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVC_SERVE__PORT", "")
    assert load_settings().serve.port == 8000


@pytest.mark.parametrize("name", ["SVC_HOEM", "SVC_SERVE__PROT", "SVC_PORT", "SVC_SERVE_PORT", "SVC_HOME__X", "SVC_"])
def test_unknown_environment_variable_is_rejected_and_named_in_the_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    text = refusal()
    assert f"environment variable {name} does not match any setting" in text
    assert "SVC_SERVE__PORT" in text
    assert f"unset {name}" in text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("SVC_SERVE__PORT", "eighty", "'serve.port' is 'eighty'"),
        ("SVC_ENGINE__DEVICE", "tpu", "'engine.device' is 'tpu'"),
        ("SVC_ENGINE", "not json", "expected: JSON"),
        ("SVC_ENGINE", "5", "'engine' is 5"),
        ("SVC_ENGINE__ARGS", "--seed 1", "expected: JSON"),
    ],
)
def test_invalid_environment_variable_is_rejected(
    name: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert text in refusal()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("prot: 1", "setting 'prot' is 1: Extra inputs are not permitted"),
        ("serve: {prot: 1}", "setting 'serve.prot' is 1"),
        ("serve: {port: 70000}", "setting 'serve.port' is 70000"),
        ("serve: {port: [1]}", "setting 'serve.port' is [1]"),
        ("engine: yes please", "setting 'engine' is 'yes please'"),
        ("home: ~nobody-of-this-name/x", "there is no user ~nobody-of-this-name"),
        ("- a\n- b", "must contain a YAML mapping of settings, got list"),
        ("5", "must contain a YAML mapping of settings, got int"),
        ("1: 2", "has a key that is not a string: 1"),
        ("serve: {port: 1", "cannot read settings"),
        ("home: 2024-13-45", "cannot read settings"),
        ("home: !!bool maybe", "cannot read settings"),
        ("home: !!python/object:os.system x", "cannot read settings"),
    ],
)
def test_invalid_settings_file_error_names_the_key_and_value(content: str, text: str, write: Write) -> None:
    assert text in refusal(write(content))


def test_nonexistent_settings_file_given_explicitly_is_rejected(folder: Path) -> None:
    assert f"cannot read settings from {folder / 'none.yaml'}" in refusal(folder / "none.yaml")


def test_non_utf8_settings_file_is_rejected(folder: Path) -> None:
    (folder / "svc.yaml").write_bytes(b"home: caf\xe9")
    assert "cannot read settings" in refusal()


def test_invalid_flag_is_rejected() -> None:
    assert "'serve.port' is -1" in refusal(serve={"port": -1})


def test_settings_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().serve.port = 1  # type: ignore[misc]


def test_dotted_paths_of_all_settings_are_listed_as_keys() -> None:
    dumped = Settings().model_dump()
    leaves = {
        f"{key}.{inner}" if inner else key
        for key, value in dumped.items()
        for inner in (value if isinstance(value, dict) and value else [""])
    }
    assert set(setting_keys()) == leaves


@pytest.mark.slow
@given(mappings_of(setting_keys()))
def test_any_mapping_is_either_loaded_as_settings_or_rejected_with_a_settings_error(content: dict[str, Any]) -> None:
    Path("svc.yaml").write_text(yaml.safe_dump(content), "utf-8")
    try:
        settings = load_settings()
    except SettingsError:
        return
    assert settings.home.is_absolute()


@given(st.text(max_size=60) | st.binary(max_size=60))
def test_any_settings_file_is_either_loaded_or_rejected_with_a_settings_error(content: str | bytes) -> None:
    Path("svc.yaml").write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        load_settings()
    except SettingsError as error:
        assert error.wrong  # noqa: PT017 - either outcome is right


def test_engine_settings_of_a_model_override_global_engine_settings() -> None:
    settings = Settings.model_validate(
        {"engine": {"max_model_len": 1024, "replicas": 2}, "models": {"a": {"engine": {"max_model_len": 64}}}}
    )
    assert (settings.engine_for("a").max_model_len, settings.engine_for("a").replicas) == (64, 2)
    assert settings.engine_for("b") == settings.engine


def test_model_setting_overrides_the_global_setting_even_if_it_equals_the_default() -> None:
    settings = Settings.model_validate({"engine": {"replicas": 2}, "models": {"a": {"engine": {"replicas": 1}}}})
    assert settings.engine_for("a").replicas == 1


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        (3, (3, 3)),
        ("3", (3, 3)),
        ({"max": 8}, (1, 8)),
        ({"min": 2, "max": 8}, (2, 8)),
        ('{"min": 2, "max": 8}', (2, 8)),
    ],
)
def test_replicas_setting_accepts_a_number_or_a_range(
    given: object, limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(given, str):
        monkeypatch.setenv("SVC_ENGINE__REPLICAS", given)
        replicas = load_settings().engine.replica_range
    else:
        replicas = Settings.model_validate({"engine": {"replicas": given}}).engine.replica_range
    assert (replicas.min, replicas.max) == limits


@pytest.mark.parametrize(
    "given",
    [0, 65, {}, {"min": 3, "max": 2}, {"min": 0, "max": 2}, {"max": 2, "step": 1}, {"max": 2, "remove_after_s": 5}],
)
def test_invalid_replicas_setting_is_rejected(given: object, tmp_path: Path) -> None:
    file = tmp_path / "svc.yaml"
    file.write_text(json.dumps({"engine": {"replicas": given}}))
    with pytest.raises(SettingsError, match=r"engine\.replicas"):
        load_settings(file)


def test_unknown_model_setting_raises_error(tmp_path: Path) -> None:
    file = tmp_path / "svc.yaml"
    file.write_text("models: {a: {engine: {replica: 2}}}")
    with pytest.raises(SettingsError, match=r"models\.a\.engine\.replica"):
        load_settings(file)


def test_tracing_is_disabled_without_a_collector() -> None:
    telemetry = load_settings().telemetry
    assert (telemetry.otlp_endpoint, telemetry.sample_share) == (None, 1.0)


@pytest.mark.parametrize("url", ["http://c:4318", "https://c/api/public/otel", "http://[::1]:6006/v1/traces"])
def test_tracing_collector_is_configured_by_its_url(url: str) -> None:
    assert load_settings(telemetry={"otlp_endpoint": url}).telemetry.otlp_endpoint == url


@pytest.mark.parametrize("url", ["", "c:4318", "grpc://c:4317", "http://", "http://c?key=1", "http://c/#a"])
def test_invalid_collector_url_is_rejected(url: str) -> None:
    assert "'telemetry.otlp_endpoint'" in refusal(telemetry={"otlp_endpoint": url})


@pytest.mark.parametrize("url", ["http://user:passw0rd@c", "https://passw0rd@c/v1/traces", "ftp://u:passw0rd@c"])
def test_password_in_a_collector_url_is_rejected_without_quoting_it(url: str) -> None:
    refused = refusal(telemetry={"otlp_endpoint": url})
    assert "telemetry.otlp_endpoint" in refused
    assert "passw0rd" not in refused


WEBHOOK = {"url": "https://hooks.example/a?b=c", "secret_file": "secret"}


def test_webhooks_are_read_from_the_settings_file(write: Write, folder: Path) -> None:
    write("webhooks: [{url: 'http://127.0.0.1:9/hook', secret_file: secret}]")
    (webhook,) = load_settings().webhooks
    assert (webhook.url, webhook.secret_file) == ("http://127.0.0.1:9/hook", folder / "secret")
    for url in ("http://localhost/", "http://[::1]:9/", WEBHOOK["url"]):
        assert load_settings(webhooks=[WEBHOOK | {"url": url}]).webhooks[0].url == url


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example/",
        "http://10.0.0.1/",
        "ftp://hooks.example/",
        "https://",
        "hooks.example",
        "https://a:b@hooks.example/",
        "https://hooks.example:x/",
        "https://hooks.example/#a",
    ],
)
def test_webhook_url_must_be_https_or_loopback(url: str) -> None:
    text = refusal(webhooks=[WEBHOOK | {"url": url}])
    assert "webhooks.0.url" in text
    assert "a:b@" not in text


def test_two_webhooks_with_the_same_url_are_rejected() -> None:
    assert "two webhooks have the same URL" in refusal(webhooks=[WEBHOOK, WEBHOOK])
    assert "webhooks.0.secret_file" in refusal(webhooks=[{"url": WEBHOOK["url"]}])


@pytest.mark.parametrize(
    "url", ["postgresql://svc@db/store", "postgresql+psycopg://svc:p%40ss@db:5433/store?sslmode=require"]
)
def test_store_url_of_a_postgresql_database_is_accepted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVC_STORE__URL", url)
    found = load_settings().store.url
    assert found is not None
    assert found.get_secret_value() == url


@pytest.mark.parametrize(
    "url",
    [
        "mysql://svc:s3cret@db/store",
        "postgresql://svc:s3cret@db",
        "postgresql://svc:s3cret@db:port/store",
        "postgresql://svc@db/store?password=s3cret",
        "postgresql://svc:p@s3cret@db/store",
        "postgresql://svc:p@s3/cret@db/store",
        "postgresql:///store?host=svc:s3cret@db",
        "s3cret",
    ],
)
def test_invalid_store_url_is_rejected_without_quoting_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVC_STORE__URL", url)
    told = refusal()
    assert "'store.url' is invalid" in told
    assert "s3" not in told


@pytest.mark.parametrize(
    "content", ["store: postgresql://svc:s3cret@db/store", "store: {ulr: 'postgresql://svc:s3cret@db/x'}"]
)
def test_error_for_a_store_url_under_a_wrong_key_does_not_reveal_the_password(content: str, write: Write) -> None:
    write(content)
    assert "s3cret" not in refusal()


def test_yaml_syntax_error_gives_its_position_without_quoting_the_line(write: Write) -> None:
    write("store:\n  url: 'postgresql://svc:s3cret@db/store\n")
    told = refusal()
    assert "line 3, column 1" in told
    assert "s3cret" not in told


@pytest.mark.parametrize("name", ["SVC_STORE__URL", "svc_store__url", "SVC_STORE"])
def test_store_url_is_removed_from_the_environment_of_subprocesses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("SVC_HOME", "/srv/svc")
    environment = environment_without_store()
    assert (environment["SVC_HOME"], name in environment) == ("/srv/svc", False)


def test_password_with_a_slash_is_hidden_in_errors(write: Write) -> None:
    write("store_url: postgresql://svc:s3/cret@db/store")
    assert "cret" not in refusal()


@pytest.mark.parametrize("url", ["s3://bucket/prefix/", "gs://bucket", "az://container/a/b", "file:///mnt/models"])
def test_object_store_url_is_accepted(url: str) -> None:
    assert ArtifactSettings(url=url).url == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    ["bucket", "https://bucket/x", "s3://", "file://host/x", "s3://id:hush@bucket/x", "az://container/x?sig=hush"],
)
def test_invalid_object_store_url_is_rejected_without_quoting_it(url: str) -> None:
    with pytest.raises(SettingsError, match=r"artifacts\.url") as caught:
        load_settings(artifacts={"url": url})
    assert "hush" not in str(caught.value) and "s3://bucket/prefix" in str(caught.value)


def test_relative_base_path_is_resolved_against_the_working_directory(write: Write, folder: Path) -> None:
    write("fine_tuning: {bases: {gpt-4o-mini: ./models/small, hub: org/name, file: small.gguf}}")
    assert load_settings().fine_tuning.bases == {
        "gpt-4o-mini": str(folder / "models/small"),
        "hub": "org/name",
        "file": str(folder / "small.gguf"),
    }


@pytest.mark.parametrize("name", ["ft:gpt-4o", "tickets@1", "", "a b", "x" * 101])
def test_invalid_base_name_is_rejected(name: str) -> None:
    assert "not a valid name" in refusal(fine_tuning={"bases": {name: "org/name"}})
