"""Diagnosis of a training run: finds what went wrong by looking at the run's measurements, and explains it."""
