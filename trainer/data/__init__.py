"""Prepares examples for training as token ids in packed rows, and determines their order."""
