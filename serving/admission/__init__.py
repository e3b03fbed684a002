"""Decide which requests run in the engine, are queued or are rejected, and when the server's own may run."""
