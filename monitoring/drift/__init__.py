"""Drift detection: compares live traffic with the examples that a version was trained on."""
