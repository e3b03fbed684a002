"""Evaluates a model's answers to examples through the same endpoint that serves clients."""
