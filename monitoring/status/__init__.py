"""`svc status`: what a running server says of itself, as figures and on a screen."""
