"""Benchmarks drift detection on replayed prompt streams, with and without a change."""
