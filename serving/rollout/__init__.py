"""Bring the served versions in line with the desired ones.

This package contains the reconciler, the four kinds of swap and the journal.
"""
