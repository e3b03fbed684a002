"""One vLLM server as a process: its configuration, start and client; and our changes to it (plugin.py)."""
