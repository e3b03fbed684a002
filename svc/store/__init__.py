"""The SQL store: desired states, keys, and records of requests, swaps, drift and changes."""
