"""Traces of requests by OpenTelemetry. Only `request_trace` does not load its SDK: import others if traces are on."""
