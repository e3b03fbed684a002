"""What the engines do with the machine: vLLM's own metrics, the server's process, the disk.

`vllm:` names are those that vLLM exports without any option (vllm/v1/metrics/loggers.py).
"""

from typing import Final

from grafana_foundation_sdk.models.dashboard import Dashboard

from monitoring.dashboards.board import MODEL, NAME, SERVED_MODEL, VERSION, Uid, board
from monitoring.dashboards.panels import Limits, PanelBuilder, chart, number
from monitoring.dashboards.promql import Query, quantile, quantiles, rate, share, total

_BY: Final = ("model", "version")
_MEMORY: Final = Query("process_resident_memory_bytes", "resident")
_STARTED: Final = Query("process_start_time_seconds * 1000", "started")


def engine() -> Dashboard:
    """The dashboard."""
    return board(
        Uid.ENGINE,
        "What the engines do with the machine: queue, cache, tokens, latency by phase, process, disk.",
        [SERVED_MODEL],
        {"Load": _load(), "Latency by phase": _phases(), "Process": _process(), "Disk and records": _disk()},
    )


def _load() -> list[PanelBuilder]:
    hits = share(
        rate(f"vllm:prefix_cache_hits_total{MODEL}", *_BY), rate(f"vllm:prefix_cache_queries_total{MODEL}", *_BY)
    )
    finished = rate(f"vllm:request_success_total{MODEL}", "model", "finished_reason")
    return [
        chart(
            "Requests in the engine",
            "Requests that the engine works on, and those that wait for room in it.",
            "none",
            Query(total(f"vllm:num_requests_running{MODEL}", *_BY), f"{VERSION} running"),
            Query(total(f"vllm:num_requests_waiting{MODEL}", *_BY), f"{VERSION} waiting"),
        ),
        chart(
            "KV cache in use",
            "The part of the memory for running requests that is taken; at 100 % requests wait or start over.",
            "percentunit",
            Query(f"max by (model, version) (vllm:kv_cache_usage_perc{MODEL})", VERSION),
            limits=Limits(warning=0.8, bad=0.95),
        ),
        chart(
            "Prefix cache hits",
            "Prompt tokens that the engine knew already and did not compute again.",
            "percentunit",
            Query(hits, VERSION),
        ),
        chart(
            "Tokens",
            "Tokens a second: prompts that were read, answers that were written.",
            "none",
            Query(rate(f"vllm:prompt_tokens_total{MODEL}", *_BY), f"{VERSION} prompt"),
            Query(rate(f"vllm:generation_tokens_total{MODEL}", *_BY), f"{VERSION} answer"),
        ),
        chart(
            "Finished requests",
            "Answers a second by their end: stop is the model's own, length a limit, abort a client that left.",
            "reqps",
            Query(finished, f"{NAME} {{{{finished_reason}}}}"),
            stacked=True,
        ),
        chart(
            "Preemptions",
            "Requests a second that lost their place in the KV cache and start over.",
            "none",
            Query(rate(f"vllm:num_preemptions_total{MODEL}", *_BY), VERSION),
            limits=Limits(warning=0.1, bad=1),
        ),
    ]


def _phases() -> list[PanelBuilder]:
    phases = [
        ("Waiting", "From arrival in the engine to the first work on it.", "request_queue_time", Limits(1, 5)),
        (
            "Reading the prompt",
            "From the first work on a request to its first token.",
            "request_prefill_time",
            Limits(2, 10),
        ),
        ("Writing the answer", "From the first token to the last.", "request_decode_time", Limits(15, 60)),
        ("Time to first token", "From arrival in the engine to the first token.", "time_to_first_token", Limits(2, 10)),
        ("Time between tokens", "Between two tokens of one answer.", "inter_token_latency", Limits(0.25, 1)),
        ("Whole request", "From arrival in the engine to the last token.", "e2e_request_latency", Limits(15, 60)),
    ]
    return [
        chart(title, text, "s", *quantiles(f"vllm:{name}_seconds{MODEL}", _BY, VERSION), limits=limits)
        for title, text, name, limits in phases
    ]


def _process() -> list[PanelBuilder]:
    files = "process_open_fds / process_max_fds"
    return [
        chart("Memory", "Memory of the server's own process, without the engine's.", "bytes", _MEMORY, span=8),
        chart(
            "Processor",
            "Cores that the server's own process keeps busy, without the engine's.",
            "none",
            Query(rate("process_cpu_seconds_total"), "cores"),
            limits=Limits(warning=0.8, bad=1),
            span=8,
        ),
        chart(
            "Open files",
            "Open files and connections of the server's process, of those that it may open.",
            "percentunit",
            Query(files, "open"),
            limits=Limits(warning=0.7, bad=0.9),
            span=8,
        ),
        chart(
            "Time of a scrape",
            "How long the server takes to answer the exporter.",
            "s",
            Query("svc_server_scrape_duration_seconds", "scrape"),
            limits=Limits(warning=1, bad=5),
            span=8,
        ),
        chart(
            "Lag of the event loop",
            "How much later than asked the server wakes up a task: what every stream waits for beside its engine.",
            "s",
            *(Query(quantile(q, "svc_event_loop_lag_seconds"), f"p{q * 100:g}") for q in (0.5, 0.99, 0.999)),
            limits=Limits(warning=0.05, bad=0.25),
            span=8,
        ),
        chart(
            "Wrong keys",
            "Requests without a right key, a second, by what was wrong with it.",
            "reqps",
            Query(rate("svc_authentication_failures_total", "fault"), "{{fault}}"),
            stacked=True,
            span=8,
        ),
    ]


def _disk() -> list[PanelBuilder]:
    free = "svc_home_free_bytes / svc_home_size_bytes"
    dropped = total("svc_request_log_dropped_total", "reason")
    spans_dropped = total("svc_spans_dropped_total", "reason")
    return [
        number("Up since", "When the server started.", "dateTimeFromNow", _STARTED),
        number(
            "Disk free",
            "The free part of the disk that holds the home.",
            "percentunit",
            Query(free, "free"),
            limits=Limits(warning=0.2, bad=0.1),
        ),
        chart(
            "Disk of the home",
            "The disk that holds versions, records and logs.",
            "bytes",
            Query("svc_home_free_bytes", "free"),
            Query("svc_home_size_bytes", "size"),
        ),
        chart(
            "Records of requests",
            "Records a second that were stored, one for each request.",
            "none",
            Query(rate("svc_request_log_rows_total"), "stored"),
            span=4,
        ),
        chart(
            "Records dropped",
            "Records that were lost since the server started; with content_limit only their content was.",
            "none",
            Query(dropped, "{{reason}}"),
            limits=Limits(warning=1, bad=100),
            span=4,
        ),
        chart(
            "Spans sent",
            "Spans a second that the receiver of traces took; none where telemetry.otlp_endpoint is not set.",
            "none",
            Query(rate("svc_spans_total"), "sent"),
        ),
        chart(
            "Spans dropped",
            "Spans that were lost since the server started; with content_limit only their content was.",
            "none",
            Query(spans_dropped, "{{reason}}"),
            limits=Limits(warning=1, bad=100),
        ),
    ]
