"""Who may run in the engine, who waits, who is sent away, and the server's own request beside them."""
