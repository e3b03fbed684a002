"""Shared by all packages: errors, settings, data, registry, engine, store, evaluation, and the command line.

It knows nothing of training, the HTTP API or Prometheus, and imports none of the packages above it.
"""
