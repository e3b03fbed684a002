"""Model folders in Hugging Face hub format."""
