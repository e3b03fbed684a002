"""`svc status`: the state and figures of a running server, as Python values and as a screen."""
