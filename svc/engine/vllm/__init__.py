"""One vLLM server as a process: what is chosen for it, its start, its client; and what is added to it (plugin.py)."""
