"""An OpenAI-compatible gateway in front of vLLM engines that swaps versions without downtime."""
