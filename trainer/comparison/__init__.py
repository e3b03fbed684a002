"""`svc compare`: two models are asked the same examples, and their answers compared."""
