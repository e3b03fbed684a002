"""Contents of clients' files: those that clients upload, and results that the server writes for them."""
