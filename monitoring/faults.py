"""Which failed requests are faults of the server: those that dashboards, alerts and `svc status` count as errors.

What a client did wrong (400, 404, 413, a connection that it closed) says nothing of a server or of a version. The
alert rules (deploy/prometheus/rules) and the dashboards repeat the pattern; docs/metrics.md has the reasons one by one.
"""

import re
from typing import Final

SERVER_FAULTS: Final = "overloaded|queue_.*|engine_.*|internal_error"
"""A pattern of the `reason` in `svc_request_errors_total`; the whole word matches, as in Prometheus."""


def is_fault(reason: str) -> bool:
    """Whether a request that failed so is a fault of the server."""
    return re.fullmatch(SERVER_FAULTS, reason) is not None
