"""The SQL store: desired states, API keys, and records of requests, swaps, drift and audited changes."""
