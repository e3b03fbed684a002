"""Optimizations that make training on a CPU fast enough. Imports torch."""
