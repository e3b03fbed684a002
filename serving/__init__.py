"""An OpenAI-compatible gateway in front of vLLM engines, and the swap of versions behind it."""
