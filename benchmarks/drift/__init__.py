"""Drift detection on replayed prompts: streams without a change, and with one."""
