"""Brings the served versions to the desired ones: the reconciler, the four kinds of swap, and their journal."""
