"""The HTTP admission: an OpenAI-compatible gateway in front of one engine, and the swap of versions behind it."""
