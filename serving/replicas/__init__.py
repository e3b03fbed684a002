"""The engines behind a model name: connections, supervision, verification on every load, and pooling."""
