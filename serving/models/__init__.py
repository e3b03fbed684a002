"""The served models: their deployments, the router from names to versions, and fine-tuned models."""
