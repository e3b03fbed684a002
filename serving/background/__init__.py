"""The server's own requests to its engines, which have a lower priority than those of clients."""
