"""Request tracing with OpenTelemetry.

`request_trace` does not load the SDK. Import the other modules only if tracing is enabled.
"""
