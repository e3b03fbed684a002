"""Traces of requests by OpenTelemetry. All but `request_trace` load its SDK: to be imported where traces are on."""
