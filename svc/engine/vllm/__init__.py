"""Configures, starts and talks to a vLLM server process, and changes vLLM where necessary (plugin.py)."""
