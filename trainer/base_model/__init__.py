"""Base models: their sources and their checks."""
