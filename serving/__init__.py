"""An OpenAI-compatible gateway in front of vLLM engines, with swaps of their versions."""
