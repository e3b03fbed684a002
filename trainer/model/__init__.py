"""The trained model: loading, adapters and layers."""
