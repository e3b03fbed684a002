"""Wakes waiting parts of the server when the store changes, also when another process changed it."""
