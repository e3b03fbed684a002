"""Diagnosis of a training run: finds faults in its measurements and explains them."""
