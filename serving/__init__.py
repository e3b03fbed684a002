"""The HTTP door: an OpenAI-compatible gateway in front of one engine, and the swap of versions behind it."""
