"""The server's own requests to its engines, with a lower priority than those of clients."""
