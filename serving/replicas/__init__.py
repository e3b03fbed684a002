"""Manages the engines behind a model name: connects to them, supervises them, verifies every load and pools them."""
