"""Monitoring of versions in production: status, metrics, held-out quality and drift."""
