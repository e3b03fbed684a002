"""Diagnoses a training run from its measurements: finds faults and explains them."""
