"""Settings of the gateway: its address, and its limits."""

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from svc.settings.section import AbsolutePath, Network, Section


class SwapChoice(StrEnum):
    """Method by which engines switch to another version of a model."""

    AUTO = "auto"
    BLUEGREEN = "bluegreen"


class ServeSettings(Section):
    """The gateway's address and limits. Every resource that a client could exhaust has a limit."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that clients may use for this server in addition to localhost and IP addresses; `*` means any."""
    tls_certificate: AbsolutePath | None = None
    """PEM file with the certificate and its chain; reloaded when it changes."""
    tls_key: AbsolutePath | None = None
    """PEM file with the certificate's unencrypted private key."""
    behind_proxy: tuple[Network, ...] = ()
    """Addresses or networks of the proxies that terminate TLS in front of this server; their `X-Forwarded-For` and
    `X-Forwarded-Proto` are trusted."""
    max_connections_per_address: int | None = Field(None, ge=1)
    """Maximum number of connections per address (IPv6: per /64); further connections are closed immediately; addresses
    in `serve.behind_proxy` are not limited; default: half of all connections."""
    max_body_bytes: int = Field(4 * 2**20, ge=1024)
    """Maximum size of a request body, in bytes."""
    max_running: int = Field(256, ge=1)
    """Maximum number of concurrent requests per model; further requests are queued if they have an API key, and get
    status 429 otherwise; the total length of all concurrent answers is limited too, to this number times
    `engine.max_model_len` tokens."""
    max_queued: int = Field(256, ge=0)
    """Maximum number of requests that are queued during a swap or while `serve.max_running` requests run; further
    requests get status 503 or 429; in addition, this number of requests may wait for adapters, at most half of them
    from one key or address."""
    queue_timeout_s: float = Field(60.0, gt=0)
    """Maximum time in the queue, in seconds."""
    drain_timeout_s: float = Field(30.0, gt=0)
    """Maximum time in seconds to wait for running requests before a reload; after that, the swap is blue-green."""
    drain_s: float = Field(0.0, ge=0)
    """Time in seconds after a stop signal during which requests are still accepted while `/health` responds with 503,
    so that a load balancer stops sending requests."""
    swap: SwapChoice = SwapChoice.AUTO
    """`auto` swaps in place if the versions are compatible; `bluegreen` always starts a second engine."""
    idle_s: float | None = Field(None, gt=0)
    """Idle time in seconds after which a model's engines are stopped or, on a GPU, put to sleep; the next request waits
    until they are ready again; default: never."""
    request_timeout_s: float = Field(600.0, gt=0)
    """Maximum time in seconds without output from the engine during a request."""

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key must be set together")
        return self


class RequestLimits(Section):
    """Limits on the structure of a request. A request over any limit is rejected with status 400 and never
    reaches an engine.
    """

    reading_ms: float = Field(20.0, gt=0)
    """Maximum time in ms for which parsing a body may block the gateway, estimated from the body's size."""
    messages: int = Field(4096, ge=1)
    """Maximum number of messages."""
    input_items: int = Field(2048, ge=1)
    """Maximum number of elements in the `input` list of a request to /v1/responses."""
    content_parts: int = Field(8192, ge=1)
    """Maximum number of content parts and tool calls in all messages together."""
    tools: int = Field(512, ge=1)
    """Maximum number of tools."""
    field_values: int = Field(4096, ge=1)
    """Maximum number of values, at all depths, in a field without its own limit, such as logit_bias or metadata."""
    depth: int = Field(64, ge=1, le=500)
    """Maximum nesting depth of objects and arrays."""
