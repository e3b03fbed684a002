"""Evaluates a model on examples, using the same endpoint that serves clients."""
