"""Sends spans to a receiver via OTLP over HTTP, using the SDK's own exporter.

Headers that contain secrets come from the standard environment variables, which the SDK reads itself. They
are checked here first, because the SDK would log the value of a malformed header.
"""

import logging
import os
import re
import time
from collections.abc import Callable
from urllib.parse import unquote

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_TRACES_HEADERS
from opentelemetry.sdk.trace.export import SpanExporter

from svc.errors import SettingsError

_LOGGER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_LOG_EVERY_S = 60.0
_PATH = "/v1/traces"
_HEADER = re.compile(r"[ \t]*[!#$%&'*+.^_`|~0-9A-Za-z-]+[ \t]*=([\x20!#-+\x2d-:<-\[\]-~]*)")
"""Pattern of a `name=value` header as the SDK parses it. The value should be percent-encoded; it must not contain
`"`, `,`, `;` or `\\`."""
_VALUE = re.compile(r"[\t -~]*")


class LogLimit(logging.Filter):
    """Logging filter that passes at most one record per minute, no matter how many batches a receiver rejects.

    Args:
        clock: function that returns monotonic time, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._next = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record should be logged."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + _LOG_EVERY_S
        return True


_LIMIT = LogLimit()


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Return the SDK's OTLP exporter for a receiver.

    Args:
        endpoint: the receiver's base URL, or its traces URL.

    Raises:
        SettingsError: an environment variable that holds headers is malformed.
    """
    for name in (OTEL_EXPORTER_OTLP_TRACES_HEADERS, OTEL_EXPORTER_OTLP_HEADERS):
        _check_headers(name, os.environ.get(name, ""))
    logging.getLogger(_LOGGER).addFilter(_LIMIT)
    return OTLPSpanExporter(traces_url(endpoint))


def traces_url(endpoint: str) -> str:
    """Return the traces URL for a receiver's base URL, derived as the OTLP standard specifies."""
    base = endpoint.rstrip("/")
    return base if base.endswith(_PATH) else base + _PATH


def _check_headers(variable: str, text: str) -> None:
    for number, header in enumerate(text.split(","), start=1):
        match = _HEADER.fullmatch(header)
        if header.strip() and not (match and _VALUE.fullmatch(unquote(match[1]).strip())):
            raise SettingsError(
                f"header {number} in {variable} is malformed",  # not shown, because it may be a secret
                expected="name=value pairs separated by commas, for example Authorization=Basic%20dXNlcjpwYXNz",
                todo="percent-encode all characters of the value that are not letters or digits",
            )
