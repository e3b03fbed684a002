"""Builds the rows of a rollout's signals."""

from svc.store.rollouts import SignalRow

LOSS = SignalRow("invalid", "failed", production=0.0, candidate=0.3, low=0.1, high=0.5, margin=0.01, units=90)
