"""Manage the engines behind a model name: connect to them, supervise them, verify every load and pool them."""
