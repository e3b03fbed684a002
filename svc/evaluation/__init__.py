"""Sends examples to an endpoint and measures how good the answers are: on the same endpoint that serves clients."""
