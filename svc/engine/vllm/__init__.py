"""Configures, starts and talks to a vLLM server process, and patches vLLM where necessary (plugin.py)."""
