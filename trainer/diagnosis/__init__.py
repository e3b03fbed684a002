"""Diagnosis of a training from its numbers: the faults found, in words."""
