"""One settings object for all packages, merged in the order defaults < svc.yaml < `SVC_*` environment <
flags.

An unknown key is an error in every source, because a misspelt setting would otherwise be silently
ignored. Recipe keys (trainer/recipe/) are not settings: settings belong to a machine, recipes to a model.
"""

import ipaddress
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

from svc.dotted_keys import dotted_keys
from svc.errors import SettingsError
from svc.yaml_text import parse_yaml

ENV_PREFIX = "SVC_"
DEFAULT_FILE = Path("svc.yaml")
_PASSWORD = re.compile(r"//\S*@")
"""Matches the user and password in a rejected URL, which must not appear in the error message."""


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"there is no user {path.parts[0]} on this machine") from error


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


def _network(text: str) -> str:
    return str(ipaddress.ip_network(text))


Network = Annotated[str, AfterValidator(_network)]


class Device(StrEnum):
    """Device on which the engine runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Launcher(StrEnum):
    """Where engines run."""

    LOCAL = "local"
    RAY = "ray"


class GptqKernel(StrEnum):
    """Kernel that computes matrix products with the 4-bit weights of a GPTQ or AWQ model."""

    AUTO = "auto"
    VLLM = "vllm"
    TORCH = "torch"


class SwapChoice(StrEnum):
    """How engines switch to another version of a model."""

    AUTO = "auto"
    BLUEGREEN = "bluegreen"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _store_url(secret: SecretStr) -> SecretStr:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        text = secret.get_secret_value()
        url = make_url(text)
        valid = url.drivername in ("postgresql", "postgresql+psycopg") and bool(url.database)
        valid = valid and not {"password", "sslpassword"} & url.query.keys()  # SQLAlchemy would not hide them
        # After an unescaped @, the rest of a password would be part of the host, which errors name.
        valid = valid and text.count("@") <= 1 and "@" not in str(url.query.get("host"))
    except (ArgumentError, ValueError):  # their messages may quote the password
        valid = False
    if not valid:
        raise ValueError(
            "not the URL of a PostgreSQL database, such as postgresql+psycopg://user@host:5432/database; the password "
            "goes after the user, percent-encoded, and not into a parameter"
        )
    return secret


class StoreSettings(_Section):
    """Settings of the store, which contains desired versions, keys, the audit log, requests and feedback.

    By default, it is an SQLite database in the home. See docs/scale.md for PostgreSQL.
    """

    url: Annotated[SecretStr, AfterValidator(_store_url)] | None = Field(
        None,
        description="URL of a PostgreSQL database, such as `postgresql+psycopg://user@host:5432/database`; "
        "default: SQLite, `svc.db` in `home`",
    )
    password_file: AbsolutePath | None = Field(
        None, description="file with the password for `store.url`, unless the URL contains it"
    )


def _artifacts_url(text: str) -> str:
    url = urlsplit(text)
    located = url.path.startswith("/") and not url.netloc if url.scheme == "file" else bool(url.netloc)
    if url.scheme not in ("s3", "gs", "az", "file") or not located or url.query or url.fragment or "@" in text:
        raise ValueError(
            "must be s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///path, without "
            "credentials, which are read from the environment"
        )
    return text.rstrip("/")


class ArtifactSettings(_Section):
    """Settings of the object store that several machines share for versions and clients' files. See docs/scale.md.

    Credentials are read from the environment, never from settings.
    """

    url: Annotated[str, AfterValidator(_artifacts_url)] | None = Field(
        None,
        description="object store for versions and clients' files: `s3://bucket/prefix`, "
        "`gs://bucket/prefix`, `az://container/prefix` or `file:///path`; default: they are stored only in `home`",
    )
    checkpoints: bool = Field(
        False,
        description="whether checkpoints are also uploaded, so that another machine can resume a training run",
    )
    cache_gb: float | None = Field(
        None,
        gt=0,
        description="size of the versions in `home`, in GB, above which weights that the object store also has are "
        "removed, least recently used first; also of those in `ray.folder` on each machine of a Ray cluster; "
        "default: unlimited",
    )


class ReplicaRange(_Section):
    """Minimum and maximum number of replicas if the number follows the load."""

    min: int = Field(1, ge=1, le=64)
    max: int = Field(ge=1, le=64)
    remove_after_s: float = Field(900.0, ge=30)
    """Time for which fewer replicas must have been enough before one is removed, in seconds."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, which is more than max, {self.max}")
        return self


class RaySettings(_Section):
    """Settings of the Ray cluster that `svc train --on ray` and engines with `engine.launcher: ray` use. See
    docs/ray.md.
    """

    address: str | None = Field(
        None,
        description="address of the cluster, such as `head:6379` or `ray://head:10001`; default: the environment "
        "variable RAY_ADDRESS",
    )
    gpu_type: str | None = Field(
        None, description="type of the GPUs to use, as Ray names it, such as `H100`; default: any"
    )
    cpus: int = Field(
        1, ge=1, description="CPU cores to reserve for each training worker, and for each engine without GPUs"
    )
    folder: AbsolutePath = Field(
        Path("~/.cache/tuneserve/ray"),
        validate_default=True,
        description="folder on each node for base models, checkpoints of unfinished training runs, and served versions",
    )
    wait_s: float = Field(
        10.0,
        gt=0,
        description="maximum wait for free resources before a training run or an engine starts, in seconds; set it "
        "higher if the cluster adds nodes on demand",
    )


class EngineSettings(_Section):
    """Settings for launching vLLM. Defaults for unset values depend on the machine and model;
    `svc status --verbose` shows them with their reasons.

    `args` passes further arguments to vLLM and overrides everything else.
    """

    launcher: Launcher = Field(
        Launcher.LOCAL, description="local: engines run on this machine; ray: on machines of the cluster `ray.address`"
    )
    device: Device = Field(
        Device.AUTO, description="cpu, cuda, or auto, which selects the device that the installed vLLM is built for"
    )
    max_model_len: int = Field(2048, ge=16, description="maximum context length in tokens; at most the model's own")
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="size of the key-value cache on the CPU, in GiB; default: as needed, up to half of the free memory",
    )
    gpu_memory_share: float | None = Field(
        None, gt=0, le=1, description="share of the GPU's memory; default: 0.9, or less if other processes use the GPU"
    )
    tensor_parallel: int | None = Field(
        None,
        ge=1,
        description="number of GPUs that share each layer; default: as many as divide the model's heads evenly",
    )
    gptq_kernel: GptqKernel = Field(
        GptqKernel.AUTO,
        description="vllm, torch (on any CPU), or auto, which selects the faster kernel on this device",
    )
    max_concurrency: int = Field(64, ge=1, description="maximum number of sequences decoded concurrently")
    cores: int | None = Field(
        None,
        ge=1,
        description="CPU cores per engine; default: this process's cores, divided by the number of engines that run "
        "when it starts",
    )
    replicas: Annotated[int, Field(ge=1, le=64)] | ReplicaRange = Field(
        1,
        description="number of engines per model, or `{min: 1, max: 8}` for a number that follows the load; with "
        "`remove_after_s: 300`, one is removed after five minutes of low load instead of 15",
    )
    start_timeout_s: float = Field(600.0, gt=0, description="maximum startup time of an engine, in seconds")
    args: tuple[str, ...] = Field((), description="additional arguments for vLLM's server, passed unchanged")
    environment: tuple[str, ...] = Field(
        (),
        description="environment variables to pass to vLLM, in addition to those that its libraries read; all others "
        "are withheld",
    )

    @property
    def replica_range(self) -> ReplicaRange:
        """Minimum and maximum number of replicas, which are equal if the number is fixed."""
        fixed = self.replicas
        return fixed if isinstance(fixed, ReplicaRange) else ReplicaRange(min=fixed, max=fixed)


class AdapterSettings(_Section):
    """Settings for engines that serve versions as adapters of a shared base: `svc serve NAME --format adapter`."""

    max_loaded: int = Field(
        8,
        ge=1,
        le=10_000,
        description="maximum number of loaded adapters per engine; the least recently used adapter is unloaded first",
    )
    max_rank: int | None = Field(
        None,
        ge=1,
        le=512,
        description="maximum adapter rank; default: the rank of the version that the engine starts with, at least 16",
    )


class ServeSettings(_Section):
    """The gateway's address and limits. Every resource that a client could exhaust has a limit."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="host names that clients may use for this server in addition to localhost and IP addresses; `*` "
        "means any",
    )
    tls_certificate: AbsolutePath | None = Field(
        None, description="PEM file with the certificate and its chain; reloaded when it changes"
    )
    tls_key: AbsolutePath | None = Field(None, description="PEM file with the certificate's unencrypted private key")
    behind_proxy: tuple[Network, ...] = Field(
        (),
        description="addresses or networks of the proxies that terminate TLS in front of this server; their "
        "`X-Forwarded-For` and `X-Forwarded-Proto` are trusted",
    )
    max_connections_per_address: int | None = Field(
        None,
        ge=1,
        description="maximum connections per address (IPv6: per /64); further connections are closed immediately; "
        "addresses in `serve.behind_proxy` are not limited; default: half of all connections",
    )
    max_body_bytes: int = Field(4 * 2**20, ge=1024, description="maximum size of a request body, in bytes")
    max_running: int = Field(
        256,
        ge=1,
        description="maximum concurrent requests per model; their answers together may have at most this many times "
        "`engine.max_model_len` tokens; further requests get status 429, or wait if they have a key",
    )
    max_queued: int = Field(
        256,
        ge=0,
        description="maximum number of requests queued during a swap or for a free slot; further requests get status "
        "503 or 429; the same number may wait for adapters, at most half of them from one key or address",
    )
    queue_timeout_s: float = Field(60.0, gt=0, description="maximum time in the queue, in seconds")
    drain_timeout_s: float = Field(
        30.0,
        gt=0,
        description="maximum wait for running requests before a reload, in seconds; after that, the swap is blue-green",
    )
    drain_s: float = Field(
        0.0,
        ge=0,
        description="time after a stop signal during which requests are still accepted while `/health` answers 503, so "
        "that a load balancer stops sending them, in seconds",
    )
    swap: SwapChoice = Field(
        SwapChoice.AUTO,
        description="auto swaps in place if the versions are compatible; bluegreen always starts a second engine",
    )
    idle_s: float | None = Field(
        None,
        gt=0,
        description="idle time in seconds after which a model's engines are stopped or, on a GPU, put to sleep; "
        "the next request waits until they are ready again; default: never",
    )
    request_timeout_s: float = Field(600.0, gt=0, description="maximum time without engine output, in seconds")

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key must be set together")
        return self


class RequestLimits(_Section):
    """Limits on the structure of a request. A request over any limit is rejected with status 400 and never
    reaches an engine.
    """

    reading_ms: float = Field(
        20.0,
        gt=0,
        description="maximum time in ms for which parsing a body may block the gateway, estimated from the body's size",
    )
    messages: int = Field(4096, ge=1, description="maximum number of messages")
    input_items: int = Field(
        2048, ge=1, description="maximum number of elements in `input`, the messages of /v1/responses"
    )
    content_parts: int = Field(
        8192, ge=1, description="maximum number of content parts and tool calls in all messages together"
    )
    tools: int = Field(512, ge=1, description="maximum number of tools")
    field_values: int = Field(
        4096,
        ge=1,
        description="maximum number of values at all depths of any other field, such as logit_bias or metadata",
    )
    depth: int = Field(64, ge=1, le=500, description="maximum nesting depth of objects and arrays")


def _pattern(text: str) -> str:
    import regex

    from svc.redaction import compile_pattern

    try:
        compile_pattern(text)
    except regex.error as error:
        raise ValueError(f"not a valid regular expression: {error}") from error
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]


class RequestLogSettings(_Section):
    """Settings of the request log, which stores metrics of every request, drift features for many requests, and prompts
    and answers for a sample.
    """

    max_age_days: float = Field(
        30.0, gt=0, le=36_500, description="age in days at which a request and its feedback are deleted"
    )
    max_mib: int = Field(1024, ge=1, description="size of the log in MiB above which the oldest requests are deleted")
    content_share: float = Field(0.0, ge=0, le=1, description="share of requests whose prompt and answer are stored")
    features: bool = Field(
        True, description="store drift features of at most 10,000 prompts per day and version, without their text"
    )
    max_content_kib: int = Field(
        64,
        ge=1,
        description="maximum size of a stored prompt or answer, in KiB; if either is larger, neither is stored",
    )
    redact: tuple[Pattern, ...] = Field(
        (),
        description="regular expressions to redact in content, in addition to email addresses, phone and card numbers; "
        "content on which they take longer than 0.25 s is not stored, so avoid nested repetitions",
    )


def _otlp_endpoint(text: str) -> str:
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        raise ValueError("must be the URL of a collector, such as http://collector:4318")
    if "@" in url.netloc:
        raise ValueError(
            "the URL must not contain a password, which anyone who sees the settings could read; use headers instead, "
            "see docs/traces.md"
        )
    return text


class TelemetrySettings(_Section):
    """Settings for OpenTelemetry tracing of requests, sent to a collector, Langfuse, Phoenix or another
    backend.
    """

    otlp_endpoint: Annotated[str, AfterValidator(_otlp_endpoint)] | None = Field(
        None,
        description="URL to which spans are exported by OTLP over HTTP; `/v1/traces` is appended if missing; "
        "headers are read from OTEL_EXPORTER_OTLP_HEADERS; default: no traces",
    )
    sample_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of requests that are traced; the decision in a client's `traceparent` takes precedence",
    )


class HoldoutSettings(_Section):
    """Settings for requests that the server itself sends for monitoring. They have a lower priority than
    clients' requests.

    The served version answers its held-out set after each start and swap, and then periodically. Client
    answers whose content is stored are scored by their likelihood under the version.
    """

    every_hours: float = Field(6.0, ge=0, description="interval between held-out runs, in hours; 0 disables these runs")
    requests_per_minute: float = Field(
        60.0, gt=0, description="maximum number of held-out examples plus scored answers per minute"
    )
    scored_per_hour: int = Field(
        200, ge=0, description="maximum number of live answers scored per hour, newest first; 0 disables scoring"
    )
    run_functions: bool = Field(
        False,
        description="whether to run a version's metric function, which is code from the user who registered it; if "
        "not, such a version is monitored by exact match",
    )


class MonitorSettings(_Section):
    """Settings of `svc monitor`, which runs the metrics exporter as a separate process."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(9464, ge=0, le=65535, description="port to listen on")
    server: str = Field("", description="URL of the server to monitor; default: the server of this home")
    key_file: AbsolutePath | None = Field(
        None, description="file that contains a metrics key for `monitor.server`; not needed on the same machine"
    )
    authority: AbsolutePath | None = Field(
        None, description="file with the CA certificates used to verify `monitor.server`; default: those of the machine"
    )
    drift_every_s: float = Field(
        60.0,
        ge=0,
        le=300,
        description="interval between drift checks, in seconds; 0 disables them in `svc monitor`",
    )


class AtDeadline(StrEnum):
    """What a rollout does when a step reaches its deadline without a decision."""

    HOLD = "hold"
    ROLLBACK = "rollback"


class UnitKind(StrEnum):
    """The unit of traffic that a canary assigns to one version and counts as one observation."""

    AUTO = "auto"
    """Assign by the request's `user`, or else its conversation, or else the request itself."""
    REQUEST = "request"


class RolloutSettings(_Section):
    """Steps and limits of a gradual promotion, for example `svc promote NAME@N --shadow 200 --canary 5,25,100`.

    A margin is the largest acceptable loss of the candidate compared with production over the same period.
    """

    shadow: int = Field(
        0, ge=0, le=100_000, description="number of copied requests that the candidate answers first; 0: none"
    )
    canary: tuple[float, ...] = Field(
        (), max_length=20, description="shares of clients that the candidate serves, in percent, ending with 100"
    )
    min_units: int = Field(
        50, ge=1, description="minimum number of users or conversations that the candidate serves in each canary step"
    )
    max_step_s: float = Field(86_400.0, gt=0, description="deadline of each step, seconds")
    at_deadline: AtDeadline = Field(
        AtDeadline.ROLLBACK, description="rollback, or hold: stay at the step until it is decided or someone decides"
    )
    unit: UnitKind = Field(
        UnitKind.AUTO, description="auto: `user`, else conversation, else request; request: every request by itself"
    )
    max_errors: float = Field(0.01, gt=0, lt=1, description="margin for the share of failed requests")
    max_invalid: float = Field(0.01, gt=0, lt=1, description="margin for the share of answers that are not valid JSON")
    max_slowdown: float = Field(
        1.2, gt=1, description="margin for the time to the first token: 1.2 is 20 % slower than production"
    )
    max_negative: float = Field(0.05, gt=0, lt=1, description="margin for the share of negative feedback")

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        steps = self.canary
        if steps and (list(steps) != sorted(set(steps)) or steps[0] <= 0 or steps[-1] != 100):
            raise ValueError(
                "canary steps must be increasing percentages above 0 that end with 100, for example 5,25,100"
            )
        return self

    @property
    def is_gradual(self) -> bool:
        """Whether the promotion has at least one step before the switch."""
        return bool(self.shadow or self.canary)


class UndecidedGates(StrEnum):
    """What a promotion does when a gate is undecided."""

    ALLOW = "allow"
    REFUSE = "refuse"


class _CustomGate(_Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$", description="name of the gate")


class _RunGate(_CustomGate):
    timeout_s: float = Field(60.0, gt=0, le=600, description="maximum duration, seconds; then the gate has failed")


class CommandGate(_RunGate):
    """A gate that runs a command without a shell: exit code 0 passes, 1 fails."""

    command: tuple[str, ...] = Field(min_length=1, description="program and arguments")


class EntryPointGate(_RunGate):
    """A gate that calls a Python function in a separate process."""

    entry_point: str = Field(pattern=r"^\w+(\.\w+)*:\w+$", description="module:function")


class ResultFileGate(_CustomGate):
    """A gate that reads results exported by Promptfoo or OpenAI Evals."""

    result_file: AbsolutePath = Field(description="exported file; {version} in its path stands for NAME@N")
    min_pass_share: float = Field(ge=0, le=1, description="minimum share of passed tests")


_GATE_KINDS: dict[str, type[_CustomGate]] = {
    "command": CommandGate,
    "entry_point": EntryPointGate,
    "result_file": ResultFileGate,
}


def _gate_kind(value: Any) -> str | None:
    if isinstance(value, dict):
        return next((kind for kind in _GATE_KINDS if kind in value), None)
    return next((kind for kind, model in _GATE_KINDS.items() if isinstance(value, model)), None)


CustomGate = Annotated[
    Annotated[CommandGate, Tag("command")]
    | Annotated[EntryPointGate, Tag("entry_point")]
    | Annotated[ResultFileGate, Tag("result_file")],
    Discriminator(
        _gate_kind,
        custom_error_type="gate_kind",
        custom_error_message="a gate must have one of the keys command, entry_point and result_file",
    ),
]


class GateSettings(_Section):
    """Gates that a version must pass before it is promoted.

    A margin is the largest acceptable loss compared with the version in production. Without a margin, the loss is
    only shown.
    """

    quality_margin: float | None = Field(
        0.02,
        ge=0,
        description="margin for the primary metric on the same held-out examples; for a metric that is not a share, "
        "relative to production's value",
    )
    nll_margin: float | None = Field(
        0.05, ge=0, description="margin for the NLL of the held-out references, relative to production's NLL"
    )
    forgetting_margin: float | None = Field(
        None, ge=0, le=1, description="margin for the share of correct answers to general questions lost by training"
    )
    speed_margin: float | None = Field(
        0.2, ge=0, description="margin for tokens per second and time to first token: 0.2 is 20 % slower"
    )
    max_age_days: float | None = Field(
        None, gt=0, description="maximum age of the training data, and of the version and its evaluation, in days"
    )
    undecided: UndecidedGates = Field(
        UndecidedGates.ALLOW,
        description="allow: promote with a warning if a gate is undecided; refuse: treat it as failed",
    )
    custom: tuple[CustomGate, ...] = Field((), max_length=50, description="additional gates, see docs/rollouts.md")

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [gate.name for gate in self.custom]
        if len(set(names)) < len(names):
            raise ValueError("custom gates must have different names")
        return self


def _webhook_url(text: str) -> str:
    url = urlsplit(text)
    host = url.hostname or ""
    if url.scheme not in ("http", "https") or not host or url.fragment or "@" in url.netloc or url.port == 0:
        raise ValueError("the value is not the URL of a webhook, such as https://host/path")
    if url.scheme == "http" and host != "localhost" and not _is_loopback_address(host):
        raise ValueError("the messages would cross the network in plain text; use https")
    return text


def _is_loopback_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class WebhookSettings(_Section):
    """Settings of a webhook that is notified about rollouts."""

    url: Annotated[str, AfterValidator(_webhook_url)] = Field(
        description="URL to which the messages are posted; https, or http on this machine"
    )
    secret_file: AbsolutePath = Field(
        description="file with the secrets that sign the messages, `whsec_` and base64; readable by its owner only"
    )


def _base(text: str) -> str:
    """Resolve the path of a base against the working folder. Other kinds of bases are returned unchanged."""
    is_path = text.startswith((".", "/", "~")) or text.endswith(".gguf")
    return str(_absolute(Path(text))) if is_path else text


_CLIENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
"""Names of bases for clients. A colon would make the names of trained models, `ft:BASE:...`, ambiguous."""


class TrainingPlace(StrEnum):
    """Where jobs of the fine-tuning API are trained."""

    HERE = "here"
    RAY = "ray"


class FineTuningSettings(_Section):
    """Settings of OpenAI's fine-tuning API. See docs/fine-tuning-api.md."""

    bases: dict[str, Annotated[str, Field(min_length=1), AfterValidator(_base)]] = Field(
        {},
        description="bases that clients may fine-tune, keyed by the name that clients use; each is a base as in a "
        "recipe; for "
        "example `{gpt-4o-mini-2024-07-18: ./models/SmolLM2-135M-Instruct}`; default: none, and the API is off",
    )
    organization: str = Field(
        "tuneserve",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
        description="name of the organization in jobs and in the names of trained models, `ft:BASE:ORGANIZATION:...`",
    )
    idle_s: float = Field(
        600,
        gt=0,
        description="time without requests after which a model that was loaded for a client's request is stopped, in "
        "seconds",
    )
    max_age_days: float = Field(
        90.0,
        gt=0,
        le=36_500,
        description="days to keep a finished job and its events; a job is kept longer while its model or a "
        "checkpoint is registered",
    )
    max_jobs: int = Field(50, ge=1, description="maximum number of unfinished jobs per key")
    worker: bool = Field(
        True, description="whether this server runs jobs; if not, another server that uses the same store must"
    )
    place: TrainingPlace = Field(
        TrainingPlace.HERE,
        description="where jobs are trained; here: on the server's machine; ray: on the cluster `ray.address`, as with "
        "`svc train --on ray`; the server's machine only registers the version",
    )
    wandb: bool = Field(
        False,
        description="whether jobs may report to Weights & Biases, with the API key in this server's environment",
    )

    @field_validator("bases")
    @classmethod
    def _check_names(cls, bases: dict[str, str]) -> dict[str, str]:
        for name in bases:
            if not _CLIENT_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a valid name; use letters, digits and . _ - / only")
        return bases


class BatchSettings(_Section):
    """Settings of OpenAI's Batch API. See docs/batches-api.md."""

    max_age_days: float = Field(
        90.0, gt=0, le=36_500, description="days to keep a finished batch; its files are not deleted"
    )
    max_open: int = Field(20, ge=1, description="maximum number of unfinished batches per key")
    concurrency: int = Field(
        16,
        ge=1,
        le=1024,
        description="maximum number of batch requests that a model answers concurrently; fewer run while other clients "
        "need the capacity",
    )


class FilesSettings(_Section):
    """Limits of the files that clients upload. See docs/files-api.md."""

    max_mb: int = Field(
        512, ge=1, description="maximum size of a file that is uploaded in one request, in MB of 2^20 bytes"
    )
    max_upload_gb: float = Field(
        8.0, gt=0, description="maximum size of a file that is uploaded in parts, in GB of 2^30 bytes"
    )
    max_total_gb: float = Field(
        100.0, gt=0, description="maximum total size of a key's files, in GB of 2^30 bytes, including results"
    )
    max_files: int = Field(10_000, ge=1, description="maximum number of files per key, including results")
    min_free_gb: float = Field(
        1.0, ge=0, description="free disk space below which uploads are refused, in GB of 2^30 bytes"
    )

    @property
    def max_bytes(self) -> int:
        """Maximum size of a file that is uploaded in one request, in bytes."""
        return self.max_mb * 2**20

    @property
    def max_upload_bytes(self) -> int:
        """Maximum size of a file that is uploaded in parts, in bytes."""
        return int(self.max_upload_gb * 2**30)


class ModelSettings(_Section):
    """Settings of one served model that override the general settings."""

    engine: EngineSettings = Field(EngineSettings(), description="`engine` settings that differ for this model")
    idle_s: float | None = Field(None, gt=0, description="overrides `serve.idle_s`, in seconds")
    rollout: RolloutSettings = Field(
        RolloutSettings(), description="steps of every promotion of this model, see docs/rollouts.md"
    )
    gates: GateSettings = Field(
        GateSettings(), description="gates of every promotion of this model, see docs/rollouts.md"
    )


class Settings(BaseSettings):
    """All settings. The `home` folder contains all state except the cache of base models."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,  # it may contain the password of `store.url`
    )

    home: AbsolutePath = Field(Path(".svc"), validate_default=True, description="folder for all state")
    base_cache: AbsolutePath = Field(
        Path("~/.cache/tuneserve/base"), validate_default=True, description="folder for downloaded base models"
    )
    tracking_uri: str = Field("", description="URL of the MLflow tracking server; default: a database in `home`")
    store: StoreSettings = StoreSettings()
    artifacts: ArtifactSettings = ArtifactSettings()
    ray: RaySettings = RaySettings()
    engine: EngineSettings = EngineSettings()
    adapters: AdapterSettings = AdapterSettings()
    serve: ServeSettings = ServeSettings()
    request_limits: RequestLimits = RequestLimits()
    request_log: RequestLogSettings = RequestLogSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    holdout: HoldoutSettings = HoldoutSettings()
    monitor: MonitorSettings = MonitorSettings()
    fine_tuning: FineTuningSettings = FineTuningSettings()
    batches: BatchSettings = BatchSettings()
    files: FilesSettings = FilesSettings()
    webhooks: tuple[WebhookSettings, ...] = Field(
        (),
        max_length=20,
        description="receivers of messages about rollouts, each `{url: ..., secret_file: ...}`, see docs/rollouts.md",
    )
    models: dict[str, ModelSettings] = Field(
        {},
        description="settings that differ for one model, by model name: `{engine: {...}, idle_s: ..., rollout: {...}, "
        "gates: {...}}`",
    )

    @field_validator("webhooks")
    @classmethod
    def _check_webhooks(cls, webhooks: tuple[WebhookSettings, ...]) -> tuple[WebhookSettings, ...]:
        if len({each.url for each in webhooks}) < len(webhooks):
            raise ValueError("two webhooks have the same URL")
        return webhooks

    def idle_s_of(self, name: str) -> float | None:
        """Return the number of idle seconds after which a model's engines sleep or stop, or None if they never do."""
        own = self.models[name].idle_s if name in self.models else None
        return own or self.serve.idle_s

    def model_settings(self, name: str) -> ModelSettings:
        """Return a model's own settings, or the defaults if it has none."""
        return self.models.get(name, ModelSettings())

    def engine_for(self, name: str) -> EngineSettings:
        """Return a model's engine settings: the `engine` section, overridden by the model's section in `models`."""
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
        """Accept only values passed as arguments. `load_settings` merges the sources itself, so that flags override
        the environment.
        """
        return (init_settings,)


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """Load the settings from all sources.

    Args:
        config: a YAML file; defaults to `svc.yaml` in the working directory, if it exists.
        flags: values from the command line, as `section={key: value}` or `key=value`; `None` means not
            given.

    Raises:
        SettingsError: a key is unknown, a value is invalid, or the file cannot be read.
    """
    _check_environment()
    try:
        given = {key: value for key, value in flags.items() if value is not None}
        return Settings(**_merge(_merge(_read_file(config), _read_environment()), given))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        is_secret = first["loc"][:1] in (("store",), ("artifacts",))
        shown = "invalid" if is_secret else _PASSWORD.sub("//***@", repr(first["input"]))
        raise SettingsError(
            f"setting {key!r} is {shown}: {first['msg']}",
            todo="see docs/configuration.md for every setting and its type",
        ) from error


def _read_file(config: Path | None) -> dict[str, Any]:
    path = config or DEFAULT_FILE
    if config is None and not path.is_file():
        return {}
    try:
        content = parse_yaml(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"cannot read settings from {path}: {error}", expected="a YAML file encoded in UTF-8"
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must contain a YAML mapping of settings, got {type(content).__name__}")
    for key in content:
        if not isinstance(key, str):
            raise SettingsError(f"{path} has a key that is not a string: {key!r}", expected="setting names as keys")
    return content


def _read_environment() -> dict[str, Any]:
    try:
        return EnvSettingsSource(Settings)()
    except SourceError as error:
        raise SettingsError(
            f"cannot read the environment variables: {error}: {error.__cause__}",
            expected='JSON for a list or a section, for example SVC_ENGINE__ARGS=\'["--seed", "1"]\'',
        ) from error


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def setting_keys() -> list[str]:
    """Return every configurable key, as `section.key`."""
    return dotted_keys(Settings)


def environment_without_store() -> dict[str, str]:
    """Return this process's environment without the URL of the store, for child processes that do not need its
    password.
    """
    secret = (_variable("store"), _variable("store.url"))
    return {name: value for name, value in os.environ.items() if name.upper() not in secret}


def _check_environment() -> None:
    """Raise SettingsError if an unknown `SVC_*` variable is set, since pydantic-settings would ignore it."""
    known = {_variable(key) for key in [*setting_keys(), *Settings.model_fields]}
    for name in os.environ:
        if name.startswith(ENV_PREFIX) and name.upper() not in known:
            raise SettingsError(
                f"the environment variable {name} does not match any setting",
                expected=f"one of {', '.join(sorted(known))}",
                todo=f"unset {name} or correct its name",
            )


def _variable(key: str) -> str:
    return ENV_PREFIX + key.upper().replace(".", "__")
