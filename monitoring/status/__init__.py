"""The `svc status` command: reads the state and statistics of a running server, and displays them on one screen."""
