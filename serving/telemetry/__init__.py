"""Metrics, quantiles and traces of requests, plus the request log."""
