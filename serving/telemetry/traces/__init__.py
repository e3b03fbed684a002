"""Request traces with OpenTelemetry. `request_trace` does not load the SDK; import other modules only if traces are on."""
