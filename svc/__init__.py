"""What every package shares: errors, settings, data, registry, engine, store, evaluation, and the command line.

Knows nothing of training, of the HTTP surface or of Prometheus, and imports none of the packages above it.
"""
