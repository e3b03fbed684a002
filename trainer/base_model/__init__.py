"""Where base models come from, and what is checked of them."""
