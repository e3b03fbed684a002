"""The engines behind a model name: connections to them, supervision, verification at every load, and pooling."""
