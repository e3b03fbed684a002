"""Imports recipes of other fine-tuning tools."""
