"""Shared by all packages: errors, settings, data, registry, engine, store, evaluation, and the command line.

This package knows nothing of training, the HTTP API or Prometheus, and does not import the packages that have them.
"""
