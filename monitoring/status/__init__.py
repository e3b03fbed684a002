"""The `svc status` command: reads the state and figures of a running server, and displays them on a screen."""
