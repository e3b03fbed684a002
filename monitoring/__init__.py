"""Monitoring for versions in production: status, metrics, held-out quality and drift."""
