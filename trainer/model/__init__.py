"""The trained model: its loading, its adapters and its layers."""
