"""The server's own requests to its engines, behind those of clients."""
