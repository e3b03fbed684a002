"""Contents of clients' files: those that clients upload, and the results that the server writes for them."""
