"""Batches of requests: a file of requests is answered with the capacity that no client needs, without a connection."""
