"""Code shared by all packages: errors, settings, data, registry, engine, store, evaluation, command line.

This package knows nothing about training, the HTTP API or Prometheus, and does not import the packages
that implement them.
"""
