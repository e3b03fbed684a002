"""One vLLM server process: its configuration, start and client, and our changes to vLLM (plugin.py)."""
