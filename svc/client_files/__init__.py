"""Contents of clients' files, which clients upload or the server writes as results."""
