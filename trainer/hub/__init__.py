"""Publishes versions on the Hugging Face Hub."""
