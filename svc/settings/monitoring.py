"""Settings of the request log, telemetry, held-out checks and the monitor."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from svc.settings.section import AbsolutePath, Section


def _pattern(text: str) -> str:
    import regex

    from svc.redaction import compile_pattern

    try:
        compile_pattern(text)
    except regex.error as error:
        raise ValueError(f"not a valid regular expression: {error}") from error
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]


class RequestLogSettings(Section):
    """Settings of the request log, which stores metrics of every request, drift features for many requests, and prompts
    and answers for a sample.
    """

    max_age_days: float = Field(30.0, gt=0, le=36_500)
    """Age in days at which a request and its feedback are deleted."""
    max_mib: int = Field(1024, ge=1)
    """Size of the log in MiB above which the oldest requests are deleted."""
    content_share: float = Field(0.0, ge=0, le=1)
    """Share of requests whose prompt and answer are stored."""
    features: bool = True
    """Whether to store drift features (without text) of at most 10,000 prompts per day and version."""
    max_content_kib: int = Field(64, ge=1)
    """Maximum size of a stored prompt or answer, in KiB; if either is larger, neither is stored."""
    redact: tuple[Pattern, ...] = ()
    """Regular expressions to redact in content, in addition to email addresses, phone numbers and card numbers; content
    on which they take longer than 0.25 s is not stored, so avoid nested repetitions."""


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


class TelemetrySettings(Section):
    """Settings for tracing requests with OpenTelemetry. Traces are sent to a collector, Langfuse, Phoenix or another
    backend.
    """

    otlp_endpoint: Annotated[str, AfterValidator(_otlp_endpoint)] | None = None
    """URL to which spans are exported by OTLP over HTTP; `/v1/traces` is appended if missing; headers are read from
    OTEL_EXPORTER_OTLP_HEADERS; default: no traces."""
    sample_share: float = Field(1.0, ge=0, le=1)
    """Share of requests that are traced; the decision in a client's `traceparent` takes precedence."""


class HoldoutSettings(Section):
    """Settings for requests that the server itself sends for monitoring. They have a lower priority than
    clients' requests.

    The served version answers its held-out set after each start and swap, and then periodically. Answers to clients are
    scored by their likelihood under the version, if their content is stored.
    """

    every_hours: float = Field(6.0, ge=0)
    """Hours between held-out evaluations; 0 disables them."""
    requests_per_minute: float = Field(60.0, gt=0)
    """Maximum number of requests per minute for evaluating held-out examples and scoring live answers."""
    scored_per_hour: int = Field(200, ge=0)
    """Maximum number of live answers scored per hour, newest first; 0 disables scoring."""
    run_functions: bool = False
    """Whether to run a version's metric function, which is code from the user who registered the version; if not, such
    a version is monitored by exact match."""


class MonitorSettings(Section):
    """Settings of `svc monitor`, which runs the metrics exporter as a separate process."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(9464, ge=0, le=65535)
    """Port to listen on."""
    server: str = ""
    """URL of the server to monitor; default: the server that uses this home folder."""
    key_file: AbsolutePath | None = None
    """File with an API key of scope `metrics`; used only if `monitor.server` is set."""
    authority: AbsolutePath | None = None
    """File with the CA certificates used to verify `monitor.server`; default: the system's certificates."""
    drift_every_s: float = Field(60.0, ge=0, le=300)
    """Interval between drift checks, in seconds; 0 disables them in `svc monitor`."""
