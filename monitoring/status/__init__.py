"""`svc status`: the state and figures of a running server, as values and on a screen."""
