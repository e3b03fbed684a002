"""Decides which requests run in the engine, wait in a queue or are rejected.

The package also decides when the server's own requests may run.
"""
