"""Decides which requests run in the engine, wait or are rejected, and when the server's own request may run."""
