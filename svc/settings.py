"""One settings object for all packages: defaults < svc.yaml < `SVC_*` environment < flags.

An unknown key is an error wherever it stands, because a misspelt setting that is ignored is found at 3 in the
morning. What a recipe says (trainer/recipe/sections.py) is not a setting: settings belong to a machine, recipes to a
model.
"""

import ipaddress
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

from svc.dotted_keys import dotted_keys
from svc.errors import SettingsError
from svc.yaml_text import parse_yaml

ENV_PREFIX = "SVC_"
DEFAULT_FILE = Path("svc.yaml")
_PASSWORD = re.compile(r"//[^/\s]*@")
"""In a URL that is refused, and told."""


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"{path.parts[0]} is no user of this machine") from error


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


def _network(text: str) -> str:
    return str(ipaddress.ip_network(text))


Network = Annotated[str, AfterValidator(_network)]


class Device(StrEnum):
    """Where the engine runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class GptqKernel(StrEnum):
    """Whose kernel multiplies by the 4-bit weights of a GPTQ model."""

    AUTO = "auto"
    VLLM = "vllm"
    TORCH = "torch"


class SwapChoice(StrEnum):
    """How another version comes into the engines."""

    AUTO = "auto"
    BLUEGREEN = "bluegreen"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSettings(_Section):
    """How vLLM is started. What is not set follows from machine and model; `svc status --verbose` shows what, and why.

    What is not named here goes through `args`, which overrule all else.
    """

    device: Device = Field(Device.AUTO, description="cpu, cuda, or auto: what the installed vLLM is built for")
    max_model_len: int = Field(2048, ge=16, description="context length, tokens; never more than the model's own")
    kv_cache_gib: float | None = Field(
        None, gt=0, description="key-value cache on the CPU, GiB; default: what can be used, in half of the free memory"
    )
    gpu_memory_share: float | None = Field(
        None, gt=0, le=1, description="share of a GPU's memory; default: 0.9, or less where others use it"
    )
    tensor_parallel: int | None = Field(
        None,
        ge=1,
        description="GPUs that share each layer; default: as many as there are and the model's heads divide by",
    )
    gptq_kernel: GptqKernel = Field(
        GptqKernel.AUTO,
        description="vllm, torch (on any CPU), or auto: vLLM's own, and PyTorch's on a CPU for which vLLM has none",
    )
    max_concurrency: int = Field(64, ge=1, description="sequences decoded together")
    cores: int | None = Field(
        None,
        ge=1,
        description="cores for each engine on a CPU; default: those of this process, shared out between the engines "
        "that are served when it starts",
    )
    replicas: int = Field(1, ge=1, le=64, description="engines that serve one model")
    start_timeout_s: float = Field(600.0, gt=0, description="longest start, seconds")
    args: tuple[str, ...] = Field((), description="further arguments for vLLM's server, as they are")
    environment: tuple[str, ...] = Field(
        (), description="names of variables that vLLM gets beside those of its libraries; secrets are withheld"
    )


class AdapterSettings(_Section):
    """Versions that are served as adapters beside one base: `svc serve NAME --format adapter`."""

    max_loaded: int = Field(8, ge=1, le=10_000, description="adapters in an engine's memory; the least used one goes")
    max_rank: int | None = Field(
        None, ge=1, le=512, description="largest rank; default: that of the version an engine starts with, at least 16"
    )


class ServeSettings(_Section):
    """The gateway's address and its limits: all that a client could grow has one."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    allowed_hosts: tuple[str, ...] = Field(
        (), description="names that clients use for this server, beside localhost and addresses; *: any"
    )
    tls_certificate: AbsolutePath | None = Field(
        None, description="file with the certificate and its chain, in PEM; read again when it changes"
    )
    tls_key: AbsolutePath | None = Field(
        None, description="file with the certificate's key, in PEM, without a password"
    )
    behind_proxy: tuple[Network, ...] = Field(
        (),
        description="addresses or networks of the proxies in front, which speak TLS with clients; their "
        "`X-Forwarded-For` and `-Proto` are believed",
    )
    max_connections_per_address: int | None = Field(
        None,
        ge=1,
        description="connections that one address may hold, or one /64 of IPv6; further ones are closed at once; "
        "addresses in behind_proxy have no limit; default: half of all connections",
    )
    max_body_bytes: int = Field(4 * 2**20, ge=1024, description="largest request body, bytes")
    max_running: int = Field(
        256,
        ge=1,
        description="requests in the engine at once, whose answers may have so many times engine.max_model_len tokens "
        "together; one more is answered 429, or waits if it has a key",
    )
    max_queued: int = Field(
        256,
        ge=0,
        description="requests that wait, during a swap or for a place; one more is answered 503 or 429; as many more "
        "may wait for adapters, half of them from one key or address",
    )
    queue_timeout_s: float = Field(60.0, gt=0, description="longest wait of a queued request, seconds")
    drain_timeout_s: float = Field(
        30.0, gt=0, description="longest wait for running requests before a reload, seconds; then blue-green"
    )
    swap: SwapChoice = Field(
        SwapChoice.AUTO, description="auto: in place where the version fits; bluegreen: always by a second engine"
    )
    idle_s: float | None = Field(
        None,
        gt=0,
        description="a model's engines are ended, or sleep on a GPU, after so long without a request, seconds, and "
        "come back with the next one, which waits for them; default: never",
    )
    request_timeout_s: float = Field(600.0, gt=0, description="longest silence of the engine within a request, seconds")

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        return self


class RequestLimits(_Section):
    """Structure of one request. One that exceeds a limit is answered 400 and reaches no engine."""

    reading_ms: float = Field(
        20.0,
        gt=0,
        description="longest time for which reading a body may hold the gateway, estimated from its bytes, ms",
    )
    messages: int = Field(4096, ge=1, description="messages")
    input_items: int = Field(2048, ge=1, description="elements of `input`, which /v1/responses has for messages")
    content_parts: int = Field(8192, ge=1, description="content parts and tool calls of all messages together")
    tools: int = Field(512, ge=1, description="tools")
    field_values: int = Field(
        4096, ge=1, description="values in any other field, at all depths: logit_bias, metadata, documents, ..."
    )
    depth: int = Field(64, ge=1, le=500, description="levels of objects and arrays")


def _pattern(text: str) -> str:
    import regex

    from svc.redaction import compile_pattern

    try:
        compile_pattern(text)
    except regex.error as error:
        raise ValueError(f"is no regular expression: {error}") from error
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]


class RequestLogSettings(_Section):
    """What is kept of each request: figures always; features for drift; prompts and answers only for a share."""

    max_age_days: float = Field(30.0, gt=0, le=36_500, description="older requests are forgotten, with their feedback")
    max_mib: int = Field(1024, ge=1, description="the oldest requests are forgotten beyond this size, MiB")
    content_share: float = Field(0.0, ge=0, le=1, description="share of requests whose prompt and answer are kept")
    features: bool = Field(
        True, description="keep features of at most 10,000 prompts a day of a version, without their text, for drift"
    )
    max_content_kib: int = Field(64, ge=1, description="longer content is not kept, KiB for prompt and for answer")
    redact: tuple[Pattern, ...] = Field(
        (),
        description="regular expressions of what is blanked in content, beside mail addresses, phone and card numbers; "
        "content on which they take longer than 0.25 s is not kept: no repetition inside a repetition",
    )


def _otlp_endpoint(text: str) -> str:
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        raise ValueError("is no URL as http://collector:4318")
    if "@" in url.netloc:
        raise ValueError("has a password in it, which everybody would see; see docs/traces.md for headers")
    return text


class TelemetrySettings(_Section):
    """Traces of requests by OpenTelemetry, for a collector, Langfuse, Phoenix and others."""

    otlp_endpoint: Annotated[str, AfterValidator(_otlp_endpoint)] | None = Field(
        None,
        description="URL of the receiver of spans by OTLP over HTTP, to which `/v1/traces` is added where it does not "
        "end so; its headers stand in OTEL_EXPORTER_OTLP_HEADERS; default: no traces",
    )
    sample_share: float = Field(
        1.0, ge=0, le=1, description="share of requests with a span; a client's `traceparent` decides for its own"
    )


class HoldoutSettings(_Section):
    """The server's own requests to its engine, behind those of clients: what drift is measured by.

    The held-out set of the version that serves is asked after each start and swap, and then again and again. Answers
    whose content is kept are scored: how likely the version finds them.
    """

    every_hours: float = Field(6.0, ge=0, description="time from one run of the held-out set to the next; 0: no runs")
    requests_per_minute: float = Field(60.0, gt=0, description="fastest pace, held-out examples and scores together")
    scored_per_hour: int = Field(200, ge=0, description="live answers that are scored, the newest first; 0: none")
    run_functions: bool = Field(
        False,
        description="run the metric function that a version brought: code of whoever registered it; otherwise, such "
        "a version is watched by exact match",
    )


class MonitorSettings(_Section):
    """The exporter as its own process: `svc monitor`."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(9464, ge=0, le=65535, description="port to listen on")
    server: str = Field("", description="URL of the server to watch; default: the one that runs on this home")
    key_file: AbsolutePath | None = Field(
        None, description="file with a key for `monitor.server`, whose scope is metrics; on its machine none is needed"
    )
    authority: AbsolutePath | None = Field(
        None, description="file with the certificates that `monitor.server` is checked by; default: the machine's"
    )
    drift_every_s: float = Field(
        60.0,
        ge=0,
        le=300,
        description="time from one check for drift to the next, seconds; 0: `svc monitor` makes none",
    )


class ModelSettings(_Section):
    """What differs for one of the models that a server serves."""

    engine: EngineSettings = Field(EngineSettings(), description="what of `engine` differs for this model")
    idle_s: float | None = Field(None, gt=0, description="in place of `serve.idle_s`, seconds")


class Settings(BaseSettings):
    """All settings. `home` holds every byte of state except the cache of base models."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, env_ignore_empty=True
    )

    home: AbsolutePath = Field(Path(".svc"), validate_default=True, description="folder for all state")
    base_cache: AbsolutePath = Field(
        Path("~/.cache/tuneserve/base"), validate_default=True, description="folder for downloaded base models"
    )
    tracking_uri: str = Field("", description="MLflow tracking server; default: SQLite under home")
    engine: EngineSettings = EngineSettings()
    adapters: AdapterSettings = AdapterSettings()
    serve: ServeSettings = ServeSettings()
    request_limits: RequestLimits = RequestLimits()
    request_log: RequestLogSettings = RequestLogSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    holdout: HoldoutSettings = HoldoutSettings()
    monitor: MonitorSettings = MonitorSettings()
    models: dict[str, ModelSettings] = Field(
        {}, description="by model name: `{engine: {...}, idle_s: ...}` with what differs for this model"
    )

    def idle_s_of(self, name: str) -> float | None:
        """After how long without a request a model's engines sleep or are ended, seconds; None for never."""
        own = self.models[name].idle_s if name in self.models else None
        return own or self.serve.idle_s

    def engine_for(self, name: str) -> EngineSettings:
        """How the engines of a model are started: the section `engine`, and over it what `models` says."""
        own = self.models[name].engine if name in self.models else EngineSettings()
        given = {key: getattr(own, key) for key in own.model_fields_set}
        return self.engine.model_copy(update=given)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """None but what is passed in: `load_settings` merges the sources, so that flags go before the environment."""
        return (init_settings,)


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """Reads the settings.

    Args:
        config: a YAML file; default: `svc.yaml` in the working folder, if it is there.
        flags: what the command line gave, as `section={key: value}` or `key=value`; `None` means not given.

    Raises:
        SettingsError: an unknown key, a wrong value, a file that cannot be read.
    """
    _check_environment()
    try:
        given = {key: value for key, value in flags.items() if value is not None}
        return Settings(**_merge(_merge(_read_file(config), _read_environment()), given))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise SettingsError(
            f"setting {key!r} is {_PASSWORD.sub('//***@', repr(first['input']))}: {first['msg']}",
            todo="see docs/configuration.md for every setting and its type",
        ) from error


def _read_file(config: Path | None) -> dict[str, Any]:
    path = config or DEFAULT_FILE
    if config is None and not path.is_file():
        return {}
    try:
        content = parse_yaml(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read settings from {path}: {error}", expected="a YAML file in UTF-8") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path} holds a {type(content).__name__}", expected="a YAML mapping of settings")
    for key in content:
        if not isinstance(key, str):
            raise SettingsError(f"{path} has the key {key!r}", expected="names of settings")
    return content


def _read_environment() -> dict[str, Any]:
    try:
        return EnvSettingsSource(Settings)()
    except SourceError as error:
        raise SettingsError(
            f"environment: {error}: {error.__cause__}",
            expected='JSON for a list or a section, as SVC_ENGINE__ARGS=\'["--seed", "1"]\'',
        ) from error


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def setting_keys() -> list[str]:
    """Every settable key, dotted."""
    return dotted_keys(Settings)


def _check_environment() -> None:
    """pydantic-settings ignores variables that it does not know; a misspelt one must not pass."""
    known = {_variable(key) for key in [*setting_keys(), *Settings.model_fields]}
    for name in os.environ:
        if name.startswith(ENV_PREFIX) and name.upper() not in known:
            raise SettingsError(
                f"environment variable {name} names no setting",
                expected=f"one of {', '.join(sorted(known))}",
                todo=f"unset {name} or correct its name",
            )


def _variable(key: str) -> str:
    return ENV_PREFIX + key.upper().replace(".", "__")
