"""The engines behind a model name: connections, supervision, verification at every load, and pooling."""
