"""Metrics, quantiles and traces of requests, and the request log."""
