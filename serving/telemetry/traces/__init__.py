"""Request traces with OpenTelemetry. `request_trace` does not load the SDK; import the others only if traces are on."""
