"""Manages the engines behind a model name: connects to them, pools and supervises them, and verifies every load."""
