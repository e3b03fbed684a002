"""Contents of clients' files: what they upload, and results that the server writes for them."""
