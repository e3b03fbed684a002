"""The engines behind a model name: the way to them, each kept alive, verified at every load, and pooled."""
