"""Request traces with OpenTelemetry. Only `request_trace` does not load the SDK; import others if traces are on."""
