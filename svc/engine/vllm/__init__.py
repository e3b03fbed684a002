"""vLLM's side of an engine: what is added to it where it lacks something."""
