"""Publishing of versions on the Hugging Face Hub."""
