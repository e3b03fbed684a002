"""The server's own requests to its engines, which have lower priority than client requests."""
